// The part of a Launcher that torch gives: memory and matrix products, on the device and the
// current stream of a tensor.
#pragma once

#include <algorithm>

#include "../cuda/launcher.h"
#include "../torch/tensors.h"

namespace fusedrnn::cuda {

// Scratch memory at most for a product whose result is not torch's to write: one that is added to
// something, or rounded to 16 bits.
constexpr size_t kProductBytes = size_t(64) << 20;

// How many rows of such a product are computed at once. The product is [M, N] and a value takes
// value_bytes. The slices have about equal size, and each fits in `bytes` unless a single row does
// not.
inline int64_t slice_rows(int64_t M, int64_t N, size_t value_bytes, size_t bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, N * static_cast<int64_t>(value_bytes));
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(bytes) / row_bytes);
  const int64_t slices = std::max<int64_t>(1, (M + most - 1) / most);
  return (M + slices - 1) / slices;
}

class TorchLauncher : public Launcher {
 public:
  explicit TorchLauncher(const Tensor& like);

  // Uninitialised. A lack of memory is an error that says so under every torch.
  Tensor empty(Sizes sizes, ScalarType dtype);

  void multiply(const Product& product) override;
  void* scratch(size_t bytes) override;

 protected:
  struct Memory {
    size_t free, total;  // bytes
  };

  // As empty, but that a torch before 2.13 does not say why it failed.
  virtual Tensor allocate(Sizes sizes, ScalarType dtype);
  // What the device has; throws where it cannot be asked.
  virtual Memory memory() const = 0;
  // out = a b; all 2-D, out float32 or float64, of another dtype than a and b only where it is
  // float32.
  virtual void mm(const Tensor& a, const Tensor& b, const Tensor& out);

  size_t product_limit_ = kProductBytes;

 private:
  // rows x columns of memory, transposed after that where asked for.
  Tensor tensor_of(const Matrix<const void>& m, Dtype dtype) const;
  void* product_memory(size_t bytes);

  const Tensor& like_;
  int32_t device_type_ = 0, device_index_ = 0;
  // Given back when the op returns. The allocator hands it out again only to work that is enqueued
  // later on the same stream.
  std::vector<Tensor> kept_;
  OptionalTensor product_;  // bytes for slices of products; given back in the same way
};

// Whether torch may compute float32 products in TF32, as it is set now.
bool torch_allows_tf32();

}  // namespace fusedrnn::cuda
