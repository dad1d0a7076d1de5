// How the factors of products lie in memory and are multiplied. Floats and doubles are multiplied
// one by one. bfloat16 is multiplied in pairs: one instruction multiplies a pair by a pair and adds
// both products to a float. A vector of factors is a Vec<Real<Stored>> with kTerms<Stored> factors
// in each lane.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace fusedrnn::cpu {
namespace {

// --- float and double: factors are values -------------------------------------------------------

// Load a vector of factors. n is the number of factors that exist, a multiple of kTerms<Stored>;
// the remaining lanes become zero.
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> load_factors(const Stored* p) {
  return Vec<Stored>::load(p);
}
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> load_factors(const Stored* p, int n) {
  return Vec<Stored>::load_partial(p, n);
}
// A vector with the same group of terms in every lane.
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> broadcast_factors(const Stored* p) {
  return Vec<Stored>::broadcast(*p);
}

// For each lane, sum plus the products of all terms of a and b in the lane.
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> multiply_add(Vec<Real<Stored>> a, Vec<Real<Stored>> b,
                                               Vec<Real<Stored>> sum) {
  return fma(a, b, sum);
}

// Load or store a vector of values, one in each lane. With n, only the first n exist in memory.
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> load_values(const Stored* p) {
  return Vec<Stored>::load(p);
}
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> load_values(const Stored* p, int n) {
  return Vec<Stored>::load_partial(p, n);
}
template <class Stored>
FUSEDRNN_INLINE void store_values(Vec<Real<Stored>> v, Stored* p) {
  v.store(p);
}
template <class Stored>
FUSEDRNN_INLINE void store_values(Vec<Real<Stored>> v, Stored* p, int n) {
  v.store_partial(p, n);
}
template <class Stored>
FUSEDRNN_INLINE Real<Stored> value(Stored x) {
  return x;
}

// Loads one group of terms for the unit of every lane, from the first rows of a matrix [K, units]
// with row stride ld. `rows` is the number of rows from p to the end of the matrix: where a group
// has more terms, they are zero. n is the number of units.
template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> load_rows(const Stored* p, int64_t, int64_t, int n) {
  return n == Vec<Stored>::kLanes ? Vec<Stored>::load(p) : Vec<Stored>::load_partial(p, n);
}

// --- bfloat16 -----------------------------------------------------------------------------------

#ifdef __AVX512BF16__

template <>
FUSEDRNN_INLINE Vec<float> load_factors(const Bf16* p) {
  return Vec<float>::load(reinterpret_cast<const float*>(p));
}
template <>
FUSEDRNN_INLINE Vec<float> load_factors(const Bf16* p, int n) {
  return Vec<float>::load_partial(reinterpret_cast<const float*>(p), n / 2);
}
template <>
FUSEDRNN_INLINE Vec<float> broadcast_factors(const Bf16* p) {
  float pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return Vec<float>::broadcast(pair);
}

template <>
FUSEDRNN_INLINE Vec<float> multiply_add<Bf16>(Vec<float> a, Vec<float> b, Vec<float> sum) {
  return Vec<float>::from_native(_mm512_dpbf16_ps(sum.native,
                                                  reinterpret_cast<__m512bh>(a.native),  //
                                                  reinterpret_cast<__m512bh>(b.native)));
}

FUSEDRNN_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

// The bits of n values, each in the lower half of a lane. (Conversion and shift are operators,
// because GCC 12 warns about its own header's intrinsics for them.)
FUSEDRNN_INLINE Lanes<float>::Unsigned low_halves(const Bf16* p, int n) {
  typedef unsigned short Halves __attribute__((vector_size(32)));
  const __m256i bits = n == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                               : _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return __builtin_convertvector(reinterpret_cast<Halves>(bits), Lanes<float>::Unsigned);
}
FUSEDRNN_INLINE Vec<float> from_unsigned(Lanes<float>::Unsigned bits) {
  return Vec<float>::from_bits(reinterpret_cast<Lanes<float>::Bits>(bits));
}
template <>
FUSEDRNN_INLINE Vec<float> load_values(const Bf16* p, int n) {
  return from_unsigned(low_halves(p, n) << 16);
}
template <>
FUSEDRNN_INLINE Vec<float> load_values(const Bf16* p) {
  return load_values(p, 16);
}
template <>
FUSEDRNN_INLINE void store_values(Vec<float> v, Bf16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.native)));
}
template <>
FUSEDRNN_INLINE void store_values(Vec<float> v, Bf16* p, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n),
                           reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.native)));
}
FUSEDRNN_INLINE float value(Bf16 x) {
  const unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

FUSEDRNN_INLINE Vec<float> load_rows(const Bf16* p, int64_t ld, int64_t rows, int n) {
  Lanes<float>::Unsigned pairs = low_halves(p, n);
  if (rows > 1) pairs |= low_halves(p + ld, n) << 16;
  return from_unsigned(pairs);
}

#endif

}  // namespace
}  // namespace fusedrnn::cpu
