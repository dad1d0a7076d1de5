// The streamed kernels on the tensor cores. They serve 16-bit types, and float32 where TF32 is
// allowed.
#include "kernels.h"
#include "product_mma.cuh"
#include "streamed_kernels.cuh"

namespace fusedrnn::cuda {
namespace {

template <class Stored>
using Streamed = MmaProduct<Stored, true>;

}  // namespace
}  // namespace fusedrnn::cuda

FUSEDRNN_STREAMED(mma_tf32, fusedrnn::cuda::Streamed<float>)
FUSEDRNN_STREAMED(mma_f16, fusedrnn::cuda::Streamed<fusedrnn::Half>)
FUSEDRNN_STREAMED(mma_bf16, fusedrnn::cuda::Streamed<fusedrnn::Bf16>)

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kStreamedMmaKernels = {
    FUSEDRNN_KERNEL(streamed_forward_mma_tf32), FUSEDRNN_KERNEL(streamed_backward_mma_tf32),
    FUSEDRNN_KERNEL(streamed_forward_mma_f16),  FUSEDRNN_KERNEL(streamed_backward_mma_f16),
    FUSEDRNN_KERNEL(streamed_forward_mma_bf16), FUSEDRNN_KERNEL(streamed_backward_mma_bf16),
};
