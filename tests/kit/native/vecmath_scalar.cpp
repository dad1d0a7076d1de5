// The functions of csrc/cells/math.h on arrays. math.h has no exp, and scalars no partial loads.
#include "cells/math.h"
#include "vecmath_table.h"

namespace fusedrnn_test {
namespace {

template <class T>
void sigmoid(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = fusedrnn::sigmoid(x[i]);
}
template <class T>
void tanh(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = fusedrnn::tanh(x[i]);
}
template <class T>
void relu(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = fusedrnn::relu(x[i]);
}
template <class T>
void relu_grad(const T* y, const T* d, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = fusedrnn::relu_grad(y[i], d[i]);
}

template <class T>
constexpr VecMath<T> table() {
  return {nullptr, sigmoid<T>, tanh<T>, relu<T>, relu_grad<T>, 1, nullptr};
}

}  // namespace

extern const VecMathTable kScalar = {table<float>(), table<double>()};

}  // namespace fusedrnn_test
