// Clusters of blocks: their sizes and ranks, their barrier, and shared memory of other blocks.
#include <algorithm>

#include "handlers.h"

namespace ptxvm {

// --- Sizes and ranks -----------------------------------------------------------------------------

namespace {

// The most blocks of a cluster on any device so far.
constexpr uint32_t kMaxCluster = 16;

std::string text_of(const uint32_t (&sizes)[3]) {
  return std::to_string(sizes[0]) + " x " + std::to_string(sizes[1]) + " x " +
         std::to_string(sizes[2]);
}

}  // namespace

// Makes the blocks of the grid and the clusters that they belong to.
void Machine::make_clusters() {
  const bool given = options.cluster[0] != 0, required = kernel.cluster[0] != 0;
  if (given && required && !std::equal(options.cluster, options.cluster + 3, kernel.cluster))
    throw std::invalid_argument(kernel.name + " requires clusters of " + text_of(kernel.cluster) +
                                " blocks, got " + text_of(options.cluster));
  if (kernel.explicit_cluster && !given && !required)
    throw std::invalid_argument(kernel.name + " must be launched with a size of its clusters");
  uint32_t count = 1;
  for (int k = 0; k < 3; ++k) {
    cluster[k] = given ? options.cluster[k] : required ? kernel.cluster[k] : 1;
    count *= cluster[k];
  }
  if (count == 0 || count > kMaxCluster ||
      (kernel.max_cluster && count > static_cast<uint32_t>(kernel.max_cluster)))
    throw std::invalid_argument(
        "a cluster of " + text_of(cluster) + " blocks: it has 1 to " +
        std::to_string(kernel.max_cluster ? kernel.max_cluster : kMaxCluster));
  for (int k = 0; k < 3; ++k)
    if (grid[k] % cluster[k])
      throw std::invalid_argument("a grid of " + text_of(grid) +
                                  " blocks is no multiple of clusters of " + text_of(cluster));
  const uint32_t wide = grid[0] / cluster[0], high = grid[1] / cluster[1];
  clusters.resize(wide * high * (grid[2] / cluster[2]));
  for (uint32_t b = 0; b < grid[0] * grid[1] * grid[2]; ++b) {
    Block& home = blocks.emplace_back();
    home.index = b;
    home.x = b % grid[0];
    home.y = b / grid[0] % grid[1];
    home.z = b / grid[0] / grid[1];
    home.rank = home.x % cluster[0] +
                cluster[0] * (home.y % cluster[1] + cluster[1] * (home.z % cluster[2]));
    home.cluster = &clusters[home.x / cluster[0] +
                             wide * (home.y / cluster[1] + high * (home.z / cluster[2]))];
    home.cluster->blocks.resize(count);
    home.cluster->blocks[home.rank] = &home;
    home.cluster->threads += block[0] * block[1] * block[2];
  }
}

uint64_t Machine::special_value_of_cluster(const Block& b, const std::string& stem,
                                           int axis) const {
  const uint32_t at[3] = {b.x, b.y, b.z};
  if (stem == "%clusterid") return at[axis] / cluster[axis];
  if (stem == "%nclusterid") return grid[axis] / cluster[axis];
  if (stem == "%cluster_ctaid") return at[axis] % cluster[axis];
  if (stem == "%cluster_nctaid") return cluster[axis];
  if (stem == "%cluster_ctarank") return b.rank;
  if (stem == "%cluster_nctarank") return b.cluster->blocks.size();
  return options.cluster[0] != 0 || kernel.cluster[0] != 0;  // %is_explicit_cluster
}

// --- Barrier -------------------------------------------------------------------------------------

void Machine::arrive_in_cluster(Thread& t, bool release) {
  Cluster& c = *t.home->cluster;
  if (t.cluster_phase != Thread::kNotArrived)
    fault("barrier divergence", t,
          "the thread arrives at the cluster's barrier again without a wait in between");
  t.cluster_phase = c.phase;
  if (release) t.known_at_arrival = {t.view.known, t.lenient.known};
  c.arrivals.push_back(order.arrive(t, Scope::kCluster, release));
  show_mbarriers(t);
  ++c.arrived;
  progress();
  finish_cluster_phase(c);
}

void Machine::wait_in_cluster(Thread& t) {
  Cluster& c = *t.home->cluster;
  if (t.cluster_phase == Thread::kNotArrived)
    fault("barrier divergence", t,
          "the thread waits at the cluster's barrier but has not arrived there");
  if (t.cluster_phase == c.phase) {
    t.state = Thread::State::kAtBarrier;
    c.waiting.push_back(&t);
  } else {
    pass_cluster_barrier(t);
  }
}

// Ends the phase if all threads of the cluster have arrived or exited.
void Machine::finish_cluster_phase(Cluster& c) {
  if (c.arrived == 0 || c.arrived + c.exited - c.arrived_and_exited != c.threads) return;
  c.last = order.united(c.arrivals);
  c.arrivals.clear();
  c.arrived = c.arrived_and_exited = 0;
  ++c.phase;
  for (Thread* waiting : c.waiting) {
    pass_cluster_barrier(*waiting);
    wake(*waiting);
  }
  c.waiting.clear();
}

void Machine::pass_cluster_barrier(Thread& t) {
  const Order::Knowledge& last = t.home->cluster->last;
  if (t.known_at_arrival.strict == t.view.known && t.known_at_arrival.lenient == t.lenient.known) {
    // The thread has learned nothing since it published, so the others know all that it knows.
    t.view.known = last.strict;
    t.lenient.known = last.lenient;
    t.known = last.strict->data();
  } else {
    order.learn(t, last, t.home->cluster->joins);
  }
  t.known_at_arrival = {};
  t.cluster_passed = t.cluster_phase + 1;
  t.cluster_phase = Thread::kNotArrived;
  t.met_blocks = ~0u;
}

// --- Shared memory of other blocks ---------------------------------------------------------------

Block& Machine::block_at(const Thread& t, uint64_t& address) {
  if (address < kBlockWindow) return *t.home;
  const Cluster& c = *t.home->cluster;
  const uint64_t rank = address / kBlockWindow - 1;
  if (rank >= c.blocks.size())
    fault("out of bounds", t,
          "shared memory of the block of rank " + std::to_string(rank) + " in a cluster of " +
              std::to_string(c.blocks.size()));
  address %= kBlockWindow;
  return *c.blocks[rank];
}

// The block of an access that is not inside the thread's own shared memory. The block must be
// running at the time of the access, in every order of threads: it must have started before for
// certain, and some thread of it must exit later for certain.
Block& Machine::visited_block(Thread& t, const Instruction& i, uint64_t& address, int bytes,
                              bool by_copy) {
  const bool own = address < kBlockWindow;
  Block& b = block_at(t, address);
  if (address + bytes > b.shared.size())
    fault("out of bounds", t,
          "shared memory " + (own ? "" : "of block " + std::to_string(b.index) + " ") + "at " +
              std::to_string(address) + ", " + std::to_string(bytes) + " bytes, of " +
              std::to_string(b.shared.size()));
  if (!own && i.space == Space::kShared && !(i.flags & kAnyBlock))
    fault("out of bounds", t,
          "an address in .shared::cluster, of block " + std::to_string(b.index) + " at " +
              std::to_string(address) + ", in an instruction that takes one of .shared::cta");
  if (&b == t.home) return b;
  const std::string what = "shared memory of block " + std::to_string(b.index) + " at " +
                           std::to_string(address) + ", which ";
  if (b.exited == b.threads.size()) fault("absent block", t, what + "has exited");
  if (!options.races) return b;
  if (!(t.met_blocks >> b.rank & 1)) {
    const bool met = std::any_of(b.threads.begin(), b.threads.end(), [&](const Thread& other) {
      return order.would_have_happened_before(t, other.id, 1);
    });
    if (!met)
      fault("absent block", t,
            what + "may not have started yet: a barrier of the cluster is missing before");
    t.met_blocks |= 1u << b.rank;
  }
  if (!by_copy) b.visits[t.id] = {t.epoch, i.place};
  return b;
}

void Machine::leave_cluster(Thread& t) {
  Block& b = *t.home;
  std::erase_if(b.visits, [&](const auto& visit) {
    return order.happened_before(t, visit.first, visit.second.epoch);
  });
  if (b.exited == b.threads.size() && !b.visits.empty()) {
    const auto& [id, visit] = *b.visits.begin();
    const auto [who, copied] = thread_behind(id);
    if (copied)
      fault("absent block", t,
            "the block exits, but a copy may access its shared memory later, which " +
                name_of(who) + " began at " + where(visit.place) + ": a wait for it is missing");
    fault("absent block", t,
          "the block exits, but " + name_of(who) + " may access its shared memory later, at " +
              where(visit.place) + ": a barrier of the cluster is missing before the end");
  }
  Cluster& c = *b.cluster;
  ++c.exited;
  c.arrived_and_exited += t.cluster_phase == c.phase;
  finish_cluster_phase(c);
}

// --- Handlers ------------------------------------------------------------------------------------

namespace {

// Calls f for the lanes of the warp if the instruction is .aligned, once all of them are there;
// else for the thread alone.
template <class F>
void for_lanes(Machine& m, Thread& t, const Instruction& i, F f) {
  if (!(i.flags & kAligned)) return f(t);
  if (!m.gather(t, ~0u)) return;
  for (uint32_t l = 0; l < 32; ++l) {
    if (!(t.members >> l & 1)) continue;
    Thread& lane = t.home->threads[t.warp * 32 + l];
    f(lane);
    if (lane.state == Thread::State::kInWarp) m.wake(lane);
  }
}

void cluster_arrive(Machine& m, Thread& t, const Instruction& i) {
  for_lanes(m, t, i, [&](Thread& lane) { m.arrive_in_cluster(lane, i.flags & kRelease); });
}

void cluster_wait(Machine& m, Thread& t, const Instruction& i) {
  for_lanes(m, t, i, [&](Thread& lane) { m.wait_in_cluster(lane); });
}

// The offset in the window of shared memory that an operand names.
uint64_t offset_in_window(Machine& m, Thread& t, const Instruction& i) {
  uint64_t address = t.get(i.in[0]);
  if (i.space != Space::kGlobal) return address;
  if (address < kSharedWindow || address >= kLocalWindow)
    m.fault("out of bounds", t, "the address is not in shared memory");
  return address - kSharedWindow;
}

void map_address(Machine& m, Thread& t, const Instruction& i) {
  uint64_t offset = offset_in_window(m, t, i);
  m.block_at(t, offset);
  const uint64_t rank = t.get(i.in[1]) & 0xffffffff;
  uint64_t address = (rank + 1) * kBlockWindow + offset;
  m.block_at(t, offset = address);
  t.set(i.out, address + (i.space == Space::kGlobal ? kSharedWindow : 0));
}

void rank_of_address(Machine& m, Thread& t, const Instruction& i) {
  uint64_t offset = offset_in_window(m, t, i);
  t.set(i.out, m.block_at(t, offset).rank);
}

}  // namespace

Handler pick_cluster(const Statement& s, Instruction& i) {
  if (s.opcode == "mapa") return map_address;
  if (s.opcode == "getctarank") return rank_of_address;
  if (s.opcode == "barrier" && s.has("cluster")) {
    if (s.has("arrive") && !s.has("relaxed")) i.flags |= kRelease;
    return s.has("arrive") ? cluster_arrive : s.has("wait") ? cluster_wait : nullptr;
  }
  return nullptr;
}

}  // namespace ptxvm
