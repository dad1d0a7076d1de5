// The choice of an instruction set: the one that FUSEDRNN_ISA names, or else the best one that is
// compiled in and that this processor has.
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

// The table that the first call chooses. It throws std::runtime_error if FUSEDRNN_ISA does not name
// an instruction set that can run here; the message lists those that can.
const KernelTable& kernels();

// The table of the instruction set `name`. It throws the same error.
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
