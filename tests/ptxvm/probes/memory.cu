// Probes of bounds, of reads before a write, of shared memory and of the barriers of one block.
// Each faulty kernel stands beside the correct kernel that it was made from.
#include <cassert>
#include <cstdint>
#include <cstdio>

extern "C" __global__ void shifted(const float* x, float* out, int n, int by) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k < n) out[k] = x[k + by];
}
extern "C" __global__ void shared_index(const float* x, float* out, int by) {
  extern __shared__ float tile[];
  tile[threadIdx.x + by] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + by];
}
extern "C" __global__ void wide_load(const float* x, float4* out, int by) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + by);
}
// Only the first `filled` threads write to the tile; all of it is read.
extern "C" __global__ void partly_filled(const float* x, float* out, int filled) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  if (t < filled) tile[t] = x[t];
  __syncthreads();
  out[t] = tile[63 - t];
}
extern "C" __global__ void sum_of(const float* x, float* work, float* out, int n) {
  for (int k = threadIdx.x; k < n; k += blockDim.x) work[k] = x[k] + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    float s = 0;
    for (int k = 0; k < 64; ++k) s += work[k];
    *out = s;
  }
}
extern "C" __global__ void writes_input(float* x) { x[threadIdx.x] = 0; }

// Rotates x by one place through shared memory, `steps` times: out[t] = x[(t + steps) % 64].
template <bool kBefore, bool kAfter>
__device__ void rotate(const float* x, float* out, int steps) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  float v = x[t];
  for (int s = 0; s < steps; ++s) {
    tile[t] = v;
    if (kBefore) __syncthreads();
    v = tile[(t + 1) % 64];
    if (kAfter) __syncthreads();
  }
  out[t] = v;
}
extern "C" __global__ void rotated(const float* x, float* out, int steps) {
  rotate<true, true>(x, out, steps);
}
extern "C" __global__ void rotated_early_read(const float* x, float* out, int steps) {
  rotate<false, true>(x, out, steps);
}
extern "C" __global__ void rotated_early_write(const float* x, float* out, int steps) {
  rotate<true, false>(x, out, steps);
}
// Two threads write adjacent 16-bit numbers. That is a race only if they write the same number.
extern "C" __global__ void neighbours(const uint16_t* x, uint16_t* out, int apart) {
  __shared__ uint16_t tile[64];
  const int t = threadIdx.x;
  tile[(t * apart) % 64] = x[t];
  __syncthreads();
  out[t] = tile[t * apart % 64];
}
// The threads of one block pass numbers to each other through global memory.
template <bool kBarrier>
__device__ void reverse(const float* x, float* work, float* out) {
  const int t = threadIdx.x;
  work[t] = x[t];
  if (kBarrier) __syncthreads();
  out[t] = work[63 - t];
}
extern "C" __global__ void reversed(const float* x, float* work, float* out) {
  reverse<true>(x, work, out);
}
extern "C" __global__ void reversed_early(const float* x, float* work, float* out) {
  reverse<false>(x, work, out);
}
// Two blocks write the same numbers if `apart` is less than the number of threads.
extern "C" __global__ void both_blocks(float* out, int apart) {
  out[blockIdx.x * apart + threadIdx.x] = blockIdx.x;
}
// ld.global.nc does not see what the same launch writes: it is an error if x and y are one array.
extern "C" __global__ void non_coherent(const float* __restrict__ x, float* y, float* out) {
  const int t = threadIdx.x;
  y[t] = t;
  __syncthreads();
  out[t] = __ldg(x + 63 - t);
}
extern "C" __global__ void hits(int* counts, const int* at, int n) {
  for (int k = threadIdx.x; k < n; k += blockDim.x) atomicAdd(&counts[at[k]], 1);
}

