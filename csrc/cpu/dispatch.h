// Which instruction set runs: the best that was compiled and that this processor has, or the one
// that FUSEDRNN_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace fusedrnn::cpu {

struct IsaInfo {
  const char* name;
  const char* needs;  // processor features, for people
  bool supported;
  const KernelTable* table;
};

// Every instruction set compiled in, best first.
const std::vector<IsaInfo>& instruction_sets();

// The table chosen at the first call. Throws std::runtime_error where FUSEDRNN_ISA names none that
// can run, with the list of those that can.
const KernelTable& kernels();

// The table of `name`, for tests; the same error.
const KernelTable& kernels_named(const std::string& name);

// The kernels of a stored type.
template <class Stored>
const DtypeKernels<Stored>& kernels_of(const KernelTable& table);
template <>
inline const DtypeKernels<float>& kernels_of<float>(const KernelTable& table) {
  return table.f32;
}
template <>
inline const DtypeKernels<double>& kernels_of<double>(const KernelTable& table) {
  return table.f64;
}

template <>
inline const DtypeKernels<Bf16>& kernels_of<Bf16>(const KernelTable& table) {
  return *table.bf16;
}

}  // namespace fusedrnn::cpu
