// The part of a Launcher that torch gives: memory and matrix products, on the device and the
// current stream of a tensor.
#pragma once

#include "../cuda/launcher.h"
#include "../torch/tensors.h"

namespace fusedrnn::cuda {

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
  // out = a b; all 2-D, out of another dtype than a and b only where it is float32.
  virtual void mm(const Tensor& a, const Tensor& b, const Tensor& out);

 private:
  // rows x columns of memory, transposed after that where asked for.
  Tensor matrix(const void* at, Dtype dtype, int64_t rows, int64_t columns, int64_t ld,
                bool transposed) const;

  const Tensor& like_;
  int32_t device_type_ = 0, device_index_ = 0;
  // Given back when the op returns. The allocator hands it out again only to work that is enqueued
  // later on the same stream.
  std::vector<Tensor> kept_;
  void* product_ = nullptr;  // of a product that is to be added to something
  size_t product_bytes_ = 0;
};

// Whether torch may compute float32 products in TF32, as it is set now.
bool torch_allows_tf32();

}  // namespace fusedrnn::cuda
