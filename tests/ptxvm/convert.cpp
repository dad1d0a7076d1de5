// Handlers of conversions (cvt).
#include <algorithm>
#include <cmath>

#include "handlers.h"
#include "numbers.h"

namespace ptxvm {

namespace {

constexpr uint32_t kDirected = kRoundDown | kRoundZero | kRoundUp;

void integer_to_integer(Machine&, Thread& t, const Instruction& i) {
  const uint64_t bits = t.get(i.in[0]);
  const bool from_signed = i.from.is_signed(), to_signed = i.type.is_signed();
  int64_t v = from_signed ? sign_extended(bits, i.from.bits)
                          : static_cast<int64_t>(low_bits(bits, i.from.bits));
  if (i.flags & kSaturate) {
    using Wide = __int128;
    const Wide wide =
        from_signed ? static_cast<Wide>(v) : static_cast<Wide>(static_cast<uint64_t>(v));
    const Wide top = (Wide(1) << (to_signed ? i.type.bits - 1 : i.type.bits)) - 1;
    const Wide bottom = to_signed ? -top - 1 : 0;
    v = static_cast<int64_t>(std::clamp(wide, bottom, top));
  }
  // A signed value is extended to the width of its register.
  t.set(i.out, to_signed ? static_cast<uint64_t>(sign_extended(v, i.type.bits))
                         : low_bits(v, i.type.bits));
}

void integer_to_float(Machine&, Thread& t, const Instruction& i) {
  const uint64_t bits = t.get(i.in[0]);
  const int64_t v = sign_extended(bits, i.from.bits);
  const uint64_t u = low_bits(bits, i.from.bits);
  const bool is_signed = i.from.is_signed();
  if (i.type.bits == 32 && !(i.flags & kDirected)) {
    t.set(i.out, bits_of(is_signed ? static_cast<float>(v) : static_cast<float>(u)));
    return;
  }
  const double x = is_signed ? static_cast<double>(v) : static_cast<double>(u);
  t.set(i.out,
        i.type.bits == 32 ? bits_of(rounded_to_float(x, i.flags)) : bits_of_number(x, i.type));
}

double integral(double x, uint32_t flags) {
  if (flags & kIntegerNearest) return std::nearbyint(x);
  if (flags & kIntegerZero) return std::trunc(x);
  if (flags & kIntegerDown) return std::floor(x);
  if (flags & kIntegerUp) return std::ceil(x);
  return x;
}

double source(const Thread& t, const Instruction& i) {
  const uint64_t bits = t.get(i.in[0]);
  return number_of(i.flags & kFlushDenormals && i.from.bits == 32 ? flushed(bits) : bits, i.from);
}

void float_to_integer(Machine&, Thread& t, const Instruction& i) {
  const double x = integral(source(t, i), i.flags);
  const bool to_signed = i.type.is_signed();
  const int bits = i.type.bits;
  const double top = std::ldexp(1, to_signed ? bits - 1 : bits);
  const double bottom = to_signed ? -top : 0;
  uint64_t v;
  if (x != x) {
    v = 0;
  } else if (x >= top) {
    v = to_signed ? (1ull << (bits - 1)) - 1 : ~0ull;
  } else if (x <= bottom) {
    v = to_signed ? 1ull << (bits - 1) : 0;
  } else {
    v = to_signed ? static_cast<uint64_t>(static_cast<int64_t>(x)) : static_cast<uint64_t>(x);
  }
  t.set(i.out, low_bits(v, bits));
}

uint64_t to_float(double x, const Instruction& i) {
  Type type = i.type;
  type.pair = false;
  if (i.flags & kRelu) x = x != x ? x : std::fmax(x, 0);
  if (i.flags & kSaturate) x = x != x ? 0 : std::fmin(std::fmax(x, 0), 1);
  if (type.bits == 32 && i.flags & kDirected) return bits_of(rounded_to_float(x, i.flags));
  if (type.bits == 16 && i.flags & kRoundZero) {
    // Rounding to nearest may have gone away from zero; then the result is the number before it.
    const uint64_t out = bits_of_number(x, type);
    const bool away = std::fabs(number_of(out, type)) > std::fabs(x);
    return away ? out - 1 : out;
  }
  return bits_of_number(x, type);
}

void float_to_float(Machine&, Thread& t, const Instruction& i) {
  const uint64_t out = to_float(integral(source(t, i), i.flags), i);
  t.set(i.out, i.flags & kFlushDenormals && i.type.bits == 32 ? flushed(out) : out);
}

void bfloat_of_float(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, bfloat_of(float_of(t.get(i.in[0]))));
}
void float_of_half_bits(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, bits_of(float_of_half(t.get(i.in[0]) & 0xffff)));
}

// Converts two floats to a pair. The first operand goes to the upper half.
void floats_to_pair(Machine&, Thread& t, const Instruction& i) {
  const uint64_t high = to_float(float_of(t.get(i.in[0])), i);
  const uint64_t low = to_float(float_of(t.get(i.in[1])), i);
  t.set(i.out, low | high << 16);
}

void to_tf32(Machine&, Thread& t, const Instruction& i) {
  const uint32_t bits = t.get(i.in[0]);
  const bool special = (bits & 0x7f800000) == 0x7f800000;
  const uint32_t half = i.flags & kRoundZero  ? 0
                        : i.flags & kTiesAway ? 0x1000
                                              : 0xfff + (bits >> 13 & 1);
  t.set(i.out, special ? bits : (bits + half) & 0xffffe000u);
}

}  // namespace

Handler pick_convert(const Statement& s, Instruction& i) {
  if (s.opcode != "cvt") return nullptr;
  // The fp8 formats and other small ones are not known.
  for (const std::string& m : s.modifiers)
    if (m.rfind("e4m", 0) == 0 || m.rfind("e5m", 0) == 0 || m.rfind("e2m", 0) == 0 ||
        m.rfind("e3m", 0) == 0 || m.rfind("ue8", 0) == 0 || m == "pack")
      return nullptr;
  if (i.type.kind == Kind::kTf32) return to_tf32;
  if (i.type.pair) return i.count == 2 && i.from.bits == 32 ? floats_to_pair : nullptr;
  const bool to = i.type.is_float(), from = i.from.is_float();
  const uint32_t special = kDirected | kFlushDenormals | kSaturate | kRelu;
  if (to && from && !(i.flags & special)) {
    if (i.type.kind == Kind::kBfloat && i.from.bits == 32) return bfloat_of_float;
    if (i.type.bits == 32 && i.from.kind == Kind::kFloat && i.from.bits == 16)
      return float_of_half_bits;
  }
  if (to) return from ? float_to_float : integer_to_float;
  return from ? float_to_integer : integer_to_integer;
}

}  // namespace ptxvm
