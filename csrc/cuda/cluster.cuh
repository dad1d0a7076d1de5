// Clusters of blocks (from sm_90 on), whose blocks may write to each other's shared memory. The
// blocks of a cluster have neighbouring units of the same sequences, and they share the source of a
// product: each multiplies one part of K, for the weight rows of all of them. So it reads a part of
// the source, and its weights take no more room than without clusters. Then each block adds up its
// slices and puts the sums into the shared memory of the block that owns the weight row. That block
// adds the sums of all.
//
// A block receives sums again only after a barrier of all blocks of its sequences, at which it has
// arrived after it read the sums before. So one wait of the cluster in each product is enough.
#pragma once

#include "shared_memory.cuh"

namespace fusedrnn::cuda {

#if __CUDA_ARCH__ >= 900
// A barrier of a cluster. What a thread wrote before it arrived is visible to those that waited.
__device__ __forceinline__ void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_in_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Stores a value in the shared memory of block `rank`, where this block would have it at `p`.
__device__ __forceinline__ void store_in_block(float* p, int rank, float value) {
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(p))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}
#else
// Kernels with clusters stop at once in code for less than sm_90.
__device__ void arrive_in_cluster();
__device__ void wait_in_cluster();
__device__ void store_in_block(float* p, int rank, float value);
#endif

// The number of this block in its cluster. A cluster lies along x.
__device__ __forceinline__ int rank_in_cluster(const BlockShape& shape) {
  return static_cast<int>(blockIdx.x) % shape.cluster;
}

// Shared memory of a block whose partial sums are those of a part of K.
struct ClusterMemory : SharedMemory<float> {
  // Sums of this block's weight rows, [cluster][partial_rows][R / cluster], one from each block.
  __device__ __forceinline__ float* received() const { return at<float>(shape.received); }

  // Hands the block's sums for n sequences on, and waits for those of the other blocks.
  __device__ __forceinline__ void wait_for_sums(int stage, int n) const {
    __syncthreads();
    const ProductTile& tile = shape.tile[stage];
    const int rows = tile.R / shape.cluster, rank = rank_in_cluster(shape);
#pragma unroll 1
    for (int i = threadIdx.x; i < n * tile.R; i += kThreads) {
      const int j = i / tile.R, r = i - j * tile.R, owner = r / rows;
      float* to = received() + (rank * shape.partial_rows + j) * rows + r - owner * rows;
      store_in_block(to, owner, sum_slices(stage, j, r));
    }
    arrive_in_cluster();
    wait_in_cluster();
  }

  // The product of sequence j's row of the source with this block's own weight row r, summed over
  // the parts of K in the order of the blocks.
  __device__ __forceinline__ float sum_of_product(int stage, int j, int r) const {
    const int rows = shape.tile[stage].R / shape.cluster;
    const float* from = received() + j * rows + r;
    float sum = 0;
    for (int rank = 0; rank < shape.cluster; ++rank) sum += from[rank * shape.partial_rows * rows];
    return sum;
  }
};

}  // namespace fusedrnn::cuda
