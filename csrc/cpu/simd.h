// Vec<Scalar>: one register of float or double lanes.
//
// This header is compiled once per instruction set, with FUSEDRNN_VECTOR_BYTES = 64 (AVX-512),
// 32 (AVX2 + FMA) or 16 (baseline of the platform). Everything is in an anonymous namespace and
// forced inline: an object file compiled for AVX-512 must not offer the linker a symbol that a
// portable caller could pick up. For the same reason nothing here uses a template of the standard
// library.
//
// Arithmetic uses the vector extensions of the compilers. Intrinsics appear only for operations
// that the extensions lack (fused multiply-add, min and max, masked memory access).
#pragma once

#ifndef FUSEDRNN_VECTOR_BYTES
#error "define FUSEDRNN_VECTOR_BYTES as 16, 32 or 64 before including simd.h"
#endif

#if FUSEDRNN_VECTOR_BYTES == 64
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__)
#error "64-byte vectors need -mavx512f -mavx512bw -mavx512dq -mavx512vl"
#endif
#include <immintrin.h>
#elif FUSEDRNN_VECTOR_BYTES == 32
#if !defined(__AVX2__) || !defined(__FMA__)
#error "32-byte vectors need -mavx2 -mfma"
#endif
#include <immintrin.h>
#elif FUSEDRNN_VECTOR_BYTES != 16
#error "FUSEDRNN_VECTOR_BYTES must be 16, 32 or 64"
#endif

#define FUSEDRNN_INLINE inline __attribute__((always_inline))
// FUSEDRNN_INLINE for a lambda. It goes between the parameters and the body.
#define FUSEDRNN_INLINE_LAMBDA __attribute__((always_inline))

namespace fusedrnn::cpu {
namespace {

// The compilers' vector types behind Vec. Bits and Unsigned have lanes of the same width; Bits
// holds comparison results (all ones or all zeros) and raw bit patterns.
template <class Scalar>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Native __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  // The alignment is 2 and not 4, because a lane may be a pair of bfloat16 (factors.h), which
  // begins at any even address.
  typedef float Unaligned
      __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(2), may_alias));
  typedef int Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef unsigned Unsigned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};

template <>
struct Lanes<double> {
  typedef double Native __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef double Unaligned
      __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(8), may_alias));
  typedef long long Bits __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef unsigned long long Unsigned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};

