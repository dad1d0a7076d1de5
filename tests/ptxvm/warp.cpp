// Handlers of the instructions that the lanes of a warp execute together: shuffles, votes, sums,
// matrix loads and products. The last lane that arrives does the work for all lanes.
#include <algorithm>

#include "handlers.h"
#include "numbers.h"

namespace ptxvm {

namespace {

Thread& lane_of(Thread& t, uint32_t lane) { return t.home->threads[t.warp * 32 + lane]; }

uint32_t mask_at(const Thread& t, const Instruction& i, int operand) {
  return t.get(i.in[operand]);
}

// --- Warp barrier --------------------------------------------------------------------------------

void warp_barrier(Machine& m, Thread& t, const Instruction& i) {
  if (!m.gather(t, mask_at(t, i, 0))) return;
  std::vector<Order::Arrival> arrivals;
  std::vector<Actor*> leaving;
  for (uint32_t l = 0; l < 32; ++l)
    if (t.members >> l & 1) {
      arrivals.push_back(m.order.publish(lane_of(t, l)));
      leaving.push_back(&lane_of(t, l));
    }
  m.order.meet(arrivals, leaving);
  m.release_warp(t);
}

// --- Shuffles, votes, sums -----------------------------------------------------------------------

void shuffle(Machine& m, Thread& t, const Instruction& i) {
  if (!m.gather(t, mask_at(t, i, 3))) return;
  uint32_t values[32] = {};
  bool inside[32] = {};
  for (int l = 0; l < 32; ++l) {
    if (!(t.members >> l & 1)) continue;
    const Thread& lane = lane_of(t, l);
    const int by = lane.get(i.in[1]) & 31, c = static_cast<int>(lane.get(i.in[2]));
    const int segment = c >> 8 & 31, clamp = c & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int from = 0;
    switch (static_cast<Shuffle>(i.detail)) {
      case Shuffle::kUp:
        from = l - by;
        inside[l] = from >= last;
        break;
      case Shuffle::kDown:
        from = l + by;
        inside[l] = from <= last;
        break;
      case Shuffle::kButterfly:
        from = l ^ by;
        inside[l] = from <= last;
        break;
      case Shuffle::kIndex:
        from = first | (by & ~segment);
        inside[l] = from <= last;
        break;
    }
    if (!inside[l]) from = l;
    if (!(t.members >> from & 1))
      m.fault("warp divergence", t,
              "lane " + std::to_string(l) + " reads lane " + std::to_string(from) +
                  ", which is not in the mask");
    values[l] = lane_of(t, from).get(i.in[0]);
  }
  for (int l = 0; l < 32; ++l) {
    if (!(t.members >> l & 1)) continue;
    lane_of(t, l).set(i.out, values[l]);
    if (i.second_out >= 0) lane_of(t, l).set(i.vector(i.second_out)[0], inside[l]);
  }
  m.release_warp(t);
}

void vote(Machine& m, Thread& t, const Instruction& i) {
  if (!m.gather(t, mask_at(t, i, 1))) return;
  uint32_t yes = 0;
  for (int l = 0; l < 32; ++l)
    if (t.members >> l & 1 && lane_of(t, l).truth(i.in[0])) yes |= 1u << l;
  uint32_t out = yes;
  switch (static_cast<Vote>(i.detail)) {
    case Vote::kAny:
      out = yes != 0;
      break;
    case Vote::kAll:
      out = yes == t.members;
      break;
    case Vote::kUniform:
      out = yes == 0 || yes == t.members;
      break;
    case Vote::kBallot:
      break;
  }
  for (int l = 0; l < 32; ++l)
    if (t.members >> l & 1) lane_of(t, l).set(i.out, out);
  m.release_warp(t);
}

// match.any returns to each lane the mask of the lanes that have the same value.
void match(Machine& m, Thread& t, const Instruction& i) {
  if (!m.gather(t, mask_at(t, i, 1))) return;
  uint32_t out[32] = {};
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 32; ++k)
      if (t.members >> l & t.members >> k & 1 &&
          low_bits(lane_of(t, l).get(i.in[0]), i.type.bits) ==
              low_bits(lane_of(t, k).get(i.in[0]), i.type.bits))
        out[l] |= 1u << k;
  for (int l = 0; l < 32; ++l)
    if (t.members >> l & 1) lane_of(t, l).set(i.out, out[l]);
  m.release_warp(t);
}

void reduce(Machine& m, Thread& t, const Instruction& i) {
  if (!m.gather(t, mask_at(t, i, 1))) return;
  bool first = true;
  int64_t all = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(t.members >> l & 1)) continue;
    const uint64_t bits = lane_of(t, l).get(i.in[0]);
    const int64_t v =
        i.type.is_signed() ? sign_extended(bits, 32) : static_cast<int64_t>(low_bits(bits, 32));
    switch (static_cast<Atomic>(i.detail)) {
      case Atomic::kAdd:
        all += v;
        break;
      case Atomic::kMin:
        all = first ? v : std::min(all, v);
        break;
      case Atomic::kMax:
        all = first ? v : std::max(all, v);
        break;
      case Atomic::kAnd:
        all = first ? v : all & v;
        break;
      case Atomic::kOr:
        all |= v;
        break;
      default:
        all ^= v;
    }
    first = false;
  }
  for (int l = 0; l < 32; ++l)
    if (t.members >> l & 1) lane_of(t, l).set(i.out, low_bits(all, 32));
  m.release_warp(t);
}

