// The order in which threads run, barriers, and the end of a run.
#include <algorithm>
#include <bit>

#include "machine.h"

namespace ptxvm {

namespace {

// Size of the memory whose address is in %envreg1 and %envreg2. cg::grid.sync() has its counter
// there.
constexpr size_t kGridWorkspace = 4096;

std::string name_of(const std::map<int, std::string>& files, int file) {
  const auto found = files.find(file);
  return found == files.end() ? "?" : found->second.substr(found->second.rfind('/') + 1);
}

std::string source_of(const Module& module, const SourceLine& s) {
  if (s.line == 0) return "";
  std::string text = name_of(module.files, s.file) + ":" + std::to_string(s.line);
  if (s.outer_line != 0)
    text += " in " + name_of(module.files, s.outer_file) + ":" + std::to_string(s.outer_line);
  return text;
}

}  // namespace

Machine::Machine(const Module& module, const Kernel& kernel, const uint32_t (&grid)[3],
                 const uint32_t (&block)[3], uint64_t dynamic_shared,
                 std::vector<unsigned char> parameters, std::vector<Buffer*> buffers,
                 const Options& options)
    : module(module),
      kernel(kernel),
      grid{grid[0], grid[1], grid[2]},
      block{block[0], block[1], block[2]},
      options(options),
      parameters_(std::move(parameters)),
      buffers_(std::move(buffers)),
      last_buffer_(kernel.code.size(), ~0u),
      grid_workspace_(kGridWorkspace, 0),
      state_(options.seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull),
      dynamic_shared_(dynamic_shared) {
  const uint32_t threads = block[0] * block[1] * block[2];
  const uint32_t count = grid[0] * grid[1] * grid[2];
  if (threads == 0 || threads > 1024 || count == 0)
    throw std::invalid_argument("a block has 1 to 1024 threads and a grid at least one block");
  if (kernel.max_threads && threads > static_cast<uint32_t>(kernel.max_threads))
    throw std::invalid_argument(kernel.name + " is limited to " +
                                std::to_string(kernel.max_threads) + " threads a block, got " +
                                std::to_string(threads));
  // The thread ids of each block begin at a multiple of 32, so that a warp never holds two blocks.
  const uint32_t stride = (threads + 31) / 32 * 32;
  const uint32_t more = kernel.copies_bulk ? (2 * stride + kCopiersOfBlock) * count : 0;
  const uint64_t actors =
      static_cast<uint64_t>(stride) * count * (kernel.copies_async ? 2 : 1) + more;
  if (actors > Mark::kMaxThreads)
    throw std::invalid_argument("a grid of " + std::to_string(actors) +
                                " threads is more than the interpreter's " +
                                std::to_string(Mark::kMaxThreads));
  for (const auto& [name, variable] : module.variables) {
    own_buffers_.emplace_back();
    own_buffers_.back().name = name;
    own_buffers_.back().data = variable->bytes.data();
    own_buffers_.back().size = variable->bytes.size();
  }
  own_buffers_.emplace_back();
  own_buffers_.back().name = "the grid's barrier";
  own_buffers_.back().data = grid_workspace_.data();
  own_buffers_.back().size = kGridWorkspace;
  for (Buffer& buffer : own_buffers_) buffers_.push_back(&buffer);
  for (Buffer* buffer : buffers_) buffer->shadows.reset();
  std::sort(buffers_.begin(), buffers_.end(),
            [](const Buffer* a, const Buffer* b) { return a->data < b->data; });

  make_clusters();
  order.start(stride * count, kernel.copies_async, more, clusters.size() < count);
  registers_.assign(static_cast<size_t>(threads) * count * kernel.registers, 0xdeadbeefdeadbeef);
  const uint64_t shared_bytes = kernel.shared_bytes + dynamic_shared;
  uint64_t* registers = registers_.data();
  for (uint32_t b = 0; b < count; ++b) {
    Block& home = blocks[b];
    home.shared.assign(shared_bytes, 0xba);
    home.shared_written.assign(shared_bytes, 0);
    home.shadows = new_shadows(shared_bytes);
    home.gatherings.resize(stride / 32);
    home.threads = std::vector<Thread>(threads);
    for (uint32_t k = 0; k < threads; ++k, registers += kernel.registers) {
      Thread& t = home.threads[k];
      t.home = &home;
      t.block = b;
      t.cluster = home.cluster->blocks[0]->index;
      t.id = b * stride + k;
      t.index = k;
      t.lane = k % 32;
      t.warp = k / 32;
      t.registers = registers;
      t.banks[Operand::kRegister] = registers;
      t.banks[Operand::kConstant] = kernel.constants.data();
      order.begin(t);
      for (const auto& [place, name] : kernel.special) registers[place] = special_value(t, name);
      ready_.push_back(&t);
    }
  }
}

uint64_t Machine::special_value(const Thread& t, const std::string& name) const {
  const Block& b = *t.home;
  const uint64_t workspace = reinterpret_cast<uint64_t>(grid_workspace_.data());
  const int axis = name.back() - 'x';
  const std::string stem = name.substr(0, name.find('.'));
  const uint32_t lane = 1u << t.lane;
  if (stem == "%tid")
    return axis == 0   ? t.index % block[0]
           : axis == 1 ? t.index / block[0] % block[1]
                       : t.index / block[0] / block[1];
  if (stem == "%ntid") return block[axis];
  if (stem == "%ctaid") return axis == 0 ? b.x : axis == 1 ? b.y : b.z;
  if (stem == "%nctaid") return grid[axis];
  if (stem == "%laneid") return t.lane;
  if (stem == "%warpid") return t.warp;
  if (stem == "%nwarpid") return (b.threads.size() + 31) / 32;
  if (stem.find("cluster") != std::string::npos) return special_value_of_cluster(b, stem, axis);
  if (stem == "%smid") return b.index;
  if (stem == "%nsmid") return blocks.size();
  if (stem == "%lanemask_eq") return lane;
  if (stem == "%lanemask_lt") return lane - 1;
  if (stem == "%lanemask_le") return lane | (lane - 1);
  if (stem == "%lanemask_gt") return ~(lane | (lane - 1));
  if (stem == "%lanemask_ge") return ~(lane - 1);
  if (stem == "%dynamic_smem_size") return dynamic_shared_;
  if (stem == "%total_smem_size") return kernel.shared_bytes + dynamic_shared_;
  if (stem == "%envreg1") return workspace >> 32;
  if (stem == "%envreg2") return workspace & 0xffffffff;
  return stem == "WARP_SZ" ? 32 : 0;
}

std::string Machine::where(uint32_t place) const {
  const Origin& origin = kernel.origins.at(std::min<size_t>(place, kernel.origins.size() - 1));
  const std::string source = source_of(module, origin.source);
  return "PTX line " + std::to_string(origin.ptx_line) +
         (source.empty() ? "" : " (" + source + ")") + ": " + origin.text;
}

void Machine::fault_at(const std::string& kind, const Thread& t, uint32_t place,
                       const std::string& message) const {
  const Origin& origin = kernel.origins.at(place);
  throw Fault(kind,
              message + "\n  in " + kernel.name + ", block " + std::to_string(t.home->index) +
                  " thread " + std::to_string(t.index) + ", " + where(place),
              t.home->index, t.index, origin.ptx_line, source_of(module, origin.source));
}

void Machine::fault(const std::string& kind, const Thread& t, const std::string& message) const {
  fault_at(kind, t, t.at - 1, message);
}

Statistics Machine::run() {
  const Instruction* code = kernel.code.data();
  while (!ready_.empty() || !copies_.empty()) {
    // Bulk copies end in any order, at any time.
    if (!copies_.empty() && (ready_.empty() || random() % 4 == 0))
      end_bulk_copy(random() % copies_.size());
    if (ready_.empty()) continue;
    size_t pick = 0;
    uint64_t turn = options.quantum;
    if (options.seed != 0) {
      pick = static_cast<uint64_t>(random()) % ready_.size();
      turn = 1 + random() % options.quantum;
    }
    Thread& t = *ready_[pick];
    if (options.seed != 0) {
      ready_[pick] = ready_.back();
      ready_.pop_back();
    } else {
      ready_.erase(ready_.begin());
    }
    uint64_t done = 0;
    while (done < turn && t.state == Thread::State::kReady) {
      const Instruction& i = code[t.at++];
      ++done;
      ++statistics.instructions;
      if (i.guard >= 0 && (t.registers[i.guard] != 0) == i.guard_negated) continue;
      i.run(*this, t, i);
    }
    if (t.state == Thread::State::kReady) ready_.push_back(&t);
    if (statistics.instructions > options.max_steps)
      report_stuck("more than max_steps instructions");
    if (statistics.instructions - last_progress_ > options.max_idle)
      report_stuck("threads run, but none has stored anything or met another for " +
                   std::to_string(options.max_idle) + " instructions");
  }
  for (const Block& b : blocks)
    if (b.exited != b.threads.size()) report_stuck("no thread can go on");
  return statistics;
}

void Machine::report_stuck(std::string message) const {
  int listed = 0;
  for (const Block& b : blocks)
    for (const Thread& t : b.threads) {
      if (t.state == Thread::State::kDone || ++listed > 8) continue;
      const char* state = t.state == Thread::State::kAtBarrier ? "waits at a barrier"
                          : t.state == Thread::State::kInWarp  ? "waits for its warp"
                                                               : "runs";
      message += "\n  block " + std::to_string(b.index) + " thread " + std::to_string(t.index) +
                 " " + state + ", " + where(t.at > 0 ? t.at - 1 : 0);
    }
  throw Fault("deadlock", message + unfinished_mbarriers(), -1, -1, -1, "");
}

// --- Warps ---------------------------------------------------------------------------------------

bool Machine::gather(Thread& t, uint32_t members) {
  Block& b = *t.home;
  const uint32_t first = t.warp * 32, lanes = std::min<uint32_t>(32, b.threads.size() - first);
  if (lanes < 32) members &= (1u << lanes) - 1;
  if (!(members >> t.lane & 1)) fault("warp divergence", t, "the lane is not in its own mask");
  for (uint32_t l = 0; l < lanes; ++l)
    if (members >> l & 1 && b.threads[first + l].state == Thread::State::kDone)
      fault("warp divergence", t,
            "the mask names lane " + std::to_string(l) + ", which has exited");
  std::vector<Gathering>& open = b.gatherings[t.warp];
  auto mine = std::find_if(open.begin(), open.end(),
                           [&](const Gathering& g) { return g.members & members; });
  if (mine == open.end()) mine = open.insert(open.end(), {members, 0, t.at});
  if (mine->members != members)
    fault("warp divergence", t, "other lanes of the mask wait with another mask");
  if (mine->at != t.at)
    fault("warp divergence", t, "other lanes of the mask wait at " + where(mine->at - 1));
  mine->arrived |= 1u << t.lane;
  t.members = members;
  if (mine->arrived != members) {
    t.state = Thread::State::kInWarp;
    return false;
  }
  open.erase(mine);
  return true;
}

void Machine::release_warp(Thread& t) {
  for (uint32_t l = 0; l < 32; ++l)
    if (t.members >> l & 1 && l != t.lane) wake(t.home->threads[t.warp * 32 + l]);
}

// --- Barriers ------------------------------------------------------------------------------------

void Machine::arrive(Thread& t, uint32_t id, uint32_t count, bool wait) {
  Block& b = *t.home;
  if (id >= 16) fault("barrier divergence", t, "barriers are numbered 0 to 15");
  Barrier& barrier = b.barriers[id];
  const bool whole_block = count == 0;
  const uint32_t expected = whole_block ? b.threads.size() : count;
  if (whole_block && b.exited)
    fault("barrier divergence", t,
          std::to_string(b.exited) + " threads of the block exited before this barrier");
  if (count % 32)
    fault("barrier divergence", t,
          "a barrier takes whole warps, not " + std::to_string(count) + " threads");
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.whole_block = whole_block;
    barrier.at = t.at;
  } else if (barrier.expected != expected) {
    fault("barrier divergence", t, "threads wait at this barrier for another number of threads");
  } else if (whole_block && id == 0 && barrier.at != t.at) {
    // All threads must wait at the same __syncthreads(). A named barrier may be used by several
    // instructions.
    fault("barrier divergence", t, "other threads of the block wait at " + where(barrier.at - 1));
  }
  barrier.arrivals.push_back(order.publish(t));
  if (wait) {
    t.state = Thread::State::kAtBarrier;
    barrier.waiting.push_back(&t);
  }
  progress();
  if (++barrier.arrived == barrier.expected) finish_barrier(barrier);
}

