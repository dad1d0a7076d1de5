// The kernels that a launcher can start: the engine's and those of the bindings.
#pragma once

#include "../cuda/kernels.h"

namespace fusedrnn::cuda {

extern const std::vector<Kernel> kBindingKernels;

// Null where there is no kernel of that name.
inline const void* any_kernel_named(const std::string& name) {
  for (const Kernel& kernel : kBindingKernels)
    if (name == kernel.name) return kernel.function;
  return kernel_named(name);
}

}  // namespace fusedrnn::cuda
