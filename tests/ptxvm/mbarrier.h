// mbarrier objects: barriers of 64 bits in shared memory, which count arrivals and bytes.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "order.h"

namespace ptxvm {

// A phase ends when no arrival is pending and as many bytes were copied as were expected. The next
// one then begins with `expected` arrivals pending.
struct MBarrier {
  static constexpr int64_t kMaxCount = (1 << 20) - 1;

  int64_t expected = 0, pending = 0;
  int64_t bytes = 0;  // expected, less those that copies have written
  uint32_t phase = 0;

  // The thread that initialised the object, in which epoch, and at which instruction.
  uint32_t maker = kNoId, epoch = 0, place = 0;
  // fence.mbarrier_init shows the object to the threads that wait for the next phase of the
  // cluster's barrier at which the maker arrives, also if that arrival is relaxed.
  bool fenced = false;
  uint32_t shown_in = kNoId;  // that phase

  // Copies that count their bytes at this object are recorded under this id; kNoId before the first
  // one. Its epochs are the phases, beginning with 1, of all objects that were at this address.
  uint32_t copier = kNoId, copier_epoch = 1;

  // The arrivals of this phase, by threads of the object's own block and by others.
  std::vector<Order::Arrival> near, far;
  // What the threads of the phase before knew, for a wait of scope .cta and for one of .cluster.
  Order::Knowledge last_near, last_all;
  Order::Joins joins;
  std::unordered_map<uint32_t, uint32_t> uses;  // the last epoch in which each thread used it
};

}  // namespace ptxvm
