#include "cuda_launcher.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

#include "../cuda/args.h"
#include "../cuda/plan.h"
#include "kernels.h"

namespace fusedrnn::cuda {

struct KernelFacts {
  const void* function;
  cudaFuncAttributes attributes;
  size_t shared_allowed;  // bytes of dynamic shared memory that the kernel may ask for
};

struct DeviceFacts {
  Device limits;
  bool cooperative;  // whether the device has cooperative launches
  std::string name;
  std::map<std::string, KernelFacts> kernels;  // all kernels of the library
  std::mutex mutex;                            // guards every shared_allowed
};

namespace {

using torch::stable::accelerator::DeviceGuard;

// The dynamic shared memory that a kernel may ask for before a call of the CUDA runtime raises it.
constexpr size_t kSharedByDefault = size_t(48) << 10;

std::string text_of(cudaError_t error) {
  return std::string(cudaGetErrorName(error)).append(" (").append(cudaGetErrorString(error)) + ")";
}

// The explanation of cudaErrorAssert in error messages.
constexpr const char* kAsserted =
    "a kernel of this process stopped itself, and said why on standard error (for one of "
    "fusedrnn's: its blocks waited too long for each other; FUSEDRNN_CUDA_REGIME=per_step needs no "
    "waiting). The device is of no use to this process any more: start it again";

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next call does not report it again
  if (error == cudaErrorAssert) fail(what, " failed: ", text_of(error), "; ", kAsserted);
  fail(what, " failed: ", text_of(error));
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

// While an object of this class lives, its thread may make calls that would otherwise break a
// capture of a stream into a CUDA graph. We load kernels and set their attributes under it. These
// calls enqueue nothing, so the captured graph misses nothing.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  // The constructor exchanges this for the thread's own mode, which the destructor restores.
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

std::string way_out(cudaError_t error, const DeviceFacts& device);
cudaError_t allow_shared(DeviceFacts& device, KernelFacts& kernel, size_t bytes);

// Loads all kernels, at the first call on a device. CUDA would otherwise load a kernel when it is
// first used. That may wait for running kernels, and it cannot happen in a capture.
// cudaFuncGetAttributes counts as a use.
void load_kernels(DeviceFacts& device) {
  const RelaxedCapture relaxed;
  for_all_kernels([&](const Kernel& kernel) {
    KernelFacts facts = {kernel.function, {}, kSharedByDefault};
    const cudaError_t error = cudaFuncGetAttributes(&facts.attributes, kernel.function);
    if (error != cudaSuccess) {
      cudaGetLastError();
      fail("CUDA kernel ", kernel.name, " cannot be loaded: ", text_of(error), "; ",
           way_out(error, device));
    }
    device.kernels.emplace(kernel.name, facts);
  });
}

cudaLaunchAttribute cluster_attribute(unsigned blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {blocks, 1, 1};
  return attribute;
}

// Sets how many blocks of clusters run together, one on each multiprocessor. It depends on how many
// multiprocessors each processing cluster of this very device has, which only the runtime knows. A
// device that does not say it has no clusters for the plan.
void count_clusters(DeviceFacts& device) {
  const auto found = device.kernels.find("clustered_backward_mma_bf16");
  if (device.limits.capability < 90 || !device.cooperative || found == device.kernels.end()) return;
  KernelFacts& kernel = found->second;
  const RelaxedCapture relaxed;
  // With all the shared memory that a block may have, no two blocks share a multiprocessor.
  const size_t bytes = device.limits.shared_per_block;
  if (allow_shared(device, kernel, bytes) != cudaSuccess) {
    cudaGetLastError();
    return;
  }
  for (size_t i = 0; i < kClusterSizes.size(); ++i) {
    const auto blocks = static_cast<unsigned>(kClusterSizes[i]);
    cudaLaunchAttribute cluster = cluster_attribute(blocks);
    cudaLaunchConfig_t config = {};
    config.gridDim = {blocks, 1, 1};
    config.blockDim = {kThreads, 1, 1};
    config.dynamicSmemBytes = bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &config) != cudaSuccess) {
      cudaGetLastError();
      return;
    }
    device.limits.cluster_blocks[i] = clusters * static_cast<int>(blocks);
  }
}

