#define FUSEDRNN_VECTOR_BYTES 16
#define TABLE kPortable
#include "vecmath.inl"
