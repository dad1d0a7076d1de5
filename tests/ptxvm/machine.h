// A grid of threads that run one kernel on the CPU. All blocks are alive at once. A thread can be
// stopped and resumed at any instruction; the order in which threads run follows from a seed.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "bulk.h"
#include "mbarrier.h"
#include "order.h"
#include "program.h"

namespace ptxvm {

// An error in a kernel. README.md lists the values of `kind`.
struct Fault : std::runtime_error {
  Fault(const std::string& kind, const std::string& message, int block, int thread, int ptx_line,
        const std::string& source)
      : std::runtime_error(kind + ": " + message),
        kind(kind),
        block(block),
        thread(thread),
        ptx_line(ptx_line),
        source(source) {}
  std::string kind;
  int block, thread, ptx_line;  // -1 if the fault belongs to no single thread
  std::string source;           // "kernels.cu:12"; empty without -lineinfo
};

// --- Shadow memory -------------------------------------------------------------------------------

// The scopes, and one more.
enum class Strength : uint8_t { kWeak, kBlock, kCluster, kDevice, kNonCoherent };

// One access, packed into 64 bits: the thread, its epoch, which of the four bytes it touched, the
// strength of the access, and the index of the instruction.
struct Mark {
  uint64_t bits = 0;

  Mark() = default;
  Mark(uint32_t thread, uint32_t epoch, uint32_t bytes, Strength strength, uint32_t place)
      : bits(static_cast<uint64_t>(std::min(place, kMaxPlace)) << 47 |
             static_cast<uint64_t>(strength) << 44 | static_cast<uint64_t>(bytes) << 40 |
             static_cast<uint64_t>(epoch) << 18 | thread) {}

  static constexpr uint32_t kMaxThreads = 1 << 18, kMaxEpoch = (1 << 22) - 1,
                            kMaxPlace = (1 << 17) - 1;
  static constexpr uint64_t kBytes = 0xfull << 40;

  explicit operator bool() const { return bits != 0; }
  uint32_t thread() const { return bits & (kMaxThreads - 1); }
  uint32_t epoch() const { return bits >> 18 & kMaxEpoch; }
  uint32_t bytes() const { return bits >> 40 & 0xf; }
  Strength strength() const { return static_cast<Strength>(bits >> 44 & 7); }
  uint32_t place() const { return bits >> 47; }
  bool same_thread_and_epoch(Mark other) const { return ((bits ^ other.bits) << 24) == 0; }
};

// The record of four bytes of memory: the last write to each 16-bit half, and up to four of the
// reads since then.
struct Shadow {
  Mark writers[2];
  Mark readers[4];
};

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
// calloc returns zeroed pages that take no memory before their first use; most of a large buffer's
// shadows are never used.
using Shadows = std::unique_ptr<Shadow[], FreeDeleter>;
inline Shadows new_shadows(uint64_t bytes) {
  auto* shadows = static_cast<Shadow*>(std::calloc(bytes / 4 + 2, sizeof(Shadow)));
  if (!shadows) throw std::bad_alloc();
  return Shadows(shadows);
}

// An array in global memory that a kernel may touch.
struct Buffer {
  std::string name;
  unsigned char* data = nullptr;
  uint64_t size = 0;
  bool writable = true;
  // One flag for each byte, 1 once it was written. Empty if all bytes hold values from the start.
  std::vector<uint8_t> written;
  Shadows shadows;  // the accesses of this launch; null before the first one

  uint64_t address() const { return reinterpret_cast<uint64_t>(data); }
};

// --- Threads and blocks --------------------------------------------------------------------------

struct Block;
struct Cluster;

// One cp.async. The bytes are copied when a thread waits for the group of the copy.
struct AsyncCopy {
  uint64_t to, from;
  int bytes, from_bytes;
};

struct Thread : Actor {
  enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

