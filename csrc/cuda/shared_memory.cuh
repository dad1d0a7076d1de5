// The shared memory of a block of the resident kernels. The plan decides its layout.
#pragma once

#include "args.h"

namespace fusedrnn::cuda {

struct SharedMemory {
  const ResidentShape& shape;
  char* base;

  // The partial sums of the latest product, [slices][rows_pad][ld].
  __device__ __forceinline__ float* partials() const { return at<float>(shape.partials); }
  // Rows of the source as floats, [at most kFmaRows][K_pad]. Only FmaProduct uses them.
  __device__ __forceinline__ float4* staged() const { return at<float4>(shape.staged); }
  // b_ih, then b_hh of the block's units, [2][G][units].
  __device__ __forceinline__ float* bias() const { return at<float>(shape.bias); }
  // The parameters of the block's units, [kParams][units]. They come right behind bias().
  __device__ __forceinline__ float* params() const { return at<float>(shape.params); }
  // The part of a stage's weights that is not in registers.
  template <class Vector>
  __device__ __forceinline__ Vector* weights(int stage) const {
    return at<Vector>(shape.tile[stage].weights);
  }

  // The product of sequence j's row of the source with weight row r, summed over the slices.
  __device__ __forceinline__ float sum_slices(int stage, int j, int r) const {
    const ResidentTile& tile = shape.tile[stage];
    const float* partial = partials() + j * tile.ld + r;
    float sum = 0;
    for (int slice = 0; slice < tile.slices; ++slice)
      sum += partial[slice * shape.rows_pad * tile.ld];
    return sum;
  }

  // The address at an offset in bytes.
  template <class Value>
  __device__ __forceinline__ Value* at(int offset) const {
    return reinterpret_cast<Value*>(base + offset);
  }
};

}  // namespace fusedrnn::cuda
