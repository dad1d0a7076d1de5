// The part of a Launcher that torch implements: memory and matrix products, on the device of a
// tensor and on its current stream.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../cuda/launcher.h"
#include "../torch/tensors.h"

namespace fusedrnn::cuda {

// The most scratch memory for a product that torch does not write to its place itself, because the
// result is added to c or rounded to 16 bits.
constexpr size_t kProductBytes = size_t(64) << 20;
// The least of it, so that the small products of a pass take one allocation.
constexpr size_t kLeastProductBytes = size_t(1) << 20;

// How many rows of such a product are computed at once. The product is [M, N], with value_bytes for
// each value. It is cut into strips of about equal size that fit `bytes`. A strip is some
// consecutive rows of the product, at least one.
inline int64_t strip_rows(int64_t M, int64_t N, size_t value_bytes, size_t bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, N * static_cast<int64_t>(value_bytes));
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(bytes) / row_bytes);
  const int64_t strips = std::max<int64_t>(1, (M + most - 1) / most);
  return (M + strips - 1) / strips;
}

// Torch's C functions for products on one kind of device. They need no lookup of an op by its name.
// A function that this torch lacks is null, and the op is called by its name instead. Torch's
// headers declare these functions for code that TorchInductor generates
// (inductor/aoti_torch/generated/c_shim_cuda.h).
struct Products {
  AOTITorchError (*mm_out)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) = nullptr;
  AOTITorchError (*mm_dtype_out)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b,
                                 int32_t out_dtype) = nullptr;
  // out = beta c + alpha a b, where c may be out.
  AOTITorchError (*addmm_out)(AtenTensorHandle out, AtenTensorHandle c, AtenTensorHandle a,
                              AtenTensorHandle b, double beta, double alpha) = nullptr;
};

// The functions for a kind of device, "cuda" or "cpu", in a library of torch that is loaded.
Products products_of(const char* library, const std::string& device);

class TorchLauncher : public Launcher {
 public:
  TorchLauncher(const Tensor& like, const Products& products);

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
  // out = a b, or out += a b, all 2-D. out is float32 or float64. Its dtype is that of a and b, or
  // float32 with 16-bit a and b. It is added to only if can_add says so.
  virtual void mm(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate);

  size_t product_limit_ = kProductBytes;

 private:
  // A tensor over the memory of a matrix.
  struct View {
    Matrix<const void> matrix;
    Dtype dtype;
    Tensor tensor;
  };

  // Whether torch itself can add a product to c.
  bool can_add(const MatrixProduct& p) const;
  // A tensor [rows, columns] over the memory of m, whose strides follow m.transposed.
  Tensor tensor_of(const Matrix<const void>& m, Dtype dtype);
  Tensor make_tensor(const Matrix<const void>& m, Dtype dtype) const;
  void* product_memory(size_t bytes);

  const Tensor& like_;
  const Products& products_;
  int32_t device_type_ = 0, device_index_ = 0;
  // The latest results of tensor_of, the last one first. Most matrices of a time step are those of
  // the step before, and to make a tensor torch asks CUDA about the address. A cell of two stages
  // has six matrices in a step.
  static constexpr size_t kViews = 8;
  std::vector<View> views_;
  // Scratch memory, which is freed when the op returns. The allocator then gives it only to work
  // that is enqueued later on the same stream.
  std::vector<Tensor> kept_;
  OptionalTensor product_;  // memory for products, freed in the same way
};

// Whether torch's current settings allow TF32 in float32 products.
bool torch_allows_tf32();

}  // namespace fusedrnn::cuda
