// Conversions between the stored type and the compute type. 16-bit types become float when they are
// loaded and are rounded to nearest when they are stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "args.h"

namespace fusedrnn::cuda {

__device__ __forceinline__ float real(float x) { return x; }
__device__ __forceinline__ double real(double x) { return x; }
__device__ __forceinline__ float real(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float real(Bf16 x) {
  return __bfloat162float(__ushort_as_bfloat16(x.bits));
}

template <class Stored>
__device__ __forceinline__ Stored stored(Real<Stored> x) {
  return x;
}
template <>
__device__ __forceinline__ Half stored<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ Bf16 stored<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// The inputs of a cell for one unit, beside its sums: the unit's parameters, and the row's value of
// row_input in cells that take one.
template <class Cell, class V>
struct Inputs {
  V params[Cell::kParams > 0 ? Cell::kParams : 1];

  template <class Stored>
  __device__ __forceinline__ void load_params(const Stored* from, int64_t H, int64_t u) {
    for (int k = 0; k < Cell::kParams; ++k) params[k] = real(from[k * H + u]);
  }
  __device__ __forceinline__ Given<V> of_row(const V* row_input, int64_t row) const {
    return {params, Cell::kTakesRow ? row_input[row] : V(0)};
  }
};

// A number as a type, so that a generic lambda can take it as a compile-time constant.
template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls body(Cell()) for the cell that a kernel was started for. One kernel serves all cells, since
// all its threads take the same branch.
template <class Body>
__device__ __forceinline__ void with_cell(CellKind kind, const Body& body) {
#define FUSEDRNN_CASE(name, type) \
  if (kind == CellKind::name) return body(type());
  FUSEDRNN_CELLS(FUSEDRNN_CASE)
#undef FUSEDRNN_CASE
}

}  // namespace fusedrnn::cuda