// Collects the facts of the current device, which must be device `index`.
std::unique_ptr<DeviceFacts> facts_of(int index) {
  auto facts = std::make_unique<DeviceFacts>();
  const auto bytes = [&](cudaDeviceAttr which) {
    return static_cast<size_t>(attribute(which, index));
  };
  facts->cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  facts->limits = {
      .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                    attribute(cudaDevAttrComputeCapabilityMinor, index),
      // Without cooperative launches no layer can be resident, so the plan must see no room.
      .sms = facts->cooperative ? attribute(cudaDevAttrMultiProcessorCount, index) : 0,
      .threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index),
      .registers_per_sm = attribute(cudaDevAttrMaxRegistersPerMultiprocessor, index),
      .shared_per_block = bytes(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .shared_per_sm = bytes(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      .shared_reserved = bytes(cudaDevAttrReservedSharedMemoryPerBlock),
      .l2_bytes = bytes(cudaDevAttrL2CacheSize),
      .cluster_blocks = {},  // count_clusters
  };
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  facts->name = properties.name;
  facts->limits.name = facts->name;  // the facts of a device are never destroyed
  load_kernels(*facts);
  // The driver may have compiled the kernels from PTX for an older architecture. Then they have
  // what that has: no tensor cores, or no clusters.
  for (const auto& [kernel, of] : facts->kernels)
    facts->limits.capability = std::min(facts->limits.capability, of.attributes.ptxVersion);
  count_clusters(*facts);
  return facts;
}

// Makes a device the current one. This library has a CUDA runtime of its own beside torch's, and
// both use the current context. If that belongs to the device already, it stays: cudaSetDevice
// might choose another context of the device.
void use_device(int index) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current != index) check_cuda(cudaSetDevice(index), "cudaSetDevice");
}

// Returns the facts of a device and makes it the current one.
DeviceFacts& facts_on(int index) {
  use_device(index);
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<DeviceFacts>> devices;
  const std::lock_guard lock(mutex);
  std::unique_ptr<DeviceFacts>& facts = devices[index];
  if (!facts) facts = facts_of(index);
  return *facts;
}

// Advice on an error of a launch, or of loading a kernel, for the message.
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
    case cudaErrorInvalidClusterSize:
      return "leave cluster= out of FUSEDRNN_CUDA_PLAN";
    case cudaErrorAssert:
      return kAsserted;
    case cudaErrorMemoryAllocation:
      return "take a smaller batch or shorter sequences";
    default:
      return "the error may come from work enqueued before: CUDA_LAUNCH_BLOCKING=1 shows where";
  }
}

KernelFacts& kernel_facts(DeviceFacts& device, const std::string& name) {
  const auto found = device.kernels.find(name);
  check(found != device.kernels.end(), "no CUDA kernel is named ", name);
  return found->second;
}

// Allows a kernel to ask for `bytes` of dynamic shared memory.
cudaError_t allow_shared(DeviceFacts& device, KernelFacts& kernel, size_t bytes) {
  const std::lock_guard lock(device.mutex);
  if (bytes <= kernel.shared_allowed) return cudaSuccess;
  const RelaxedCapture relaxed;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) kernel.shared_allowed = bytes;
  return error;
}

// Checks the index of a device that a caller gives. Throws if there is no such GPU.
int checked_index(int64_t index) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    fail("there is no GPU: ", text_of(error));
  }
  check(0 <= index && index < devices, "index must be that of one of ", devices, " GPUs, got ",
        index);
  return static_cast<int>(index);
}

