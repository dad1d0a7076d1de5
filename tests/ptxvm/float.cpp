// Handlers of floating-point arithmetic, comparisons and elementary functions.
#include <cmath>

#include "handlers.h"
#include "numbers.h"

namespace ptxvm {

namespace {

constexpr uint32_t kDirected = kRoundDown | kRoundZero | kRoundUp;

float smaller(float a, float b) { return std::fmin(a, b); }
double smaller(double a, double b) { return std::fmin(a, b); }
float larger(float a, float b) { return std::fmax(a, b); }
double larger(double a, double b) { return std::fmax(a, b); }

struct Add {
  static constexpr Arithmetic kRounded = Arithmetic::kAdd;
  template <class T>
  static T of(T a, T b, T) {
    return a + b;
  }
};
struct Sub {
  static constexpr Arithmetic kRounded = Arithmetic::kSub;
  template <class T>
  static T of(T a, T b, T) {
    return a - b;
  }
};
struct Mul {
  static constexpr Arithmetic kRounded = Arithmetic::kMul;
  template <class T>
  static T of(T a, T b, T) {
    return a * b;
  }
};
struct Div {
  static constexpr Arithmetic kRounded = Arithmetic::kDiv;
  template <class T>
  static T of(T a, T b, T) {
    return a / b;
  }
};
struct Fma {
  static constexpr Arithmetic kRounded = Arithmetic::kFma;
  template <class T>
  static T of(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct Min {
  static constexpr Arithmetic kRounded = Arithmetic::kAdd;
  template <class T>
  static T of(T a, T b, T) {
    return smaller(a, b);
  }
};
struct Max {
  static constexpr Arithmetic kRounded = Arithmetic::kAdd;
  template <class T>
  static T of(T a, T b, T) {
    return larger(a, b);
  }
};

uint64_t third(const Thread& t, const Instruction& i) { return i.count > 2 ? t.get(i.in[2]) : 0; }

// Arithmetic in float32 and float64 without modifiers has its own handlers, because it is the most
// frequent.
template <class Op>
void plain32(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out,
        bits_of(Op::of(float_of(t.get(i.in[0])), float_of(t.get(i.in[1])), float_of(third(t, i)))));
}
template <class Op>
void plain64(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, bits_of(Op::of(double_of(t.get(i.in[0])), double_of(t.get(i.in[1])),
                              double_of(third(t, i)))));
}

template <class T>
T clamped(T x, uint32_t flags) {
  if (flags & kRelu) x = x != x ? x : larger(x, T(0));
  if (flags & kSaturate) x = x != x ? T(0) : smaller(larger(x, T(0)), T(1));
  return x;
}

template <class Op>
uint64_t one_number(uint64_t a, uint64_t b, uint64_t c, Type type, uint32_t flags) {
  const bool extreme = std::is_same_v<Op, Min> || std::is_same_v<Op, Max>;
  const uint32_t directed = extreme ? 0 : flags & kDirected;
  const bool flush = flags & kFlushDenormals && type.bits == 32;
  if (flush) {
    a = flushed(a);
    b = flushed(b);
    c = flushed(c);
  }
  if (extreme && flags & kPropagateNan) {
    const double x = number_of(a, type), y = number_of(b, type);
    if (x != x || y != y) return bits_of_number(std::numeric_limits<double>::quiet_NaN(), type);
  }
  if (type.bits == 32) {
    const float x = float_of(a), y = float_of(b), z = float_of(c);
    const float r = directed ? rounded(Op::kRounded, x, y, z, directed) : Op::of(x, y, z);
    const uint64_t out = bits_of(clamped(r, flags));
    return flush ? flushed(out) : out;
  }
  const double x = number_of(a, type), y = number_of(b, type), z = number_of(c, type);
  const double r =
      directed && type.bits == 64 ? rounded(Op::kRounded, x, y, z, directed) : Op::of(x, y, z);
  return bits_of_number(clamped(r, flags), type);
}

template <class Op>
void general(Machine&, Thread& t, const Instruction& i) {
  const uint64_t a = t.get(i.in[0]), b = t.get(i.in[1]), c = third(t, i);
  if (!i.type.pair) {
    t.set(i.out, one_number<Op>(a, b, c, i.type, i.flags));
    return;
  }
  const uint64_t low = one_number<Op>(a, b, c, i.type, i.flags);
  const uint64_t high = one_number<Op>(a >> 16, b >> 16, c >> 16, i.type, i.flags);
  t.set(i.out, low_bits(low, 16) | low_bits(high, 16) << 16);
}

template <class Op>
Handler arithmetic(const Instruction& i) {
  const uint32_t special = kDirected | kFlushDenormals | kSaturate | kRelu | kPropagateNan;
  if (i.type.kind == Kind::kFloat && !(i.flags & special)) {
    if (i.type.bits == 32) return plain32<Op>;
    if (i.type.bits == 64) return plain64<Op>;
  }
  return general<Op>;
}

// --- Sign ----------------------------------------------------------------------------------------

uint64_t sign_bits(Type type) { return type.pair ? 0x80008000u : 1ull << (type.bits - 1); }

uint64_t flushed_input(const Instruction& i, uint64_t a) {
  return i.flags & kFlushDenormals && i.type.bits == 32 ? flushed(a) : a;
}

void negate(Machine&, Thread& t, const Instruction& i) {
  const uint64_t a = low_bits(t.get(i.in[0]), i.type.pair ? 32 : i.type.bits);
  t.set(i.out, flushed_input(i, a) ^ sign_bits(i.type));
}

void absolute(Machine&, Thread& t, const Instruction& i) {
  const uint64_t a = low_bits(t.get(i.in[0]), i.type.pair ? 32 : i.type.bits);
  t.set(i.out, flushed_input(i, a) & ~sign_bits(i.type));
}

void copy_sign(Machine&, Thread& t, const Instruction& i) {
  const uint64_t sign = sign_bits(i.type);
  t.set(i.out, low_bits((t.get(i.in[1]) & ~sign) | (t.get(i.in[0]) & sign), i.type.bits));
}

// --- Comparisons ---------------------------------------------------------------------------------

bool holds(const Thread& t, const Instruction& i) {
  uint64_t a = t.get(i.in[0]), b = t.get(i.in[1]);
  if (i.flags & kFlushDenormals && i.from.bits == 32) {
    a = flushed(a);
    b = flushed(b);
  }
  const double x = number_of(a, i.from), y = number_of(b, i.from);
  const bool nan = x != x || y != y;
  const Compare c = static_cast<Compare>(i.detail);
  if (c == Compare::kNum) return !nan;
  if (c == Compare::kNan) return nan;
  return nan ? i.unordered : compare(c, x, y);
}

void set_predicate(Machine&, Thread& t, const Instruction& i) { set_comparison(t, i, holds(t, i)); }

void set_number(Machine&, Thread& t, const Instruction& i) {
  const bool yes = holds(t, i);
  t.set(i.out, !yes                ? 0
               : i.type.is_float() ? bits_of_number(1, i.type)
                                   : low_bits(~0ull, i.type.bits));
}

enum Property : uint8_t { kInfinite, kFinite, kNumber, kNotANumber, kNormal, kSubnormal };

void test_property(Machine&, Thread& t, const Instruction& i) {
  const double x = number_of(t.get(i.in[0]), i.type);
  const double least = i.type.bits == 32 ? 0x1p-126 : 0x1p-1022;
  const bool finite = std::isfinite(x);
  const bool answer[] = {std::isinf(x),
                         finite,
                         x == x,
                         x != x,
                         finite && std::fabs(x) >= least,
                         x != 0 && std::fabs(x) < least};
  t.set(i.out, answer[i.detail]);
}

// --- Elementary functions, computed in double and rounded once -----------------------------------

double reciprocal(double x) { return 1 / x; }
double reciprocal_root(double x) { return 1 / std::sqrt(x); }

template <double (*f)(double)>
uint64_t function_of(uint64_t a, const Instruction& i) {
  const bool flush = i.flags & kFlushDenormals && i.type.bits == 32;
  const double y = f(number_of(flush ? flushed(a) : a, i.type));
  const uint64_t out = i.flags & kDirected && i.type.bits == 32
                           ? bits_of(rounded_to_float(y, i.flags))
                           : bits_of_number(y, i.type);
  return flush ? flushed(out) : out;
}

template <double (*f)(double)>
void elementary(Machine&, Thread& t, const Instruction& i) {
  const uint64_t a = t.get(i.in[0]);
  if (i.type.pair) {
    t.set(i.out, function_of<f>(a & 0xffff, i) | function_of<f>(a >> 16 & 0xffff, i) << 16);
  } else {
    t.set(i.out, function_of<f>(a, i));
  }
}

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 use and return only the upper 32 bits of a number.
template <double (*f)(double)>
void coarse64(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, bits_of(f(double_of(t.get(i.in[0]) & ~0xffffffffull))) & ~0xffffffffull);
}

template <double (*f)(double)>
Handler function(const Instruction& i, bool coarse) {
  return coarse && i.type.bits == 64 ? coarse64<f> : elementary<f>;
}

}  // namespace

