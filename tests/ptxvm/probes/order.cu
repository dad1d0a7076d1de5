// Data passed between blocks. Each `exchange` is one barrier of the grid, right or wrong.
#include <cooperative_groups.h>

namespace {

__device__ void red_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ void red_relaxed(unsigned* p, unsigned v) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ unsigned load_relaxed(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ unsigned load_plain(const unsigned* p) {
  unsigned v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

// Each wait(count, target) returns once all blocks have added to *count `target` times together.
struct ReleaseAcquire {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      red_release(count, 1);
      while (load_acquire(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct FenceVolatile {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(count, 1u);
      while (*static_cast<volatile unsigned*>(count) < target) {
      }
      __threadfence();
    }
    __syncthreads();
  }
};
struct FenceRelaxed {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      fence();
      red_relaxed(count, 1);
      while (load_relaxed(count) < target) {
      }
      fence();
    }
    __syncthreads();
  }
};
struct AtomicPoll {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned v;
      asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                   : "=r"(v)
                   : "l"(count)
                   : "memory");
      do
        asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], 0;"
                     : "=r"(v)
                     : "l"(count)
                     : "memory");
      while (v < target);
    }
    __syncthreads();
  }
};
// Every thread waits for itself: no barrier of the block behind the spin.
struct EveryThreadWaits {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) red_release(count, 1);
    while (load_acquire(count) < target) {
    }
  }
};
// One warp waits, and hands on what it saw through a barrier of the block.
struct OtherThreadWaits {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) red_release(count, 1);
    if (threadIdx.x == 33)
      while (load_acquire(count) < target) {
      }
    __syncthreads();
  }
};
struct CooperativeGroups {
  static __device__ void wait(unsigned*, unsigned) { cooperative_groups::this_grid().sync(); }
};

struct NoRelease {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      red_relaxed(count, 1);
      while (load_acquire(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct NoAcquire {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      red_release(count, 1);
      while (load_relaxed(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct NoFenceAfterVolatile {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(count, 1u);
      while (*static_cast<volatile unsigned*>(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct NoFenceBeforeAtomic {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      atomicAdd(count, 1u);
      while (*static_cast<volatile unsigned*>(count) < target) {
      }
      __threadfence();
    }
    __syncthreads();
  }
};
struct FenceOfBlockScope {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      fence_block();
      red_relaxed(count, 1);
      while (load_relaxed(count) < target) {
      }
      fence_block();
    }
    __syncthreads();
  }
};
// The fence stands before the barrier of the block, so it covers its own thread's stores alone.
struct FenceTooEarly {
  static __device__ void wait(unsigned* count, unsigned target) {
    fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      red_relaxed(count, 1);
      while (load_acquire(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct AtomicOfBlockScope {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.cta.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
      while (load_acquire(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct PlainSpin {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      red_release(count, 1);
      while (load_plain(count) < target) {
      }
      fence();
    }
    __syncthreads();
  }
};
struct NoBarrierBefore {
  static __device__ void wait(unsigned* count, unsigned target) {
    if (threadIdx.x == 0) {
      red_release(count, 1);
      while (load_acquire(count) < target) {
      }
    }
    __syncthreads();
  }
};
struct NoBarrierBehind {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) {
      red_release(count, 1);
      while (load_acquire(count) < target) {
      }
    }
  }
};
struct OneTooFew {
  static __device__ void wait(unsigned* count, unsigned target) {
    ReleaseAcquire::wait(count, target - 1);
  }
};
struct Nothing {
  static __device__ void wait(unsigned*, unsigned) { __syncthreads(); }
};

}  // namespace

// A ring of n numbers through two buffers: x'[k] = x[k - 1] + x[k + 1], one barrier a step.
template <class Barrier>
__global__ void exchange(int* x, int* y, unsigned* count, int n, int steps) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  for (int s = 0; s < steps; ++s) {
    const int* from = s & 1 ? y : x;
    int* to = s & 1 ? x : y;
    if (k < n) to[k] = from[(k + n - 1) % n] + from[(k + 1) % n];
    Barrier::wait(count, gridDim.x * (s + 1));
  }
}
// The same with the barrier in two halves and one buffer: a step late, a reader meets a writer.
template <class Barrier>
__global__ void one_buffer(int* x, unsigned* count, int n, int steps) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  for (int s = 0; s < steps; ++s) {
    const int sum = x[(k + n - 1) % n] + x[(k + 1) % n];
    Barrier::wait(count, gridDim.x * (s + 1));
    x[k] = sum;
  }
}
template __global__ void one_buffer<ReleaseAcquire>(int*, unsigned*, int, int);

// Arrive, do other work, wait; the work's result is the block's own.
extern "C" __global__ void split_barrier(int* x, int* y, unsigned* count, int n, int steps) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  int own = 0;
  for (int s = 0; s < steps; ++s) {
    const int* from = s & 1 ? y : x;
    int* to = s & 1 ? x : y;
    to[k] = from[(k + n - 1) % n] + from[(k + 1) % n];
    __syncthreads();
    if (threadIdx.x == 0) red_release(count, 1);
    own += to[k];
    if (threadIdx.x == 0)
      while (load_acquire(count) < gridDim.x * (s + 1)) {
      }
    __syncthreads();
  }
  if (own == 123456789) x[k] = 0;
}
// A flag for each block: thread b waits for block b, all go on together.
extern "C" __global__ void flags(int* x, int* y, unsigned* flag, int n, int steps) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  for (int s = 0; s < steps; ++s) {
    const int* from = s & 1 ? y : x;
    int* to = s & 1 ? x : y;
    to[k] = from[(k + n - 1) % n] + from[(k + 1) % n];
    __syncthreads();
    const unsigned done = s + 1;
    if (threadIdx.x == 0)
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag + blockIdx.x), "r"(done)
                   : "memory");
    if (threadIdx.x < gridDim.x)
      while (load_acquire(flag + threadIdx.x) < done) {
      }
    __syncthreads();
  }
}
// A generation counter that the last block to come raises, the other count set back by hand.
extern "C" __global__ void generations(int* x, int* y, unsigned* count, int n, int steps) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  for (int s = 0; s < steps; ++s) {
    const int* from = s & 1 ? y : x;
    int* to = s & 1 ? x : y;
    to[k] = from[(k + n - 1) % n] + from[(k + 1) % n];
    __syncthreads();
    if (threadIdx.x == 0) {
      volatile unsigned* generation = count + 1;
      const unsigned mine = *generation;
      __threadfence();
      if (atomicAdd(count, 1u) == gridDim.x - 1) {
        *static_cast<volatile unsigned*>(count) = 0;
        __threadfence();
        atomicAdd(count + 1, 1u);
      } else {
        while (*generation == mine) {
        }
      }
      __threadfence();
    }
    __syncthreads();
  }
}

