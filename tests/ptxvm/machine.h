// A grid of threads that run one kernel on the CPU: all blocks alive at once, every thread stopped
// and resumed at any instruction in an order that a seed sets.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "order.h"
#include "program.h"

namespace ptxvm {

// An error that a kernel makes. `kind` is one of a fixed list, which the README gives.
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
  int block, thread, ptx_line;  // -1 where the fault is no single thread's
  std::string source;           // "kernels.cu:12", empty without -lineinfo
};

// --- Shadow memory -------------------------------------------------------------------------------

enum class Strength : uint8_t { kWeak, kBlock, kDevice, kNonCoherent };

// One access, packed: who, in which epoch, which bytes of the cell, how strong, which instruction.
struct Mark {
  uint64_t bits = 0;

  Mark() = default;
  Mark(uint32_t thread, uint32_t epoch, uint32_t bytes, Strength strength, uint32_t place)
      : bits(static_cast<uint64_t>(std::min(place, kMaxPlace)) << 46 |
             static_cast<uint64_t>(strength) << 44 | static_cast<uint64_t>(bytes) << 40 |
             static_cast<uint64_t>(epoch) << 18 | thread) {}

  static constexpr uint32_t kMaxThreads = 1 << 18, kMaxEpoch = (1 << 22) - 1,
                            kMaxPlace = (1 << 18) - 1;
  static constexpr uint64_t kBytes = 0xfull << 40;

  explicit operator bool() const { return bits != 0; }
  uint32_t thread() const { return bits & (kMaxThreads - 1); }
  uint32_t epoch() const { return bits >> 18 & kMaxEpoch; }
  uint32_t bytes() const { return bits >> 40 & 0xf; }
  Strength strength() const { return static_cast<Strength>(bits >> 44 & 3); }
  uint32_t place() const { return bits >> 46; }
  bool same_thread_and_epoch(Mark other) const { return ((bits ^ other.bits) << 24) == 0; }
};

// Four bytes of memory: who last wrote each half, and some of those who read since.
struct Cell {
  Mark writers[2];
  Mark readers[4];
};

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
// Zeroed without touching it: most of a large buffer's cells are never used.
using Cells = std::unique_ptr<Cell[], FreeDeleter>;
inline Cells new_cells(uint64_t bytes) {
  auto* cells = static_cast<Cell*>(std::calloc(bytes / 4 + 2, sizeof(Cell)));
  if (!cells) throw std::bad_alloc();
  return Cells(cells);
}

// Global memory that a kernel may touch.
struct Buffer {
  std::string name;
  unsigned char* data = nullptr;
  uint64_t size = 0;
  bool writable = true;
  // One byte for each, 1 once written; empty where all hold values from the start.
  std::vector<uint8_t> written;
  Cells cells;  // of this launch; null before the first access

  uint64_t address() const { return reinterpret_cast<uint64_t>(data); }
};

// --- Threads and blocks --------------------------------------------------------------------------

struct Block;

// cp.async: the copy is made when its group is waited for.
struct AsyncCopy {
  uint64_t to, from;
  int bytes, from_bytes;
};

struct Thread : Actor {
  enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

  uint64_t* registers = nullptr;
  const uint64_t* banks[2] = {};
  uint32_t at = 0;  // index of the instruction behind the one that runs
  State state = State::kReady;
  Block* home = nullptr;
  uint32_t index = 0, lane = 0, warp = 0;
  uint32_t members = 0;  // of the collective that it takes part in
  bool carry = false;
  std::vector<unsigned char> local, scratch;
  std::vector<uint8_t> local_written;
  std::deque<std::vector<AsyncCopy>> copy_groups;
  std::vector<AsyncCopy> open_copies;

  uint64_t get(Operand o) const { return banks[o.bank][o.index]; }
  bool truth(Operand o) const { return (get(o) != 0) != o.negated; }
  void set(Operand o, uint64_t value) { registers[o.index] = value; }
};

// Lanes that wait for one another at one instruction.
struct Gathering {
  uint32_t members, arrived, at;
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  uint32_t at = 0;        // where the first to arrive stands
  bool everyone = false;  // no number of threads was given
  std::vector<Thread*> waiting;
  std::vector<Order::Arrival> arrivals;
  uint32_t sum = 0;  // threads whose predicate holds, for barrier.red
};

