#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fusedrnn::cpu {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The table of avx512 with kernels for bfloat16 added.
const KernelTable& avx512_bf16() {
  static const KernelTable table = {.isa = "avx512_bf16",
                                    .f32 = kKernelsAvx512.f32,
                                    .f64 = kKernelsAvx512.f64,
                                    .bf16 = &kBf16KernelsAvx512};
  return table;
}
#endif

const KernelTable& choose() {
  const char* wanted = std::getenv("FUSEDRNN_ISA");
  if (wanted && *wanted) return kernels_named(wanted);
  for (const IsaInfo& isa : instruction_sets())
    if (isa.supported) return *isa.table;
  throw std::runtime_error("fusedrnn: no compiled instruction set runs on this processor");
}

}  // namespace

const std::vector<IsaInfo>& instruction_sets() {
  static const std::vector<IsaInfo> list = {
#if defined(__x86_64__)
      {"avx512_bf16", "avx512f avx512bw avx512dq avx512vl avx512_bf16", has_avx512_bf16(),
       &avx512_bf16()},
      {"avx512", "avx512f avx512bw avx512dq avx512vl", has_avx512(), &kKernelsAvx512},
      {"avx2", "avx2 fma", has_avx2(), &kKernelsAvx2},
#endif
      {"portable", "nothing beyond the platform's baseline", true, &kKernelsPortable},
  };
  return list;
}

const KernelTable& kernels_named(const std::string& name) {
  std::string choices;
  const IsaInfo* found = nullptr;
  for (const IsaInfo& isa : instruction_sets()) {
    if (name == isa.name) found = &isa;
    if (isa.supported) choices.append(choices.empty() ? "" : ", ").append(isa.name);
  }
  if (found && found->supported) return *found->table;
  std::string message = "FUSEDRNN_ISA must be one of " + choices + ", got '" + name + "'";
  if (found) message.append(": this processor lacks one of ").append(found->needs);
  throw std::runtime_error(message);
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();  // if it throws, the next call chooses again
  return table;
}

}  // namespace fusedrnn::cpu
