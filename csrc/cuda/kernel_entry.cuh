// What all kernels with a time loop begin with.
#pragma once

#include "storage.cuh"

namespace fusedrnn::cuda {

// The dynamic shared memory of a block, aligned for loads of 16 bytes, the widest ones.
extern __shared__ __align__(16) char dynamic_shared[];

// Calls body(cell) for the cell that a kernel was started for. The plan uses no tensor cores before
// sm_80 and no clusters before sm_90, so kernels for them stop at once in code that is compiled for
// less.
template <class Product, class Body>
__device__ __forceinline__ void with_cell_of(CellKind kind, const Body& body) {
#if __CUDA_ARCH__ < 800
  constexpr bool kRuns = !Product::kTensorCores && !Product::kClusters;
#elif __CUDA_ARCH__ < 900
  constexpr bool kRuns = !Product::kClusters;
#else
  constexpr bool kRuns = true;
#endif
  if constexpr (kRuns) {
    with_cell(kind, body);
  } else {
    __trap();
  }
}

}  // namespace fusedrnn::cuda
