// The resident regime: a launch runs many positions of all directions, in forward those of a chunk
// and in backward all of them (resident.cpp). A block owns some units of some sequences, with all
// gates of these units. During a launch its part of the recurrent weights stays in registers and
// shared memory, and its states, or backward their gradients, stay in registers. Blocks hand each
// other the sources of the stages (forward: h and the emit of an earlier stage; backward: deltas)
// through the exchange: two buffers in global memory, used in turns. They wait for each other once
// in each stage.
//
// Between its arrival at the barrier and its wait, a block writes results that no other block reads
// and loads values for the next step.
//
// `Product` (product_fma.cuh, product_mma.cuh) multiplies a block's weight rows by the source. It
// leaves the partial sum of each slice of K in shared memory. This file has the code that forward
// (resident_forward.cuh) and backward (resident_backward.cuh) share.
#pragma once

#include "barrier.cuh"
#include "shared_memory.cuh"
#include "storage.cuh"

namespace fusedrnn::cuda {

// Stands for the function that returns a stage's weights, in the concept below.
template <class Stored>
struct AnyWeight {
  Stored operator()(int row, int k) const;
};

template <class Product>
concept ResidentProduct =
    requires(Product& product, SharedMemory memory, const typename Product::Stored* source,
             typename Product::Stored (*as_stored)(typename Product::Stored)) {
      Product(memory);
      as_stored(Product::exchanged(float{}));
      product.template load_weights<0>(AnyWeight<typename Product::Stored>());
      product.template multiply<0>(source, int{});
    };

// The part of the layer that this block owns.
template <class Args>
struct Place {
  int d;        // direction
  int first_u;  // its units are [first_u, first_u + units)
  int units;    // units of a block; the last block may own fewer
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

// Returns the same number, but hides from the compiler that it is the same. Otherwise the compiler
// would compute the addresses that depend on this number alone, those of all gates and parameters,
// once before the loop over steps, and there are not enough registers to keep them. From an opaque
// number it computes them where they are used.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Calls body(i, j, u) for each pair i that this thread owns, which is sequence first_j + j and unit
// first_u + u. Only sequences j < n are taken.
template <class Args, class Body>
__device__ __forceinline__ void for_pairs(const Args& a, const Place<Args>& place, int n,
                                          const Body& body) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int q = i * kThreads + threadIdx.x;
    const int j = q / place.units, u = q - j * place.units;
    if (j < n && place.first_u + u < a.H) body(i, j, u);
  }
}

// The rows of this block's sequences in one of the two buffers of a stage's exchange.
template <class Args>
__device__ __forceinline__ auto exchange_rows(const Args& a, const Place<Args>& place, int s,
                                              int buffer) {
  const int64_t block_row = (int64_t(buffer) * a.D + place.d) * gridDim.y * a.shape.rows_pad +
                            blockIdx.y * a.shape.rows_pad;
  return a.exchange[s] + block_row * a.shape.tile[s].K_pad;
}

// The barrier of the blocks that have the same sequences and the same direction as this one.
template <class Args>
__device__ __forceinline__ Barrier barrier_of(const Args& a, const Place<Args>& place,
                                              const char* kernel) {
  return Barrier(a.arrivals + (place.d * gridDim.y + blockIdx.y) * kArrivalStride, gridDim.x,
                 a.spin_limit, kernel);
}

// Copies the parameters of the block's units to shared memory.
template <class Cell, class Args>
__device__ __forceinline__ void load_params(const Args& a, const Place<Args>& place,
                                            const SharedMemory& memory) {
  if constexpr (Cell::kParams > 0) {
    for (int i = threadIdx.x; i < Cell::kParams * place.units; i += kThreads) {
      const int k = i / place.units, u = place.first_u + i % place.units;
      if (u < a.H) memory.params()[i] = real(a.params[place.d][k * a.H + u]);
    }
    __syncthreads();
  }
}

}  // namespace fusedrnn::cuda
