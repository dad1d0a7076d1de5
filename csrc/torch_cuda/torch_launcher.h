// The part of a Launcher that torch implements: memory and matrix products, on the device of a
// tensor and on its current stream.
#pragma once

#include <algorithm>

#include "../cuda/launcher.h"
#include "../torch/tensors.h"

namespace fusedrnn::cuda {

// The most scratch memory for a product that torch does not write to its place itself, because the
// result is added to c or rounded to 16 bits.
constexpr size_t kProductBytes = size_t(64) << 20;

// How many rows of such a product are computed at once. The product is [M, N], with value_bytes for
// each value. It is cut into strips of about equal size that fit `bytes`. A strip is some
// consecutive rows of the product, at least one.
inline int64_t strip_rows(int64_t M, int64_t N, size_t value_bytes, size_t bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, N * static_cast<int64_t>(value_bytes));
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(bytes) / row_bytes);
  const int64_t strips = std::max<int64_t>(1, (M + most - 1) / most);
  return (M + strips - 1) / strips;
}

class TorchLauncher : public Launcher {
 public:
  explicit TorchLauncher(const Tensor& like);

  // An uninitialised tensor. If memory is lacking, the error says so under every version of torch.
  Tensor empty(Sizes sizes, ScalarType dtype);

  void multiply(const MatrixProduct& product) override;
  void scratch(std::vector<ScratchPart>& parts) override;

 protected:
  struct Memory {
    size_t free, total;  // bytes
  };

  // As empty, but under torch before 2.13 the error does not give the reason.
  virtual Tensor allocate(Sizes sizes, ScalarType dtype);
  // The free and total memory of the device. Throws if the device does not answer.
  virtual Memory memory() const = 0;
  // out = a b, all 2-D. out is float32 or float64. Its dtype is that of a and b, or float32 with
  // 16-bit a and b.
  virtual void mm(const Tensor& a, const Tensor& b, const Tensor& out);

  size_t product_limit_ = kProductBytes;

 private:
  // A tensor [rows, columns] over the memory of m, whose strides follow m.transposed.
  Tensor tensor_of(const Matrix<const void>& m, Dtype dtype) const;
  void* product_memory(size_t bytes);

  const Tensor& like_;
  int32_t device_type_ = 0, device_index_ = 0;
  // Scratch memory, which is freed when the op returns. The allocator then gives it only to work
  // that is enqueued later on the same stream.
  std::vector<Tensor> kept_;
  OptionalTensor product_;  // memory for products, freed in the same way
};

// Whether torch's current settings allow TF32 in float32 products.
bool torch_allows_tf32();

}  // namespace fusedrnn::cuda
