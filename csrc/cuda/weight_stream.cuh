// Weights that have no room in registers and shared memory lie in global memory, mostly in L2, in
// the order in which threads read them, and come through a ring in shared memory. Each thread
// copies only what it reads itself, so no thread waits for another one. The weights are the same
// at every step: after the last of them the stream begins again with the first. So the first ones
// of the next step are on their way while the block waits for other blocks.
//
// An asynchronous copy is ordered after everything that its thread did before (PTX ISA,
// "Asynchronous Operations"). So it sees the weights that the thread wrote to global memory at the
// beginning of the launch, and it does not overwrite a place of the ring before the thread has read
// it.
#pragma once

#include "args.h"

namespace fusedrnn::cuda {

// Copies bytes from global to shared memory, without waiting for them from sm_80 on.
template <int kBytes>
__device__ __forceinline__ void copy_ahead(char* to, const char* from) {
  static_assert(kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from) : "memory");
  }
#else
  for (int i = 0; i < kBytes; i += 8)
    *reinterpret_cast<uint2*>(to + i) = *reinterpret_cast<const uint2*>(from + i);
#endif
}
__device__ __forceinline__ void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the latest `left` groups of copies are complete.
template <int left>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

// A stream of items of kParts parts. A part has kPart bytes and is kPartStride bytes from the one
// before. Items are kItemStride bytes apart, both in global memory and in the ring. Both pointers
// are those of this thread's first part.
template <int kPart, int kParts, int kPartStride, int kItemStride>
class WeightStream {
 public:
  static constexpr int kSlots = kRingBytes / (kPart * kParts);

  // Begins to copy. Without items, nothing may be taken.
  __device__ __forceinline__ void begin(const char* from, char* ring, int items) {
    from_ = from;
    ring_ = ring;
    items_ = items;
    if (items == 0) return;
#pragma unroll 1
    for (slot_ = 0; slot_ < kSlots; ++slot_) copy();
    slot_ = 0;
  }

  // This thread's first part of the next item, which has arrived.
  __device__ __forceinline__ const char* take() const {
    // Other streams of the thread may have begun copies since, so this may wait for more.
    wait_for_copies<kSlots - 1>();
    return ring_ + slot_ * kItemStride;
  }

  // Uses the place of the item that was taken for one that comes later.
  __device__ __forceinline__ void next() {
    copy();
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
  }

 private:
  __device__ __forceinline__ void copy() {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      copy_ahead<kPart>(ring_ + slot_ * kItemStride + part * kPartStride,
                        from_ + int64_t(item_) * kItemStride + part * kPartStride);
    close_copies();
    item_ = item_ + 1 == items_ ? 0 : item_ + 1;
  }

  const char* from_;
  char* ring_;
  int items_ = 0;
  int item_ = 0;  // the item that is copied next
  int slot_ = 0;  // the place of the item that is taken next
};

// Stands for the stream of a product whose weights all have room.
struct NoStream {};

}  // namespace fusedrnn::cuda
