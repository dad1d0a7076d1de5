// What the blocks of the resident and of the streamed kernels share: which part of the layer a
// block owns, its rows of a step, its place in the exchange, and the barrier of the blocks that
// exchange values.
#pragma once

#include "args.h"
#include "barrier.cuh"

namespace fusedrnn::cuda {

// The part of the layer that this block owns.
template <class Args>
struct Place {
  int d;        // direction
  int first_u;  // its units are [first_u, first_u + units)
  int units;    // units of a block; the last blocks may own fewer or none
  int first_j;  // its sequences are [first_j, first_j + rows)
  int rows;

  __device__ __forceinline__ explicit Place(const Args& a) {
    d = blockIdx.z;
    units = a.shape.units;
    first_u = blockIdx.x * units;
    first_j = static_cast<int>(blockIdx.y) * a.shape.rows;
    rows = static_cast<int>(min(int64_t(a.shape.rows), a.N - first_j));
  }
};

// The rows of a step that belong to this block.
struct Step {
  int64_t row;  // packed row of the block's first sequence
  int n;        // how many sequences of the block are alive
};

template <class Args>
__device__ __forceinline__ Step step_of(const Args& a, const Place<Args>& place, int64_t t) {
  if (!a.row_offset) return {t * a.N + place.first_j, place.rows};
  const int64_t row = a.row_offset[t], alive = a.row_offset[t + 1] - row;
  return {row + place.first_j,
          static_cast<int>(max(int64_t(0), min(int64_t(place.rows), alive - place.first_j)))};
}

// How many values of a stage's exchange come before the rows of this block's sequences in one of
// the two buffers.
template <class Args>
__device__ __forceinline__ int64_t exchange_offset(const Args& a, const Place<Args>& place, int s,
                                                   int buffer) {
  const int64_t block_row = (int64_t(buffer) * a.D + place.d) * gridDim.y * a.shape.rows_pad +
                            blockIdx.y * a.shape.rows_pad;
  return block_row * a.shape.tile[s].K_pad;
}

// These rows as values.
template <class Args>
__device__ __forceinline__ auto exchange_rows(const Args& a, const Place<Args>& place, int s,
                                              int buffer) {
  return a.exchange[s] + exchange_offset(a, place, s, buffer);
}

template <class Product>
using BarrierOf =
    std::conditional_t<Product::kClusters, ClusterBarrier, Barrier<Product::kTakesWords>>;

// The barrier of the blocks that have the same sequences and the same direction as this one. If
// the launch has no counters, because the exchange has words, the barrier does nothing.
template <class Product, class Args>
__device__ __forceinline__ BarrierOf<Product> barrier_of(const Args& a, const Place<Args>& place,
                                                         const char* kernel) {
  unsigned* arrivals = a.arrivals;
  if (!Product::kTakesWords || arrivals)
    arrivals += (place.d * gridDim.y + blockIdx.y) * kArrivalStride;
  if constexpr (Product::kClusters) {
    return ClusterBarrier(arrivals, gridDim.x, a.as_one, a.shape, a.spin_limit, kernel);
  } else {
    return Barrier<Product::kTakesWords>(arrivals, gridDim.x, a.spin_limit, kernel);
  }
}

}  // namespace fusedrnn::cuda
