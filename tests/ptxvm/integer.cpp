// Handlers of integer arithmetic, logic and comparisons.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "handlers.h"
#include "numbers.h"

namespace ptxvm {

namespace {

template <class T>
uint64_t widened(T value) {
  return static_cast<std::make_unsigned_t<T>>(value);
}
template <class T>
T read(const Thread& t, Operand o) {
  return static_cast<T>(t.get(o));
}

struct Add {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  }
};
struct Sub {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
  }
};
struct MulLow {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct MulHigh {
  template <class T>
  static T of(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return std::max(a, b);
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};

template <class Op>
struct Binary {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    t.set(i.out, widened(Op::template of<T>(read<T>(t, i.in[0]), read<T>(t, i.in[1]))));
  }
};

// a op b + c
template <class Op>
struct WithSum {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    const T product = Op::template of<T>(read<T>(t, i.in[0]), read<T>(t, i.in[1]));
    t.set(i.out, widened(Add::of<T>(product, read<T>(t, i.in[2]))));
  }
};

// The product of two numbers in twice their width, plus the third operand if there is one.
struct Wide {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    const int64_t product = static_cast<int64_t>(static_cast<uint64_t>(read<T>(t, i.in[0])) *
                                                 static_cast<uint64_t>(read<T>(t, i.in[1])));
    const uint64_t sum = product + (i.count > 2 ? t.get(i.in[2]) : 0);
    t.set(i.out, low_bits(sum, 16 * sizeof(T)));
  }
};

template <bool kRemainder>
struct Divide {
  template <class T>
  static void run(Machine& m, Thread& t, const Instruction& i) {
    const T a = read<T>(t, i.in[0]), b = read<T>(t, i.in[1]);
    if (b == 0) m.fault("division by zero", t, "an integer division");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) {
      t.set(i.out, kRemainder ? 0 : widened(Sub::of<T>(0, a)));
    } else {
      t.set(i.out, widened(static_cast<T>(kRemainder ? a % b : a / b)));
    }
  }
};

struct Negate {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    t.set(i.out, widened(Sub::of<T>(0, read<T>(t, i.in[0]))));
  }
};
struct Absolute {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    const T a = read<T>(t, i.in[0]);
    t.set(i.out, widened(a < 0 ? Sub::of<T>(0, a) : a));
  }
};
struct Not {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    t.set(i.out, widened(static_cast<T>(~read<T>(t, i.in[0]))));
  }
};

struct ShiftLeft {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    const uint32_t n = t.get(i.in[1]);
    t.set(i.out, n >= 8 * sizeof(T) ? 0 : widened(static_cast<T>(read<T>(t, i.in[0]) << n)));
  }
};
struct ShiftRight {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    const uint32_t most = 8 * sizeof(T) - 1, n = t.get(i.in[1]);
    const T a = read<T>(t, i.in[0]);
    const T half = static_cast<T>(a >> std::min(n, most));
    t.set(i.out, widened(n > most ? static_cast<T>(std::is_signed_v<T> ? half : 0) : half));
  }
};

struct SetPredicate {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    set_comparison(
        t, i, compare(static_cast<Compare>(i.detail), read<T>(t, i.in[0]), read<T>(t, i.in[1])));
  }
};

template <class Family>
Handler by_type(Type type, bool as_signed) {
  switch (type.bits) {
    case 8:
      return as_signed ? Family::template run<int8_t> : Family::template run<uint8_t>;
    case 16:
      return as_signed ? Family::template run<int16_t> : Family::template run<uint16_t>;
    case 32:
      return as_signed ? Family::template run<int32_t> : Family::template run<uint32_t>;
    case 64:
      return as_signed ? Family::template run<int64_t> : Family::template run<uint64_t>;
    default:
      return nullptr;
  }
}

// --- Predicates and single operations ------------------------------------------------------------

void and_predicates(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, t.truth(i.in[0]) && t.truth(i.in[1]));
}
void or_predicates(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, t.truth(i.in[0]) || t.truth(i.in[1]));
}
void xor_predicates(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, t.truth(i.in[0]) != t.truth(i.in[1]));
}
void not_predicate(Machine&, Thread& t, const Instruction& i) { t.set(i.out, !t.truth(i.in[0])); }

