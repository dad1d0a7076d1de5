// Bulk copies and the async proxy.
#include "bulk.h"

#include <algorithm>

#include "handlers.h"

namespace ptxvm {

// --- Who made an access --------------------------------------------------------------------------

// After the ids of threads, and of their cp.async copies if there are any, come two for the bulk
// groups of each thread: one for what they read and one for what they write, because a thread can
// wait for the reads alone. Last come kCopiersOfBlock ids for the mbarrier objects of each block.
std::pair<uint32_t, bool> Machine::thread_behind(uint32_t id) const {
  const uint32_t threads = order.threads(), more = order.first_of_more();
  if (id < more) return {id % threads, id >= threads};
  if (id < more + 2 * threads) return {(id - more) % threads, true};
  return {issuers_[id - more - 2 * threads], true};
}

std::string Machine::name_of(uint32_t thread) const {
  const uint32_t stride = order.threads() / blocks.size();
  return "block " + std::to_string(thread / stride) + " thread " + std::to_string(thread % stride);
}

uint32_t Machine::new_copier(const Thread& t, Block& home) {
  if (home.copiers_made == kCopiersOfBlock)
    fault("unsupported", t, "copies to more than 64 mbarrier objects of one block");
  issuers_.resize(kCopiersOfBlock * blocks.size(), kNoId);
  return order.first_of_more() + 2 * order.threads() + kCopiersOfBlock * home.index +
         home.copiers_made++;
}

// --- The async proxy -----------------------------------------------------------------------------

void Machine::fence_proxy(Thread& t, bool shared, bool global) {
  constexpr size_t kKept = 32;
  t.proxy_fences.push_back({order.publish(t).stamp.epoch, t.view.known, shared, global});
  if (t.proxy_fences.size() > kKept) t.proxy_fences.erase(t.proxy_fences.begin());
}

// Whether a fence.proxy.async stands between what a thread wrote in an epoch and what `t` does now,
// on the way on which `t` came to know of it.
bool Machine::passed_proxy(const Thread& t, uint32_t writer, uint32_t epoch, bool shared) const {
  const auto passed = [&](const Thread& by) {
    return std::any_of(by.proxy_fences.begin(), by.proxy_fences.end(), [&](const ProxyFence& f) {
      const bool behind = by.id == writer ? f.epoch >= epoch : order.knows(f.known, writer, epoch);
      return (shared ? f.shared : f.global) && behind && order.happened_before(t, by.id, f.epoch);
    });
  };
  const Block& theirs = blocks[writer / (order.threads() / blocks.size())];
  if (passed(t) || passed(theirs.threads[writer - theirs.threads[0].id])) return true;
  for (const Block* block : {&theirs, static_cast<const Block*>(t.home)})
    if (std::any_of(block->threads.begin(), block->threads.end(), passed)) return true;
  return false;
}

// Checks a bulk copy of bytes that were written before.
void Machine::check_proxy(const Thread& t, Mark before, const Touch& touch) const {
  if (before.thread() >= order.threads()) return;
  if (passed_proxy(t, before.thread(), before.epoch(), touch.home != nullptr)) return;
  fault_at("weak memory", t, touch.place,
           (touch.buffer ? touch.buffer->name : "shared memory") + " at byte " +
               std::to_string(touch.offset) + ": a fence.proxy.async is missing between the copy " +
               "and the write by " + name_of(before.thread()) + " at " + where(before.place()));
}

// --- Beginning -----------------------------------------------------------------------------------

BulkEnd Machine::shared_end(Thread& t, const Instruction& i, uint64_t address, int bytes) {
  address &= kSharedWindow - 1;
  Block* home = t.home;
  if (address + bytes > home->shared.size()) home = &visited_block(t, i, address, bytes, true);
  if (!home->mbarriers.empty()) refuse_mbarriers(t, *home, address, bytes);
  return {home, nullptr, address, &home->shared[address]};
}

BulkEnd Machine::global_end(Thread& t, const Instruction& i, uint64_t address, int bytes, Use use) {
  Buffer& b = buffer_at(t, i, address, bytes, use);
  const uint64_t offset = address - b.address();
  if (use == Use::kWrite && !b.writable)
    fault("read-only memory", t, "a copy to " + b.name + " at byte " + std::to_string(offset));
  return {nullptr, &b, offset, b.data + offset};
}

void Machine::begin_bulk_copy(Thread& t, const Instruction& i, BulkCopy copy, const BulkEnd& to,
                              const BulkEnd& from, const MBarrierPlace* at) {
  AsyncReader reader = {bulk_reader(t), t.bulk_groups + 1, !copy.generic}, writer = reader;
  writer.id = bulk_writer(t);
  if (at) {
    if (at->home != to.home)
      fault("mbarrier", t, "the object must be in the block whose shared memory the copy writes");
    MBarrier& o = mbarrier_at(t, *at, true);
    if (options.races && !copy.generic && !o.fenced && !passed_proxy(t, o.maker, o.epoch, true))
      fault("weak memory", t,
            "a fence.mbarrier_init or fence.proxy.async is missing between the copy and the "
            "object's initialisation at " +
                where(o.place));
    if (o.copier == kNoId) o.copier = new_copier(t, *at->home);
    issuers_[o.copier - order.first_of_more() - 2 * order.threads()] = t.id;
    reader.id = writer.id = o.copier;
    reader.epoch = writer.epoch = o.copier_epoch;
    o.uses[o.copier] = o.copier_epoch;
    copy.home = at->home;
    copy.mbarrier = at->offset;
  } else {
    copy.group = t.bulk_groups + 1;
  }
  const auto touch = [&](const BulkEnd& end, Use use, const AsyncReader& as) {
    if (end.home) {
      if (options.races)
        check_order(t,
                    {end.home->shadows.get(), end.offset, shared_key(*end.home, end.offset),
                     copy.bytes, use, Strength::kWeak, i.place, nullptr, end.home},
                    &as);
      // The block must not exit before the copy has ended.
      if (options.races) end.home->visits[as.id] = {as.epoch, i.place};
    } else if (options.races) {
      Buffer& b = *end.buffer;
      if (!b.shadows) b.shadows = new_shadows(b.size);
      check_order(t,
                  {b.shadows.get(), end.offset + (b.address() & 3), b.address() + end.offset,
                   copy.bytes, use, Strength::kWeak, i.place, &b},
                  &as);
    }
    const std::vector<uint8_t>& flags = end.home ? end.home->shared_written : end.buffer->written;
    if (use == Use::kRead && options.uninitialised && !flags.empty())
      for (int k = 0; k < copy.bytes; ++k)
        if (!flags[end.offset + k])
          fault("uninitialised read", t,
                (end.home ? "shared memory" : end.buffer->name) + std::string(" at byte ") +
                    std::to_string(end.offset + k));
  };
  if (from.data) touch(from, Use::kRead, reader);
  touch(to, Use::kWrite, writer);
  copy.thread = &t;
  copy.place = i.place;
  copy.from = from.data;
  copy.to = to.data;
  std::vector<uint8_t>& flags = to.home ? to.home->shared_written : to.buffer->written;
  copy.written = flags.empty() ? nullptr : &flags[to.offset];
  copies_.push_back(copy);
  progress();
}

// --- Ending --------------------------------------------------------------------------------------

void Machine::end_bulk_copy(size_t which) {
  const BulkCopy copy = copies_[which];
  copies_[which] = copies_.back();
  copies_.pop_back();
  std::memmove(copy.to, copy.from ? copy.from : copy.value, copy.bytes);
  if (copy.written) std::fill_n(copy.written, copy.bytes, 1);
  progress();
  if (!copy.home) return;
  MBarrier& o = copy.home->mbarriers.at(copy.mbarrier);
  o.bytes -= copy.bytes;
  settle({copy.home, copy.mbarrier}, o);
}

void Machine::wait_for_bulk_groups(Thread& t, uint32_t left, bool only_reads) {
  if (t.bulk_groups <= left) return;
  const uint32_t done = t.bulk_groups - left;
  for (size_t k = copies_.size(); k-- > 0;)
    if (copies_[k].thread == &t && !copies_[k].home && copies_[k].group <= done) end_bulk_copy(k);
  order.learn(t, bulk_reader(t), done);
  if (!only_reads) order.learn(t, bulk_writer(t), done);
}

// --- Handlers ------------------------------------------------------------------------------------

namespace {

enum Form : uint8_t { kToGlobal = 1, kFromShared = 2, kMulticast = 4 };

int checked_size(Machine& m, const Thread& t, uint64_t to, uint64_t from, uint64_t bytes) {
  if (to % 16 || from % 16 || bytes % 16)
    m.fault("misaligned access", t,
            "a bulk copy takes addresses and a size that are multiples of 16, not a size of " +
                std::to_string(bytes) + " from an address " + std::to_string(from % 16) +
                " and to one " + std::to_string(to % 16) + " bytes behind a multiple");
  if (bytes > static_cast<uint64_t>(MBarrier::kMaxCount))
    m.fault("out of bounds", t, "a bulk copy of " + std::to_string(bytes) + " bytes");
  return static_cast<int>(bytes);
}

void copy_to_shared(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t to = m.address(t, i), from = t.get(i.in[0]) + i.second_offset;
  BulkCopy copy;
  copy.bytes = checked_size(m, t, to, from, t.get(i.in[1]) & 0xffffffff);
  const bool shared = i.detail & kFromShared;
  const BulkEnd source = shared ? m.shared_end(t, i, from, copy.bytes)
                                : m.global_end(t, i, from, copy.bytes, Use::kRead);
  if (shared && source.home != t.home)
    m.fault("out of bounds", t, "a bulk copy from the shared memory of another block");
  BulkEnd target = m.shared_end(t, i, to, copy.bytes);
  Machine::MBarrierPlace at = m.mbarrier_place(t, i, t.get(i.in[2]) + i.third_offset, true);
  if (!(i.detail & kMulticast)) return m.begin_bulk_copy(t, i, copy, target, source, &at);
  // The copy goes to the same offset in each block of the mask, and so does the count.
  const std::vector<Block*>& blocks = t.home->cluster->blocks;
  const uint32_t mask = t.get(i.in[3]) & 0xffff;
  if (mask >> blocks.size())
    m.fault("out of bounds", t, "the mask of a copy names blocks that the cluster does not have");
  for (size_t rank = 0; rank < blocks.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    target = m.shared_end(t, i, (rank + 1) * kBlockWindow + target.offset, copy.bytes);
    at.home = blocks[rank];
    m.begin_bulk_copy(t, i, copy, target, source, &at);
  }
}

void copy_to_global(Machine& m, Thread& t, const Instruction& i) {
  const uint64_t to = m.address(t, i), from = t.get(i.in[0]) + i.second_offset;
  BulkCopy copy;
  copy.bytes = checked_size(m, t, to, from, t.get(i.in[1]) & 0xffffffff);
  const BulkEnd source = m.shared_end(t, i, from, copy.bytes);
  if (source.home != t.home)
    m.fault("out of bounds", t, "a bulk copy from the shared memory of another block");
  m.begin_bulk_copy(t, i, copy, m.global_end(t, i, to, copy.bytes, Use::kWrite), source, nullptr);
}

// st.async: the value goes to shared memory of any block of the cluster, and counts its bytes
// there.
void store_async(Machine& m, Thread& t, const Instruction& i) {
  BulkCopy copy;
  copy.generic = true;
  const int size = i.type.bytes();
  const size_t parts = i.has_vectors() ? i.vector(0).size() : 1;
  copy.bytes = size * static_cast<int>(parts);
  for (size_t k = 0; k < parts; ++k) {
    const uint64_t v = t.get(i.has_vectors() ? i.vector(0)[k] : i.in[0]);
    std::memcpy(copy.value + size * k, &v, size);
  }
  const uint64_t to = m.address(t, i);
  if (to % copy.bytes)
    m.fault("misaligned access", t, "st.async of " + std::to_string(copy.bytes) + " bytes");
  const uint64_t object = t.get(i.in[i.count - 1]) + i.second_offset;
  const Machine::MBarrierPlace at = m.mbarrier_place(t, i, object, true);
  m.begin_bulk_copy(t, i, copy, m.shared_end(t, i, to, copy.bytes), {}, &at);
}

void commit(Machine&, Thread& t, const Instruction&) { ++t.bulk_groups; }

template <bool kOnlyReads>
void wait(Machine& m, Thread& t, const Instruction& i) {
  m.wait_for_bulk_groups(t, t.get(i.in[0]), kOnlyReads);
}

void fence(Machine& m, Thread& t, const Instruction& i) {
  m.fence_proxy(t, i.detail & 1, i.detail & 2);
}

void nothing(Machine&, Thread&, const Instruction&) {}

}  // namespace

Handler pick_bulk(const Statement& s, Instruction& i) {
  if (s.opcode == "fence" && s.has("proxy") && s.has("async")) {
    const bool shared = s.has("shared::cta") || s.has("shared::cluster"), global = s.has("global");
    i.detail = shared ? 1 : global ? 2 : 3;
    return fence;
  }
  const bool counts = s.has("mbarrier::complete_tx::bytes");
  if (s.opcode == "st" && s.has("async") && counts) {
    const size_t parts = i.has_vectors() ? i.vector(0).size() : 1;
    return i.type.bits > 64 || i.type.bits < 32 || parts * i.type.bytes() > 16 ? nullptr
                                                                               : store_async;
  }
  if (s.opcode != "cp" || !s.has("async") || !s.has("bulk")) return nullptr;
  if (s.has("commit_group")) return commit;
  if (s.has("wait_group")) return s.has("read") ? wait<true> : wait<false>;
  for (const char* other : {"tensor", "cp_mask", "reduce"})
    if (s.has(other)) return nullptr;
  if (s.has("prefetch")) return nothing;
  std::vector<std::string> ends;  // the destination and the source
  for (const std::string& m : s.modifiers)
    if (m == "global" || m == "shared::cta" || m == "shared::cluster") ends.push_back(m);
  if (ends.size() != 2) return nullptr;
  if (ends[1] == "shared::cta") i.detail |= kFromShared;
  if (s.has("multicast::cluster")) i.detail |= kMulticast;
  if (ends[0] == "global") return ends[1] == "shared::cta" && !counts ? copy_to_global : nullptr;
  return counts && ends[1] != "shared::cluster" ? copy_to_shared : nullptr;
}

}  // namespace ptxvm
