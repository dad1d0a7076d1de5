// Bulk copies: cp.async.bulk, and st.async, which copies a few bytes of registers.
#pragma once

#include <cstdint>

#include "order.h"

namespace ptxvm {

struct Block;
struct Buffer;
struct Thread;

// Ids of copies that a block can have: one for each address at which an mbarrier object was that
// counted the bytes of a copy.
constexpr uint32_t kCopiersOfBlock = 64;

// The bytes at one end of a copy: in shared memory of `home`, or in `buffer`.
struct BulkEnd {
  Block* home = nullptr;
  Buffer* buffer = nullptr;
  uint64_t offset = 0;  // in either
  unsigned char* data = nullptr;
};

// A copy that is under way. It is recorded as two accesses when it begins, and the bytes move at a
// later time. Its end counts the bytes at an mbarrier object, or a thread waits for its group.
struct BulkCopy {
  Thread* thread = nullptr;  // that began it
  uint32_t place = 0;        // its instruction
  int bytes = 0;
  bool generic = false;          // st.async, which belongs to no other proxy
  unsigned char value[16] = {};  // its bytes if `from` is null
  const unsigned char* from = nullptr;
  unsigned char* to = nullptr;
  uint8_t* written = nullptr;  // the flags of the bytes at `to`, if there are any
  Block* home = nullptr;       // the block of the mbarrier object; null for a copy of a group
  uint32_t mbarrier = 0;       // its offset
  uint32_t group = 0;
};

// A fence.proxy.async: what came before it may be accessed through the async proxy by whoever knows
// of the fence.
struct ProxyFence {
  uint32_t epoch = 0;  // of the thread
  Clock known;
  bool shared = false, global = false;
};

}  // namespace ptxvm
