// The resident kernels on the tensor cores. They serve 16-bit types, and float32 where TF32 is
// allowed.
#include "kernels.h"
#include "product_mma.cuh"
#include "resident_kernels.cuh"

FUSEDRNN_RESIDENT(mma_tf32, fusedrnn::cuda::MmaProduct<float>)
FUSEDRNN_RESIDENT(mma_f16, fusedrnn::cuda::MmaProduct<fusedrnn::Half>)
FUSEDRNN_RESIDENT(mma_bf16, fusedrnn::cuda::MmaProduct<fusedrnn::Bf16>)

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kResidentMmaKernels = {
    FUSEDRNN_KERNEL(resident_forward_mma_tf32), FUSEDRNN_KERNEL(resident_backward_mma_tf32),
    FUSEDRNN_KERNEL(resident_forward_mma_f16),  FUSEDRNN_KERNEL(resident_backward_mma_f16),
    FUSEDRNN_KERNEL(resident_forward_mma_bf16), FUSEDRNN_KERNEL(resident_backward_mma_bf16),
};
