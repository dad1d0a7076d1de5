// csrc/cpu/dispatch.cpp as it runs on a processor that has AVX2 but not AVX-512.
#pragma once

#include <string>

namespace fusedrnn_test {

// What it does for FUSEDRNN_ISA = name, or where that is not set for an empty name.
std::string old_processor_kernels_named(const std::string& name);

}  // namespace fusedrnn_test
