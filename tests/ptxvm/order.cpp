#include "order.h"

#include <algorithm>

namespace ptxvm {

namespace {

void raise_to(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) {
  uint32_t* a = clock.data();
  const uint32_t* b = other.data();
  for (size_t i = 0; i < clock.size(); ++i) a[i] = std::max(a[i], b[i]);
}

}  // namespace

void Order::start(uint32_t threads, bool copies_async) {
  threads_ = threads;
  copies_ = copies_async;
  nothing_ = std::make_shared<const std::vector<uint32_t>>(copies_async ? 2 * threads : threads, 0);
}

void Order::begin(Actor& actor) const {
  actor.view.known = actor.lenient.known = nothing_;
  actor.known = nothing_->data();
}

bool Order::would_have_happened_before(const Actor& actor, uint32_t thread, uint32_t epoch) const {
  return (*actor.lenient.known)[thread] >= epoch;
}

Order::Arrival Order::publish(Actor& actor) const {
  const Arrival arrival = {{actor.view.known, actor.id, actor.epoch, actor.copies_done},
                           {actor.lenient.known, actor.id, actor.epoch, actor.copies_done}};
  ++actor.epoch;
  return arrival;
}

void Order::meet(const std::vector<Arrival>& arrivals, const std::vector<Actor*>& leaving) const {
  const auto all_arrivals = [&](const Stamp Arrival::* which) {
    auto clock = std::make_shared<std::vector<uint32_t>>(*(arrivals[0].*which).clock);
    const void* last = (arrivals[0].*which).clock.get();
    for (const Arrival& arrival : arrivals) {
      const Stamp& stamp = arrival.*which;
      // Most threads of a block share one clock, so the same clock is not joined twice.
      if (stamp.clock.get() != last) raise_to(*clock, *stamp.clock);
      last = stamp.clock.get();
    }
    for (const Arrival& arrival : arrivals) {
      const Stamp& stamp = arrival.*which;
      (*clock)[stamp.thread] = std::max((*clock)[stamp.thread], stamp.epoch);
      if (copies_) {
        uint32_t& copies = (*clock)[threads_ + stamp.thread];
        copies = std::max(copies, stamp.copies);
      }
    }
    return clock;
  };
  const Clock strict = all_arrivals(&Arrival::stamp), lenient = all_arrivals(&Arrival::lenient);
  for (Actor* actor : leaving) {
    actor->view.known = strict;
    actor->lenient.known = lenient;
    actor->known = strict->data();
  }
}

// Whether the view already includes the stamp. A thread publishes each epoch once, so a view that
// knows a thread's epoch knows everything that the thread knew then.
bool Order::covers(const Actor& actor, const View& view, const Stamp& stamp) const {
  if (!stamp.clock || stamp.thread == actor.id) return true;
  const std::vector<uint32_t>& known = *view.known;
  if (stamp.thread != kNoId) return known[stamp.thread] >= stamp.epoch;
  if (stamp.clock == view.known) return true;
  for (size_t i = 0; i < known.size(); ++i)
    if (known[i] < (*stamp.clock)[i] && i != actor.id) return false;
  return true;
}

Clock Order::joined(const Clock& clock, const Stamp& stamp) const {
  auto both = std::make_shared<std::vector<uint32_t>>(*clock);
  if (stamp.clock != clock) raise_to(*both, *stamp.clock);
  if (stamp.thread != kNoId) {
    (*both)[stamp.thread] = std::max((*both)[stamp.thread], stamp.epoch);
    if (copies_) {
      uint32_t& copies = (*both)[threads_ + stamp.thread];
      copies = std::max(copies, stamp.copies);
    }
  }
  return both;
}

Stamp Order::united(const Stamp& a, const Stamp& b) const {
  if (!a.clock) return b;
  if (!b.clock) return a;
  Stamp both;
  both.clock = joined(joined(a.clock, a), b);
  return both;
}

void Order::learn(Actor& actor, View& view, const Stamp& stamp) const {
  if (covers(actor, view, stamp)) return;
  view.known = joined(view.known, stamp);
  if (&view == &actor.view) actor.known = view.known->data();
}

void Order::fence(Actor& actor, Scope scope) const {
  const bool device = scope == Scope::kDevice;
  std::vector<View::Observed> rest;
  for (const View::Observed& seen : actor.view.observed) {
    if (device || !seen.other_block) {
      learn(actor, actor.view, seen.stamp);
    } else {
      rest.push_back(seen);
    }
  }
  actor.view.observed = std::move(rest);
  const Stamp now = publish(actor).stamp;
  actor.view.fenced_block = now;
  if (device) actor.view.fenced_device = now;
}

void Order::store(Actor& actor, StrongWord& word, Scope scope, bool release, bool atomic) const {
  const Arrival now = publish(actor);
  Published mine;
  mine.block = actor.block;
  mine.narrow = release ? now.stamp : actor.view.fenced_block;
  if (scope == Scope::kDevice) mine.wide = release ? now.stamp : actor.view.fenced_device;
  mine.as_written = now.lenient;
  word.before = word.now;
  if (atomic && word.now.block != kNoId) {
    const bool same = word.now.block == actor.block;
    mine.narrow = united(same ? word.now.narrow : word.now.wide, mine.narrow);
    mine.wide = united(word.now.wide, mine.wide);
    mine.as_written = united(word.now.as_written, mine.as_written);
  }
  word.now = mine;
  word.writer = actor.id;
  word.writer_epoch = now.stamp.epoch;
  word.seen = false;
}

void Order::load(Actor& actor, const Published& published, Scope scope, bool acquire) const {
  learn(actor, actor.lenient, published.as_written);
  if (published.block == kNoId) return;
  const bool other = published.block != actor.block;
  if (other && scope != Scope::kDevice) return;
  const Stamp& stamp = other ? published.wide : published.narrow;
  if (acquire) {
    learn(actor, actor.view, stamp);
  } else if (!covers(actor, actor.view, stamp)) {
    for (const View::Observed& seen : actor.view.observed)
      if (seen.stamp.clock == stamp.clock && seen.stamp.thread == stamp.thread &&
          seen.stamp.epoch >= stamp.epoch && seen.other_block == other)
        return;
    actor.view.observed.push_back({stamp, other});
  }
}

}  // namespace ptxvm
