// Probes that pass data between blocks. Each instance of `exchange` uses another barrier of the
// grid; some are correct and some are not.
#include <cooperative_groups.h>

namespace {

// Ways to arrive at a barrier: each adds 1 to *p.
__device__ void red_release(unsigned* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
__device__ void red_release_block(unsigned* p) {
  asm volatile("red.release.cta.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
__device__ void red_relaxed(unsigned* p) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
__device__ void atom_acq_rel(unsigned* p) {
  [[maybe_unused]] unsigned v;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(p) : "memory");
}
__device__ void atomic_add(unsigned* p) { atomicAdd(p, 1u); }

// Ways to read the counter while waiting.
__device__ unsigned load_acquire(unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ unsigned load_relaxed(unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ unsigned load_plain(unsigned* p) {
  unsigned v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ unsigned load_volatile(unsigned* p) { return *static_cast<volatile unsigned*>(p); }
__device__ unsigned atom_acquire(unsigned* p) {
  unsigned v;
  asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], 0;" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Fences before the arrival or after the wait.
__device__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
__device__ void fence_of_c() { __threadfence(); }
__device__ void none() {}

// Each barrier's wait(count, target) arrives, and returns once all blocks together have arrived
// `target` times. In most of them thread 0 does this for its block, between two __syncthreads().
template <void (*kFenceBefore)(), void (*kArrive)(unsigned*), unsigned (*kPoll)(unsigned*),
          void (*kFenceBehind)(), bool kBlockBefore = true, bool kBlockBehind = true>
struct Thread0 {
  static __device__ void wait(unsigned* count, unsigned target) {
    if constexpr (kBlockBefore) __syncthreads();
    if (threadIdx.x == 0) {
      kFenceBefore();
      kArrive(count);
      while (kPoll(count) < target) {
      }
      kFenceBehind();
    }
    if constexpr (kBlockBehind) __syncthreads();
  }
};

struct ReleaseAcquire : Thread0<none, red_release, load_acquire, none> {};
struct FenceVolatile : Thread0<fence_of_c, atomic_add, load_volatile, fence_of_c> {};
struct FenceRelaxed : Thread0<fence, red_relaxed, load_relaxed, fence> {};
struct AtomicPoll : Thread0<none, atom_acq_rel, atom_acquire, none> {};
// Every thread polls the counter itself, so no __syncthreads() is needed after the loop.
struct EveryThreadWaits {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) red_release(count);
    while (load_acquire(count) < target) {
    }
  }
};
// A thread of another warp polls the counter, and passes the order on through __syncthreads().
struct OtherThreadWaits {
  static __device__ void wait(unsigned* count, unsigned target) {
    __syncthreads();
    if (threadIdx.x == 0) red_release(count);
    if (threadIdx.x == 33)
      while (load_acquire(count) < target) {
      }
    __syncthreads();
  }
};
struct CooperativeGroups {
  static __device__ void wait(unsigned*, unsigned) { cooperative_groups::this_grid().sync(); }
};

struct NoRelease : Thread0<none, red_relaxed, load_acquire, none> {};
struct NoAcquire : Thread0<none, red_release, load_relaxed, none> {};
struct NoFenceAfterVolatile : Thread0<fence_of_c, atomic_add, load_volatile, none> {};
struct NoFenceBeforeAtomic : Thread0<none, atomic_add, load_volatile, fence_of_c> {};
struct FenceOfBlockScope : Thread0<fence_block, red_relaxed, load_relaxed, fence_block> {};
struct AtomicOfBlockScope : Thread0<none, red_release_block, load_acquire, none> {};
struct PlainSpin : Thread0<none, red_release, load_plain, fence> {};
struct NoBarrierBefore : Thread0<none, red_release, load_acquire, none, false, true> {};
struct NoBarrierBehind : Thread0<none, red_release, load_acquire, none, true, false> {};
// Each thread's fence comes before __syncthreads(), so thread 0's fence covers only its own stores.
struct FenceTooEarly {
  static __device__ void wait(unsigned* count, unsigned target) {
    fence();
    NoRelease::wait(count, target);
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

// Each number of a ring becomes the sum of its neighbours: x'[k] = x[k - 1] + x[k + 1]. Steps
// alternate between two buffers, with one barrier of the grid for each step.
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
// The same with one buffer. There is no barrier between a write and the next step's reads, so they
// race.
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

// A barrier in two parts: the block arrives, does work that other blocks do not read, and then
// waits.
extern "C" __global__ void split_barrier(int* x, int* y, unsigned* count, int n, int steps) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  int own = 0;
  for (int s = 0; s < steps; ++s) {
    const int* from = s & 1 ? y : x;
    int* to = s & 1 ? x : y;
    to[k] = from[(k + n - 1) % n] + from[(k + 1) % n];
    __syncthreads();
    if (threadIdx.x == 0) red_release(count);
    own += to[k];
    if (threadIdx.x == 0)
      while (load_acquire(count) < gridDim.x * (s + 1)) {
      }
    __syncthreads();
  }
  if (own == 123456789) x[k] = 0;
}
// A barrier with one flag for each block. Thread b waits for the flag of block b.
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
// A barrier with two counters: the last block that arrives resets the count of arrivals and raises
// the generation, for which the other blocks wait.
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

// Block 0 passes n numbers to block 1. All accesses are volatile, so there is no race; but without
// fences block 1 may read old numbers after it has read the new flag.
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

// One warp passes 32 numbers to another one through shared memory and a flag in it.
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