// activemask returns the lanes that stand at the same instruction at this moment. PTX defines no
// more than that.
void active_mask(Machine&, Thread& t, const Instruction& i) {
  uint32_t mask = 0;
  const uint32_t lanes = std::min<uint32_t>(32, t.home->threads.size() - t.warp * 32);
  for (uint32_t l = 0; l < lanes; ++l)
    if (lane_of(t, l).at == t.at || l == t.lane) mask |= 1u << l;
  t.set(i.out, mask);
}

// --- Matrices ------------------------------------------------------------------------------------

void check_whole_warp(Machine& m, const Thread& t) {
  if (t.home->threads.size() < (t.warp + 1) * 32)
    m.fault("warp divergence", t, "a matrix instruction takes 32 lanes");
}

// ldmatrix loads 8x8 matrices of 16-bit numbers. Lane 8k + r has the address of row r of matrix k.
// Lane l gets the numbers of row l / 4 in columns 2(l % 4) and 2(l % 4) + 1, of the matrix or of
// its transpose.
void load_matrix(Machine& m, Thread& t, const Instruction& i) {
  check_whole_warp(m, t);
  if (!m.gather(t, ~0u)) return;
  const int count = i.detail;
  uint16_t matrices[4][8][8];
  for (int k = 0; k < count; ++k)
    for (int r = 0; r < 8; ++r) {
      Thread& lane = lane_of(t, k * 8 + r);
      lane.at = t.at;
      std::memcpy(matrices[k][r], m.access(lane, i, m.address(lane, i), 16, Use::kRead), 16);
    }
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < count; ++k) {
      const int r = l / 4, c = l % 4 * 2;
      const auto& matrix = matrices[k];
      const uint32_t pair = i.flags & kTranspose ? matrix[c][r] | matrix[c + 1][r] << 16
                                                 : matrix[r][c] | matrix[r][c + 1] << 16;
      lane_of(t, l).set(i.has_vectors() ? i.vector(0)[k] : i.out, pair);
    }
  m.release_warp(t);
}

// Number `part` of a register of the factor A or B. A register holds one tf32 or two 16-bit
// numbers.
template <Kind kKind>
float entry(uint64_t bits, int part) {
  if (kKind == Kind::kTf32) return float_of(bits & 0xffffe000u);
  const uint64_t half = bits >> (16 * part) & 0xffff;
  return kKind == Kind::kBfloat ? float_of_bfloat(half) : float_of_half(half);
}

