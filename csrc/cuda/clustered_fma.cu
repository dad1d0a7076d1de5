// The resident kernels on the ordinary cores whose blocks are in clusters (cluster.cuh).
#include "kernels.h"
#include "product_fma.cuh"
#include "resident_kernels.cuh"

namespace fusedrnn::cuda {
template <class Stored>
using Clustered = FmaProduct<Stored, false, true>;
}  // namespace fusedrnn::cuda

FUSEDRNN_CLUSTERED(fma_f32, fusedrnn::cuda::Clustered<float>)
FUSEDRNN_CLUSTERED(fma_f16, fusedrnn::cuda::Clustered<fusedrnn::Half>)
FUSEDRNN_CLUSTERED(fma_bf16, fusedrnn::cuda::Clustered<fusedrnn::Bf16>)

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kClusteredFmaKernels = {
    FUSEDRNN_KERNEL(clustered_forward_fma_f32),  FUSEDRNN_KERNEL(clustered_backward_fma_f32),
    FUSEDRNN_KERNEL(clustered_forward_fma_f16),  FUSEDRNN_KERNEL(clustered_backward_fma_f16),
    FUSEDRNN_KERNEL(clustered_forward_fma_bf16), FUSEDRNN_KERNEL(clustered_backward_fma_bf16),
};
