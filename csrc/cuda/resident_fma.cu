// The resident kernels on the ordinary cores. They serve float32 without TF32, batches of few
// sequences, and GPUs before sm_80.
#include "kernels.h"
#include "product_fma.cuh"
#include "resident_kernels.cuh"

FUSEDRNN_RESIDENT(fma_f32, fusedrnn::cuda::FmaProduct<float>)
FUSEDRNN_RESIDENT(fma_f16, fusedrnn::cuda::FmaProduct<fusedrnn::Half>)
FUSEDRNN_RESIDENT(fma_bf16, fusedrnn::cuda::FmaProduct<fusedrnn::Bf16>)

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kResidentFmaKernels = {
    FUSEDRNN_KERNEL(resident_forward_fma_f32),  FUSEDRNN_KERNEL(resident_backward_fma_f32),
    FUSEDRNN_KERNEL(resident_forward_fma_f16),  FUSEDRNN_KERNEL(resident_backward_fma_f16),
    FUSEDRNN_KERNEL(resident_forward_fma_bf16), FUSEDRNN_KERNEL(resident_backward_fma_bf16),
};
