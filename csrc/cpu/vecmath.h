// exp, sigmoid, tanh, relu and the gradient of relu on Vec<float> and Vec<double>.
//
// This is one source for every instruction set, with FMA or without. The operations that must be
// exact (n times the high part of ln 2, products with powers of two) are exact by construction.
// Over the whole range exp is within 2 units in the last place, sigmoid and tanh within 3, with
// correct subnormal results, infinities and NaN, exact values at 0, and no step back of more than
// one unit. Measured over every float: 1.01, 2.41 and 2.73 units (tests/kernels/sweep.py measures,
// test_vecmath.py checks).
//
// Every function rests on  x = n ln 2 + r,  |r| <= ln(2) / 2,  exp(x) = 2^n (1 + expm1(r)).
// tests/kernels/derive_exp_polynomial.py derives the constants and prints their error.
#pragma once

#include "simd.h"

namespace fusedrnn::cpu {
namespace {

template <class Scalar>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kLog2e = 0x1.715476p+0f;
  // The high part of ln 2. The last 9 of its 24 bits are zero and |n| <= 151 has 8 bits, so
  // n kLn2Hi is exact for every n in use.
  static constexpr float kLn2Hi = 0x1.62e4p-1f;
  static constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
  // expm1(r) = r + r^2 (q[0] + q[1] r + ...). It gives exp a relative error of 3.7e-9, which is
  // 1/16 unit in the last place.
  static constexpr int kTerms = 5;
  static constexpr float q[kTerms] = {0x1.fffff8p-2f, 0x1.55548ep-3f, 0x1.555b96p-5f, 0x1.123bdp-7f,
                                      0x1.685352p-10f};
  // At kExpZero exp is less than half the smallest subnormal, so the result is 0. At kExpInfinite
  // it is infinite.
  static constexpr float kExpZero = -104.0f;
  static constexpr float kExpInfinite = 89.0f;
  // The smallest y at which m / (m + 2) rounds to 1, where m = exp(y) - 1. It was found by trying
  // values upwards from 25 ln 2. tanh clamps 2 |x| to it. For larger y, 2 is half the distance
  // between neighbouring values of m, and the quotient would go up and down.
  static constexpr float kTanhOne = 0x1.154246p+4f;
  // kLift is added to n, so that 2^n is normal even if exp(x) is not. The factor kUnlift = 2^-kLift
  // takes it off again with one rounding.
  static constexpr int kLift = 64;
  static constexpr float kUnlift = 0x1p-64f;
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2Hi = 0x1.62e42fefa38p-1;
  static constexpr double kLn2Lo = 0x1.ef35793c7673p-45;
  // They give exp a relative error of 4.1e-18, which is 1/27 unit in the last place.
  static constexpr int kTerms = 10;
  static constexpr double q[kTerms] = {
      0x1.000000000000bp-1,  0x1.555555555550fp-3,  0x1.55555555502ap-5,   0x1.1111111122b4ap-7,
      0x1.6c16c1852c01cp-10, 0x1.a01a014498ae6p-13, 0x1.a01997c656a0fp-16, 0x1.71deec62e8918p-19,
      0x1.28af42a60c9fap-22, 0x1.add773f1864b3p-26};
  static constexpr double kExpZero = -746.0;
  static constexpr double kExpInfinite = 710.0;
  static constexpr double kTanhOne = 0x1.2b70887340c74p+5;  // just over 54 ln 2
  static constexpr int kLift = 512;
  static constexpr double kUnlift = 0x1p-512;
};

// The parts of exp(x) = 2^n (1 + expm1(r)).
template <class Scalar>
struct ReducedExp {
  Vec<Scalar> expm1_r;
  // The low bits are n + kOffset, and the bits above them come from a constant.
  typename Lanes<Scalar>::Unsigned exponent;
};

// 1.5 2^kMantissaBits + offset. A small number that is added to it is rounded to an integer, which
// is then in the low bits of the sum.
template <class Scalar>
constexpr Scalar rounding_constant(int offset) {
  return Scalar(1.5) * Scalar(1ll << ExpConstants<Scalar>::kMantissaBits) + Scalar(offset);
}

template <class Scalar>
FUSEDRNN_INLINE typename Lanes<Scalar>::Unsigned unsigned_bits(Vec<Scalar> v) {
  return reinterpret_cast<typename Lanes<Scalar>::Unsigned>(v.native);
}

template <int kOffset, class Scalar>
FUSEDRNN_INLINE ReducedExp<Scalar> reduce_exp(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using K = ExpConstants<Scalar>;
  const V rounding = rounding_constant<Scalar>(kOffset);
  const V shifted = fma(x, V(K::kLog2e), rounding);
  const V n = shifted - rounding;
  const V r = fma(n, V(-K::kLn2Lo), fma(n, V(-K::kLn2Hi), x));
  V q = K::q[K::kTerms - 1];
#pragma GCC unroll 16
  for (int k = K::kTerms - 2; k >= 0; --k) q = fma(q, r, V(K::q[k]));
  return {fma(r * r, q, r), unsigned_bits(shifted)};
}

// 2^n from its biased exponent in the low bits. The bits above them are shifted out.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> power_of_two(typename Lanes<Scalar>::Unsigned biased_exponent) {
  const auto bits = biased_exponent << ExpConstants<Scalar>::kMantissaBits;
  return Vec<Scalar>::from_bits(reinterpret_cast<typename Vec<Scalar>::Bits>(bits));
}

