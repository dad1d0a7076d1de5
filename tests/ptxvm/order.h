// What happened before what, after PTX's memory model.
//
// Each thread counts epochs: a new one begins whenever it publishes what it did so far (at a
// barrier, a fence, a release). A clock holds, for every thread of the grid, the last epoch whose
// accesses are known to have happened before. Two accesses to the same bytes, one of them a write,
// must be ordered by clocks or both be strong (atomic, volatile, relaxed, acquire, release); else
// they race, whatever values they happened to see. So a fence that is missing on either side of a
// spin shows in every run, not only in those where a value came late.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptxvm {

// Entry t is thread t's; entry threads + t that of its asynchronous copies.
using Clock = std::shared_ptr<const std::vector<uint32_t>>;

constexpr uint32_t kNobody = ~0u;

// What a thread knew when it published: its clock, and its own accesses.
struct Stamp {
  Clock clock;  // null: nothing published
  uint32_t thread = kNobody;
  uint32_t epoch = 0, copies = 0;
};

// What one thread knows. A release by a relaxed store or atomic reaches back to the last fence; an
// acquire by a relaxed load takes effect at the next one.
struct View {
  Clock known;
  Stamp fenced_block, fenced_device;
  struct Observed {
    Stamp stamp;
    bool other_block;  // takes a fence of device scope
  };
  std::vector<Observed> observed;
};

struct Actor;

// What travels with the value of a strong store, to readers in the storing block and elsewhere.
struct Published {
  Stamp narrow, wide;
  Stamp as_written;  // as if the store had released
  uint32_t block = kNobody;
};

// Memory that a strong store wrote. A load that is not ordered behind the last store may still see
// the value before it, until some thread has seen the new one.
struct StrongWord {
  Published now, before;
  uint32_t old_value = 0;
  uint32_t writer = kNobody, writer_epoch = 0;
  bool seen = true;
};

// The part of a thread that orders its accesses.
struct Actor {
  uint32_t id = 0, block = 0;
  const uint32_t* known = nullptr;  // view.known's entries, for quick checks
  uint32_t epoch = 1;
  uint32_t copies_done = 0;  // groups of asynchronous copies waited for
  uint32_t copies_begun = 0;
  View view;
  // The same, had every strong access been a release and an acquire: tells a missing fence from
  // missing synchronisation.
  View lenient;
};

class Order {
 public:
  // Clocks have `entries` numbers, `threads` of them for the threads themselves.
  void start(uint32_t threads, bool copies_async);
  void begin(Actor& actor) const;

  bool happened_before(const Actor& actor, uint32_t thread, uint32_t epoch) const {
    if (thread == actor.id) return true;
    if (thread == threads_ + actor.id) return epoch <= actor.copies_done;
    return actor.known[thread] >= epoch;
  }
  // Under the lenient view.
  bool would_have_happened_before(const Actor& actor, uint32_t thread, uint32_t epoch) const;

  uint32_t threads() const { return threads_; }

  // Two stamps: under the view and under the lenient one.
  struct Arrival {
    Stamp stamp, lenient;
  };
  Arrival publish(Actor& actor) const;
  // Those who leave a barrier know what everyone who arrived there knew.
  void meet(const std::vector<Arrival>& arrivals, const std::vector<Actor*>& leaving) const;

  void fence(Actor& actor, Scope scope) const;
  // A strong store, or the store of an atomic: `atomic` keeps what came with the value before.
  void store(Actor& actor, StrongWord& word, Scope scope, bool release, bool atomic) const;
  // A strong load of `published`'s value.
  void load(Actor& actor, const Published& published, Scope scope, bool acquire) const;

 private:
  bool covers(const Actor& actor, const View& view, const Stamp& stamp) const;
  Clock joined(const Clock& clock, const Stamp& stamp) const;
  Stamp united(const Stamp& a, const Stamp& b) const;
  void learn(Actor& actor, View& view, const Stamp& stamp) const;

  uint32_t threads_ = 0;
  bool copies_ = false;
  Clock nothing_;
};

}  // namespace ptxvm
