// csrc/torch_cuda/cuda_launcher.cpp with a fake CUDA runtime, which has two devices, records its
// calls in order, and fails if a test asks for it. A CPU tensor counts as a tensor of device 0.
// tests/kit/bindings.py builds this module, which is not part of the package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>

#include "torch_cuda/cuda_launcher.h"
#include "torch_cuda/kernels.h"

namespace {

namespace py = pybind11;

std::vector<std::string> calls;
std::map<std::string, cudaError_t> failing;
int current = 0;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
int ptx_version = 90;  // of all kernels
const char functions[5] = {};

// Records the call. "(relaxed)" means that a stream capture would allow it.
cudaError_t note(const std::string& function, const std::string& what) {
  calls.push_back(what.empty() ? function : function + " " + what);
  if (mode == cudaStreamCaptureModeRelaxed) calls.back() += " (relaxed)";
  const auto found = failing.find(function);
  return found == failing.end() ? cudaSuccess : found->second;
}

std::string name_of(const void* function) {
  std::string name = "?";
  fusedrnn::cuda::for_all_kernels([&](const fusedrnn::cuda::Kernel& kernel) {
    if (kernel.function == function) name = kernel.name;
  });
  return name;
}

}  // namespace

namespace fusedrnn::cuda {
const std::vector<Kernel> kStepKernels = {{"step", &functions[0]}};
const std::vector<Kernel> kAroundLoopKernels = {{"rows", &functions[1]}};
const std::vector<Kernel> kResidentFmaKernels = {{"resident_fma", &functions[2]}};
const std::vector<Kernel> kResidentMmaKernels;
const std::vector<Kernel> kClusteredFmaKernels;
const std::vector<Kernel> kClusteredMmaKernels = {{"clustered_backward_mma_bf16", &functions[4]}};
const std::vector<Kernel> kStreamedFmaKernels;
const std::vector<Kernel> kStreamedMmaKernels;
const std::vector<Kernel> kBindingKernels = {{"store", &functions[3]}};
}  // namespace fusedrnn::cuda

// --- The CUDA runtime ----------------------------------------------------------------------------

extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorAssert ? "cudaErrorAssert" : "cudaErrorOther";
}
const char* cudaGetErrorString(cudaError_t) { return "made up"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return note("count", "");
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  return note("set", std::to_string(device));
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      break;
    default:
      *value = 1000 + which;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "Made-up GPU");
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  *attributes = {};
  attributes->numRegs = 200;
  attributes->ptxVersion = ptx_version;
  attributes->maxThreadsPerBlock = 256;
  return note("load", name_of(function));
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  return note("allow", name_of(function) + " " + std::to_string(value));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  std::ostringstream text;
  text << name_of(function) << " " << config->gridDim.x << "x" << config->gridDim.y << "x"
       << config->gridDim.z << " of " << config->blockDim.x << ", " << config->dynamicSmemBytes
       << " bytes";
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) text << ", cooperative";
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      text << ", clusters of " << attribute.val.clusterDim.x;
  }
  return note("launch", text.str());
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return note("zero", ""); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = 7;
  *total = 1000;
  return note("memory", "");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13010;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int,
                                                          size_t bytes) {
  *blocks = 1;
  return note("occupancy", name_of(function) + " " + std::to_string(bytes));
}

// As if each of eight processing clusters had 17 multiprocessors.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  const int blocks = static_cast<int>(config->attrs[0].val.clusterDim.x);
  *clusters = 8 * (17 / blocks);
  return note("clusters", name_of(function) + " " + std::to_string(config->gridDim.x) + "x" +
                              std::to_string(config->gridDim.y) + " in " + std::to_string(blocks) +
                              " of " + std::to_string(config->blockDim.x) + ", " +
                              std::to_string(config->dynamicSmemBytes));
}

// --- Functions of torch that need a GPU ----------------------------------------------------------

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  calls.push_back("guard " + std::to_string(index));
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_stream(int32_t, StreamHandle* stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_stream(StreamHandle) { return 0; }
AOTITorchError torch_stream_native_handle(StreamHandle, void** native) {
  *native = nullptr;
  return 0;
}

}  // extern "C"

PYBIND11_MODULE(_cuda_runtime, m) {
  using fusedrnn::cuda::CudaLauncher;
  const auto tensor = [] {
    const int64_t one = 1;
    float* memory = new float[1]();  // never freed
    AtenTensorHandle made = nullptr;
    fusedrnn::check_torch(
        aoti_torch_create_tensor_from_blob(memory, 1, &one, &one, 0, aoti_torch_dtype_float32(),
                                           aoti_torch_device_type_cpu(), 0, &made));
    return fusedrnn::Tensor(made);
  };
  m.def(
      "launch",
      [=](const std::string& kernel, size_t shared_bytes, bool cooperative, unsigned cluster) {
        CudaLauncher(tensor()).launch({.kernel = kernel,
                                       .grid = {2, 3, 1},
                                       .block = {256},
                                       .shared_bytes = shared_bytes,
                                       .cooperative = cooperative,
                                       .cluster = cluster});
      },
      py::arg("kernel"), py::arg("shared_bytes"), py::arg("cooperative"), py::arg("cluster") = 1);
  m.def("describe_device", fusedrnn::cuda::describe_device);
  m.def("blocks_together", fusedrnn::cuda::blocks_together);
  m.def("calls", [] { return std::exchange(calls, {}); });
  m.def("compile_for", [](int version) { ptx_version = version; });
  m.def("make_current", [](int device) { current = device; });
  m.def("fail", [](const std::string& function, int error) {
    if (error == 0) {
      failing.erase(function);
    } else {
      failing[function] = static_cast<cudaError_t>(error);
    }
  });
}
