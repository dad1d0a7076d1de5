#include "order.h"

#include <algorithm>
#include <utility>

namespace ptxvm {

namespace {

void raise_to(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) {
  uint32_t* a = clock.data();
  const uint32_t* b = other.data();
  for (size_t i = 0; i < clock.size(); ++i) a[i] = std::max(a[i], b[i]);
}

constexpr Scope kScopes[] = {Scope::kBlock, Scope::kCluster, Scope::kDevice};

// How far a thread is from the thread that published: the smallest scope that holds both.
Scope distance(const Actor& actor, const Published& published) {
  return published.block == actor.block       ? Scope::kBlock
         : published.cluster == actor.cluster ? Scope::kCluster
                                              : Scope::kDevice;
}

}  // namespace

void Order::start(uint32_t threads, bool copies_async, uint32_t more, bool clusters) {
  threads_ = threads;
  copies_ = copies_async;
  clusters_ = clusters;
  first_copier_ = copies_async ? threads : kNoId / 2;
  nothing_ = std::make_shared<const std::vector<uint32_t>>(first_of_more() + more, 0);
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

Order::Arrival Order::arrive(Actor& actor, Scope scope, bool release) const {
  Arrival arrival = publish(actor);
  if (!release) arrival.stamp = actor.view.fenced[scope];
  return arrival;
}

Order::Knowledge Order::united(const std::vector<Arrival>& arrivals) const {
  const auto all_arrivals = [&](const Stamp Arrival::* which) {
    auto clock = std::make_shared<std::vector<uint32_t>>(*nothing_);
    const void* last = nullptr;
    for (const Arrival& arrival : arrivals) {
      const Stamp& stamp = arrival.*which;
      // Most threads of a block share one clock, so the same clock is not joined twice.
      if (stamp.clock && stamp.clock.get() != last) raise_to(*clock, *stamp.clock);
      last = stamp.clock.get();
    }
    for (const Arrival& arrival : arrivals) {
      const Stamp& stamp = arrival.*which;
      if (stamp.thread == kNoId) continue;
      (*clock)[stamp.thread] = std::max((*clock)[stamp.thread], stamp.epoch);
      if (copies_ && stamp.thread < threads_) {
        uint32_t& copies = (*clock)[threads_ + stamp.thread];
        copies = std::max(copies, stamp.copies);
      }
    }
    return clock;
  };
  return {all_arrivals(&Arrival::stamp), all_arrivals(&Arrival::lenient)};
}

void Order::meet(const std::vector<Arrival>& arrivals, const std::vector<Actor*>& leaving) const {
  const Knowledge all = united(arrivals);
  for (Actor* actor : leaving) {
    actor->view.known = all.strict;
    actor->lenient.known = all.lenient;
    actor->known = all.strict->data();
  }
}

// Whether the view already includes the stamp. A thread publishes each epoch once, so a view that
// knows a thread's epoch knows everything that the thread knew then.
bool Order::covers(const Actor& actor, const Known& view, const Stamp& stamp) const {
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
    if (copies_ && stamp.thread < threads_) {
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

void Order::learn(Actor& actor, Known& view, const Stamp& stamp) const {
  if (covers(actor, view, stamp)) return;
  view.known = joined(view.known, stamp);
  if (&view == &actor.view) actor.known = view.known->data();
}

void Order::learn(Actor& actor, const Knowledge& knowledge, Joins& last) const {
  learn_all(actor, actor.view, knowledge.strict, last.strict);
  learn_all(actor, actor.lenient, knowledge.lenient, last.lenient);
}

void Order::learn_all(Actor& actor, Known& view, const Clock& more, Join& last) const {
  if (last.known != view.known || last.more != more) {
    Stamp stamp;
    stamp.clock = more;
    if (covers(actor, view, stamp)) return;
    last = {view.known, more, joined(view.known, stamp)};
  }
  view.known = last.both;
  if (&view == &actor.view) actor.known = view.known->data();
}

void Order::learn(Actor& actor, uint32_t id, uint32_t epoch) const {
  const Arrival arrival = arrival_of(id, epoch);
  learn(actor, actor.view, arrival.stamp);
  learn(actor, actor.lenient, arrival.lenient);
}

Order::Arrival Order::arrival_of(uint32_t id, uint32_t epoch) const {
  const Stamp stamp = {nothing_, id, epoch, 0};
  return {stamp, stamp};
}

void Order::observe(Actor& actor, const Knowledge& knowledge, Scope apart) const {
  Stamp stamp;
  stamp.clock = knowledge.lenient;
  learn(actor, actor.lenient, stamp);
  stamp.clock = knowledge.strict;
  if (!covers(actor, actor.view, stamp)) actor.view.observed.push_back({stamp, apart});
}

void Order::fence(Actor& actor, Scope scope) const {
  std::vector<View::Observed> rest;
  for (const View::Observed& seen : actor.view.observed) {
    if (seen.distance <= scope) {
      learn(actor, actor.view, seen.stamp);
    } else {
      rest.push_back(seen);
    }
  }
  actor.view.observed = std::move(rest);
  const Stamp now = publish(actor).stamp;
  for (const Scope s : kScopes)
    if (s <= scope) actor.view.fenced[s] = now;
}

void Order::store(Actor& actor, StrongWord& word, Scope scope, bool release, bool atomic) const {
  const Arrival now = publish(actor);
  word.before = std::move(word.now);
  word.now = {};
  const Published& before = word.before;
  Published& mine = word.now;
  mine.block = actor.block;
  mine.cluster = actor.cluster;
  const bool joins = atomic && before.block != kNoId;
  for (const Scope s : kScopes) {
    if (s == Scope::kCluster && !clusters_) continue;  // no reader is at this distance
    if (s <= scope) mine.stamps[s] = release ? now.stamp : actor.view.fenced[s];
    // A reader at this distance may be farther from the thread that stored the previous value.
    if (joins)
      mine.stamps[s] = united(before.stamps[std::max(s, distance(actor, before))], mine.stamps[s]);
  }
  mine.as_written = joins ? united(before.as_written, now.lenient) : now.lenient;
  word.writer = actor.id;
  word.writer_epoch = now.stamp.epoch;
  word.seen = false;
}

void Order::load(Actor& actor, const Published& published, Scope scope, bool acquire) const {
  learn(actor, actor.lenient, published.as_written);
  if (published.block == kNoId) return;
  const Scope apart = distance(actor, published);
  if (apart > scope) return;
  const Stamp& stamp = published.stamps[apart];
  if (acquire) {
    learn(actor, actor.view, stamp);
  } else if (!covers(actor, actor.view, stamp)) {
    for (const View::Observed& seen : actor.view.observed)
      if (seen.stamp.clock == stamp.clock && seen.stamp.thread == stamp.thread &&
          seen.stamp.epoch >= stamp.epoch && seen.distance == apart)
        return;
    actor.view.observed.push_back({stamp, apart});
  }
}

}  // namespace ptxvm