// mma: D = A B + C, with A [16, K] stored by rows and B [K, 8] by columns. Lane 4g + q holds
// numbers of rows g and g + 8 of A and of column g of B. K is cut into groups of four numbers for
// tf32, of which the lane holds number q, and of eight numbers for 16-bit types, of which it holds
// numbers 2q and 2q + 1. The sum is taken in double and rounded once; hardware sums and rounds in
// another order.
template <Kind kKind>
void multiply(Machine& m, Thread& t, const Instruction& i) {
  check_whole_warp(m, t);
  if (!m.gather(t, ~0u)) return;
  constexpr int kParts = kKind == Kind::kTf32 ? 1 : 2, kBlock = 4 * kParts;
  const std::vector<Operand>&d = i.vector(0), &a = i.vector(1), &b = i.vector(2), &c = i.vector(3);
  const int depth = i.detail;
  const bool wide = d.size() == 4;  // the sums are float32, not float16
  double left[16][16], right[16][8];
  for (int l = 0; l < 32; ++l) {
    const Thread& lane = lane_of(t, l);
    const int g = l / 4, q = l % 4;
    for (size_t k = 0; k < a.size(); ++k)
      for (int e = 0; e < kParts; ++e)
        left[g + (k & 1) * 8][kParts * q + e + (k >> 1) * kBlock] = entry<kKind>(lane.get(a[k]), e);
    for (size_t k = 0; k < b.size(); ++k)
      for (int e = 0; e < kParts; ++e)
        right[kParts * q + e + k * kBlock][g] = entry<kKind>(lane.get(b[k]), e);
  }
  double product[16][8] = {};
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) product[r][n] += left[r][k] * right[k][n];
  for (int l = 0; l < 32; ++l) {
    Thread& lane = lane_of(t, l);
    uint64_t out[4];
    for (int k = 0; k < 4; ++k) {
      const double sum = product[l / 4 + (k >> 1) * 8][2 * (l % 4) + (k & 1)];
      const float before = wide ? float_of(lane.get(c[k]))
                                : float_of_half(lane.get(c[k / 2]) >> (16 * (k & 1)) & 0xffff);
      out[k] =
          wide ? bits_of(static_cast<float>(before + sum)) : half_of(round_to_odd(before + sum));
    }
    for (int k = 0; k < 4; ++k) {
      if (wide) lane.set(d[k], out[k]);
      if (!wide && k % 2 == 0) lane.set(d[k / 2], out[k] | out[k + 1] << 16);
    }
  }
  m.release_warp(t);
}

Handler pick_multiply(const Statement& s, Instruction& i) {
  std::vector<std::string> types;
  std::string shape;
  for (const std::string& modifier : s.modifiers) {
    Type type;
    if (type_named(modifier, type)) types.push_back(modifier);
    if (modifier.rfind("m16n8k", 0) == 0) shape = modifier;
  }
  if (shape.empty() || types.size() != 4 || types[1] != types[2] || !i.has_vectors() ||
      i.lists->size() != 4 || s.modifiers[0] == "sp")
    return nullptr;
  i.detail = static_cast<uint8_t>(std::stoi(shape.substr(6)));
  const bool sums = types[0] == types[3] && (types[0] == "f32" || types[0] == "f16");
  if (!sums) return nullptr;
  if (types[1] == "tf32" && types[0] == "f32" && (i.detail == 4 || i.detail == 8))
    return multiply<Kind::kTf32>;
  if (i.detail != 8 && i.detail != 16) return nullptr;
  if (types[1] == "bf16" && types[0] == "f32") return multiply<Kind::kBfloat>;
  return types[1] == "f16" ? multiply<Kind::kFloat> : nullptr;
}

}  // namespace

Handler pick_warp(const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  if (op == "bar" && s.has("warp")) return warp_barrier;
  if (op == "shfl") {
    i.detail = static_cast<uint8_t>(s.has("up")     ? Shuffle::kUp
                                    : s.has("down") ? Shuffle::kDown
                                    : s.has("bfly") ? Shuffle::kButterfly
                                                    : Shuffle::kIndex);
    return s.has("sync") ? shuffle : nullptr;
  }
  if (op == "vote") {
    i.detail = static_cast<uint8_t>(s.has("any")   ? Vote::kAny
                                    : s.has("all") ? Vote::kAll
                                    : s.has("uni") ? Vote::kUniform
                                                   : Vote::kBallot);
    return s.has("sync") ? vote : nullptr;
  }
  if (op == "match") return s.has("any") ? match : nullptr;
  if (op == "redux") {
    i.detail = static_cast<uint8_t>(s.has("add")   ? Atomic::kAdd
                                    : s.has("min") ? Atomic::kMin
                                    : s.has("max") ? Atomic::kMax
                                    : s.has("and") ? Atomic::kAnd
                                    : s.has("or")  ? Atomic::kOr
                                                   : Atomic::kXor);
    return i.type.is_float() ? nullptr : reduce;
  }
  if (op == "activemask") return active_mask;
  if (op == "ldmatrix") {
    i.detail = s.has("x1") ? 1 : s.has("x2") ? 2 : 4;
    i.space = s.has("shared") || s.has("shared::cta") ? Space::kShared : Space::kGlobal;
    return s.has("m8n8") && s.has("b16") ? load_matrix : nullptr;
  }
  if (op == "mma") return pick_multiply(s, i);
  return nullptr;
}

}  // namespace ptxvm
