// The macro that defines the two streamed kernels of a product.
#pragma once

#include "kernel_entry.cuh"
#include "streamed_backward.cuh"
#include "streamed_forward.cuh"

namespace fusedrnn::cuda {

template <class Product>
__device__ __forceinline__ void run_streamed_forward(
    const StreamedForwardArgs<typename Product::Stored>& a, const char* kernel) {
  with_cell_of<Product>(a.cell, [&](auto cell) {
    StreamedForward<Product, decltype(cell)>(a, dynamic_shared, kernel).run();
  });
}

template <class Product>
__device__ __forceinline__ void run_streamed_backward(
    const StreamedBackwardArgs<typename Product::Stored>& a, const char* kernel) {
  with_cell_of<Product>(a.cell, [&](auto cell) {
    StreamedBackward<Product, decltype(cell)>(a, dynamic_shared, kernel).run();
  });
}

}  // namespace fusedrnn::cuda

// Defines the kernels of forward and backward for a product. The bounds ask for one block on a
// multiprocessor, so a thread may have all 255 registers.
#define FUSEDRNN_STREAMED(name, Product)                                                         \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      streamed_forward_##name(                                                                   \
          const __grid_constant__ fusedrnn::cuda::StreamedForwardArgs<typename Product::Stored>  \
              args) {                                                                            \
    fusedrnn::cuda::run_streamed_forward<Product>(args, "streamed_forward_" #name);              \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      streamed_backward_##name(                                                                  \
          const __grid_constant__ fusedrnn::cuda::StreamedBackwardArgs<typename Product::Stored> \
              args) {                                                                            \
    fusedrnn::cuda::run_streamed_backward<Product>(args, "streamed_backward_" #name);            \
  }
