// The macros that define the two resident kernels of a product.
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

// Defines the kernels of forward and backward for a product, whose names begin with `regime`. The
// bounds ask for one block on a multiprocessor, so a thread may have all 255 registers.
#define FUSEDRNN_RESIDENT_NAMED(regime, name, Product)                                           \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      regime##_forward_##name(                                                                   \
          const __grid_constant__ fusedrnn::cuda::ResidentForwardArgs<typename Product::Stored>  \
              args) {                                                                            \
    fusedrnn::cuda::run_resident_forward<Product>(args, #regime "_forward_" #name);              \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      regime##_backward_##name(                                                                  \
          const __grid_constant__ fusedrnn::cuda::ResidentBackwardArgs<typename Product::Stored> \
              args) {                                                                            \
    fusedrnn::cuda::run_resident_backward<Product>(args, #regime "_backward_" #name);            \
  }
#define FUSEDRNN_RESIDENT(name, Product) FUSEDRNN_RESIDENT_NAMED(resident, name, Product)
// The same for a product whose blocks are in clusters.
#define FUSEDRNN_CLUSTERED(name, Product) FUSEDRNN_RESIDENT_NAMED(clustered, name, Product)