int index_of(const Tensor& x) {
  check(x.is_cuda(), "x must be on the GPU as other tensors are, got it on ",
        x.is_cpu() ? "the CPU" : "another device");
  return x.get_device_index();
}

// The current stream under torch before 2.13. The function that returns it is in torch's CUDA
// library. We do not link with that library, since a build of torch without CUDA lacks it, but it
// is loaded whenever x is on a GPU.
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

// Torch's functions for products on a GPU. They are in torch's CUDA library, as the function above.
const Products& cuda_products() {
  static const Products products = products_of("libtorch_cuda.so", "cuda");
  return products;
}

}  // namespace

const char* compiled_architectures() { return FUSEDRNN_CUDA_ARCHITECTURES; }

CudaLauncher::CudaLauncher(const Tensor& x)
    : TorchLauncher(x, cuda_products()),
      index_(index_of(x)),
      guard_(index_),
      facts_(facts_on(index_)) {
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
  return kernel_facts(facts_, kernel).attributes.numRegs;
}

void CudaLauncher::launch(const Launch& l) {
  KernelFacts& kernel = kernel_facts(facts_, l.kernel);
  cudaError_t error = allow_shared(facts_, kernel, l.shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (l.cooperative) {
      attributes[count].id = cudaLaunchAttributeCooperative;
      attributes[count++].val.cooperative = 1;
    }
    if (l.cluster > 1) attributes[count++] = cluster_attribute(l.cluster);
    cudaLaunchConfig_t config = {};
    config.gridDim = {l.grid.x, l.grid.y, l.grid.z};
    config.blockDim = {l.block.x, l.block.y, l.block.z};
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = count;
    void* arguments[] = {const_cast<void*>(l.args)};
    error = cudaLaunchKernelExC(&config, kernel.function, arguments);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail("CUDA kernel ", l.kernel, " did not start: ", text_of(error), "; grid ", l.grid.x, "x",
       l.grid.y, "x", l.grid.z, ", block ", l.block.x, "x", l.block.y, "x", l.block.z, ", ",
       l.shared_bytes, " bytes of shared memory", l.cooperative ? ", cooperative" : "",
       l.cluster > 1 ? ", in clusters of " + std::to_string(l.cluster) : "", "; ",
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

std::string describe_device(int64_t given_index) {
  const int index = checked_index(given_index);
  const DeviceGuard guard(index);
  const DeviceFacts& facts = facts_on(index);
  int driver = 0, runtime = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  std::ostringstream text;
  text << "name " << facts.name << "\n" << to_text(facts.limits);
  text << "cooperative_launch " << facts.cooperative << "\n";
  text << "driver " << driver / 1000 << "." << driver % 1000 / 10 << "\n";
  text << "runtime " << runtime / 1000 << "." << runtime % 1000 / 10 << "\n";
  for (const auto& [name, kernel] : facts.kernels) {
    const cudaFuncAttributes& a = kernel.attributes;
    text << "kernel " << name << " registers " << a.numRegs << " shared " << a.sharedSizeBytes
         << " local " << a.localSizeBytes << " constant " << a.constSizeBytes << " max_threads "
         << a.maxThreadsPerBlock << "\n";
  }
  return text.str();
}

int blocks_together(const std::string& name, int64_t shared_bytes, int64_t given_index) {
  check(shared_bytes >= 0, "shared_bytes must not be negative, got ", shared_bytes);
  const int index = checked_index(given_index);
  const DeviceGuard guard(index);
  DeviceFacts& facts = facts_on(index);
  KernelFacts& kernel = kernel_facts(facts, name);
  const auto bytes = static_cast<size_t>(shared_bytes);
  check(bytes <= facts.limits.shared_per_block, "shared_bytes must be at most ",
        facts.limits.shared_per_block, " on this device, got ", shared_bytes);
  check_cuda(allow_shared(facts, kernel, bytes), "cudaFuncSetAttribute");
  int blocks = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kThreads, bytes),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

}  // namespace fusedrnn::cuda
