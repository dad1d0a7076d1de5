// The kernels of this library, by name.
#pragma once

#include <string>

namespace fusedrnn::cuda {

// As the CUDA runtime knows it; null where no kernel is named so.
const void* kernel_named(const std::string& name);

// Machine code and PTX in the library, as in FUSEDRNN_CUDA_ARCH: "80;90+PTX".
const char* compiled_architectures();

}  // namespace fusedrnn::cuda