void Machine::finish_barrier(Barrier& barrier) {
  const std::vector<Actor*> leaving(barrier.waiting.begin(), barrier.waiting.end());
  order.meet(barrier.arrivals, leaving);
  for (Thread* waiting : barrier.waiting) {
    const Instruction& i = kernel.code[waiting->at - 1];
    // barrier.red gives every thread the number of true predicates, or whether all or any are true.
    const uint32_t sum = barrier.sum;
    if (i.detail == 1) waiting->set(i.out, sum);
    if (i.detail == 2) waiting->set(i.out, sum == barrier.arrived);
    if (i.detail == 3) waiting->set(i.out, sum != 0);
    wake(*waiting);
  }
  barrier = Barrier();
}

void Machine::leave(Thread& t) {
  Block& b = *t.home;
  t.state = Thread::State::kDone;
  ++b.exited;
  leave_cluster(t);
  progress();
  for (const Barrier& barrier : b.barriers)
    if (barrier.arrived && barrier.whole_block)
      fault("barrier divergence", t,
            "the thread exits while others of its block wait at " + where(barrier.at - 1));
  for (const Gathering& g : b.gatherings[t.warp])
    if (g.members >> t.lane & 1)
      fault("warp divergence", t, "the lane exits while others wait for it at " + where(g.at - 1));
}

}  // namespace ptxvm
