// The macro that defines the two resident kernels of a product.
#pragma once

#include "kernel_entry.cuh"
#include "resident_backward.cuh"
#include "resident_forward.cuh"

namespace fusedrnn::cuda {

template <class Product>
__device__ __forceinline__ void run_resident_forward(
    const ResidentForwardArgs<typename Product::Stored>& a, const char* kernel) {
  with_cell_of<Product>(a.cell, [&](auto cell) {
    // The plan gives cells with a projection to the streamed regime.
    if constexpr (!info_of<decltype(cell)>().projects)
      ResidentForward<Product, decltype(cell)>(a, dynamic_shared, kernel).run();
  });
}

template <class Product>
__device__ __forceinline__ void run_resident_backward(
    const ResidentBackwardArgs<typename Product::Stored>& a, const char* kernel) {
  with_cell_of<Product>(a.cell, [&](auto cell) {
    if constexpr (!info_of<decltype(cell)>().projects)
      ResidentBackward<Product, decltype(cell)>(a, dynamic_shared, kernel).run();
  });
}

}  // namespace fusedrnn::cuda

// Defines the kernels of forward and backward for a product. The bounds ask for one block on a
// multiprocessor, so a thread may have all 255 registers.
#define FUSEDRNN_RESIDENT(name, Product)                                                         \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      resident_forward_##name(                                                                   \
          const __grid_constant__ fusedrnn::cuda::ResidentForwardArgs<typename Product::Stored>  \
              args) {                                                                            \
    fusedrnn::cuda::run_resident_forward<Product>(args, "resident_forward_" #name);              \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      resident_backward_##name(                                                                  \
          const __grid_constant__ fusedrnn::cuda::ResidentBackwardArgs<typename Product::Stored> \
              args) {                                                                            \
    fusedrnn::cuda::run_resident_backward<Product>(args, "resident_backward_" #name);            \
  }