  uint64_t* registers = nullptr;
  const uint64_t* banks[2] = {};
  uint32_t at = 0;  // index of the instruction after the one that runs
  State state = State::kReady;
  Block* home = nullptr;
  uint32_t index = 0, lane = 0, warp = 0;
  uint32_t members = 0;  // mask of the lanes in the warp instruction that this thread waits at
  bool carry = false;
  // The phase of the cluster's barrier at which the thread arrived, until it waits for its end.
  static constexpr uint32_t kNotArrived = ~0u;
  uint32_t cluster_phase = kNotArrived;
  Order::Knowledge known_at_arrival;  // what the thread knew then, if it published all of it
  uint32_t cluster_passed = 0;  // phases of the cluster's barrier whose end the thread waited for
  uint32_t met_blocks = 0;      // ranks of blocks of the cluster that have started for certain
  std::vector<unsigned char> local, scratch;
  std::vector<uint8_t> local_written;
  std::vector<std::vector<AsyncCopy>> copy_groups;
  std::vector<AsyncCopy> open_copies;
  uint32_t bulk_groups = 0;  // groups of bulk copies that the thread has committed
  std::vector<ProxyFence> proxy_fences;

  uint64_t get(Operand o) const { return banks[o.bank][o.index]; }
  bool truth(Operand o) const { return (get(o) != 0) != o.negated; }
  void set(Operand o, uint64_t value) { registers[o.index] = value; }
};

// Lanes of a warp that wait for one another at one instruction; `members` and `arrived` are masks.
struct Gathering {
  uint32_t members, arrived, at;
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  uint32_t at = 0;           // instruction at which the first thread arrived
  bool whole_block = false;  // the barrier is for the whole block: the instruction gives no number
  std::vector<Thread*> waiting;
  std::vector<Order::Arrival> arrivals;
  uint32_t sum = 0;  // number of threads whose predicate is true, for barrier.red
};

// The last access of a thread to the shared memory of another block.
struct Visit {
  uint32_t epoch, place;
};

struct Block {
  uint32_t index = 0, x = 0, y = 0, z = 0;
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<uint8_t> shared_written;
  Shadows shadows;
  std::vector<std::vector<Gathering>> gatherings;  // one list for each warp
  Barrier barriers[16];
  uint32_t exited = 0;
  // The last visit of each thread of another block, by its id, as far as no thread of this block
  // knew of it when it exited.
  std::unordered_map<uint32_t, Visit> visits;
  std::map<uint32_t, MBarrier> mbarriers;  // by offset in shared memory
  // The id and epoch of the copies to each object that was invalidated, by its offset.
  std::map<uint32_t, std::pair<uint32_t, uint32_t>> copiers;
  uint32_t copiers_made = 0;
};

// The blocks of a cluster and their barrier (barrier.cluster).
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  uint32_t threads = 0, exited = 0;
  uint32_t phase = 0, arrived = 0;
  uint32_t arrived_and_exited = 0;  // threads that did both in this phase
  std::vector<Thread*> waiting;
  std::vector<Order::Arrival> arrivals;
  Order::Knowledge last;  // of the phase before this one
  Order::Joins joins;
};

struct Options {
  uint64_t seed = 1;
  uint32_t cluster[3] = {};  // blocks; zeros stand for what the kernel requires, or for one block
  int quantum = 64;          // most instructions that a thread runs before another thread's turn
  uint64_t max_steps = 1ull << 36;
  // This many instructions of all threads without progress are reported as a deadlock.
  uint64_t max_idle = 1ull << 25;
  bool races = true, uninitialised = true, stale = true;
};

struct Statistics {
  uint64_t instructions = 0, stale_loads = 0;
};

enum class Use : uint8_t { kRead, kWrite, kBoth };

struct Machine {
  Machine(const Module& module, const Kernel& kernel, const uint32_t (&grid)[3],
          const uint32_t (&block)[3], uint64_t dynamic_shared,
          std::vector<unsigned char> parameters, std::vector<Buffer*> buffers,
          const Options& options);

  Statistics run();

  // --- Called by handlers
  [[noreturn]] void fault(const std::string& kind, const Thread& thread,
                          const std::string& message) const;
  [[noreturn]] void fault_at(const std::string& kind, const Thread& thread, uint32_t place,
                             const std::string& message) const;
  std::string where(uint32_t place) const;  // "PTX line 12 (kernels.cu:34): ld.global ..."

