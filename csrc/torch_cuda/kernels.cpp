#include "kernels.h"

#include <unordered_map>

#define FUSEDRNN_FLOATS(each, name) each(name##_f32) each(name##_f16) each(name##_bf16)
#define FUSEDRNN_DTYPES(each, name) FUSEDRNN_FLOATS(each, name) each(name##_f64)
#define FUSEDRNN_KERNELS(each)                                                                   \
  FUSEDRNN_DTYPES(each, step_forward)                                                            \
  FUSEDRNN_DTYPES(each, step_backward)                                                           \
  FUSEDRNN_DTYPES(each, sum_rows)                                                                \
  FUSEDRNN_DTYPES(each, add)                                                                     \
  FUSEDRNN_FLOATS(each, resident_forward_fma)                                                    \
  FUSEDRNN_FLOATS(each, resident_backward_fma)                                                   \
  each(resident_forward_mma_tf32) each(resident_forward_mma_f16) each(resident_forward_mma_bf16) \
      each(resident_backward_mma_tf32) each(resident_backward_mma_f16)                           \
          each(resident_backward_mma_bf16) each(round_f16) each(round_bf16) each(write_offsets)  \
              each(pack_rows_b16) each(pack_rows_b32) each(pack_rows_b64) each(unpack_rows_b16)  \
                  each(unpack_rows_b32) each(unpack_rows_b64)

// To the host a kernel is an address; what it takes, a Launch has as bytes.
#define FUSEDRNN_DECLARE(name) extern "C" void name();
FUSEDRNN_KERNELS(FUSEDRNN_DECLARE)

namespace fusedrnn::cuda {

const void* kernel_named(const std::string& name) {
#define FUSEDRNN_ENTRY(name) {#name, reinterpret_cast<const void*>(&::name)},
  static const std::unordered_map<std::string, const void*> table = {
      FUSEDRNN_KERNELS(FUSEDRNN_ENTRY)};
#undef FUSEDRNN_ENTRY
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

const char* compiled_architectures() { return FUSEDRNN_CUDA_ARCHITECTURES; }

}  // namespace fusedrnn::cuda