void select(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, low_bits(t.get(t.truth(i.in[2]) ? i.in[0] : i.in[1]), i.type.bits));
}

void select_by_sign(Machine&, Thread& t, const Instruction& i) {
  const uint64_t c = t.get(i.in[2]);
  const bool first = i.from.is_float() ? float_of(c) >= 0 : static_cast<int32_t>(c) >= 0;
  t.set(i.out, low_bits(t.get(first ? i.in[0] : i.in[1]), i.type.bits));
}

void funnel_shift(Machine&, Thread& t, const Instruction& i) {
  const uint64_t both = t.get(i.in[1]) << 32 | low_bits(t.get(i.in[0]), 32);
  uint32_t n = t.get(i.in[2]);
  n = i.flags & kWrap ? n & 31 : std::min(n, 32u);
  t.set(i.out, low_bits(i.flags & kLeft ? both << n >> 32 : both >> n, 32));
}

void extract_bits(Machine&, Thread& t, const Instruction& i) {
  const int w = i.type.bits;
  const int at = t.get(i.in[1]) & 255, length = t.get(i.in[2]) & 255;
  uint64_t v = low_bits(t.get(i.in[0]), w);
  if (i.type.is_signed()) {
    v = sign_extended(v, w);
    const int64_t shifted = static_cast<int64_t>(v) >> std::min(at, 63);
    const int kept = std::min(length, std::max(w - at, 0));
    // Bits of the field above the top bit of the number are copies of the sign.
    const int64_t field = length == 0 ? 0
                          : kept <= 0 ? static_cast<int64_t>(v) >> 63
                                      : sign_extended(shifted, kept);
    t.set(i.out, low_bits(field, w));
  } else {
    t.set(i.out, at >= w ? 0 : low_bits(v >> at, length));
  }
}

void insert_bits(Machine&, Thread& t, const Instruction& i) {
  const int w = i.type.bits;
  const int at = t.get(i.in[2]) & 255, length = t.get(i.in[3]) & 255;
  const uint64_t field = at >= w ? 0 : low_bits(low_bits(~0ull, length) << at, w);
  const uint64_t a = at >= w ? 0 : t.get(i.in[0]) << at;
  t.set(i.out, (low_bits(t.get(i.in[1]), w) & ~field) | (a & field));
}

void reverse_bits(Machine&, Thread& t, const Instruction& i) {
  uint64_t v = t.get(i.in[0]), out = 0;
  for (int k = 0; k < i.type.bits; ++k, v >>= 1) out = out << 1 | (v & 1);
  t.set(i.out, out);
}

void count_bits(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, std::popcount(low_bits(t.get(i.in[0]), i.type.bits)));
}

void count_leading_zeros(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, std::countl_zero(low_bits(t.get(i.in[0]), i.type.bits)) - (64 - i.type.bits));
}

void find_leading_bit(Machine&, Thread& t, const Instruction& i) {
  uint64_t v = low_bits(t.get(i.in[0]), i.type.bits);
  if (i.type.is_signed() && sign_extended(v, i.type.bits) < 0) v = low_bits(~v, i.type.bits);
  const int top = 63 - std::countl_zero(v);
  const bool as_shift = i.detail;
  t.set(i.out, v == 0 ? 0xffffffffu : as_shift ? i.type.bits - 1 - top : top);
}

void permute_bytes(Machine&, Thread& t, const Instruction& i) {
  const uint64_t bytes = t.get(i.in[1]) << 32 | low_bits(t.get(i.in[0]), 32);
  const uint32_t selector = t.get(i.in[2]);
  uint32_t out = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k) & 15;
    uint32_t byte = bytes >> (8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * k);
  }
  t.set(i.out, out);
}

void logic_table(Machine&, Thread& t, const Instruction& i) {
  const uint32_t a = t.get(i.in[0]), b = t.get(i.in[1]), c = t.get(i.in[2]);
  const uint32_t table = t.get(i.in[3]);
  uint32_t out = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  t.set(i.out, out);
}