struct Block {
  uint32_t index = 0, x = 0, y = 0, z = 0;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<uint8_t> shared_written;
  Cells cells;
  std::vector<std::vector<Gathering>> gatherings;  // by warp
  Barrier barriers[16];
  uint32_t exited = 0;
};

struct Options {
  uint64_t seed = 1;
  int quantum = 64;  // instructions a thread runs at most before another's turn
  uint64_t max_steps = 1ull << 36;
  uint64_t max_idle = 1ull << 25;  // instructions without any progress before a livelock is called
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

  // --- What instructions call
  [[noreturn]] void fault(const std::string& kind, const Thread& thread,
                          const std::string& message) const;
  [[noreturn]] void fault_at(const std::string& kind, const Thread& thread, uint32_t place,
                             const std::string& message) const;
  std::string where(uint32_t place) const;  // "PTX line 12 (kernels.cu:34): ld.global ..."

  uint64_t address(const Thread& t, const Instruction& i) const {
    return t.get(i.address) + i.offset;
  }
  // Plain access of `bytes` bytes at the instruction's address, checked; where they lie.
  unsigned char* access(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  void load(Thread& t, const Instruction& i, uint64_t address, int bytes, unsigned char* to);
  void store(Thread& t, const Instruction& i, uint64_t address, int bytes,
             const unsigned char* from);
  // Reads, changes and writes in one; `change` gives the new value.
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
  // True for the last of `members` to arrive, for whom the collective then runs.
  bool gather(Thread& t, uint32_t members);
  void release_warp(Thread& t);
  // `count` threads, or 0 for the whole block.
  void arrive(Thread& t, uint32_t id, uint32_t count, bool wait);
  void finish_barrier(Barrier& barrier);
  void leave(Thread& t);

  uint32_t random() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 20;
  }

  const Module& module;
  const Kernel& kernel;
  uint32_t grid[3], block[3];
  Options options;
  Order order;
  std::deque<Block> blocks;
  Statistics statistics;

 private:
  uint64_t special_value(const Thread& t, const std::string& name) const;
  Buffer& buffer_at(const Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  unsigned char* global(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  unsigned char* shared(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use);
  unsigned char* local(Thread& t, uint64_t address, int bytes, Use use);
  unsigned char* parameter(Thread& t, uint64_t address, int bytes);
  Strength strength_of(const Instruction& i) const;
  // An access as check_order sees it.
  struct Touch {
    Cell* cells;
    uint64_t offset;  // from the start of `cells`
    uint64_t key;     // what strong_ knows the first byte by
    int bytes;
    Use use;
    Strength strength;
    uint32_t place;
    const Buffer* buffer;  // null for shared memory
  };
  // Whose epochs an asynchronous copy counts in.
  struct AsyncReader {
    uint32_t id, epoch;
  };
  void check_order(Thread& t, const Touch& touch, const AsyncReader* copier = nullptr);
  void conflict(const Thread& t, Mark before, const Touch& touch, bool wrote) const;
  void stale_line(const Thread& t, const Cell& cell, uint32_t bytes, const Touch& touch) const;
  void read_cell(Cell& cell, Mark mark);
  uint64_t shared_key(const Block& b, uint64_t offset) const;
  uint64_t word_key(const Thread& t, const Instruction& i, uint64_t address) const;
  void strong_load(Thread& t, const Instruction& i, uint64_t address, int bytes,
                   unsigned char* value);
  bool is_shareable(const Instruction& i, uint64_t address) const;
  void observe(Thread& t, const Instruction& i, uint64_t address, int bytes);
  void strong_store(Thread& t, const Instruction& i, uint64_t address, int bytes,
                    const unsigned char* old, bool atomic);
  [[noreturn]] void report_stuck(std::string message) const;
  bool is_shared(const Instruction& i, uint64_t address) const {
    return i.space == Space::kShared ||
           (i.space == Space::kGlobal && address >= kSharedWindow && address < kLocalWindow);
  }

  std::vector<unsigned char> parameters_;
  std::vector<Buffer*> buffers_;       // by address
  std::vector<uint32_t> last_buffer_;  // by instruction
  std::vector<Buffer> own_buffers_;    // the module's variables, the grid's barrier
  std::vector<unsigned char> grid_workspace_;
  std::vector<uint64_t> registers_;
  std::vector<Thread*> ready_;
  std::unordered_map<uint64_t, StrongWord> strong_;
  uint64_t state_ = 1;
  uint64_t last_progress_ = 0;
  uint64_t dynamic_shared_ = 0;
};

}  // namespace ptxvm
