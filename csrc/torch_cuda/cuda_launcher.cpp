#include "cuda_launcher.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

#include "kernels.h"

namespace fusedrnn::cuda {

struct KernelFacts {
  const void* function;
  int registers;
  size_t shared_allowed;  // dynamic shared memory that it may ask for
};

struct DeviceFacts {
  Device limits;
  std::string name;
  std::mutex mutex;
  std::map<std::string, KernelFacts> kernels;
};

namespace {

// Blocks may ask for more only after a call says so.
constexpr size_t kSharedByDefault = size_t(48) << 10;

std::string text_of(cudaError_t error) {
  return std::string(cudaGetErrorName(error)).append(" (").append(cudaGetErrorString(error)) + ")";
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // this error is told now, not at the next call
  fail(what, " failed: ", text_of(error));
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

std::unique_ptr<DeviceFacts> facts_of(int index) {
  auto facts = std::make_unique<DeviceFacts>();
  const auto bytes = [&](cudaDeviceAttr which) {
    return static_cast<size_t>(attribute(which, index));
  };
  facts->limits = {
      .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                    attribute(cudaDevAttrComputeCapabilityMinor, index),
      // Where blocks cannot be started together none can be resident.
      .sms = attribute(cudaDevAttrCooperativeLaunch, index)
                 ? attribute(cudaDevAttrMultiProcessorCount, index)
                 : 0,
      .threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index),
      .registers_per_sm = attribute(cudaDevAttrMaxRegistersPerMultiprocessor, index),
      .shared_per_block = bytes(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .shared_per_sm = bytes(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      .shared_reserved = bytes(cudaDevAttrReservedSharedMemoryPerBlock),
  };
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  facts->name = properties.name;
  return facts;
}

DeviceFacts& device_facts(int index) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<DeviceFacts>> devices;
  const std::lock_guard lock(mutex);
  std::unique_ptr<DeviceFacts>& facts = devices[index];
  if (!facts) facts = facts_of(index);
  return *facts;
}

// What to do about an error that a launch, or the search for a kernel, ended with.
std::string way_out(cudaError_t error, const DeviceFacts& device) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
      return std::string("this library was compiled for ")
          .append(compiled_architectures())
          .append(", the device is ")
          .append(device.name)
          .append(" (sm_")
          .append(std::to_string(device.limits.capability))
          .append("): build fusedrnn again with FUSEDRNN_CUDA_ARCH=")
          .append(std::to_string(device.limits.capability));
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
      return "the driver is older than the CUDA toolkit that compiled this library: update it, or "
             "build fusedrnn again with an older toolkit";
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorLaunchOutOfResources:
      return "the device cannot hold all blocks at once, perhaps because it is shared: "
             "FUSEDRNN_CUDA_REGIME=per_step needs less";
    case cudaErrorMemoryAllocation:
      return "take a smaller batch or shorter sequences";
    default:
      return "the error may come from work enqueued before: CUDA_LAUNCH_BLOCKING=1 shows where";
  }
}

KernelFacts& kernel_facts(DeviceFacts& device, const std::string& name) {
  const auto known = device.kernels.find(name);
  if (known != device.kernels.end()) return known->second;
  const void* function = any_kernel_named(name);
  check(function, "no CUDA kernel is named ", name);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error != cudaSuccess) {
    cudaGetLastError();
    fail("CUDA kernel ", name, " cannot be loaded: ", text_of(error), "; ", way_out(error, device));
  }
  return device.kernels.emplace(name, KernelFacts{function, attributes.numRegs, kSharedByDefault})
      .first->second;
}

int index_of(const Tensor& x) {
  check(x.is_cuda(), "x must be on the GPU as other tensors are, got it on ",
        x.is_cpu() ? "the CPU" : "another device");
  return x.get_device_index();
}

// Before torch 2.13. The function is in torch's CUDA library, with which we are not linked, since a
// build of torch without CUDA lacks it; where x is on a GPU it is loaded.
cudaStream_t current_stream_of_old_torch(int index) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(symbol);
  }();
  check(get, "this torch does not say which CUDA stream is the current one");
  void* native = nullptr;
  check_torch(get(index, &native));
  return static_cast<cudaStream_t>(native);
}

cudaStream_t current_stream(int index) {
  if (!torch_stream_native_handle) return current_stream_of_old_torch(index);
  StreamHandle stream = nullptr;
  void* native = nullptr;
  check_torch(aoti_torch_get_current_stream(index, &stream));
  const AOTITorchError got = torch_stream_native_handle(stream, &native);
  check_torch(aoti_torch_delete_stream(stream));
  check_torch(got);
  return static_cast<cudaStream_t>(native);
}

}  // namespace

const char* compiled_architectures() { return FUSEDRNN_CUDA_ARCHITECTURES; }

CudaLauncher::CudaLauncher(const Tensor& x)
    : TorchLauncher(x), index_(index_of(x)), guard_(index_), facts_(device_facts(index_)) {
  // This library has a CUDA runtime of its own beside torch's; both go by the current context.
  check_cuda(cudaSetDevice(index_), "cudaSetDevice");
  stream_ = current_stream(index_);
}

void CudaLauncher::check_device(const Tensor& t, const char* name) const {
  if (t.is_cuda() && t.get_device_index() == index_) return;
  if (t.is_cuda()) {
    fail(name, " must be on cuda:", index_, " as x is, got cuda:", t.get_device_index());
  }
  fail(name, " must be on cuda:", index_, " as x is, got ", t.is_cpu() ? "cpu" : "another device");
}

const Device& CudaLauncher::device() const { return facts_.limits; }

int CudaLauncher::registers_of(const std::string& kernel) {
  const std::lock_guard lock(facts_.mutex);
  return kernel_facts(facts_, kernel).registers;
}

void CudaLauncher::launch(const Launch& l) {
  const void* function;
  cudaError_t error = cudaSuccess;
  {
    const std::lock_guard lock(facts_.mutex);
    KernelFacts& kernel = kernel_facts(facts_, l.kernel);
    function = kernel.function;
    if (l.shared_bytes > kernel.shared_allowed) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(l.shared_bytes));
      if (error == cudaSuccess) kernel.shared_allowed = l.shared_bytes;
    }
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = {l.grid.x, l.grid.y, l.grid.z};
    config.blockDim = {l.block.x, l.block.y, l.block.z};
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = stream_;
    config.attrs = &together;
    config.numAttrs = l.cooperative ? 1 : 0;
    void* arguments[] = {const_cast<void*>(l.args)};
    error = cudaLaunchKernelExC(&config, function, arguments);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail("CUDA kernel ", l.kernel, " did not start: ", text_of(error), "; grid ", l.grid.x, "x",
       l.grid.y, "x", l.grid.z, ", block ", l.block.x, "x", l.block.y, "x", l.block.z, ", ",
       l.shared_bytes, " bytes of shared memory", l.cooperative ? ", cooperative" : "", "; ",
       way_out(error, facts_));
}

void CudaLauncher::zero(void* p, size_t bytes) {
  check_cuda(cudaMemsetAsync(p, 0, bytes, stream_), "cudaMemsetAsync");
}

CudaLauncher::Memory CudaLauncher::memory() const {
  Memory bytes = {};
  check_cuda(cudaMemGetInfo(&bytes.free, &bytes.total), "cudaMemGetInfo");
  return bytes;
}

}  // namespace fusedrnn::cuda
