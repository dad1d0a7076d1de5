// Handlers of moves, loads, stores, atomics and asynchronous copies.
#include <algorithm>

#include "handlers.h"
#include "numbers.h"

namespace ptxvm {

namespace {

// --- Moves ---------------------------------------------------------------------------------------

void move(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, low_bits(t.get(i.in[0]), i.type.bits));
}
void move_whole(Machine&, Thread& t, const Instruction& i) { t.set(i.out, t.get(i.in[0])); }

void move_predicate(Machine&, Thread& t, const Instruction& i) { t.set(i.out, t.truth(i.in[0])); }

void unpack(Machine&, Thread& t, const Instruction& i) {
  const std::vector<Operand>& parts = i.vector(0);
  const int width = i.type.bits / static_cast<int>(parts.size());
  const uint64_t whole = t.get(i.in[0]);
  for (size_t k = 0; k < parts.size(); ++k) t.set(parts[k], low_bits(whole >> (width * k), width));
}

void pack(Machine&, Thread& t, const Instruction& i) {
  const std::vector<Operand>& parts = i.vector(0);
  const int width = i.type.bits / static_cast<int>(parts.size());
  uint64_t whole = 0;
  for (size_t k = 0; k < parts.size(); ++k)
    whole |= low_bits(t.get(parts[k]), width) << (width * k);
  t.set(i.out, whole);
}

uint64_t window(Space space) {
  return space == Space::kShared      ? kSharedWindow
         : space == Space::kLocal     ? kLocalWindow
         : space == Space::kParameter ? kParameterWindow
                                      : 0;
}

void to_generic(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, t.get(i.in[0]) + window(i.space));
}
void to_space(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, t.get(i.in[0]) - window(i.space));
}
void is_in_space(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t address = t.get(i.in[0]);
  bool inside = address >> 56 == window(i.space) >> 56;
  // .shared alone is the block's own memory.
  if (inside && i.space == Space::kShared && !(i.flags & kAnyBlock)) {
    uint64_t offset = address - kSharedWindow;
    inside = &m.block_at(t, offset) == t.home;
  }
  t.set(i.out, inside);
}

// --- Loads and stores ----------------------------------------------------------------------------

uint64_t number_at(const unsigned char* from, Type type) {
  uint64_t v = 0;
  switch (type.bytes()) {
    case 1:
      v = *from;
      break;
    case 2:
      std::memcpy(&v, from, 2);
      break;
    case 4:
      std::memcpy(&v, from, 4);
      break;
    default:
      std::memcpy(&v, from, 8);
  }
  return type.is_signed() ? static_cast<uint64_t>(sign_extended(v, type.bits)) : v;
}

void load(Machine& m, Thread& t, const Instruction& i) {
  unsigned char bytes[16];
  m.load(t, i, m.address(t, i), i.type.bytes(), bytes);
  t.set(i.out, number_at(bytes, i.type));
}

void load_vector(Machine& m, Thread& t, const Instruction& i) {
  unsigned char bytes[32];
  const std::vector<Operand>& parts = i.vector(0);
  const int size = i.type.bytes();
  m.load(t, i, m.address(t, i), size * static_cast<int>(parts.size()), bytes);
  for (size_t k = 0; k < parts.size(); ++k) t.set(parts[k], number_at(bytes + size * k, i.type));
}

void store(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t v = t.get(i.in[0]);
  m.store(t, i, m.address(t, i), i.type.bytes(), reinterpret_cast<const unsigned char*>(&v));
}

void store_vector(Machine& m, Thread& t, const Instruction& i) {
  unsigned char bytes[32];
  const std::vector<Operand>& parts = i.vector(0);
  const int size = i.type.bytes();
  for (size_t k = 0; k < parts.size(); ++k) {
    const uint64_t v = t.get(parts[k]);
    std::memcpy(bytes + size * k, &v, size);
  }
  m.store(t, i, m.address(t, i), size * static_cast<int>(parts.size()), bytes);
}

// --- Atomics -------------------------------------------------------------------------------------

uint64_t float_sum(uint64_t a, uint64_t b, Type type) {
  if (type.pair) {
    Type one = type;
    one.pair = false;
    return low_bits(float_sum(a, b, one), 16) | low_bits(float_sum(a >> 16, b >> 16, one), 16)
                                                    << 16;
  }
  if (type.bits == 32) return bits_of(float_of(a) + float_of(b));
  return bits_of_number(number_of(a, type) + number_of(b, type), type);
}

