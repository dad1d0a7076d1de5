// The order of accesses ("happened before") under PTX's memory model.
//
// Each thread counts epochs. A new epoch begins whenever the thread publishes its accesses: at a
// barrier, a fence or a release. A clock has one entry for every thread of the grid: the last epoch
// of that thread whose accesses are known to have happened before. Two accesses to the same bytes,
// one of them a write, must be ordered by clocks, or both must be strong (atomic, volatile,
// relaxed, acquire, release). Otherwise they race, whatever values were read. A fence that is
// missing on either side of a spin loop is therefore found in every run, not only when a value
// comes late.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptxvm {

// Entry t is the epoch of thread t. Entry threads + t is the epoch of its asynchronous copies. More
// entries follow for bulk copies (bulk.h).
using Clock = std::shared_ptr<const std::vector<uint32_t>>;

constexpr uint32_t kNoId = ~0u;  // stands for no thread, or for no block

// The knowledge of a thread when it published: its clock, its own epoch and its finished copies.
struct Stamp {
  Clock clock;  // null if nothing was published
  uint32_t thread = kNoId;
  uint32_t epoch = 0, copies = 0;
};

// Something for each scope from the block to the device.
template <class T>
struct PerScope {
  T items[3];
  T& operator[](Scope s) { return items[static_cast<int>(s) - 1]; }
  const T& operator[](Scope s) const { return items[static_cast<int>(s) - 1]; }
};

struct Known {
  Clock known;
};

// The knowledge of one thread. A relaxed store or atomic publishes the thread's accesses up to its
// last fence. A relaxed load takes effect as an acquire at the thread's next fence; until then its
// stamp waits in `observed`.
struct View : Known {
  PerScope<Stamp> fenced;
  struct Observed {
    Stamp stamp;
    Scope distance;  // a fence of a smaller scope does not acquire the stamp
  };
  std::vector<Observed> observed;
};

struct Actor;

// The stamps that a strong store publishes together with its value.
struct Published {
  PerScope<Stamp> stamps;  // for readers in the block, in the cluster's other blocks, and elsewhere
  Stamp as_written;        // as if the store had been a release
  uint32_t block = kNoId, cluster = kNoId;
};

// Four bytes that a strong store wrote. A load that is not ordered after the last store may still
// return the previous value, until some thread has read the new one.
struct StrongWord {
  Published now, before;
  uint32_t old_value = 0;
  uint32_t writer = kNoId, writer_epoch = 0;
  bool seen = true;
};

// The part of a thread that orders its accesses.
struct Actor {
  uint32_t id = 0, block = 0, cluster = 0;
  const uint32_t* known = nullptr;  // the entries of view.known, for quick checks
  uint32_t epoch = 1;
  uint32_t copies_done = 0;  // groups of asynchronous copies that the thread has waited for
  uint32_t copies_begun = 0;
  View view;
  // What the thread would know if every strong access were a release and an acquire. Two
  // accesses that only this view orders lack a fence; otherwise they lack any synchronisation.
  Known lenient;
};

class Order {
 public:
  // Clocks have one entry for each thread, and a second one for its copies if `copies_async`.
  // `more` entries follow. `clusters` says whether a cluster has more than one block.
  void start(uint32_t threads, bool copies_async, uint32_t more, bool clusters);
  void begin(Actor& actor) const;

  bool happened_before(const Actor& actor, uint32_t thread, uint32_t epoch) const {
    if (thread == actor.id) return true;
    if (thread == first_copier_ + actor.id) return epoch <= actor.copies_done;
    return actor.known[thread] >= epoch;
  }
  // The same under the lenient view.
  bool would_have_happened_before(const Actor& actor, uint32_t thread, uint32_t epoch) const;

  uint32_t threads() const { return threads_; }
  uint32_t first_of_more() const { return copies_ ? 2 * threads_ : threads_; }
  bool knows(const Clock& clock, uint32_t thread, uint32_t epoch) const {
    return (*clock)[thread] >= epoch;
  }

  // The stamps of a thread under its view and under its lenient view.
  struct Arrival {
    Stamp stamp, lenient;
  };
  Arrival publish(Actor& actor) const;
  // The same for an arrival that orders what it publishes up to `scope`. Without `release` only
  // what came before the thread's last fence is published.
  Arrival arrive(Actor& actor, Scope scope, bool release) const;
  // What threads knew together when they arrived.
  struct Knowledge {
    Clock strict, lenient;
  };
  Knowledge united(const std::vector<Arrival>& arrivals) const;
  // The last join of what a thread knew with what it learned. Threads that wait for the same mostly
  // knew the same before, and then share the clock of what they know after it.
  struct Join {
    Clock known, more, both;
  };
  struct Joins {
    Join strict, lenient;
  };
  void learn(Actor& actor, const Knowledge& knowledge, Joins& last) const;
  // The actor knows what `id`, which is no thread, did up to an epoch.
  void learn(Actor& actor, uint32_t id, uint32_t epoch) const;
  // What `id` did up to an epoch, as the arrival of one that knows nothing else.
  Arrival arrival_of(uint32_t id, uint32_t epoch) const;
  // The same as learn, but as of the actor's next fence of scope `apart` or a larger one.
  void observe(Actor& actor, const Knowledge& knowledge, Scope apart) const;
  // The threads that leave a barrier know everything that the arriving threads knew.
  void meet(const std::vector<Arrival>& arrivals, const std::vector<Actor*>& leaving) const;

  void fence(Actor& actor, Scope scope) const;
  // A strong store, or the store of an atomic. With `atomic` the stamps of the previous value are
  // kept and joined with the new ones.
  void store(Actor& actor, StrongWord& word, Scope scope, bool release, bool atomic) const;
  // A strong load of a value that came with the stamps in `published`.
  void load(Actor& actor, const Published& published, Scope scope, bool acquire) const;

 private:
  bool covers(const Actor& actor, const Known& view, const Stamp& stamp) const;
  Clock joined(const Clock& clock, const Stamp& stamp) const;
  Stamp united(const Stamp& a, const Stamp& b) const;
  void learn(Actor& actor, Known& view, const Stamp& stamp) const;

  uint32_t threads_ = 0;
  uint32_t first_copier_ =
      0;  // the entry of the copies of thread 0; out of reach if there are none
  void learn_all(Actor& actor, Known& view, const Clock& more, Join& last) const;
  bool copies_ = false, clusters_ = false;
  Clock nothing_;
};

}  // namespace ptxvm
