// The time loop: which thread runs which part of which step. There are two ways to share a sequence
// among threads.
//
// The words nest like this. A chunk (Steps) has positions, one for each step. A position has stages
// (StagePanels), in order. A stage has panels of units. A Part is some panels of one stage of one
// position: the smallest piece that a kernel runs. By rows, a task runs all parts of its own
// sequences. By units, an epoch is one stage of one position, and it is cut into slices of panels
// that threads claim.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_table.h"
#include "plan.h"
#include "runtime.h"
#include "team.h"
#include "work.h"

namespace fusedrnn::cpu {

// A stage of every position, and the number of its panels.
struct StagePanels {
  int stage;
  int64_t panels;
  bool only_leaving;  // work only where a sequence leaves
};

// The loop of one chunk over D directions of the same number of positions.
template <class Args>
struct Loop {
  const Args* args;  // [D]
  int64_t D;
  void (*enter)(const Args&);  // before the first position, or null
  void (*kernel)(const Args&, const Part&);
  std::vector<StagePanels> stages;

  int64_t begin() const { return args[0].steps.begin; }
  int64_t end() const { return args[0].steps.end; }
};

// By rows: the sequences of a task through all positions of its chunk.
template <class Args>
void run_sequences(const Loop<Args>& loop, const Args& a) {
  if (loop.enter) loop.enter(a);
  for (int64_t p = a.steps.begin; p < a.steps.end; ++p)
    for (const StagePanels& s : loop.stages) loop.kernel(a, {p, s.stage, {0, s.panels}});
}

// Adds the tasks by rows: body(d, task, args), where args are those of the task's own sequences. No
// task waits for another.
template <class Args, class Body>
void add_by_rows(Work& work, const Plan& plan, const Loop<Args>& loop, Body body) {
  const int64_t tasks = plan.tasks_per_direction();
  work.add(loop.D * tasks, [=, &plan, &loop](int64_t i) {
    const int64_t d = i / tasks, task = i % tasks;
    Args a = loop.args[d];
    a.steps.n_begin = plan.sequence_cut[task];
    a.steps.n_end = plan.sequence_cut[task + 1];
    body(d, task, a);
  });
}

// Every stage of every position is cut into the same slices of units for each direction, and
// threads claim them: the threads that are running do the work, and a thread that comes late finds
// it done. A slice computes the same on every thread, so the bits do not depend on which one ran
// it. One worker alone claims every slice, so the workers need not really run together.
template <class Args>
void run_by_units(Runtime& runtime, const Plan& plan, const Loop<Args>& loop) {
  struct alignas(64) Slice {
    std::atomic<int64_t> claimed{0};  // epochs claimed so far
  };
  const int64_t total = loop.D * plan.slices;
  for (int64_t d = 0; d < loop.D && loop.enter; ++d) loop.enter(loop.args[d]);

  // An epoch is a stage of a position that all slices complete before the next begins.
  struct Epoch {
    int64_t position;
    const StagePanels* stage;
  };
  std::vector<Epoch> epochs;
  for (int64_t p = loop.begin(); p < loop.end(); ++p) {
    bool leaving = p + 1 == loop.end();
    for (int64_t d = 0; d < loop.D && !leaving; ++d) {
      const Steps& s = loop.args[d].steps;
      leaving = s.batch_sizes[step_at(s, p + 1)] < s.batch_sizes[step_at(s, p)];
    }
    for (const StagePanels& stage : loop.stages)
      if (leaving || !stage.only_leaving) epochs.push_back({p, &stage});
  }
  const int64_t count = static_cast<int64_t>(epochs.size());

  const std::unique_ptr<Slice[]> slices(new Slice[total]);
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  } completed_slices;  // over all epochs
  std::atomic<int64_t>& done = completed_slices.value;
  const int64_t workers = std::min(runtime.threads(), total);
  runtime.parallel(workers, [&](int64_t worker) {
    for (int64_t epoch = 0; epoch < count;) {
      int64_t completed = done.load(std::memory_order_acquire);
      for (int64_t spins = 0; completed < epoch * total; ++spins) {
        relax(spins);
        completed = done.load(std::memory_order_acquire);
      }
      if (completed >= (epoch + 1) * total) {
        epoch = completed / total;
        continue;
      }
      // A worker begins with the slices that it had in the epoch before, whose weights are in its
      // cache.
      for (int64_t i = 0; i < total; ++i) {
        const int64_t slot = (worker * total / workers + i) % total;
        int64_t expected = epoch;
        if (!slices[slot].claimed.compare_exchange_strong(expected, epoch + 1)) continue;
        const StagePanels& stage = *epochs[epoch].stage;
        const int64_t slice = slot % plan.slices;
        loop.kernel(loop.args[slot / plan.slices], {epochs[epoch].position,
                                                    stage.stage,
                                                    {stage.panels * slice / plan.slices,
                                                     stage.panels * (slice + 1) / plan.slices}});
        done.fetch_add(1, std::memory_order_release);
      }
      ++epoch;
    }
  });
}

// Runs one chunk by units at once, or adds its tasks by rows to the other pieces in `work`, as the
// plan says.
template <class Args>
void run_or_add(Runtime& runtime, Work& work, const Plan& plan, const Loop<Args>& loop) {
  if (plan.by_units) {
    run_by_units(runtime, plan, loop);
  } else {
    add_by_rows(work, plan, loop,
                [&loop](int64_t, int64_t, const Args& a) { run_sequences(loop, a); });
  }
}

}  // namespace fusedrnn::cpu
