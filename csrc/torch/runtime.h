// What a layer needs from its surroundings, given by torch: threads, products and memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../cpu/layer.h"
#include "tensors.h"

namespace fusedrnn {

class TorchRuntime final : public Runtime {
 public:
  int64_t threads() const override { return torch::stable::get_num_threads(); }

  void parallel(int64_t n, const std::function<void(int64_t)>& body) override {
    if (n <= 1 || threads() == 1) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  void matmul(Matrix<const float> a, Matrix<const float> b, Matrix<float> c,
              bool accumulate) override {
    product(a, b, c, accumulate);
  }
  void matmul(Matrix<const double> a, Matrix<const double> b, Matrix<double> c,
              bool accumulate) override {
    product(a, b, c, accumulate);
  }

  void* scratch(size_t bytes) override {
    scratch_.push_back(empty({static_cast<int64_t>(bytes) + 64}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(scratch_.back().data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  template <class T>
  static Tensor wrap(Matrix<T> m) {
    const std::vector<int64_t> sizes = {m.rows, m.columns};
    const std::vector<int64_t> strides = {m.row_stride, m.column_stride};
    return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(m.data), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    scalar_of<T>());
  }

  // The shims call the CPU kernels themselves: no dispatcher, no autograd.
  template <class T>
  static void product(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, bool accumulate) {
    const Tensor ta = wrap(a), tb = wrap(b), tc = wrap(c);
    if (accumulate) {
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(tc.get(), tc.get(), ta.get(), tb.get(), 1, 1));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(tc.get(), ta.get(), tb.get()));
    }
  }

  std::vector<Tensor> scratch_;
};

}  // namespace fusedrnn
