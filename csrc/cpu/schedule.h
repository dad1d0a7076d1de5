// The time loop of one chunk, and the two ways to share it among threads.
//
// The words nest like this, from large to small:
//   Loop         one chunk of a batch in all D directions, with the kernel that computes it
//   Steps        the chunk in one direction: positions [begin, end) of sequences [n_begin, n_end)
//   position     one step of the chunk, by its number p in the order of processing. A kernel works
//                out which sequences run there as a `Position` (kernels.inl)
//   StagePanels  one stage of every position, and how many panels of units it has
//   PanelRange   consecutive panels of a stage
//   Part         a PanelRange of one stage at one position: the work of one call of the kernel
// By rows, the sequences are cut into tasks. A task runs every stage of every position for its own
// sequences, each stage as one Part with all panels.
// By units, all sequences run together, and the work is cut in two ways:
//   epoch        one stage of one position, in all directions. It begins when all work of the epoch
//                before is complete
//   slice        one of the plan.slices fixed PanelRanges of a stage. A thread claims a slice and
//                runs it as one Part
//   slot         a slice of one direction, by its number in [0, D * plan.slices)
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

// One stage of every position, and how many panels it has.
struct StagePanels {
  int stage;
  int64_t panels;
  bool only_leaving;  // the stage has work only at positions where a sequence leaves
};

// The loop of one chunk. All D directions have the same positions.
template <class Args>
struct Loop {
  const Args* args;  // [D]
  int64_t D;
  void (*enter)(const Args&);  // is called before the first position, or null
  void (*kernel)(const Args&, const Part&);
  std::vector<StagePanels> stages;

  int64_t begin() const { return args[0].steps.begin; }
  int64_t end() const { return args[0].steps.end; }
};

// Runs the sequences of one task, which `a` names, through all positions of the chunk.
template <class Args>
void run_sequences(const Loop<Args>& loop, const Args& a) {
  if (loop.enter) loop.enter(a);
  for (int64_t p = a.steps.begin; p < a.steps.end; ++p)
    for (const StagePanels& s : loop.stages) loop.kernel(a, {p, s.stage, {0, s.panels}});
}

// Adds body(d, task, args) to `work` for every task of every direction. args are those of direction
// d, with the sequences of the task. No task waits for another.
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

// Runs the chunk by units. Every stage is cut into the same slices at every position, and threads
// claim them. So the threads that are running do the work, and a thread that comes late finds it
// done. A slice computes the same bits on every thread. A worker that is alone claims every slice,
// so the result does not depend on the workers' really running at the same time.
template <class Args>
void run_by_units(Runtime& runtime, const Plan& plan, const Loop<Args>& loop) {
  struct alignas(64) Slice {
    std::atomic<int64_t> claimed{0};  // number of epochs in which this slot has been claimed
  };
  const int64_t total = loop.D * plan.slices;
  for (int64_t d = 0; d < loop.D && loop.enter; ++d) loop.enter(loop.args[d]);

  // A stage with only_leaving gets an epoch only at positions where a sequence leaves.
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
  } completed_slices;  // of all epochs and directions together
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
      // A worker begins with the same slot in every epoch, so that it finds the weights of its
      // slices in its own cache.
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

// If the plan is by units, runs the chunk at once. Else adds its tasks to the pieces in `work`,
// which the caller runs.
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