Handler pick_float(const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  if (op == "setp" || op == "set") {
    if (!i.from.is_float() || !comparison_named(s.modifiers[0], i) || i.type.pair) return nullptr;
    if (s.has("and")) i.logic = Logic::kAnd;
    if (s.has("or")) i.logic = Logic::kOr;
    if (s.has("xor")) i.logic = Logic::kXor;
    if (op == "setp") return set_predicate;
    return i.logic == Logic::kNone ? set_number : nullptr;
  }
  if (!i.type.is_float()) return nullptr;
  const bool coarse = s.has("approx");
  if (op == "add") return arithmetic<Add>(i);
  if (op == "sub") return arithmetic<Sub>(i);
  if (op == "mul") return arithmetic<Mul>(i);
  if (op == "div") return arithmetic<Div>(i);
  if (op == "fma" || op == "mad") return arithmetic<Fma>(i);
  if (op == "min" || op == "max") {
    if (i.count != 2 || s.has("xorsign")) return nullptr;
    return op == "min" ? arithmetic<Min>(i) : arithmetic<Max>(i);
  }
  if (op == "neg") return negate;
  if (op == "abs") return absolute;
  if (op == "copysign") return copy_sign;
  if (op == "rcp") return function<reciprocal>(i, coarse);
  if (op == "rsqrt") return function<reciprocal_root>(i, coarse);
  if (op == "sqrt") return elementary<std::sqrt>;
  if (op == "ex2") return elementary<std::exp2>;
  if (op == "lg2") return elementary<std::log2>;
  if (op == "tanh") return elementary<std::tanh>;
  if (op == "sin") return elementary<std::sin>;
  if (op == "cos") return elementary<std::cos>;
  if (op == "testp") {
    static const std::map<std::string, Property> kNames = {
        {"infinite", kInfinite},     {"finite", kFinite}, {"number", kNumber},
        {"notanumber", kNotANumber}, {"normal", kNormal}, {"subnormal", kSubnormal}};
    i.detail = kNames.at(s.modifiers[0]);
    return test_property;
  }
  return nullptr;
}

}  // namespace ptxvm