#if FUSEDRNN_VECTOR_BYTES == 32
// Loading 8 words from kTailWords + 8 - n gives a mask whose first n words are set.
alignas(64) constexpr int kTailWords[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
#endif

// The lanes for which a comparison holds.
template <class Scalar>
struct Mask {
  typename Lanes<Scalar>::Bits bits;

  friend FUSEDRNN_INLINE Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  friend FUSEDRNN_INLINE Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  friend FUSEDRNN_INLINE Mask operator~(Mask a) { return {~a.bits}; }
};

template <class Scalar>
struct Vec {
  using Native = typename Lanes<Scalar>::Native;
  using Bits = typename Lanes<Scalar>::Bits;
  static constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / static_cast<int>(sizeof(Scalar));

  Native native;

  Vec() = default;
  // The constructor is implicit, so that a cell can write 2 * x for any V. Subtracting zero keeps
  // -0; adding zero would turn it into +0.
  FUSEDRNN_INLINE Vec(Scalar value) : native(value - Native{}) {}

  static FUSEDRNN_INLINE Vec from_native(Native n) {
    Vec v;
    v.native = n;
    return v;
  }
  static FUSEDRNN_INLINE Vec from_bits(Bits b) { return from_native(reinterpret_cast<Native>(b)); }
  FUSEDRNN_INLINE Bits bits() const { return reinterpret_cast<Bits>(native); }

  static FUSEDRNN_INLINE Vec zero() { return from_native(Native{}); }
  static FUSEDRNN_INLINE Vec broadcast(Scalar value) { return Vec(value); }

  // p: [kLanes], any alignment.
  static FUSEDRNN_INLINE Vec load(const Scalar* p) {
    return from_native(*reinterpret_cast<const typename Lanes<Scalar>::Unaligned*>(p));
  }
  FUSEDRNN_INLINE void store(Scalar* p) const {
    *reinterpret_cast<typename Lanes<Scalar>::Unaligned*>(p) = native;
  }

  // p: [n], 0 <= n <= kLanes. Memory from p + n on is not touched; load_partial sets those lanes to
  // zero.
  static FUSEDRNN_INLINE Vec load_partial(const Scalar* p, int n);
  FUSEDRNN_INLINE void store_partial(Scalar* p, int n) const;

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return from_native(a.native + b.native); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return from_native(a.native - b.native); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return from_native(a.native * b.native); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return from_native(a.native / b.native); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return from_native(-a.native); }
  FUSEDRNN_INLINE Vec& operator+=(Vec b) { return *this = *this + b; }
  FUSEDRNN_INLINE Vec& operator-=(Vec b) { return *this = *this - b; }
  FUSEDRNN_INLINE Vec& operator*=(Vec b) { return *this = *this * b; }
  FUSEDRNN_INLINE Vec& operator/=(Vec b) { return *this = *this / b; }

  friend FUSEDRNN_INLINE Mask<Scalar> operator<(Vec a, Vec b) { return {a.native < b.native}; }
  friend FUSEDRNN_INLINE Mask<Scalar> operator<=(Vec a, Vec b) { return {a.native <= b.native}; }
  friend FUSEDRNN_INLINE Mask<Scalar> operator>(Vec a, Vec b) { return {a.native > b.native}; }
  friend FUSEDRNN_INLINE Mask<Scalar> operator>=(Vec a, Vec b) { return {a.native >= b.native}; }
  friend FUSEDRNN_INLINE Mask<Scalar> operator==(Vec a, Vec b) { return {a.native == b.native}; }
  friend FUSEDRNN_INLINE Mask<Scalar> operator!=(Vec a, Vec b) { return {a.native != b.native}; }

  // mask ? a : b, lane by lane.
  friend FUSEDRNN_INLINE Vec select(Mask<Scalar> mask, Vec a, Vec b) {
    return from_native(mask.bits ? a.native : b.native);
  }

  friend FUSEDRNN_INLINE Vec abs(Vec a) { return from_bits(a.bits() & ~sign_bit()); }
  friend FUSEDRNN_INLINE Vec minus_abs(Vec a) { return from_bits(a.bits() | sign_bit()); }
  // The magnitude of a with the sign of s. a must not be negative.
  friend FUSEDRNN_INLINE Vec with_sign_of(Vec a, Vec s) {
    return from_bits(a.bits() | (s.bits() & sign_bit()));
  }

 private:
  static FUSEDRNN_INLINE Bits sign_bit() { return Vec(Scalar(-0.0)).bits(); }
};

// Indices for __builtin_shuffle(a, b, .) that swap the lanes of a whose index has bit d set with
// the lanes of b whose index has it clear: `low` gives the new a, `high` the new b. Lanes 0 to
// kLanes - 1 are a's, the following ones b's. This is one step of a butterfly transpose.
template <class Scalar>
struct Exchange {
  typename Lanes<Scalar>::Bits low, high;
};
template <class Scalar>
FUSEDRNN_INLINE Exchange<Scalar> exchange_of(int d) {
  constexpr int kLanes = Vec<Scalar>::kLanes;
  Exchange<Scalar> e = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    e.low[i] = i & d ? kLanes + i - d : i;
    e.high[i] = i & d ? kLanes + i : i + d;
  }
  return e;
}

// Transposes a square of vectors: row i of the result has lane i of every row.
template <class Scalar>
FUSEDRNN_INLINE void transpose_square(Vec<Scalar> (&rows)[Vec<Scalar>::kLanes]) {
  constexpr int kLanes = Vec<Scalar>::kLanes;
#pragma GCC unroll 4
  for (int d = 1; d < kLanes; d *= 2) {
    const auto [low, high] = exchange_of<Scalar>(d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & d) continue;
      const auto a = rows[i].native, b = rows[i + d].native;
      rows[i].native = __builtin_shuffle(a, b, low);
      rows[i + d].native = __builtin_shuffle(a, b, high);
    }
  }
}

// Lane i of the result is the sum of all lanes of rows[i]. The rows are overwritten.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> sums_of_rows(Vec<Scalar> (&rows)[Vec<Scalar>::kLanes]) {
  constexpr int kLanes = Vec<Scalar>::kLanes;