  uint64_t address(const Thread& t, const Instruction& i) const {
    return t.get(i.address) + i.offset;
  }
  // Checks an access of `bytes` bytes at `address` and returns a pointer to them.
  unsigned char* access(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  void load(Thread& t, const Instruction& i, uint64_t address, int bytes, unsigned char* to);
  void store(Thread& t, const Instruction& i, uint64_t address, int bytes,
             const unsigned char* from);
  // An atomic update: `change` maps the old value to the new one. Returns the old value.
  template <class F>
  uint64_t update(Thread& t, const Instruction& i, uint64_t address, int bytes, F change) {
    unsigned char* p = access(t, i, address, bytes, Use::kBoth);
    uint64_t old = 0;
    std::memcpy(&old, p, bytes);
    const uint64_t fresh = change(old);
    if (is_shareable(i, address)) {
      observe(t, i, address, bytes);
      strong_store(t, i, address, bytes, p, true);
    }
    std::memcpy(p, &fresh, bytes);
    if (std::memcmp(&fresh, &old, bytes) != 0) progress();
    return old;
  }
  void begin_copy(Thread& t, const Instruction& i, const AsyncCopy& copy);
  void close_copies(Thread& t);
  void wait_for_copies(Thread& t, uint64_t left);

  void progress() { last_progress_ = statistics.instructions; }
  void wake(Thread& t) {
    t.state = Thread::State::kReady;
    ready_.push_back(&t);
    progress();
  }
  // Called by each lane that arrives at a warp instruction with mask `members`. It returns true for
  // the last lane, which then executes the instruction for all of them.
  bool gather(Thread& t, uint32_t members);
  void release_warp(Thread& t);
  // A thread arrives at barrier `id` for `count` threads; 0 stands for the whole block.
  void arrive(Thread& t, uint32_t id, uint32_t count, bool wait);
  void finish_barrier(Barrier& barrier);
  void leave(Thread& t);
  // The barrier of a cluster.
  void arrive_in_cluster(Thread& t, bool release);
  void wait_in_cluster(Thread& t);
  void leave_cluster(Thread& t);
  // The block whose shared memory holds `address`, which becomes an offset in it.
  Block& block_at(const Thread& t, uint64_t& address);

  // mbarrier objects.
  struct MBarrierPlace {
    Block* home;
    uint32_t offset;
  };
  // `by_copy` is true if not the thread but a copy that it begins will use the object.
  MBarrierPlace mbarrier_place(Thread& t, const Instruction& i, uint64_t address,
                               bool by_copy = false);
  MBarrier& mbarrier_at(Thread& t, const MBarrierPlace& at, bool by_copy = false);
  void make_mbarrier(Thread& t, const Instruction& i, int64_t count);
  void end_mbarrier(Thread& t, const Instruction& i);
  void expect_bytes(Thread& t, const MBarrierPlace& at, int64_t bytes);
  uint64_t arrive_at_mbarrier(Thread& t, const Instruction& i, const MBarrierPlace& at,
                              int64_t count, bool drop);
  void settle(const MBarrierPlace& at, MBarrier& o);
  bool has_ended(Thread& t, const Instruction& i, const MBarrierPlace& at, uint64_t which,
                 bool parity);
  void fence_mbarriers(Thread& t);

  // Bulk copies.
  void begin_bulk_copy(Thread& t, const Instruction& i, BulkCopy copy, const BulkEnd& to,
                       const BulkEnd& from, const MBarrierPlace* at);
  BulkEnd shared_end(Thread& t, const Instruction& i, uint64_t address, int bytes);
  BulkEnd global_end(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  void wait_for_bulk_groups(Thread& t, uint32_t left, bool only_reads);
  void fence_proxy(Thread& t, bool shared, bool global);

  uint32_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 20;
  }

  const Module& module;
  const Kernel& kernel;
  uint32_t grid[3], block[3], cluster[3];
  Options options;
  Order order;
  std::deque<Block> blocks;
  std::deque<Cluster> clusters;
  Statistics statistics;

 private:
  void make_clusters();
  uint64_t special_value(const Thread& t, const std::string& name) const;
  uint64_t special_value_of_cluster(const Block& b, const std::string& stem, int axis) const;
  Buffer& buffer_at(const Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  unsigned char* global(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  unsigned char* shared(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  Block& visited_block(Thread& t, const Instruction& i, uint64_t& address, int bytes,
                       bool by_copy = false);
  void finish_cluster_phase(Cluster& c);
  void show_mbarriers(Thread& t);
  void refuse_mbarriers(const Thread& t, const Block& home, uint64_t offset, int bytes) const;
  [[noreturn]] void report_unseen(const Thread& t, const MBarrierPlace& at,
                                  const MBarrier& o) const;
  std::string unfinished_mbarriers() const;
  void pass_cluster_barrier(Thread& t);
  unsigned char* local(Thread& t, uint64_t address, int bytes, Use use);
  unsigned char* parameter(Thread& t, uint64_t address, int bytes);
  Strength strength_of(const Instruction& i) const;
  // An access, as check_order needs it.
  struct Touch {
    Shadow* shadows;
    uint64_t offset;  // in bytes, from the memory of shadows[0]
    uint64_t key;     // the first byte's key in strong_
    int bytes;
    Use use;
    Strength strength;
    uint32_t place;
    const Buffer* buffer;  // null for shared memory, which is that of `home`
    const Block* home = nullptr;
  };
  // The id and epoch under which an asynchronous copy is recorded. Each thread has a second id for
  // its copies. A bulk copy belongs to the async proxy.
  struct AsyncReader {
    uint32_t id, epoch;
    bool bulk = false;
  };
  uint32_t bulk_reader(const Thread& t) const { return order.first_of_more() + t.id; }
  uint32_t bulk_writer(const Thread& t) const {
    return order.first_of_more() + order.threads() + t.id;
  }
  uint32_t new_copier(const Thread& t, Block& home);
  bool passed_proxy(const Thread& t, uint32_t writer, uint32_t epoch, bool shared) const;
  void check_proxy(const Thread& t, Mark before, const Touch& touch) const;
  void end_bulk_copy(size_t which);
  // The thread that made an access under an id, and whether an asynchronous copy made it.
  std::pair<uint32_t, bool> thread_behind(uint32_t id) const;
  std::string name_of(uint32_t thread) const;
  void check_order(Thread& t, const Touch& touch, const AsyncReader* copier = nullptr);
  void conflict(const Thread& t, Mark before, const Touch& touch, bool wrote) const;
  bool share_scope(const Thread& t, Mark before, const Touch& touch) const;
  int other_width(Mark before, const Touch& touch) const;
  void stale_line(const Thread& t, const Shadow& shadow, uint32_t bytes, const Touch& touch) const;
  void note_read(Shadow& shadow, Mark mark);
  uint64_t shared_key(const Block& b, uint64_t offset) const;
  uint64_t word_key(const Thread& t, const Instruction& i, uint64_t address);
  void strong_load(Thread& t, const Instruction& i, uint64_t address, int bytes,
                   unsigned char* value);
  bool is_shareable(const Instruction& i, uint64_t address) const;
  void observe(Thread& t, const Instruction& i, uint64_t address, int bytes);
  bool strong_load_of(Thread& t, const Instruction& i, uint64_t first, int bytes,
                      unsigned char* value);
  void strong_store(Thread& t, const Instruction& i, uint64_t address, int bytes,
                    const unsigned char* old, bool atomic);
  [[noreturn]] void report_stuck(std::string message) const;
  bool is_shared(const Instruction& i, uint64_t address) const {
    return i.space == Space::kShared ||
           (i.space == Space::kGlobal && address >= kSharedWindow && address < kLocalWindow);
  }

  std::vector<unsigned char> parameters_;
  std::vector<Buffer*> buffers_;       // sorted by address
  std::vector<uint32_t> last_buffer_;  // the buffer that each instruction accessed last
  std::vector<Buffer> own_buffers_;    // the module's variables and the grid's barrier
  std::vector<unsigned char> grid_workspace_;
  std::vector<uint64_t> registers_;
  std::vector<Thread*> ready_;
  std::unordered_map<uint64_t, StrongWord> strong_;
  std::vector<BulkCopy> copies_;   // that are under way
  std::vector<uint32_t> issuers_;  // the last thread that used each copier
  uint64_t state_ = 1;
  uint64_t last_progress_ = 0;
  uint64_t dynamic_shared_ = 0;
};

}  // namespace ptxvm
