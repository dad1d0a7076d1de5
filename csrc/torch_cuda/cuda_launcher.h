// The Launcher for a GPU. It uses the CUDA runtime, on the current stream of a tensor's device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch_launcher.h"

namespace fusedrnn::cuda {

// The architectures for which the library has machine code or PTX, in the form of
// FUSEDRNN_CUDA_ARCH: "80;90+PTX".
const char* compiled_architectures();

// The limits of a device, and the attributes of all kernels there.
struct DeviceFacts;

// The driver's figures for a device, in lines of `key value`: the limits that the plan uses, and
// the registers and memory that each kernel of the library takes there.
std::string describe_device(int64_t index);

// How many blocks of a kernel one multiprocessor runs together, by the driver's count.
int blocks_together(const std::string& kernel, int64_t shared_bytes, int64_t index);

class CudaLauncher final : public TorchLauncher {
 public:
  // The device of x is the current one for as long as the launcher lives.
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
