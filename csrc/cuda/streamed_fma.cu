// The streamed kernels on the ordinary cores. They serve float32 without TF32, float64, batches of
// few sequences, and GPUs before sm_80.
#include "kernels.h"
#include "product_fma.cuh"
#include "streamed_kernels.cuh"

namespace fusedrnn::cuda {
namespace {

template <class Stored>
using Streamed = FmaProduct<Stored, true>;

}  // namespace
}  // namespace fusedrnn::cuda

FUSEDRNN_STREAMED(fma_f32, fusedrnn::cuda::Streamed<float>)
FUSEDRNN_STREAMED(fma_f64, fusedrnn::cuda::Streamed<double>)
FUSEDRNN_STREAMED(fma_f16, fusedrnn::cuda::Streamed<fusedrnn::Half>)
FUSEDRNN_STREAMED(fma_bf16, fusedrnn::cuda::Streamed<fusedrnn::Bf16>)

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kStreamedFmaKernels = {
    FUSEDRNN_KERNEL(streamed_forward_fma_f32),  FUSEDRNN_KERNEL(streamed_backward_fma_f32),
    FUSEDRNN_KERNEL(streamed_forward_fma_f64),  FUSEDRNN_KERNEL(streamed_backward_fma_f64),
    FUSEDRNN_KERNEL(streamed_forward_fma_f16),  FUSEDRNN_KERNEL(streamed_backward_fma_f16),
    FUSEDRNN_KERNEL(streamed_forward_fma_bf16), FUSEDRNN_KERNEL(streamed_backward_fma_bf16),
};
