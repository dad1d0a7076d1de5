// The kernels of the library by name, for a launcher that starts them with the CUDA runtime.
#pragma once

#include <vector>

namespace fusedrnn::cuda {

struct Kernel {
  const char* name;
  const void* function;  // as cudaLaunchKernel and cudaFuncGetAttributes take it
};

// The kernels of the .cu files of this folder.
extern const std::vector<Kernel> kStepKernels;
extern const std::vector<Kernel> kAroundLoopKernels;
extern const std::vector<Kernel> kResidentFmaKernels;
extern const std::vector<Kernel> kResidentMmaKernels;
extern const std::vector<Kernel> kClusteredFmaKernels;
extern const std::vector<Kernel> kClusteredMmaKernels;
extern const std::vector<Kernel> kStreamedFmaKernels;
extern const std::vector<Kernel> kStreamedMmaKernels;

// Calls body(kernel) for each kernel of the engine.
template <class Body>
void for_kernels(const Body& body) {
  for (const auto* table :
       {&kStepKernels, &kAroundLoopKernels, &kResidentFmaKernels, &kResidentMmaKernels,
        &kClusteredFmaKernels, &kClusteredMmaKernels, &kStreamedFmaKernels, &kStreamedMmaKernels})
    for (const Kernel& kernel : *table) body(kernel);
}

}  // namespace fusedrnn::cuda

// An entry of a table of kernels.
#define FUSEDRNN_KERNEL(name) {#name, reinterpret_cast<const void*>(&name)}
