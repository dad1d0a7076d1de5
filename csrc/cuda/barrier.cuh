// A barrier among the blocks of a grid that all run together, in two halves: work that nobody waits
// for goes between them.
#pragma once

#include <cstdint>

namespace fusedrnn::cuda {

class Barrier {
 public:
  // arrivals: a counter that starts at zero, for `blocks` blocks.
  __device__ __forceinline__ Barrier(unsigned* arrivals, unsigned blocks)
      : arrivals_(arrivals), blocks_(blocks) {}

  // Everything that the block's threads wrote before is visible to whoever waits for it.
  __device__ __forceinline__ void arrive() {
    expected_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0)
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals_) : "memory");
  }

  // Waits until all blocks have arrived as often as this one.
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(arrivals_)
                     : "memory");
      } while (arrived < expected_);
    }
    __syncthreads();
  }

 private:
  unsigned* arrivals_;
  unsigned blocks_;
  unsigned expected_ = 0;
};

}  // namespace fusedrnn::cuda
