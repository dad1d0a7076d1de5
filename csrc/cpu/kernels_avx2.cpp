#define FUSEDRNN_VECTOR_BYTES 32
#define FUSEDRNN_REGISTERS 16
#define FUSEDRNN_TABLE kKernelsAvx2
#define FUSEDRNN_ISA_NAME "avx2"
#include "kernels.inl"
