#define FUSEDRNN_VECTOR_BYTES 32
#define TABLE kAvx2
#include "vecmath.inl"
