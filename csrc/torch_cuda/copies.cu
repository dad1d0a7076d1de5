// The kernels of the bindings: they bring rows into packed order and back, find where sequences
// begin, and store or add the results of products.
#include "../cuda/storage.cuh"
#include "copies.h"
#include "kernels.h"

namespace fusedrnn::cuda {
namespace {

// Calls body(i) for every i in [0, n). The threads of the whole grid share these calls.
template <class Body>
__device__ __forceinline__ void for_each(int64_t n, const Body& body) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += threads) body(i);
}

// Calls body(padded, packed, live) for every value of the first T steps of the padded batch: padded
// and packed are its indices in either order, and live says whether packed order has it.
template <class Body>
__device__ __forceinline__ void for_rows(const PackArgs& a, int64_t T, const Body& body) {
  for_each(T * a.N * a.width, [&](int64_t i) {
    const int64_t row = i / a.width, column = i % a.width;
    const int64_t t = row / a.N, j = row % a.N;
    int64_t begin = t * a.N;
    bool live = t < a.steps;
    if (live && a.row_offset) {
      begin = a.row_offset[t];
      live = j < a.row_offset[t + 1] - begin;
    }
    body((t * a.N + a.order[j]) * a.width + column, (begin + j) * a.width + column, live);
  });
}

template <class V>
__device__ __forceinline__ void pack(const PackArgs& a) {
  for_rows(a, a.steps, [&](int64_t padded, int64_t packed, bool live) {
    if (live) static_cast<V*>(a.to)[packed] = static_cast<const V*>(a.from)[padded];
  });
}

template <class V>
__device__ __forceinline__ void unpack(const PackArgs& a) {
  for_rows(a, a.T, [&](int64_t padded, int64_t packed, bool live) {
    static_cast<V*>(a.to)[padded] = live ? static_cast<const V*>(a.from)[packed] : V(0);
  });
}

__device__ __forceinline__ void find(const BeginningsArgs& a) {
  for_each(a.steps * a.N, [&](int64_t i) {
    const int64_t t = i / a.N, j = i % a.N;
    const int64_t row = a.row_offset ? a.row_offset[t] : t * a.N;
    const int64_t next_row = a.row_offset ? a.row_offset[t + 1] : row + a.N;
    if (j >= next_row - row) return;
    const auto starts = [&](int64_t step, int64_t step_row) {
      return a.starts[a.order ? step * a.N + a.order[j] : step_row + j] != 0;
    };
    const int64_t next_end = t + 1 == a.steps ? next_row
                             : a.row_offset   ? a.row_offset[t + 2]
                                              : next_row + a.N;
    const bool goes_on = j < next_end - next_row;  // whether the sequence has a next step
    a.drops[0][row + j] = goes_on && starts(t + 1, next_row);
    const bool begins = starts(t, row);
    if (a.drops[1]) a.drops[1][row + j] = t > 0 && begins;
    if (t == 0) a.begins[j] = begins;
  });
}

template <class Stored>
__device__ __forceinline__ void store(const StoreArgs<Stored>& a) {
  for_each(a.rows * a.columns, [&](int64_t i) {
    Stored& to = a.to[i / a.columns * a.ld + i % a.columns];
    to = stored<Stored>(a.accumulate ? real(to) + a.from[i] : a.from[i]);
  });
}

}  // namespace
}  // namespace fusedrnn::cuda

#define FUSEDRNN_PACK(bits)                                                        \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)           \
      pack_rows_b##bits(const __grid_constant__ fusedrnn::cuda::PackArgs args) {   \
    fusedrnn::cuda::pack<uint##bits##_t>(args);                                    \
  }                                                                                \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)           \
      unpack_rows_b##bits(const __grid_constant__ fusedrnn::cuda::PackArgs args) { \
    fusedrnn::cuda::unpack<uint##bits##_t>(args);                                  \
  }
FUSEDRNN_PACK(16)
FUSEDRNN_PACK(32)
FUSEDRNN_PACK(64)
#undef FUSEDRNN_PACK

extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)
    find_beginnings(const __grid_constant__ fusedrnn::cuda::BeginningsArgs args) {
  fusedrnn::cuda::find(args);
}

#define FUSEDRNN_STORE(name, Stored)                                                 \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)             \
      store_##name(const __grid_constant__ fusedrnn::cuda::StoreArgs<Stored> args) { \
    fusedrnn::cuda::store(args);                                                     \
  }
FUSEDRNN_STORE(f32, float)
FUSEDRNN_STORE(f64, double)
FUSEDRNN_STORE(f16, fusedrnn::Half)
FUSEDRNN_STORE(bf16, fusedrnn::Bf16)
#undef FUSEDRNN_STORE

namespace fusedrnn::cuda {

const std::vector<Kernel> kBindingKernels = {
    FUSEDRNN_KERNEL(pack_rows_b16),   FUSEDRNN_KERNEL(pack_rows_b32),
    FUSEDRNN_KERNEL(pack_rows_b64),   FUSEDRNN_KERNEL(unpack_rows_b16),
    FUSEDRNN_KERNEL(unpack_rows_b32), FUSEDRNN_KERNEL(unpack_rows_b64),
    FUSEDRNN_KERNEL(store_f32),       FUSEDRNN_KERNEL(store_f64),
    FUSEDRNN_KERNEL(store_f16),       FUSEDRNN_KERNEL(store_bf16),
    FUSEDRNN_KERNEL(find_beginnings)};

}  // namespace fusedrnn::cuda
