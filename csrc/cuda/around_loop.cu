// The kernels around the time loop: they round states to the stored type, sum over rows, and write
// numbers of the host to device memory.
#include "kernels.h"
#include "storage.cuh"

namespace fusedrnn::cuda {
namespace {

template <class Stored>
__device__ __forceinline__ void round_values(const RoundArgs<Stored>& a) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.count; i += threads)
    a.to[i] = stored<Stored>(a.from[i]);
}

// A block sums 32 columns. Each of its 8 warps takes every eighth row, and the first warp adds the
// eight sums. A warp sums 64 rows at a time and then adds that sum to its total, so that rounding
// errors grow more slowly than in one long sum.
template <class Stored>
__device__ __forceinline__ void sum_rows(const SumRowsArgs<Stored>& a) {
  constexpr int kWarps = kThreads / 32, kRun = 64 * kWarps;
  __shared__ Real<Stored> sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  Real<Stored> sum = 0;
  if (column < a.columns) {
    for (int64_t begin = 0; begin < a.rows; begin += kRun) {
      const int64_t end = min(a.rows, begin + kRun);
      Real<Stored> run = 0;
      for (int64_t row = begin + warp; row < end; row += kWarps)
        run += real(a.m[row * a.columns + column]);
      sum += run;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.columns) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  a.out[column] = stored<Stored>(sum);
  if (a.again) a.again[column] = stored<Stored>(sum);
}

}  // namespace
}  // namespace fusedrnn::cuda

#define FUSEDRNN_ROWS(name, Stored)                                                       \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)                  \
      sum_rows_##name(const __grid_constant__ fusedrnn::cuda::SumRowsArgs<Stored> args) { \
    fusedrnn::cuda::sum_rows(args);                                                       \
  }
FUSEDRNN_ROWS(f32, float)
FUSEDRNN_ROWS(f64, double)
FUSEDRNN_ROWS(f16, fusedrnn::Half)
FUSEDRNN_ROWS(bf16, fusedrnn::Bf16)
#undef FUSEDRNN_ROWS

#define FUSEDRNN_ROUND(name, Stored)                                                 \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)             \
      round_##name(const __grid_constant__ fusedrnn::cuda::RoundArgs<Stored> args) { \
    fusedrnn::cuda::round_values(args);                                              \
  }
FUSEDRNN_ROUND(f16, fusedrnn::Half)
FUSEDRNN_ROUND(bf16, fusedrnn::Bf16)
#undef FUSEDRNN_ROUND

extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)
    write_numbers(const __grid_constant__ fusedrnn::cuda::NumbersArgs args) {
  for (int i = threadIdx.x; i < args.count; i += fusedrnn::cuda::kThreads)
    args.to[i] = args.values[i];
}

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kAroundLoopKernels = {
    FUSEDRNN_KERNEL(sum_rows_f32),  FUSEDRNN_KERNEL(sum_rows_f64), FUSEDRNN_KERNEL(sum_rows_f16),
    FUSEDRNN_KERNEL(sum_rows_bf16), FUSEDRNN_KERNEL(round_f16),    FUSEDRNN_KERNEL(round_bf16),
    FUSEDRNN_KERNEL(write_numbers),
};
