// Registers the ops for a GPU. Their schemas are in csrc/torch/ops.cpp.
#include "../torch/passes.h"
#include "cuda_launcher.h"
#include "gpu_engine.h"

namespace fusedrnn {
namespace {

using CudaEngine = GpuEngine<cuda::CudaLauncher>;

// Returns lines of `key value`, which fusedrnn._library reads. It touches no device.
std::string cuda_info() {
  int runtime = 0;
  cudaRuntimeGetVersion(&runtime);
  std::ostringstream text;
  text << "architectures " << cuda::compiled_architectures() << "\n";
  text << "runtime " << runtime / 1000 << "." << runtime % 1000 / 10 << "\n";
  return text.str();
}

std::string device_facts(int64_t index) { return cuda::describe_device(index); }

int64_t occupancy(StringHandle kernel, int64_t shared_bytes, int64_t index) {
  return cuda::blocks_together(take_string(kernel), shared_bytes, index);
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("forward", &fusedrnn::boxed<&fusedrnn::forward<fusedrnn::CudaEngine>>);
  m.impl("backward", &fusedrnn::boxed<&fusedrnn::backward<fusedrnn::CudaEngine>>);
  m.impl("_step", &fusedrnn::boxed<&fusedrnn::step<fusedrnn::CudaEngine>>);
  m.impl("_step_backward", &fusedrnn::boxed<&fusedrnn::step_backward<fusedrnn::CudaEngine>>);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", &fusedrnn::boxed<&fusedrnn::cuda_info>);
  m.impl("_device_facts", &fusedrnn::boxed<&fusedrnn::device_facts>);
  m.impl("_occupancy", &fusedrnn::boxed<&fusedrnn::occupancy>);
}
