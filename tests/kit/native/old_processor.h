// csrc/cpu/dispatch.cpp as it runs on a processor that has AVX2 but not AVX-512.
#pragma once

#include <string>

namespace fusedrnn_test {

// The kernels that it chooses for FUSEDRNN_ISA = name. An empty name means that it is not set.
std::string old_processor_kernels_named(const std::string& name);

}  // namespace fusedrnn_test
