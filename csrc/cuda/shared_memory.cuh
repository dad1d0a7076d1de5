// The shared memory of a block of the resident and the streamed kernels. V is the compute type. The
// plan decides its layout.
#pragma once

#include "args.h"

namespace fusedrnn::cuda {

template <class V>
struct SharedMemory {
  const BlockShape& shape;
  char* base;

  // The partial sums of the latest product, [slices][partial_rows][ld].
  __device__ __forceinline__ V* partials() const { return at<V>(shape.partials); }
  // Rows of the source in the compute type, [at most kFmaRows][K_part]. Only FmaProduct uses them.
  template <class Vector>
  __device__ __forceinline__ Vector* staged() const {
    return at<Vector>(shape.staged);
  }
  // b_ih, then b_hh of the block's units, [2][G][units].
  __device__ __forceinline__ V* bias() const { return at<V>(shape.bias); }
  // The parameters of the block's units, [kParams][units]. They come right behind bias().
  __device__ __forceinline__ V* params() const { return at<V>(shape.params); }
  // The part of a stage's weights that stays in shared memory.
  template <class Vector>
  __device__ __forceinline__ Vector* weights(int stage) const {
    return at<Vector>(shape.tile[stage].weights);
  }

  // Waits until all partial sums of a product, of a stage for n sequences, are there.
  __device__ __forceinline__ void wait_for_sums(int stage, int n) const { __syncthreads(); }

  // The product of sequence j's row of the source with weight row r, summed over the slices.
  __device__ __forceinline__ V sum_slices(int stage, int j, int r) const {
    const ProductTile& tile = shape.tile[stage];
    const V* partial = partials() + j * tile.ld + r;
    V sum = 0;
    for (int slice = 0; slice < tile.slices; ++slice)
      sum += partial[slice * shape.partial_rows * tile.ld];
    return sum;
  }

  // The same, when all partial sums are there. ClusterMemory adds those of other blocks here.
  __device__ __forceinline__ V sum_of_product(int stage, int j, int r) const {
    return sum_slices(stage, j, r);
  }

  // The address at an offset in bytes.
  template <class Value>
  __device__ __forceinline__ Value* at(int offset) const {
    return reinterpret_cast<Value*>(base + offset);
  }
};

}  // namespace fusedrnn::cuda
