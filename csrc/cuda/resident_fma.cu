// The resident regime on the ordinary cores: few sequences, or a GPU without the tensor cores.
#include "product_fma.cuh"
#include "resident.cuh"

FUSEDRNN_RESIDENT(fma_f32, fusedrnn::cuda::FmaProduct<float>)
FUSEDRNN_RESIDENT(fma_f16, fusedrnn::cuda::FmaProduct<fusedrnn::cuda::Half>)
FUSEDRNN_RESIDENT(fma_bf16, fusedrnn::cuda::FmaProduct<fusedrnn::cuda::BFloat16>)
