#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_REGISTERS 32
#define FUSEDRNN_BF16_KERNELS kBf16KernelsAvx512
#include "kernels.inl"
