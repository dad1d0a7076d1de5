// Large buffers in huge pages, if the system has them. The first touch of 34 MB takes 15 ms in
// small pages and 2 ms in huge ones.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(MADV_HUGEPAGE)
#define FUSEDRNN_HUGE_PAGES 1
#else
#define FUSEDRNN_HUGE_PAGES 0
#endif

namespace fusedrnn::cpu {

// Asks for huge pages for a buffer that was just allocated, if it has at least 4 MiB. NumPy has the
// same limit.
inline void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if FUSEDRNN_HUGE_PAGES
  constexpr size_t kFrom = size_t{4} << 20;
  if (bytes < kFrom) return;
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(p);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
#endif
}

// Memory from a mapping in huge pages, for weights that are so large that only L3 holds them.
// malloc may return memory in small pages, and then each step, which reads all 16 MB, misses the
// TLB again and again: LSTM (25,64,16,1024) forward took 105 ms in such memory and 67 ms here.
class HugePages {
 public:
  HugePages() = default;
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() {
#if FUSEDRNN_HUGE_PAGES
    if (mapped_) munmap(mapped_, bytes_);
#endif
  }

  // Returns memory for `bytes`. The result is null if there are fewer than 16 MiB, if this object
  // already has a mapping, or if the system gives none; the caller then allocates in its own way.
  void* map([[maybe_unused]] size_t bytes) {
#if FUSEDRNN_HUGE_PAGES
    if (bytes < kFrom || mapped_) return nullptr;
    bytes_ = (bytes + kPage - 1) / kPage * kPage + kPage;
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;  // the caller's own allocation then reports the error
    mapped_ = p;
    const auto first = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
    p = reinterpret_cast<void*>(first);
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
#else
    return nullptr;
#endif
  }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
  static constexpr size_t kFrom = 8 * kPage;
  void* mapped_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace fusedrnn::cpu
