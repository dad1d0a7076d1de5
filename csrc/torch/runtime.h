// What a layer needs from its surroundings, given by torch: threads and memory.
#pragma once

#include <algorithm>
#include <atomic>

#include "../cpu/layer.h"
#include "tensors.h"

namespace fusedrnn {

// One mapping of its own, in huge pages, for weights that only L3 holds. What malloc hands out for
// them may lie in small pages, and then a step's way through 16 MB misses the TLB all along: LSTM
// (25,64,16,1024) forward took 105 ms there and 67 here.
class HugePages {
 public:
  HugePages() = default;
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() {
#if defined(__linux__)
    if (mapped_) munmap(mapped_, bytes_);
#endif
  }

  // Memory for `bytes`, or null where they are few, the mapping is taken or none can be had.
  void* map([[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < kFrom || mapped_) return nullptr;
    bytes_ = (bytes + kPage - 1) / kPage * kPage + kPage;
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;  // the caller's way has an error message
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

class TorchRuntime final : public Runtime {
 public:
  int64_t threads() const override { return torch::stable::get_num_threads(); }

  void parallel(int64_t n, const std::function<void(int64_t)>& body) override {
    if (n <= 1 || threads() == 1) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    // Workers claim one call after another: a worker that the scheduler keeps waiting takes none.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(n, threads()), 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < n; i = next++) body(i);
    });
  }

  void* scratch(size_t bytes) override {
    if (void* fresh = far_.map(bytes)) return fresh;
    scratch_.push_back(empty({static_cast<int64_t>(bytes) + 64}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(scratch_.back().data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  HugePages far_;
  std::vector<Tensor> scratch_;
};

}  // namespace fusedrnn
