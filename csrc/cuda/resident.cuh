// The resident regime: one launch for a whole sequence, both directions. A block owns some hidden
// units of some sequences, with all their gates. Its rows of the recurrent weights stay in
// registers and shared memory; h, or backward the deltas, goes from block to block through two
// buffers in global memory that take turns, with one barrier a stage. States stay in registers.
//
// Between arriving at a barrier and waiting for it a block writes what no other block reads, and
// loads what the next step needs.
//
// `Product` (product_fma.cuh, product_mma.cuh) multiplies a block's rows with the source, in slices
// of K whose sums lie in shared memory. This file has what forward (resident_forward.cuh) and
// backward (resident_backward.cuh) share.
#pragma once

#include "barrier.cuh"
#include "shared_memory.cuh"
#include "storage.cuh"

namespace fusedrnn::cuda {

// A value of a stage's weights, for the concept alone.
template <class Stored>
struct AnyWeight {
  Stored operator()(int row, int k) const;
};

template <class P>
concept ResidentProduct =
    requires(P& product, SharedMemory memory, const typename P::Stored* source,
             typename P::Stored (*as_stored)(typename P::Stored)) {
      P(memory);
      as_stored(P::exchanged(float{}));
      product.template load_weights<0>(AnyWeight<typename P::Stored>());
      product.template multiply<0>(source, int{});
    };

// Where this block is.
template <class Args>
struct Place {
  int d;        // direction
  int first_u;  // its units are [first_u, first_u + units)
  int units;    // units of a whole block
  int first_j;  // and its sequences [first_j, first_j + rows)
  int rows;

  __device__ __forceinline__ explicit Place(const Args& a) {
    d = blockIdx.z;
    units = a.shape.units;
    first_u = blockIdx.x * units;
    first_j = static_cast<int>(blockIdx.y) * a.shape.rows;
    rows = static_cast<int>(min(int64_t(a.shape.rows), a.N - first_j));
  }
};

// A step of the packed rows, as a block sees it.
struct Step {
  int64_t row;  // packed row of the block's first sequence
  int n;        // sequences of the block that are alive
};

template <class Args>
__device__ __forceinline__ Step step_of(const Args& a, const Place<Args>& place, int64_t t) {
  if (!a.row_offset) return {t * a.N + place.first_j, place.rows};
  const int64_t row = a.row_offset[t], alive = a.row_offset[t + 1] - row;
  return {row + place.first_j,
          static_cast<int>(max(int64_t(0), min(int64_t(place.rows), alive - place.first_j)))};
}

// The same number, but the compiler does not know that. It would compute addresses that depend on
// the number alone, those of all gates and parameters, once before the loop over steps, and would
// have no registers for them. Of an opaque number it computes them where they are used.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Calls body(i, j, u) for this thread's pairs: sequence first_j + j and unit first_u + u.
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

// The block's sequences in one of the two buffers of a stage's exchange.
template <class Args>
__device__ __forceinline__ auto exchange_rows(const Args& a, const Place<Args>& place, int s,
                                              int buffer) {
  const int64_t block_row = (int64_t(buffer) * a.D + place.d) * gridDim.y * a.shape.rows_pad +
                            blockIdx.y * a.shape.rows_pad;
  return a.exchange[s] + block_row * a.shape.tile[s].K_pad;
}

// The barrier of a block's sequences and direction.
template <class Args>
__device__ __forceinline__ Barrier barrier_of(const Args& a, const Place<Args>& place,
                                              const char* kernel) {
  return Barrier(a.arrivals + (place.d * gridDim.y + blockIdx.y) * kArrivalStride, gridDim.x,
                 a.spin_limit, kernel);
}

// Brings the parameters of the block's units to shared memory.
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
