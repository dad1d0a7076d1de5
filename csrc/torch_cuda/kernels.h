// The kernels that a launcher can start: those of the engine and those of the bindings.
#pragma once

#include "../cuda/kernels.h"

namespace fusedrnn::cuda {

extern const std::vector<Kernel> kBindingKernels;

// Calls body(kernel) for each kernel of the library.
template <class Body>
void for_all_kernels(const Body& body) {
  for_kernels(body);
  for (const Kernel& kernel : kBindingKernels) body(kernel);
}

}  // namespace fusedrnn::cuda