uint64_t changed(const Instruction& i, uint64_t old, uint64_t a, uint64_t b) {
  const int bits = i.type.bits;
  const bool less = i.type.is_signed() ? sign_extended(a, bits) < sign_extended(old, bits)
                                       : low_bits(a, bits) < low_bits(old, bits);
  switch (static_cast<Atomic>(i.detail)) {
    case Atomic::kAdd:
      return i.type.is_float() ? float_sum(old, a, i.type) : old + a;
    case Atomic::kExch:
      return a;
    case Atomic::kCas:
      return low_bits(old, bits) == low_bits(a, bits) ? b : old;
    case Atomic::kInc:
      return old >= low_bits(a, bits) ? 0 : old + 1;
    case Atomic::kDec:
      return old == 0 || old > low_bits(a, bits) ? a : old - 1;
    case Atomic::kMin:
      return less ? a : old;
    case Atomic::kMax:
      return less ? old : a;
    case Atomic::kAnd:
      return old & a;
    case Atomic::kOr:
      return old | a;
    case Atomic::kXor:
      return old ^ a;
  }
  return old;
}

void atomic(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t a = t.get(i.in[0]), b = i.count > 1 ? t.get(i.in[1]) : 0;
  const int bytes = i.type.pair ? 4 : i.type.bytes();
  const uint64_t old = m.update(t, i, m.address(t, i), bytes,
                                [&](uint64_t before) { return changed(i, before, a, b); });
  t.set(i.out, old);
}

// --- cp.async ------------------------------------------------------------------------------------

void copy_async(Machine& m, Thread& t, const Instruction& i) {
  const int bytes = static_cast<int>(t.get(i.in[1]));
  uint64_t to = m.address(t, i);
  if (to >= kSharedWindow) to -= kSharedWindow;
  int from_bytes = bytes;
  // The last operand, if there is one, says how many bytes are read. The other bytes become zero.
  if (i.count > 2) from_bytes = static_cast<int>(static_cast<uint32_t>(t.get(i.in[2])));
  if (from_bytes < 0 || from_bytes > bytes)
    m.fault("out of bounds", t, "an asynchronous copy that reads more than it writes");
  m.begin_copy(t, i, {to, t.get(i.in[0]) + i.second_offset, bytes, from_bytes});
}

void commit_copies(Machine& m, Thread& t, const Instruction&) { m.close_copies(t); }

void wait_for_copies(Machine& m, Thread& t, const Instruction& i) {
  m.wait_for_copies(t, t.get(i.in[0]));
}
void wait_for_all_copies(Machine& m, Thread& t, const Instruction&) {
  m.close_copies(t);
  m.wait_for_copies(t, 0);
}

void nothing(Machine&, Thread&, const Instruction&) {}

Handler pick_move(Instruction& i) {
  if (i.type.kind == Kind::kPredicate) return move_predicate;
  if (i.type.bits > 64) return nullptr;
  if (!i.has_vectors()) return i.type.bits == 64 ? move_whole : move;
  // {a, b} = c unpacks c, which is then an input. c = {a, b} packs, and has no scalar input.
  return i.count > 0 ? unpack : pack;
}

}  // namespace

Handler pick_data(const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  if (op == "mov") return pick_move(i);
  if (op == "cvta") return s.has("to") ? to_space : to_generic;
  if (op == "isspacep") return is_in_space;
  if (op == "ld" || op == "ldu" || op == "st") {
    if (s.has("async") || s.has("bulk")) return nullptr;
    const size_t parts = i.has_vectors() ? i.vector(0).size() : 1;
    if (i.type.bits > 64 || parts * i.type.bytes() > 32) return nullptr;
    if (op == "st") return i.has_vectors() ? store_vector : store;
    return i.has_vectors() ? load_vector : load;
  }
  if (op == "atom" || op == "red") {
    static const std::map<std::string, Atomic> kNames = {
        {"add", Atomic::kAdd}, {"exch", Atomic::kExch}, {"cas", Atomic::kCas},
        {"inc", Atomic::kInc}, {"dec", Atomic::kDec},   {"min", Atomic::kMin},
        {"max", Atomic::kMax}, {"and", Atomic::kAnd},   {"or", Atomic::kOr},
        {"xor", Atomic::kXor}};
    if (i.has_vectors() || i.type.bits > 64 || s.has("async")) return nullptr;
    for (const std::string& m : s.modifiers)
      if (const auto found = kNames.find(m); found != kNames.end()) {
        i.detail = static_cast<uint8_t>(found->second);
        if (i.type.is_float() && found->second != Atomic::kAdd) return nullptr;
        return atomic;
      }
    return nullptr;
  }
  if (op == "cp") {
    for (const char* other : {"bulk", "mbarrier", "L2::cache_hint"})
      if (s.has(other)) return nullptr;
    if (!s.has("async")) return nullptr;
    if (s.has("commit_group")) return commit_copies;
    if (s.has("wait_group")) return wait_for_copies;
    if (s.has("wait_all")) return wait_for_all_copies;
    i.space = Space::kGlobal;
    return copy_async;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "discard" || op == "createpolicy" ||
      op == "applypriority")
    return nothing;
  return nullptr;
}

}  // namespace ptxvm
