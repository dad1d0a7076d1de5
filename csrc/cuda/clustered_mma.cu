// The resident kernels on the tensor cores whose blocks are in clusters (cluster.cuh).
#include "kernels.h"
#include "product_mma.cuh"
#include "resident_kernels.cuh"

namespace fusedrnn::cuda {
template <class Stored>
using Clustered = MmaProduct<Stored, false, true>;
}  // namespace fusedrnn::cuda

FUSEDRNN_CLUSTERED(mma_tf32, fusedrnn::cuda::Clustered<float>)
FUSEDRNN_CLUSTERED(mma_f16, fusedrnn::cuda::Clustered<fusedrnn::Half>)
FUSEDRNN_CLUSTERED(mma_bf16, fusedrnn::cuda::Clustered<fusedrnn::Bf16>)

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kClusteredMmaKernels = {
    FUSEDRNN_KERNEL(clustered_forward_mma_tf32), FUSEDRNN_KERNEL(clustered_backward_mma_tf32),
    FUSEDRNN_KERNEL(clustered_forward_mma_f16),  FUSEDRNN_KERNEL(clustered_backward_mma_f16),
    FUSEDRNN_KERNEL(clustered_forward_mma_bf16), FUSEDRNN_KERNEL(clustered_backward_mma_bf16),
};
