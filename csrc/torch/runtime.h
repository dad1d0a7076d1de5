// What a layer on the CPU needs from its surroundings, given by torch: threads and memory.
#pragma once

#include <algorithm>
#include <atomic>

#include "../cpu/layer.h"
#include "huge_pages.h"
#include "tensors.h"

namespace fusedrnn {

// As new_empty, in huge pages where it is large.
inline Tensor empty_on_cpu(const Tensor& like, Sizes sizes, ScalarType dtype) {
  const Tensor t = new_empty(like, sizes, dtype);
  advise_huge_pages(t.data_ptr(), bytes_of(t));
  return t;
}

class TorchRuntime final : public Runtime {
 public:
  explicit TorchRuntime(const Tensor& like) : like_(like) {}

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
    if (void* mapped = mapping_.map(bytes)) return mapped;
    scratch_.push_back(empty_on_cpu(like_, {static_cast<int64_t>(bytes) + 64}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(scratch_.back().data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  const Tensor& like_;  // scratch is where it is
  HugePages mapping_;
  std::vector<Tensor> scratch_;
};

}  // namespace fusedrnn
