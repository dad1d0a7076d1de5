// Conversions between the bits of a register and numbers.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "program.h"

namespace ptxvm {

inline float float_of(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
inline double double_of(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline uint64_t bits_of(double x) { return std::bit_cast<uint64_t>(x); }

inline float float_of_bfloat(uint64_t bits) { return float_of(bits << 16); }

inline float float_of_half(uint64_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A subnormal is an integer times 2^-24. For a normal number the exponent's bias changes.
  if (rest < 0x400) return (sign ? -1.f : 1.f) * static_cast<float>(rest) * 0x1p-24f;
  return float_of(sign | ((rest << 13) + 0x38000000));
}

// Rounds to float, to odd. If the result is then rounded to 16 bits, it is the same as if x had
// been rounded to 16 bits at once.
inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || x != x || std::isinf(nearest)) return nearest;
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(x)) --bits;
  return std::bit_cast<float>(bits | 1);
}

inline uint64_t bfloat_of(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint64_t half_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f));
  const uint32_t rest = (bits & 0x7fffffff) - 0x38000000;
  return sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13;
}

// The number in the low bits of a register, exactly. For a pair type it is the lower number.
inline double number_of(uint64_t bits, Type type) {
  if (type.kind == Kind::kBfloat) return float_of_bfloat(bits & 0xffff);
  if (type.bits == 16) return float_of_half(bits & 0xffff);
  return type.bits == 32 ? float_of(bits) : double_of(bits);
}

// The bits of x in a float type, rounded to nearest.
inline uint64_t bits_of_number(double x, Type type) {
  if (type.kind == Kind::kBfloat) return bfloat_of(round_to_odd(x));
  if (type.bits == 16) return half_of(round_to_odd(x));
  return type.bits == 32 ? bits_of(static_cast<float>(x)) : bits_of(x);
}

// A denormal float32 becomes zero of the same sign; other numbers stay as they are.
inline uint64_t flushed(uint64_t bits) { return bits & 0x7f800000 ? bits : bits & 0x80000000; }

inline uint64_t low_bits(uint64_t v, int n) { return n >= 64 ? v : v & ((1ull << n) - 1); }
inline int64_t sign_extended(uint64_t v, int n) {
  return n >= 64 ? static_cast<int64_t>(v) : static_cast<int64_t>(v << (64 - n)) >> (64 - n);
}

// Arithmetic under the rounding direction in `flags` (rm, rz, rp). rounding.cpp defines these
// functions, because it is compiled with -frounding-math.
enum class Arithmetic : uint8_t { kAdd, kSub, kMul, kDiv, kFma };
float rounded(Arithmetic op, float a, float b, float c, uint32_t flags);
double rounded(Arithmetic op, double a, double b, double c, uint32_t flags);
float rounded_to_float(double x, uint32_t flags);

}  // namespace ptxvm
