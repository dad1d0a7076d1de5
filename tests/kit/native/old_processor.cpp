#include "old_processor.h"

#include <cstring>

// A second copy of the dispatch, in another namespace, for another processor.
static bool old_processor_has(const char* feature) {
  return std::strcmp(feature, "avx2") == 0 || std::strcmp(feature, "fma") == 0;
}
#define __builtin_cpu_supports(feature) old_processor_has(feature)
#define fusedrnn fusedrnn_on_old_processor
#include "cpu/dispatch.cpp"

namespace fusedrnn::cpu {
const KernelTable kKernelsPortable = {.isa = "portable", .f32 = {}, .f64 = {}, .bf16 = {}};
const KernelTable kKernelsAvx2 = {.isa = "avx2", .f32 = {}, .f64 = {}, .bf16 = {}};
const KernelTable kKernelsAvx512 = {.isa = "avx512", .f32 = {}, .f64 = {}, .bf16 = {}};
const DtypeKernels<Bf16> kBf16KernelsAvx512 = {};
}  // namespace fusedrnn::cpu

namespace fusedrnn_test {

std::string old_processor_kernels_named(const std::string& name) {
  return name.empty() ? fusedrnn::cpu::choose().isa : fusedrnn::cpu::kernels_named(name).isa;
}

}  // namespace fusedrnn_test
