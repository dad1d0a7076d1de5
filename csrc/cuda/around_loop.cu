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

// The values of a row in a thread's columns, loaded with one instruction.
template <class Stored>
struct VectorOfRow {
  uint4 bits;

  __device__ __forceinline__ void load(const Stored* from, int64_t) {
    bits = *reinterpret_cast<const uint4*>(from);
  }
  __device__ __forceinline__ Real<Stored> value(int k) const {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
    if constexpr (sizeof(Stored) == 2) {
      return real(Stored{static_cast<uint16_t>(words[k / 2] >> k % 2 * 16)});
    } else if constexpr (sizeof(Stored) == 4) {
      return __uint_as_float(words[k]);
    } else {
      return __hiloint2double(static_cast<int>(words[2 * k + 1]), static_cast<int>(words[2 * k]));
    }
  }
};

// The same where rows are not aligned to 16 bytes or the last columns fill no vector.
template <class Stored>
struct ValuesOfRow {
  Stored values[16 / sizeof(Stored)];

  __device__ __forceinline__ void load(const Stored* from, int64_t columns) {
#pragma unroll
    for (int k = 0; k < int(16 / sizeof(Stored)); ++k)
      if (k < columns) values[k] = from[k];
  }
  __device__ __forceinline__ Real<Stored> value(int k) const { return real(values[k]); }
};

// Adds every eighth row of [row, end) to `total`, in the order of the rows. It loads kDepth rows
// before it adds the first, so that memory is always busy. m points to a thread's first column, and
// `columns` columns are there.
template <class Row, int kDepth, class Stored>
__device__ __forceinline__ void add_rows(const Stored* m, int64_t ld, int64_t columns, int64_t row,
                                         int64_t end, Real<Stored>* total) {
  constexpr int kWarps = kThreads / 32;
  for (; row < end; row += kDepth * kWarps) {
    Row rows[kDepth] = {};  // zeros take the place of the rows beyond the end
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if (row + i * kWarps < end) rows[i].load(m + (row + i * kWarps) * ld, columns);
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
#pragma unroll
      for (int k = 0; k < int(16 / sizeof(Stored)); ++k) total[k] += rows[i].value(k);
  }
}

// Says that a block has finished, and returns whether it is the last of `blocks` blocks. What all
// threads of the others wrote before is then visible to all threads of this one. The counter is
// zero again behind the last block.
__device__ __forceinline__ bool is_last(unsigned* finished, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(finished), "r"(blocks - 1)
                 : "memory");
    last = before == blocks - 1;
  }
  __syncthreads();
  return last;
}

template <class Stored>
__device__ __forceinline__ void sum_rows(const SumRowsArgs<Stored>& a) {
  constexpr int kWarps = kThreads / 32, kColumns = kSumColumns<Stored>, kVector = kColumns / 32;
  static_assert(kColumns <= kThreads);
  __shared__ Real<Stored> of_warp[kWarps][kColumns];
  const RowSum<Stored>& sum = a.sum[blockIdx.y];
  const int block = blockIdx.x % a.column_blocks, range = blockIdx.x / a.column_blocks;
  const int64_t first = int64_t(block) * kColumns;
  if (first >= sum.columns) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = first + lane * kVector, left = sum.columns - column;
  const int64_t rows = rows_of_range(a.rows), begin = range * rows;
  const int64_t end = min(a.rows, begin + rows);
  Real<Stored> total[kVector] = {};
  if (left > 0) {
    const Stored* m = sum.m + column;
    const bool aligned =
        sum.columns % kVector == 0 && reinterpret_cast<uintptr_t>(sum.m) % sizeof(uint4) == 0;
    if (aligned) {
      add_rows<VectorOfRow<Stored>, 8>(m, sum.columns, left, begin + warp, end, total);
    } else {
      add_rows<ValuesOfRow<Stored>, 2>(m, sum.columns, left, begin + warp, end, total);
    }
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) of_warp[warp][lane * kVector + k] = total[k];
  __syncthreads();

  // From here on a thread has one column.
  const int own = threadIdx.x;
  const bool has_column = own < kColumns && first + own < sum.columns;
  Real<Stored> result = 0;
  if (has_column)
    for (int w = 0; w < kWarps; ++w) result += of_warp[w][own];
  if (a.ranges > 1) {
    const int64_t width = int64_t(a.column_blocks) * kColumns;
    Real<Stored>* partial = a.partial + blockIdx.y * a.ranges * width + first + own;
    if (has_column) partial[range * width] = result;
    if (!is_last(a.finished + blockIdx.y * a.column_blocks + block, a.ranges)) return;
    result = 0;
    if (has_column) {
#pragma unroll 8
      for (int r = 0; r < a.ranges; ++r) result += partial[r * width];
    }
  }
  if (!has_column) return;
  sum.out[first + own] = stored<Stored>(result);
  if (sum.again) sum.again[first + own] = stored<Stored>(result);
}

__device__ __forceinline__ void drop(const DropStatesArgs& a) {
  const int64_t words = a.h_words + a.c_words, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.n * words; i += threads) {
    const int64_t j = i / words, word = i % words;
    if (!a.begins[j]) continue;
    if (word < a.h_words) {
      a.h[j * a.h_words + word] = 0;
    } else {
      a.c[j * a.c_words + word - a.h_words] = 0;
    }
  }
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

extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)
    drop_states(const __grid_constant__ fusedrnn::cuda::DropStatesArgs args) {
  fusedrnn::cuda::drop(args);
}

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kAroundLoopKernels = {
    FUSEDRNN_KERNEL(sum_rows_f32),  FUSEDRNN_KERNEL(sum_rows_f64), FUSEDRNN_KERNEL(sum_rows_f16),
    FUSEDRNN_KERNEL(sum_rows_bf16), FUSEDRNN_KERNEL(round_f16),    FUSEDRNN_KERNEL(round_bf16),
    FUSEDRNN_KERNEL(write_numbers), FUSEDRNN_KERNEL(drop_states),
};
