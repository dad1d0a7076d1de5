#define FUSEDRNN_VECTOR_BYTES 64
#define TABLE kAvx512
#include "vecmath.inl"