// The instructions with a carry, add.cc, addc, sub.cc, subc, mad.cc and madc. The compiler uses
// them for sums of more than 64 bits.
struct Carry {
  template <class T>
  static void run(Machine&, Thread& t, const Instruction& i) {
    using U = unsigned __int128;
    U a = read<T>(t, i.in[0]), b = read<T>(t, i.in[1]);
    const U carry = i.detail & 1 && t.carry;
    if (i.detail & 8) {  // mad: a * b + c
      const U product = i.type.is_signed() && i.flags & kHigh
                            ? static_cast<U>(MulHigh::of<std::make_signed_t<T>>(a, b))
                            : a * b;
      a = static_cast<T>(i.flags & kHigh && !i.type.is_signed() ? product >> (8 * sizeof(T))
                                                                : product);
      b = read<T>(t, i.in[2]);
    }
    const U out = i.detail & 4 ? a - b - carry : a + b + carry;
    if (i.detail & 2) t.carry = out >> (8 * sizeof(T)) & 1;
    t.set(i.out, static_cast<T>(out));
  }
};

}  // namespace

Handler pick_integer(const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  const bool predicate = i.type.kind == Kind::kPredicate;
  if (op == "and") return predicate ? and_predicates : by_type<Binary<And>>(i.type, false);
  if (op == "or") return predicate ? or_predicates : by_type<Binary<Or>>(i.type, false);
  if (op == "xor") return predicate ? xor_predicates : by_type<Binary<Xor>>(i.type, false);
  if (op == "not") return predicate ? not_predicate : by_type<Not>(i.type, false);
  if (op == "selp") return select;
  if (op == "slct") return select_by_sign;
  if (op == "lop3") return logic_table;
  if (op == "prmt") return s.modifiers.size() == 1 ? permute_bytes : nullptr;
  if (op == "shl") return by_type<ShiftLeft>(i.type, false);
  if (op == "shr") return by_type<ShiftRight>(i.type, i.type.is_signed());
  if (op == "shf") return funnel_shift;
  if (op == "bfe") return extract_bits;
  if (op == "bfi") return insert_bits;
  if (op == "brev") return reverse_bits;
  if (op == "popc") return count_bits;
  if (op == "clz") return count_leading_zeros;
  if (op == "bfind") {
    i.detail = s.has("shiftamt");
    return find_leading_bit;
  }
  if (i.type.is_float() || i.from.is_float()) return nullptr;
  const bool negative = i.type.is_signed();
  if (s.has("cc") || op == "addc" || op == "subc" || op == "madc") {
    i.detail = (op.back() == 'c' ? 1 : 0) | (s.has("cc") ? 2 : 0) |
               (op.rfind("sub", 0) == 0 ? 4 : 0) | (op.rfind("mad", 0) == 0 ? 8 : 0);
    return by_type<Carry>(i.type, false);
  }
  if (op == "add") return i.flags & kSaturate ? nullptr : by_type<Binary<Add>>(i.type, false);
  if (op == "sub") return i.flags & kSaturate ? nullptr : by_type<Binary<Sub>>(i.type, false);
  if (op == "mul" || op == "mad") {
    if (i.flags & kWide) return by_type<Wide>(i.type, negative);
    if (op == "mul")
      return i.flags & kHigh ? by_type<Binary<MulHigh>>(i.type, negative)
                             : by_type<Binary<MulLow>>(i.type, false);
    return i.flags & kHigh ? by_type<WithSum<MulHigh>>(i.type, negative)
                           : by_type<WithSum<MulLow>>(i.type, false);
  }
  if (op == "div") return by_type<Divide<false>>(i.type, negative);
  if (op == "rem") return by_type<Divide<true>>(i.type, negative);
  if (op == "min") return by_type<Binary<Min>>(i.type, negative);
  if (op == "max") return by_type<Binary<Max>>(i.type, negative);
  if (op == "neg") return by_type<Negate>(i.type, true);
  if (op == "abs") return by_type<Absolute>(i.type, true);
  if (op == "setp" && comparison_named(s.modifiers[0], i)) {
    if (s.has("and")) i.logic = Logic::kAnd;
    if (s.has("or")) i.logic = Logic::kOr;
    if (s.has("xor")) i.logic = Logic::kXor;
    return by_type<SetPredicate>(i.type, negative);
  }
  return nullptr;
}

}  // namespace ptxvm