// Block 0 passes n numbers to block 1, all accesses volatile: no race, but without fences block 1
// may see old numbers behind the new flag.
template <bool kFences>
__global__ void pass_on(volatile int* x, volatile unsigned* flag, int* out, int n) {
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    for (int k = t; k < n; k += blockDim.x) x[k] = k + 1;
    __syncthreads();
    if (t == 0) {
      if (kFences) __threadfence();
      *flag = 1;
    }
  } else {
    if (t == 0) {
      while (*flag == 0) {
      }
      if (kFences) __threadfence();
    }
    __syncthreads();
    for (int k = t; k < n; k += blockDim.x) out[k] = x[k];
  }
}
template __global__ void pass_on<true>(volatile int*, volatile unsigned*, int*, int);
template __global__ void pass_on<false>(volatile int*, volatile unsigned*, int*, int);

// One warp passes 32 numbers to another through shared memory and a flag there.
template <bool kRelease, bool kAcquire>
__global__ void shared_flag(const int* x, int* out) {
  __shared__ int tile[32];
  __shared__ int flag;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    tile[lane] = x[lane];
    __syncwarp();
    if (kRelease) __threadfence_block();
    if (lane == 0) *static_cast<volatile int*>(&flag) = 1;
  } else {
    if (lane == 0)
      while (*static_cast<volatile int*>(&flag) == 0) {
      }
    if (kAcquire) __threadfence_block();
    __syncwarp();
    out[lane] = tile[31 - lane];
  }
}
template __global__ void shared_flag<true, true>(const int*, int*);
template __global__ void shared_flag<false, true>(const int*, int*);
template __global__ void shared_flag<true, false>(const int*, int*);

#define EXCHANGE(Barrier) \
  template __global__ void exchange<Barrier>(int*, int*, unsigned*, int, int);
EXCHANGE(ReleaseAcquire)
EXCHANGE(FenceVolatile)
EXCHANGE(FenceRelaxed)
EXCHANGE(AtomicPoll)
EXCHANGE(EveryThreadWaits)
EXCHANGE(OtherThreadWaits)
EXCHANGE(CooperativeGroups)
EXCHANGE(NoRelease)
EXCHANGE(NoAcquire)
EXCHANGE(NoFenceAfterVolatile)
EXCHANGE(NoFenceBeforeAtomic)
EXCHANGE(FenceOfBlockScope)
EXCHANGE(FenceTooEarly)
EXCHANGE(AtomicOfBlockScope)
EXCHANGE(PlainSpin)
EXCHANGE(NoBarrierBefore)
EXCHANGE(NoBarrierBehind)
EXCHANGE(OneTooFew)
EXCHANGE(Nothing)
