// A barrier among blocks of a grid, all of which run together. It has two halves, arrive and wait.
// Work that no other block waits for goes between them.
#pragma once

#include <cstddef>
#include <cstdint>

// The function that a device assert calls. The driver prints the message, and the next call of the
// CUDA runtime returns cudaErrorAssert. The toolkit's headers declare it only where assert.h is
// included with asserts on.
extern "C" [[noreturn]] __device__ void __assertfail(const char* message, const char* file,
                                                     unsigned line, const char* function,
                                                     size_t char_size);

namespace fusedrnn::cuda {

// Ends the kernel with an error that names it.
__device__ __forceinline__ void give_up_waiting(const char* kernel) {
  __assertfail(
      "fusedrnn: blocks waited for others that do not arrive; FUSEDRNN_CUDA_REGIME=per_step "
      "needs no waiting, FUSEDRNN_CUDA_SPIN_LIMIT sets how long they wait",
      "barrier.cuh", __LINE__, kernel, 1);
}

// kMayBeAbsent: whether there may be no counter. Then nothing waits.
template <bool kMayBeAbsent>
class Barrier {
 public:
  // arrivals is a counter that starts at zero and that `blocks` blocks share. A block that has
  // looked at it spin_limit times in one wait stops the kernel, with an error that names the
  // kernel.
  __device__ __forceinline__ Barrier(unsigned* arrivals, unsigned blocks, unsigned spin_limit,
                                     const char* kernel)
      : arrivals_(arrivals), blocks_(blocks), spin_limit_(spin_limit), kernel_(kernel) {}

  // Says that this block has arrived. Everything that its threads wrote before is visible to every
  // block that waits for it.
  __device__ __forceinline__ void arrive() {
    if (kMayBeAbsent && !arrivals_) return;
    expected_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0)
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals_) : "memory");
  }

  // Waits until all blocks have arrived as often as this one.
  __device__ __forceinline__ void wait() {
    if (kMayBeAbsent && !arrivals_) return;
    if (threadIdx.x == 0) {
      unsigned arrived, looks = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(arrivals_)
                     : "memory");
      } while (arrived < expected_ && ++looks < spin_limit_);
      if (looks == spin_limit_) give_up_waiting(kernel_);
    }
    __syncthreads();
  }

 private:
  unsigned* arrivals_;
  unsigned blocks_;
  unsigned expected_ = 0;
  unsigned spin_limit_;
  const char* kernel_;
};

}  // namespace fusedrnn::cuda
