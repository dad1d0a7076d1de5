// mbarrier objects and their instructions.
#include "mbarrier.h"

#include <algorithm>
#include <tuple>

#include "handlers.h"

namespace ptxvm {

namespace {

// The state that an arrival returns holds its phase and the number of arrivals that were pending. A
// set bit tells it from other numbers.
constexpr uint64_t kIsState = 1ull << 63;
constexpr int kPhaseShift = 24;

uint64_t state_of(const MBarrier& o) {
  return kIsState | static_cast<uint64_t>(o.phase) << kPhaseShift | o.pending;
}

std::string place_of(const Block& home, uint64_t offset) {
  return "at byte " + std::to_string(offset) + " of the shared memory of block " +
         std::to_string(home.index);
}

}  // namespace

// --- Objects -------------------------------------------------------------------------------------

Machine::MBarrierPlace Machine::mbarrier_place(Thread& t, const Instruction& i, uint64_t address,
                                               bool by_copy) {
  if (i.space == Space::kGlobal && (address < kSharedWindow || address >= kLocalWindow))
    fault("out of bounds", t, "the mbarrier object is not in shared memory");
  if (address % 8) fault("misaligned access", t, "an mbarrier object that is no multiple of 8");
  address &= kSharedWindow - 1;
  Block* home = t.home;
  if (address + 8 > home->shared.size()) home = &visited_block(t, i, address, 8, by_copy);
  return {home, static_cast<uint32_t>(address)};
}

MBarrier& Machine::mbarrier_at(Thread& t, const MBarrierPlace& at, bool by_copy) {
  const auto found = at.home->mbarriers.find(at.offset);
  if (found == at.home->mbarriers.end())
    fault("mbarrier", t, "no object was initialised " + place_of(*at.home, at.offset));
  MBarrier& o = found->second;
  if (options.races && !order.happened_before(t, o.maker, o.epoch) &&
      t.cluster_passed <= o.shown_in)
    report_unseen(t, at, o);
  if (!by_copy) o.uses[t.id] = t.epoch;
  return o;
}

// Reports an object whose initialisation is not ordered before its use.
void Machine::report_unseen(const Thread& t, const MBarrierPlace& at, const MBarrier& o) const {
  const bool met = order.would_have_happened_before(t, o.maker, o.epoch);
  fault(met ? "weak memory" : "race", t,
        "the mbarrier object " + place_of(*at.home, at.offset) +
            ": a use not ordered behind its initialisation by " + name_of(o.maker) + " at " +
            where(o.place));
}

void Machine::make_mbarrier(Thread& t, const Instruction& i, int64_t count) {
  const MBarrierPlace at = mbarrier_place(t, i, address(t, i));
  if (at.home != t.home)
    fault("mbarrier", t, "the object is in the shared memory of another block");
  if (count < 1 || count > MBarrier::kMaxCount)
    fault("mbarrier", t,
          "an object for " + std::to_string(count) + " arrivals: it takes 1 to " +
              std::to_string(MBarrier::kMaxCount));
  if (t.home->mbarriers.count(at.offset))
    fault("mbarrier", t, "the object was initialised before, and not invalidated since");
  access(t, i, address(t, i), 8, Use::kWrite);
  MBarrier& o = t.home->mbarriers[at.offset];
  o.expected = o.pending = count;
  o.maker = t.id;
  o.epoch = t.epoch;
  o.place = i.place;
  if (const auto last = t.home->copiers.find(at.offset); last != t.home->copiers.end())
    std::tie(o.copier, o.copier_epoch) = last->second;
}

void Machine::end_mbarrier(Thread& t, const Instruction& i) {
  const MBarrierPlace at = mbarrier_place(t, i, address(t, i));
  if (at.home != t.home)
    fault("mbarrier", t, "the object is in the shared memory of another block");
  const MBarrier& o = mbarrier_at(t, at);
  for (const auto& [user, epoch] : o.uses)
    if (options.races && !order.happened_before(t, user, epoch))
      fault("race", t,
            "the mbarrier object " + place_of(*at.home, at.offset) +
                ": mbarrier.inval is not ordered behind a use by " +
                name_of(thread_behind(user).first));
  for (const BulkCopy& copy : copies_)
    if (copy.home == at.home && copy.mbarrier == at.offset)
      fault("mbarrier", t, "a copy to the object is under way, from " + where(copy.place));
  if (o.copier != kNoId) t.home->copiers[at.offset] = {o.copier, o.copier_epoch};
  t.home->mbarriers.erase(at.offset);
  access(t, i, address(t, i), 8, Use::kWrite);
  std::fill_n(&t.home->shared_written[at.offset], 8, 0);
}

// Called for an access to bytes [offset, offset + bytes) by an instruction of another kind.
void Machine::refuse_mbarriers(const Thread& t, const Block& home, uint64_t offset,
                               int bytes) const {
  const auto next = home.mbarriers.lower_bound(offset + bytes);
  if (next == home.mbarriers.begin() || std::prev(next)->first + 8 <= offset) return;
  fault("mbarrier", t,
        "the access is to the object " + place_of(home, std::prev(next)->first) +
            ", which only mbarrier instructions may access before mbarrier.inval");
}

void Machine::fence_mbarriers(Thread& t) {
  for (auto& [offset, o] : t.home->mbarriers)
    if (o.maker == t.id) o.fenced = true;
}

void Machine::show_mbarriers(Thread& t) {
  for (auto& [offset, o] : t.home->mbarriers)
    if (o.maker == t.id && o.fenced && o.shown_in == kNoId) o.shown_in = t.home->cluster->phase;
}

// --- Arrivals and waits --------------------------------------------------------------------------

void Machine::expect_bytes(Thread& t, const MBarrierPlace& at, int64_t bytes) {
  MBarrier& o = mbarrier_at(t, at);
  o.bytes += bytes;
  if (std::abs(o.bytes) > MBarrier::kMaxCount)
    fault("mbarrier", t,
          std::to_string(o.bytes) + " expected bytes are too many for the object " +
              place_of(*at.home, at.offset));
  progress();
}

uint64_t Machine::arrive_at_mbarrier(Thread& t, const Instruction& i, const MBarrierPlace& at,
                                     int64_t count, bool drop) {
  MBarrier& o = mbarrier_at(t, at);
  const uint64_t state = state_of(o);
  if (count < 1 || count > o.pending)
    fault("mbarrier", t,
          std::to_string(count) + " arrivals at the object " + place_of(*at.home, at.offset) +
              ", which waits for " + std::to_string(o.pending) + " in phase " +
              std::to_string(o.phase));
  Order::Arrival arrival = order.arrive(t, i.scope, i.flags & kRelease);
  const bool near = at.home == t.home;
  if (!near && i.scope < Scope::kCluster) arrival.stamp = {};
  (near ? o.near : o.far).push_back(arrival);
  o.pending -= count;
  if (drop) o.expected -= count;
  settle(at, o);
  progress();
  return state;
}

// Ends the phase if nothing is missing.
void Machine::settle(const MBarrierPlace& at, MBarrier& o) {
  if (o.pending != 0 || o.bytes != 0) return;
  for (const BulkCopy& copy : copies_)
    if (copy.home == at.home && copy.mbarrier == at.offset)
      fault_at("mbarrier", *copy.thread, copy.place,
               "phase " + std::to_string(o.phase) + " of the object " +
                   place_of(*at.home, at.offset) +
                   " may end before this copy: fewer bytes are expected than are copied");
  if (o.copier != kNoId) o.near.push_back(order.arrival_of(o.copier, o.copier_epoch++));
  std::vector<Order::Arrival> all = o.near;
  all.insert(all.end(), o.far.begin(), o.far.end());
  o.last_all = order.united(all);
  o.last_near = o.far.empty() ? o.last_all : order.united(o.near);
  o.last_near.lenient = o.last_all.lenient;
  o.near.clear();
  o.far.clear();
  ++o.phase;
  o.pending = o.expected;
  progress();
}

// Whether the phase that `which` stands for has ended: its parity, or a state.
bool Machine::has_ended(Thread& t, const Instruction& i, const MBarrierPlace& at, uint64_t which,
                        bool parity) {
  if (at.home != t.home)
    fault("mbarrier", t, "a thread can wait only at an object in its own block's shared memory");
  MBarrier& o = mbarrier_at(t, at);
  bool ended;
  if (parity) {
    if (which > 1) fault("mbarrier", t, "the parity of a phase is 0 or 1");
    ended = (o.phase & 1) != which;
  } else {
    const uint32_t phase = (which & ~kIsState) >> kPhaseShift;
    if (!(which & kIsState)) fault("mbarrier", t, "the state is not one that an arrival returned");
    ended = phase != o.phase;
    if (ended && phase + 1 != o.phase)
      fault("mbarrier", t,
            "the state is of phase " + std::to_string(phase) + ", but the object is in phase " +
                std::to_string(o.phase));
  }
  if (!ended || o.phase == 0) return ended;
  const Order::Knowledge& last = i.scope >= Scope::kCluster ? o.last_all : o.last_near;
  if (i.flags & kAcquire) {
    order.learn(t, last, o.joins);
  } else {
    order.observe(t, o.last_all, Scope::kCluster);
  }
  return true;
}

std::string Machine::unfinished_mbarriers() const {
  std::string text;
  int listed = 0;
  for (const Block& b : blocks)
    for (const auto& [offset, o] : b.mbarriers) {
      if ((o.pending == o.expected && o.bytes == 0) || ++listed > 8) continue;
      text += "\n  the mbarrier object " + place_of(b, offset) + " is in phase " +
              std::to_string(o.phase) + ": " + std::to_string(o.pending) + " arrivals and " +
              std::to_string(o.bytes) + " bytes are missing";
    }
  return text;
}

// --- Handlers ------------------------------------------------------------------------------------

namespace {

uint32_t number_in(const Thread& t, const Instruction& i, int operand, uint32_t otherwise = 1) {
  return i.count > operand ? static_cast<uint32_t>(t.get(i.in[operand])) : otherwise;
}

void init(Machine& m, Thread& t, const Instruction& i) {
  m.make_mbarrier(t, i, number_in(t, i, 0));
}

void invalidate(Machine& m, Thread& t, const Instruction& i) { m.end_mbarrier(t, i); }

template <bool kDrop>
void arrive(Machine& m, Thread& t, const Instruction& i) {
  const auto at = m.mbarrier_place(t, i, m.address(t, i));
  t.set(i.out, m.arrive_at_mbarrier(t, i, at, number_in(t, i, 0), kDrop));
}

// The arrival must leave others for this phase.
void arrive_no_complete(Machine& m, Thread& t, const Instruction& i) {
  const auto at = m.mbarrier_place(t, i, m.address(t, i));
  const uint32_t phase = m.mbarrier_at(t, at).phase;
  t.set(i.out, m.arrive_at_mbarrier(t, i, at, number_in(t, i, 0), false));
  if (m.mbarrier_at(t, at).phase != phase)
    m.fault("mbarrier", t, "the arrival ends a phase although it has .noComplete");
}

template <bool kDrop>
void arrive_and_expect(Machine& m, Thread& t, const Instruction& i) {
  const auto at = m.mbarrier_place(t, i, m.address(t, i));
  m.expect_bytes(t, at, number_in(t, i, 0));
  t.set(i.out, m.arrive_at_mbarrier(t, i, at, 1, kDrop));
}

void expect(Machine& m, Thread& t, const Instruction& i) {
  m.expect_bytes(t, m.mbarrier_place(t, i, m.address(t, i)), number_in(t, i, 0));
}

// Counts bytes as copied without a copy.
void complete(Machine& m, Thread& t, const Instruction& i) {
  const auto at = m.mbarrier_place(t, i, m.address(t, i));
  m.expect_bytes(t, at, -static_cast<int64_t>(number_in(t, i, 0)));
  m.settle(at, m.mbarrier_at(t, at));
}

template <bool kParity>
void test(Machine& m, Thread& t, const Instruction& i) {
  const auto at = m.mbarrier_place(t, i, m.address(t, i));
  const uint64_t which = t.get(i.in[0]);
  t.set(i.out, m.has_ended(t, i, at, kParity ? which & 0xffffffff : which, kParity));
}

void pending_count(Machine&, Thread& t, const Instruction& i) {
  t.set(i.out, t.get(i.in[0]) & MBarrier::kMaxCount);
}

void fence_init(Machine& m, Thread& t, const Instruction&) { m.fence_mbarriers(t); }

}  // namespace

Handler pick_mbarrier(const Statement& s, Instruction& i) {
  if (s.opcode == "fence" && s.has("mbarrier_init")) return fence_init;
  if (s.opcode != "mbarrier") return nullptr;
  const bool waits = s.has("test_wait") || s.has("try_wait");
  if (!s.has("init") && !s.has("inval")) {
    i.scope = s.has("cluster") ? Scope::kCluster : Scope::kBlock;
    if (!s.has("relaxed")) i.flags |= waits ? kAcquire : kRelease;
  }
  if (s.has("init")) return init;
  if (s.has("inval")) return invalidate;
  if (s.has("pending_count")) return pending_count;
  if (waits) return s.has("parity") ? test<true> : test<false>;
  const bool arrives = s.has("arrive"), drops = s.has("arrive_drop");
  if (s.has("noComplete")) return arrives ? arrive_no_complete : nullptr;
  if (s.has("expect_tx"))
    return arrives ? arrive_and_expect<false> : drops ? arrive_and_expect<true> : expect;
  if (s.has("complete_tx")) return complete;
  return arrives ? arrive<false> : drops ? arrive<true> : nullptr;
}

}  // namespace ptxvm
