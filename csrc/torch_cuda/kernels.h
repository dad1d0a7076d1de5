// The kernels that a launcher can start: the engine's and those of the bindings.
#pragma once

#include "../cuda/kernels.h"

namespace fusedrnn::cuda {

extern const std::vector<Kernel> kBindingKernels;

// Calls body(kernel) for each of them.
template <class Body>
void for_all_kernels(const Body& body) {
  for_kernels(body);
  for (const Kernel& kernel : kBindingKernels) body(kernel);
}

}  // namespace fusedrnn::cuda
