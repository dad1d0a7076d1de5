// A Launcher on a GPU: the CUDA runtime, on the current stream of the device of a tensor.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch_launcher.h"

namespace fusedrnn::cuda {

// Machine code and PTX in the library, as in FUSEDRNN_CUDA_ARCH: "80;90+PTX".
const char* compiled_architectures();

// The facts of a device and of the kernels that have run there.
struct DeviceFacts;

// What the driver says of a device, in lines of `key value`: the limits by which the plan goes, and
// what each kernel of the library takes there.
std::string describe_device(int64_t index);

// Blocks of a kernel that one multiprocessor runs together, as the driver counts.
int blocks_together(const std::string& kernel, int64_t shared_bytes, int64_t index);

class CudaLauncher final : public TorchLauncher {
 public:
  // Makes the device of x the current one, for as long as this lives.
  explicit CudaLauncher(const Tensor& x);

  void check_device(const Tensor& t, const char* name) const;

  const Device& device() const override;
  int registers_of(const std::string& kernel) override;
  void launch(const Launch& launch) override;
  void zero(void* p, size_t bytes) override;

 protected:
  Memory memory() const override;

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  DeviceFacts& facts_;
  cudaStream_t stream_;
};

}  // namespace fusedrnn::cuda