// exp(x) for x <= 0.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> exp_of_negative(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using K = ExpConstants<Scalar>;
  const auto [expm1_r, exponent] = reduce_exp<K::kBias + K::kLift>(max(V(K::kExpZero), x));
  return (V(1) + expm1_r) * power_of_two<Scalar>(exponent) * V(K::kUnlift);
}

template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> exp(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using K = ExpConstants<Scalar>;
  const V clamped = min(V(K::kExpInfinite), max(V(K::kExpZero), x));
  // n takes more values than the exponents of normal numbers. So 2^n is the product of two factors,
  // with the exponents n / 2 and n - n / 2.
  const auto [expm1_r, exponent] = reduce_exp<2 * K::kBias>(clamped);
  const auto both = exponent - unsigned_bits(V(rounding_constant<Scalar>(0)));
  const auto half = both >> 1;
  return (V(1) + expm1_r) * power_of_two<Scalar>(half) * power_of_two<Scalar>(both - half);
}

// 1 / (1 + exp(-x)). It is computed from exp(-|x|) <= 1, which cannot overflow, and which is itself
// the result if x is very negative.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> sigmoid(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  const V e = exp_of_negative(minus_abs(x));
  return select(x < V(0), e, V(1)) / (V(1) + e);
}

// tanh |x| = m / (m + 2) with m = exp(2 |x|) - 1, which is accurate relative to |x| near 0.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> tanh(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using K = ExpConstants<Scalar>;
  const V magnitude = abs(x);
  const auto [expm1_r, exponent] = reduce_exp<K::kBias>(min(V(K::kTanhOne), magnitude + magnitude));
  const V scale = power_of_two<Scalar>(exponent);
  const V m = fma(scale, expm1_r, scale - V(1));
  return with_sign_of(m / (m + V(2)), x);
}

// NaN passes through, as in torch.relu.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> relu(Vec<Scalar> x) {
  return select(x <= Vec<Scalar>(0), Vec<Scalar>(0), x);
}

// The gradient of x for y = relu(x), where d is the gradient of y: d if y is positive or NaN, as in
// torch, else 0.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> relu_grad(Vec<Scalar> y, Vec<Scalar> d) {
  return select(y <= Vec<Scalar>(0), Vec<Scalar>(0), d);
}

}  // namespace
}  // namespace fusedrnn::cpu