// Reads any of the eight numbers in local memory, of which only `filled` were written.
extern "C" __global__ void partly_local(const int* x, int* out, int filled) {
  int history[8];
  for (int k = 0; k < filled; ++k) history[k] = x[threadIdx.x + k];
  int v = history[x[threadIdx.x] & 7];
  out[threadIdx.x] = v;
}
// Loads and stores with cache hints, which change no value: out [6, 64].
extern "C" __global__ void hints(const float* x, float* out) {
  const int t = threadIdx.x;
  const float* from = x + t;
  float v[6];
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  asm volatile("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(v[0]) : "l"(from));
  asm volatile("ld.global.L1::no_allocate.L2::128B.f32 %0, [%1];" : "=f"(v[1]) : "l"(from));
  v[2] = __ldcg(from);
  v[3] = __ldcs(from);
  v[4] = __ldcv(from);
  asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v[5]) : "l"(from));
  for (int k = 0; k < 4; ++k) __stcs(out + k * 64 + t, v[k]);
  __stwt(out + 256 + t, v[4]);
  asm volatile("st.relaxed.sys.global.f32 [%0], %1;" ::"l"(out + 320 + t), "f"(v[5]) : "memory");
}
// Atomics of every operation and scope: counts [8].
extern "C" __global__ void atomics(unsigned* counts, unsigned long long* wide, float* sum) {
  __shared__ unsigned own;
  const unsigned t = threadIdx.x;
  if (t == 0) own = 0;
  __syncthreads();
  atomicAdd_block(&own, 1u);
  atomicAdd_system(&counts[0], t);
  atomicMax(&counts[1], t);
  atomicMin(&counts[2], t);
  atomicOr(&counts[3], 1u << (t & 31));
  atomicXor(&counts[4], t);
  atomicInc(&counts[5], 9u);
  unsigned seen = 0, before;
  do {
    before = seen;
    seen = atomicCAS(&counts[7], before, before + 2);
  } while (seen != before);
  atomicAdd(wide, 1ull << 33);
  atomicAdd(sum, 0.5f);
  __syncthreads();
  if (t == 0) atomicExch(&counts[6], own);
}

// --- Barriers ------------------------------------------------------------------------------------

extern "C" __global__ void two_barriers(const float* x, float* out) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = x[threadIdx.x];
    asm volatile("bar.sync 0;");
  } else {
    out[threadIdx.x] = -x[threadIdx.x];
    asm volatile("bar.sync 0;");
  }
}
extern "C" __global__ void exits_before_barrier(const float* x, float* out, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}
extern "C" __global__ void half_at_barrier(const float* x, float* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  out[threadIdx.x] = x[threadIdx.x];
}
// One warp produces numbers and another one consumes them, through named barriers: x [2, 32].
template <int kArrive>
__device__ void produce(const float* x, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < 2; ++k) {
    if (threadIdx.x < 32) {
      if (k > 0) asm volatile("bar.sync 2, 64;");
      tile[lane] = x[k * 32 + lane];
      asm volatile("bar.arrive 1, 64;");
    } else {
      if (kArrive) asm volatile("bar.sync 1, 64;");
      out[k * 32 + lane] = tile[31 - lane];
      if (k == 0) asm volatile("bar.arrive 2, 64;");
    }
  }
}
extern "C" __global__ void produced(const float* x, float* out) { produce<1>(x, out); }
extern "C" __global__ void produced_unseen(const float* x, float* out) { produce<0>(x, out); }
extern "C" __global__ void counts(const int* x, int* out) {
  const int odd = __syncthreads_count(x[threadIdx.x] & 1);
  const int any = __syncthreads_or(x[threadIdx.x] > 98),
            all = __syncthreads_and(x[threadIdx.x] > -1);
  asm volatile("barrier.sync 3;");
  out[threadIdx.x] = odd * 4 + any * 2 + all;
}
extern "C" __global__ void waits_for_ever(volatile int* flag, int* out) {
  if (threadIdx.x > 0) {
    while (*flag == 0) {
    }
  }
  *out = 1;
}
extern "C" __global__ void asserts(const int* x, int* out) {
  assert(x[threadIdx.x] < 100);
  if (threadIdx.x == 0) printf("%d\n", x[0]);
  out[threadIdx.x] = x[threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(64) divides(const int* x, int* out) {
  out[threadIdx.x] = 100 / x[threadIdx.x];
}
__device__ __noinline__ int called(int x) { return x * x + clock(); }
extern "C" __global__ void calls(const int* x, int* out) { out[threadIdx.x] = called(x[0]); }

struct Args {
  const float* x;
  float* out;
  int n;
  float scale[3];
};
extern "C" __global__ void takes_struct(const Args args) {
  const int t = threadIdx.x;
  if (t < args.n) args.out[t] = args.x[t] * args.scale[t % 3];
}
