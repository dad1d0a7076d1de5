// The checks of every memory access: bounds, alignment, reads of bytes that were never written, and
// the order with accesses of other threads.
#include <algorithm>
#include <sstream>

#include "machine.h"

namespace ptxvm {

namespace {

std::string hex(uint64_t n) {
  std::ostringstream out;
  out << "0x" << std::hex << n;
  return out.str();
}

bool all_set(const uint8_t* flags, int n) {
  for (int i = 0; i < n; ++i)
    if (!flags[i]) return false;
  return true;
}

}  // namespace

Strength Machine::strength_of(const Instruction& i) const {
  if (i.flags & kNonCoherent) return Strength::kNonCoherent;
  return static_cast<Strength>(i.scope);
}

unsigned char* Machine::access(Thread& t, const Instruction& i, uint64_t address, int bytes,
                               Use use) {
  if (use != Use::kRead) progress();
  Space space = i.space;
  if (space == Space::kGlobal && address >= kSharedWindow) {
    space = address < kLocalWindow       ? Space::kShared
            : address < kParameterWindow ? Space::kLocal
                                         : Space::kParameter;
    address &= kSharedWindow - 1;
  } else if (space == Space::kShared && address >= kSharedWindow) {
    address -= kSharedWindow;
  }
  if (space == Space::kParameter) return parameter(t, address, bytes);
  if (address & (bytes - 1))
    fault("misaligned access", t,
          std::to_string(bytes) + " bytes at " + hex(address) + ", which is no multiple of " +
              std::to_string(bytes));
  switch (space) {
    case Space::kShared:
      return shared(t, i, address, bytes, use);
    case Space::kLocal:
      return local(t, address, bytes, use);
    default:
      return global(t, i, address, bytes, use);
  }
}

unsigned char* Machine::parameter(Thread& t, uint64_t address, int bytes) {
  constexpr uint64_t kScratch = 1 << 20;
  std::vector<unsigned char>& from = address >= kScratch ? t.scratch : parameters_;
  if (address >= kScratch) {
    address -= kScratch;
    t.scratch.resize(kernel.scratch_bytes);
  }
  if (address + bytes > from.size())
    fault("out of bounds", t, "parameter bytes " + std::to_string(address));
  return from.data() + address;
}

unsigned char* Machine::local(Thread& t, uint64_t address, int bytes, Use use) {
  if (address + bytes > kernel.local_bytes)
    fault("out of bounds", t,
          "local memory at " + std::to_string(address) + " of " +
              std::to_string(kernel.local_bytes) + " bytes");
  if (t.local.empty()) {
    t.local.assign(kernel.local_bytes, 0xba);
    t.local_written.assign(kernel.local_bytes, 0);
  }
  if (use == Use::kWrite) {
    std::fill_n(&t.local_written[address], bytes, 1);
  } else if (options.uninitialised && !all_set(&t.local_written[address], bytes)) {
    fault("uninitialised read", t, "local memory at " + std::to_string(address));
  }
  return &t.local[address];
}

unsigned char* Machine::shared(Thread& t, const Instruction& i, uint64_t address, int bytes,
                               Use use) {
  Block* home = t.home;
  if (address + bytes > home->shared.size()) home = &visited_block(t, i, address, bytes);
  Block& b = *home;
  if (!b.mbarriers.empty()) refuse_mbarriers(t, b, address, bytes);
  if (options.races)
    check_order(t, {b.shadows.get(), address, shared_key(b, address), bytes, use, strength_of(i),
                    i.place, nullptr, home});
  if (use != Use::kWrite && options.uninitialised && !all_set(&b.shared_written[address], bytes))
    fault("uninitialised read", t, "shared memory at " + std::to_string(address));
  if (use != Use::kRead) std::fill_n(&b.shared_written[address], bytes, 1);
  return &b.shared[address];
}

Buffer& Machine::buffer_at(const Thread& t, const Instruction& i, uint64_t address, int bytes,
                           Use use) {
  uint32_t& last = last_buffer_[i.place];
  const auto holds = [&](const Buffer& b) {
    return address - b.address() <= b.size - bytes && b.size >= static_cast<uint64_t>(bytes);
  };
  if (last < buffers_.size() && holds(*buffers_[last])) return *buffers_[last];
  const auto above = std::upper_bound(buffers_.begin(), buffers_.end(), address,
                                      [](uint64_t a, const Buffer* b) { return a < b->address(); });
  if (above != buffers_.begin() && holds(**(above - 1))) {
    last = above - 1 - buffers_.begin();
    return **(above - 1);
  }
  std::string near = "no buffer is near";
  if (above != buffers_.begin()) {
    const Buffer& b = **(above - 1);
    near = std::to_string(address - b.address()) + " bytes behind the start of " + b.name + " of " +
           std::to_string(b.size) + " bytes";
  }
  if (above != buffers_.end() && (*above)->address() - address < 4096)
    near += ", " + std::to_string((*above)->address() - address) + " before " + (*above)->name;
  fault("out of bounds", t,
        std::string(use == Use::kRead ? "read" : "write") + " of " + std::to_string(bytes) +
            " bytes at " + hex(address) + ": " + near);
}

unsigned char* Machine::global(Thread& t, const Instruction& i, uint64_t address, int bytes,
                               Use use) {
  Buffer& b = buffer_at(t, i, address, bytes, use);
  const uint64_t offset = address - b.address();
  if (use != Use::kRead && !b.writable)
    fault("read-only memory", t, "a write to " + b.name + " at byte " + std::to_string(offset));
  if (options.races) {
    if (!b.shadows) b.shadows = new_shadows(b.size);
    // A shadow covers an aligned word of four bytes, also if the buffer begins in the middle of
    // one.
    check_order(t, {b.shadows.get(), offset + (b.address() & 3), address, bytes, use,
                    strength_of(i), i.place, &b});
  }
  if (!b.written.empty()) {
    if (use != Use::kWrite && options.uninitialised && !all_set(&b.written[offset], bytes))
      fault("uninitialised read", t, b.name + " at byte " + std::to_string(offset));
    if (use != Use::kRead) std::fill_n(&b.written[offset], bytes, 1);
  }
  return b.data + offset;
}

// --- Order ---------------------------------------------------------------------------------------

namespace {

bool is_strong(Strength s) { return s != Strength::kWeak && s != Strength::kNonCoherent; }

}  // namespace

// Whether the scopes of two strong accesses hold both threads.
bool Machine::share_scope(const Thread& t, Mark before, const Touch& touch) const {
  const Strength scope = std::min(touch.strength, before.strength());
  if (scope == Strength::kDevice) return true;
  const Block& other = blocks[before.thread() / (order.threads() / blocks.size())];
  return &other == t.home || (scope == Strength::kCluster && other.cluster == t.home->cluster);
}

void Machine::conflict(const Thread& t, Mark before, const Touch& touch, bool wrote) const {
  int width = 0;
  if (is_strong(touch.strength) && is_strong(before.strength()) && share_scope(t, before, touch)) {
    width = other_width(before, touch);
    if (width == 0) return;
  }
  const auto [who, copied] = thread_behind(before.thread());
  std::string message = touch.buffer ? touch.buffer->name : "shared memory";
  if (touch.home && touch.home != t.home)
    message += " of block " + std::to_string(touch.home->index);
  message += " at byte " + std::to_string(touch.offset) + ": ";
  message += touch.use == Use::kRead ? "a read" : "a write";
  message += wrote ? " not ordered behind the write" : " not ordered behind the read";
  message += " by " + name_of(who) + " at " + where(before.place());
  if (copied) fault_at("race", t, touch.place, message + ", an asynchronous copy not waited for");
  if (width != 0)
    fault_at("race", t, touch.place,
             message + "; strong accesses of " + std::to_string(width) + " and of " +
                 std::to_string(kernel.code[touch.place].width()) +
                 " bytes are not atomic to each other");
  if (order.would_have_happened_before(t, before.thread(), before.epoch()))
    fault_at("weak memory", t, touch.place,
             message +
                 "; the threads met at atomic or volatile accesses, but a release, an "
                 "acquire or a fence (of this scope) is missing on the way");
  fault_at("race", t, touch.place, message);
}

// The width in bytes of the first of two strong accesses, if it differs from that of the second.
// Only accesses to exactly the same bytes are atomic to each other.
int Machine::other_width(Mark before, const Touch& touch) const {
  // The mark of a place that is too large does not know its instruction.
  if (before.place() == touch.place || before.place() >= Mark::kMaxPlace) return 0;
  const int width = kernel.code[before.place()].width();
  return width == kernel.code[touch.place].width() ? 0 : width;
}

void Machine::note_read(Shadow& shadow, Mark mark) {
  // A shadow has room for four readers. A new reader replaces an older one of its warp, if there is
  // one: lanes of a warp are mostly ordered in the same way. A non-coherent read is kept as far as
  // there is room, because no write at all may follow it.
  int slot = -1;
  for (int k = 0; k < 4; ++k) {
    const Mark reader = shadow.readers[k];
    if (!reader) {
      slot = k;
      break;
    }
    if (reader.strength() == Strength::kNonCoherent) {
      if (mark.strength() != Strength::kNonCoherent || (mark.bytes() & ~reader.bytes()) == 0)
        continue;
      slot = k;
    } else if (reader.thread() == mark.thread()) {
      if (reader.same_thread_and_epoch(mark)) mark.bits |= reader.bits & Mark::kBytes;
      slot = k;
      break;
    } else if (slot < 0 && reader.thread() >> 5 == mark.thread() >> 5) {
      slot = k;
    }
  }
  if (slot < 0) {
    slot = random() & 3;
    if (shadow.readers[slot].strength() == Strength::kNonCoherent) slot = (slot + 1) & 3;
  }
  shadow.readers[slot] = mark;
}

void Machine::check_order(Thread& t, const Touch& touch, const AsyncReader* copier) {
  const uint32_t actor = copier ? copier->id : t.id, epoch = copier ? copier->epoch : t.epoch;
  if (epoch >= Mark::kMaxEpoch) fault("unsupported", t, "too many synchronisations");
  const bool writes = touch.use != Use::kRead;
  const auto clash = [&](Mark before, uint32_t bytes, bool wrote) {
    if ((before.bytes() & bytes) == 0) return;
    if (!order.happened_before(t, before.thread(), before.epoch())) {
      conflict(t, before, touch, wrote);
    } else if (copier && copier->bulk && wrote) {
      check_proxy(t, before, touch);
    }
  };
  for (uint64_t at = touch.offset & ~3ull; at < touch.offset + touch.bytes; at += 4) {
    const uint32_t bytes =
        touch.bytes >= 4 ? 0xf : ((1u << touch.bytes) - 1) << (touch.offset - at);
    Shadow& shadow = touch.shadows[at / 4];
    const Mark mark(actor, epoch, bytes, touch.strength, touch.place);
    if (shadow.writers[0].bits | shadow.writers[1].bits) {
      if (touch.strength == Strength::kNonCoherent) stale_line(t, shadow, bytes, touch);
      clash(shadow.writers[0], bytes, true);
      // Both halves mostly come from one write, which is then checked once.
      if (((shadow.writers[0].bits ^ shadow.writers[1].bits) & ~Mark::kBytes) != 0 || bytes != 0xf)
        clash(shadow.writers[1], bytes, true);
    }
    if (!writes) {
      note_read(shadow, mark);
      continue;
    }
    for (const Mark reader : shadow.readers) {
      if (!reader) break;
      if (reader.strength() == Strength::kNonCoherent) stale_line(t, shadow, bytes, touch);
      clash(reader, bytes, false);
    }
    // An access that is ordered after this write is also ordered after the reads before it, so
    // those can be forgotten.
    if (bytes == 0xf) std::fill_n(shadow.readers, 4, Mark());
    for (int half = 0; half < 2; ++half) {
      const uint32_t mine = bytes & (3u << 2 * half);
      if (!mine) continue;
      Mark& writer = shadow.writers[half];
      // A plain store ends the synchronisation through the strong store before it.
      if (touch.strength == Strength::kWeak && is_strong(writer.strength()))
        for (int byte = 0; byte < 4; ++byte)
          strong_.erase((touch.key & ~3ull) + at - (touch.offset & ~3ull) + byte);
      Mark next(actor, epoch, mine, touch.strength, touch.place);
      if (writer && writer.same_thread_and_epoch(next)) next.bits |= writer.bits & Mark::kBytes;
      writer = next;
    }
  }
}

// Reports an ld.global.nc of bytes that the same launch writes: it reads through a cache that is
// not kept coherent during a launch.
void Machine::stale_line(const Thread& t, const Shadow& shadow, uint32_t bytes,
                         const Touch& touch) const {
  const std::string what = touch.buffer->name + " at byte " + std::to_string(touch.offset);
  if (touch.use == Use::kRead) {
    for (const Mark writer : shadow.writers)
      if (writer.bytes() & bytes)
        fault_at("non-coherent read", t, touch.place,
                 what + ": ld.global.nc of what this launch wrote at " + where(writer.place()));
  } else {
    for (const Mark reader : shadow.readers)
      if (reader.bytes() & bytes && reader.strength() == Strength::kNonCoherent)
        fault_at("non-coherent read", t, touch.place,
                 what + ": a write of what this launch reads with ld.global.nc at " +
                     where(reader.place()));
  }
}

// --- Strong accesses -----------------------------------------------------------------------------

uint64_t Machine::shared_key(const Block& b, uint64_t offset) const {
  return kSharedWindow + (static_cast<uint64_t>(b.index) << 32) + offset;
}

uint64_t Machine::word_key(const Thread& t, const Instruction& i, uint64_t address) {
  if (!is_shared(i, address)) return address;
  uint64_t offset = address & (kSharedWindow - 1);
  const Block& home = block_at(t, offset);
  return shared_key(home, offset);
}

void Machine::strong_load(Thread& t, const Instruction& i, uint64_t address, int bytes,
                          unsigned char* value) {
  const uint64_t first = word_key(t, i, address);
  const int width = i.width();
  for (int at = 0; at < bytes; at += width)
    statistics.stale_loads += strong_load_of(t, i, first + at, width, value + at);
}

// Loads one element. Returns whether it is the previous value, of which all bytes are then old.
bool Machine::strong_load_of(Thread& t, const Instruction& i, uint64_t first, int bytes,
                             unsigned char* value) {
  const bool acquire = i.flags & kAcquire;
  const int words = bytes < 4 ? 1 : bytes / 4;
  StrongWord* found[2];
  bool old = options.stale && bytes >= 4;
  for (int k = 0; k < words; ++k) {
    const auto it = strong_.find(first + 4 * k);
    found[k] = it == strong_.end() ? nullptr : &it->second;
    old &= found[k] && !found[k]->seen && found[k]->writer != t.id &&
           !order.happened_before(t, found[k]->writer, found[k]->writer_epoch);
  }
  old = old && random() % 2 == 0;
  for (int k = 0; k < words; ++k) {
    if (!found[k]) continue;
    StrongWord& word = *found[k];
    if (old) {
      std::memcpy(value + 4 * k, &word.old_value, 4);
    } else if (word.writer != t.id) {
      word.seen = true;
    }
    order.load(t, old ? word.before : word.now, i.scope, acquire);
  }
  return old;
}

void Machine::observe(Thread& t, const Instruction& i, uint64_t address, int bytes) {
  const uint64_t first = word_key(t, i, address);
  for (int at = 0; at < bytes; at += 4)
    if (const auto it = strong_.find(first + at); it != strong_.end())
      order.load(t, it->second.now, i.scope, i.flags & kAcquire);
}

void Machine::strong_store(Thread& t, const Instruction& i, uint64_t address, int bytes,
                           const unsigned char* old, bool atomic) {
  const uint64_t first = word_key(t, i, address);
  const int part = std::min(4, i.width());
  for (int at = 0; at < bytes; at += part) {
    StrongWord& word = strong_[first + at];
    std::memcpy(&word.old_value, old + at, part);
    order.store(t, word, i.scope, i.flags & kRelease, atomic);
  }
}

// Whether the access is strong and goes to memory that other threads can access.
bool Machine::is_shareable(const Instruction& i, uint64_t address) const {
  return i.scope != Scope::kWeak && address < kLocalWindow &&
         (i.space == Space::kGlobal || i.space == Space::kShared);
}

void Machine::load(Thread& t, const Instruction& i, uint64_t address, int bytes,
                   unsigned char* to) {
  std::memcpy(to, access(t, i, address, bytes, Use::kRead), bytes);
  if (is_shareable(i, address)) strong_load(t, i, address, bytes, to);
}

void Machine::store(Thread& t, const Instruction& i, uint64_t address, int bytes,
                    const unsigned char* from) {
  unsigned char* p = access(t, i, address, bytes, Use::kWrite);
  if (is_shareable(i, address)) strong_store(t, i, address, bytes, p, false);
  std::memcpy(p, from, bytes);
}

// --- Asynchronous copies -------------------------------------------------------------------------

void Machine::begin_copy(Thread& t, const Instruction& i, const AsyncCopy& copy) {
  // The source and the destination stay in use until the thread waits for the group. The copy is
  // therefore recorded under the thread's second id, whose accesses happen before the thread's own
  // only after the wait.
  const AsyncReader reader = {order.threads() + t.id, t.copies_begun + 1};
  Block& b = *t.home;
  if (copy.to % copy.bytes || copy.from % copy.bytes)
    fault("misaligned access", t, "an asynchronous copy of " + std::to_string(copy.bytes));
  if (copy.to + copy.bytes > b.shared.size())
    fault("out of bounds", t,
          "an asynchronous copy to shared memory at " + std::to_string(copy.to) + " of " +
              std::to_string(b.shared.size()));
  if (!b.mbarriers.empty()) refuse_mbarriers(t, b, copy.to, copy.bytes);
  if (options.races)
    check_order(t,
                {b.shadows.get(), copy.to, shared_key(b, copy.to), copy.bytes, Use::kWrite,
                 Strength::kWeak, i.place, nullptr, &b},
                &reader);
  if (copy.from_bytes > 0) {
    Buffer& from = buffer_at(t, i, copy.from, copy.from_bytes, Use::kRead);
    const uint64_t offset = copy.from - from.address();
    if (options.races) {
      if (!from.shadows) from.shadows = new_shadows(from.size);
      for (int at = 0; at < copy.from_bytes; at += 4)
        check_order(
            t,
            {from.shadows.get(), offset + at + (from.address() & 3), copy.from + at,
             std::min(4, copy.from_bytes - at), Use::kRead, Strength::kWeak, i.place, &from},
            &reader);
    }
    if (!from.written.empty() && options.uninitialised &&
        !all_set(&from.written[offset], copy.from_bytes))
      fault("uninitialised read", t, from.name + " at byte " + std::to_string(offset));
  }
  t.open_copies.push_back(copy);
}

void Machine::close_copies(Thread& t) {
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
  ++t.copies_begun;
}

void Machine::wait_for_copies(Thread& t, uint64_t left) {
  while (t.copy_groups.size() > left) {
    for (const AsyncCopy& copy : t.copy_groups.front()) {
      unsigned char* to = &t.home->shared[copy.to];
      std::memset(to, 0, copy.bytes);
      std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.from_bytes);
      std::fill_n(&t.home->shared_written[copy.to], copy.bytes, 1);
    }
    t.copy_groups.erase(t.copy_groups.begin());
  }
  t.copies_done = t.copies_begun - t.copy_groups.size();
  progress();
}

}  // namespace ptxvm
