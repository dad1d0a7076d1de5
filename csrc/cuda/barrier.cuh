// A barrier among blocks of a grid, all of which run together. It has two halves, arrive and wait.
// Work that no other block waits for goes between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cluster.cuh"

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
    __syncthreads();
    count();
  }

  // Does nothing: only a block of a cluster has something to do before it ends.
  __device__ __forceinline__ void leave() {}

  // Waits until all blocks have arrived as often as this one.
  __device__ __forceinline__ void wait() {
    if (kMayBeAbsent && !arrivals_) return;
    poll();
    __syncthreads();
  }

 protected:
  // One thread counts the arrival.
  __device__ __forceinline__ void count() {
    expected_ += blocks_;
    if (threadIdx.x == 0)
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals_) : "memory");
  }
  // Another block, which arrives as often as this one, counts the arrival of both.
  __device__ __forceinline__ void count_elsewhere() { expected_ += blocks_; }

  // One thread waits for the arrivals of all.
  __device__ __forceinline__ void poll() {
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
  }

 private:
  unsigned* arrivals_;
  unsigned blocks_;
  unsigned expected_ = 0;
  unsigned spin_limit_;
  const char* kernel_;
};

// The same among blocks in clusters. If the blocks of a cluster arrive as one, they wait for each
// other and the first of them counts, so `arrivals` counts clusters instead of blocks.
class ClusterBarrier : Barrier<false> {
 public:
  __device__ __forceinline__ ClusterBarrier(unsigned* arrivals, unsigned blocks, bool as_one,
                                            const BlockShape& shape, unsigned spin_limit,
                                            const char* kernel)
      : Barrier<false>(arrivals, as_one ? blocks / shape.cluster : blocks, spin_limit, kernel),
        as_one_(as_one),
        counts_(rank_in_cluster(shape) == 0) {}

  __device__ __forceinline__ void arrive() {
    if (!as_one_) return Barrier<false>::arrive();
    arrive_in_cluster();
    if (counts_) {
      wait_in_cluster();
      count();
    } else {
      // The wait follows in wait(), so that this block can go on until then.
      count_elsewhere();
      owes_wait_ = true;
    }
  }

  __device__ __forceinline__ void wait() {
    pay_wait();
    Barrier<false>::wait();
  }

  // Must be called before the block ends. PTX does not say that a block may end between its arrival
  // in a cluster and its wait. Nothing else is owed to the others: what they write to its shared
  // memory is there before the last wait for sums.
  __device__ __forceinline__ void leave() { pay_wait(); }

 private:
  __device__ __forceinline__ void pay_wait() {
    if (owes_wait_) wait_in_cluster();
    owes_wait_ = false;
  }

  const bool as_one_, counts_;
  bool owes_wait_ = false;  // whether the block has arrived in its cluster and not waited yet
};

}  // namespace fusedrnn::cuda
