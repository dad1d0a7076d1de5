#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_REGISTERS 32
#define FUSEDRNN_TABLE kKernelsAvx512
#define FUSEDRNN_ISA_NAME "avx512"
#include "kernels.inl"