#pragma GCC unroll 4
  for (int d = 1; d < kLanes; d *= 2) {
    const auto [low, high] = exchange_of<Scalar>(d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * d) {
      const auto a = rows[i].native, b = rows[i + d].native;
      rows[i].native = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
  }
  return rows[0];
}

// --- Operations that the vector extensions lack -------------------------------------------------

// fma(a, b, c) = a * b + c. It rounds once if the instruction set can; the portable build rounds
// twice. min and max give b if either argument is NaN. (They use intrinsics because GCC does not
// compile select(a < b, a, b) to the single instruction when a is a constant.)

#if FUSEDRNN_VECTOR_BYTES == 64

FUSEDRNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::from_native(_mm512_fmadd_ps(a.native, b.native, c.native));
}
FUSEDRNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::from_native(_mm512_fmadd_pd(a.native, b.native, c.native));
}

// The functions with a mask stand here because GCC 12 warns about its own header's _mm512_max_ps.
// The mask is all ones, so they compile to the instruction without a mask.
FUSEDRNN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
  return Vec<float>::from_native(_mm512_maskz_min_ps(0xffff, a.native, b.native));
}
FUSEDRNN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return Vec<float>::from_native(_mm512_maskz_max_ps(0xffff, a.native, b.native));
}
FUSEDRNN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) {
  return Vec<double>::from_native(_mm512_maskz_min_pd(0xff, a.native, b.native));
}
FUSEDRNN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
  return Vec<double>::from_native(_mm512_maskz_max_pd(0xff, a.native, b.native));
}

template <>
FUSEDRNN_INLINE Vec<float> Vec<float>::load_partial(const float* p, int n) {
  return from_native(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
}
template <>
FUSEDRNN_INLINE void Vec<float>::store_partial(float* p, int n) const {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), native);
}
template <>
FUSEDRNN_INLINE Vec<double> Vec<double>::load_partial(const double* p, int n) {
  return from_native(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
}
template <>
FUSEDRNN_INLINE void Vec<double>::store_partial(double* p, int n) const {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), native);
}

#elif FUSEDRNN_VECTOR_BYTES == 32

FUSEDRNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::from_native(_mm256_fmadd_ps(a.native, b.native, c.native));
}
FUSEDRNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::from_native(_mm256_fmadd_pd(a.native, b.native, c.native));
}

FUSEDRNN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
  return Vec<float>::from_native(_mm256_min_ps(a.native, b.native));
}
FUSEDRNN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return Vec<float>::from_native(_mm256_max_ps(a.native, b.native));
}
FUSEDRNN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) {
  return Vec<double>::from_native(_mm256_min_pd(a.native, b.native));
}
FUSEDRNN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
  return Vec<double>::from_native(_mm256_max_pd(a.native, b.native));
}

FUSEDRNN_INLINE __m256i tail_mask(int words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kTailWords + 8 - words));
}
template <>
FUSEDRNN_INLINE Vec<float> Vec<float>::load_partial(const float* p, int n) {
  return from_native(_mm256_maskload_ps(p, tail_mask(n)));
}
template <>
FUSEDRNN_INLINE void Vec<float>::store_partial(float* p, int n) const {
  _mm256_maskstore_ps(p, tail_mask(n), native);
}
template <>
FUSEDRNN_INLINE Vec<double> Vec<double>::load_partial(const double* p, int n) {
  return from_native(_mm256_maskload_pd(p, tail_mask(2 * n)));
}
template <>
FUSEDRNN_INLINE void Vec<double>::store_partial(double* p, int n) const {
  _mm256_maskstore_pd(p, tail_mask(2 * n), native);
}

#else

FUSEDRNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
FUSEDRNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

FUSEDRNN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return select(a < b, a, b); }
FUSEDRNN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return select(a < b, a, b); }
FUSEDRNN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return select(a > b, a, b); }
FUSEDRNN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return select(a > b, a, b); }

template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> Vec<Scalar>::load_partial(const Scalar* p, int n) {
  Vec v = zero();
  for (int i = 0; i < kLanes; ++i)
    if (i < n) v.native[i] = p[i];
  return v;
}
template <class Scalar>
FUSEDRNN_INLINE void Vec<Scalar>::store_partial(Scalar* p, int n) const {
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i] = native[i];
}

#endif

}  // namespace
}  // namespace fusedrnn::cpu
