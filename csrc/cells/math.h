// The functions that cells are written with, for one float or double, on the host and on a GPU.
// csrc/cpu/vecmath.h has the same functions for Vec. A cell is a template on its value type V in
// namespace fusedrnn, and calls them without a namespace. For scalars the call finds the functions
// of this header, which is included before the cell (and never ::tanh or ::fma). For Vec it finds
// those of vecmath.h through the namespace of Vec.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
// Functions are always inlined. Otherwise an object compiled for AVX-512 would have them as weak
// symbols, and the linker could pick those for every caller.
#define FUSEDRNN_HD inline __attribute__((always_inline))
#endif

namespace fusedrnn {

FUSEDRNN_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FUSEDRNN_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }

FUSEDRNN_HD float tanh(float x) { return ::tanhf(x); }
FUSEDRNN_HD double tanh(double x) { return ::tanh(x); }

// sigmoid(x) = 1 / (1 + exp(-x)), written so that exp cannot overflow and small results keep all
// their bits.
FUSEDRNN_HD float sigmoid(float x) {
  const float e = ::expf(-::fabsf(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}
FUSEDRNN_HD double sigmoid(double x) {
  const double e = ::exp(-::fabs(x));
  return (x < 0 ? e : 1.0) / (1.0 + e);
}

// NaN passes through, as in torch.relu.
FUSEDRNN_HD float relu(float x) { return x <= 0 ? 0.0f : x; }
FUSEDRNN_HD double relu(double x) { return x <= 0 ? 0.0 : x; }

// The gradient of x for y = relu(x), where d is the gradient of y: d if y is positive or NaN, as in
// torch, else 0.
FUSEDRNN_HD float relu_grad(float y, float d) { return y <= 0 ? 0.0f : d; }
FUSEDRNN_HD double relu_grad(double y, double d) { return y <= 0 ? 0.0 : d; }

}  // namespace fusedrnn
