// The resident regime: a launch runs many positions of all directions, in forward those of a chunk
// and in backward all of them (resident.cpp). A block owns some units of some sequences, with all
// gates of these units. During a launch its part of the recurrent weights stays in registers and
// shared memory, and its states, or backward their gradients, stay in registers. Blocks hand each
// other the sources of the stages (forward: h and the emit of an earlier stage; backward: deltas)
// through the exchange: two buffers in global memory, used in turns. They wait for each other once
// in each stage. Instead of values the exchange may have words (words.cuh); then there is no
// barrier.
//
// Between its arrival at the barrier and its wait, a block writes results that no other block reads
// and loads values for the next step.
//
// This file has the code that forward (resident_forward.cuh) and backward (resident_backward.cuh)
// share.
#pragma once

#include "blocks.cuh"
#include "product.cuh"

namespace fusedrnn::cuda {

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

// The block of a cluster that owns weight row r of a product: its first unit, and the row's number
// among its own `rows`. Rows from the last on, with which tiles are filled, get the number `rows`.
struct Owner {
  int first_u, r;
};
template <class Product, class Args>
__device__ __forceinline__ Owner owner_of(const Args& a, const Place<Args>& place, int r,
                                          int rows) {
  if constexpr (!Product::kClusters) return {place.first_u, r};
  const int block = r / rows;
  return {place.first_u + (block - rank_in_cluster(a.shape)) * place.units,
          block < a.shape.cluster ? r - block * rows : rows};
}

// The first value of a row of a stage's source that this block multiplies.
template <class Product, class Args>
__device__ __forceinline__ int first_k(const Args& a, int s) {
  return Product::kClusters ? rank_in_cluster(a.shape) * a.shape.tile[s].K_part : 0;
}

// The source of a stage's product in one of the two buffers of the exchange. Words of it are those
// with this number.
template <class Product, class Args>
__device__ __forceinline__ auto source_of(const Args& a, const Place<Args>& place, int s,
                                          int buffer, unsigned number, const char* kernel) {
  const int64_t at = exchange_offset(a, place, s, buffer) + first_k<Product>(a, s);
  using Stored = std::remove_reference_t<decltype(*a.exchange[s])>;
  const auto* words = reinterpret_cast<const uint64_t*>(a.exchange[s]);
  return Source<Stored>{a.exchange[s] + at, a.words ? words + at : nullptr, number, a.spin_limit,
                        kernel};
}

// A place in the exchange of a stage: a value of sequence j of this block, in one of the two
// buffers.
struct Slot {
  int stage, buffer, j;
  int64_t column;
};

// Hands a value on to the product of the slot's stage. A word gets this number.
template <class Product, class Args, class V>
__device__ __forceinline__ void put(const Args& a, const Place<Args>& place, const Slot& slot,
                                    V value, unsigned number) {
  const int64_t at = exchange_offset(a, place, slot.stage, slot.buffer) +
                     int64_t(slot.j) * a.shape.tile[slot.stage].K_pad + slot.column;
  if constexpr (Product::kTakesWords) {
    if (a.words) {
      put_word(reinterpret_cast<uint64_t*>(a.exchange[slot.stage]) + at,
               real(Product::exchanged(value)), number);
      return;
    }
  }
  a.exchange[slot.stage][at] = Product::exchanged(value);
}

// Copies the parameters of the block's units to shared memory.
template <class Cell, class Args, class V>
__device__ __forceinline__ void load_params(const Args& a, const Place<Args>& place,
                                            const SharedMemory<V>& memory) {
  if constexpr (Cell::kParams > 0) {
    for (int i = threadIdx.x; i < Cell::kParams * place.units; i += kThreads) {
      const int k = i / place.units, u = place.first_u + i % place.units;
      if (u < a.H) memory.params()[i] = real(a.params[place.d][k * a.H + u]);
    }
    __syncthreads();
  }
}

}  // namespace fusedrnn::cuda
