#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_REGISTERS 16
#define FUSEDRNN_TABLE kKernelsPortable
#define FUSEDRNN_ISA_NAME "portable"
#include "kernels.inl"
