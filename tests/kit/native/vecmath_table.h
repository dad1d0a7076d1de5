// The functions of csrc/cpu/vecmath.h on arrays, as one instruction set computes them.
#pragma once

#include <cstdint>

namespace fusedrnn_test {

template <class T>
struct VecMath {
  using Function = void (*)(const T* x, T* y, int64_t n);  // x, y: [n]
  Function exp;
  Function sigmoid;
  Function tanh;
  Function relu;
  void (*relu_grad)(const T* y, const T* d, T* out, int64_t n);  // y, d, out: [n]
  int lanes;
  void (*load_partial)(const T* p, int n, T* out);  // p: [n], out: [lanes]
};

struct VecMathTable {
  VecMath<float> f32;
  VecMath<double> f64;
};

// kScalar is csrc/cells/math.h, one value at a time.
extern const VecMathTable kPortable, kAvx2, kAvx512, kScalar;

}  // namespace fusedrnn_test
