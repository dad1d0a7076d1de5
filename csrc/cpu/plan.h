// How a layer call is cut up: a pure function of sizes and threads, so that it can be tested and
// printed without running anything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../layer/sequences.h"
#include "kernel_table.h"

namespace fusedrnn::cpu {

struct Plan {
  bool as_stored = false;    // the time loop reads weights as torch stores them, without packing
  bool x_as_stored = false;  // x W reads weight_ih as torch stores it
  int64_t chunk_steps = 1;   // steps per chunk of x W (forward) or of deltas (backward)
  // By rows, task i runs the sequences [cut[i], cut[i + 1]) through all steps, and no task waits
  // for another. By units, every step is cut into slices of hidden units, and a step waits for the
  // step before.
  bool by_units = false;
  std::vector<int64_t> sequence_cut;
  // In forward by rows, whether a task also computes x W of its own sequences. The threads then
  // wait for each other only once, at the end.
  bool own_chunks = false;
  int64_t slices = 1;  // by units: slices of a stage in one direction

  int64_t tasks_per_direction() const { return static_cast<int64_t>(sequence_cut.size()) - 1; }
};

// The number of values of a chunk's gate buffer. In forward, 512 KiB of float stay in L2 between
// the product that writes them and the loop that reads them. In backward, the products sum over the
// rows of a chunk and are faster with more rows. (One thread, LSTM 100,32,256,256: forward 16.5 ms
// with 2^20, 15.8 with 2^17; training 53.6 with 2^22, 50.1 with 2^18, 52.1 with 2^20.)
constexpr int64_t kForwardChunkValues = 1 << 17;
constexpr int64_t kBackwardChunkValues = 1 << 20;

// The fewest sequences of a task, on average. With fewer, a thread would read all the panels for
// too few rows to be worth it.
constexpr int64_t kMinSequencesPerTask = 2;

// Cuts the sequences into at most `tasks` runs of about equal work (sum of lengths).
inline std::vector<int64_t> cut_sequences(const Sequences& seq, int64_t tasks) {
  const int64_t n = seq.widest();
  tasks = std::clamp<int64_t>(tasks, 1, std::max<int64_t>(1, n / kMinSequencesPerTask));
  std::vector<int64_t> cut = {0};
  int64_t done = 0;      // sum of the lengths of the sequences up to j
  int64_t step = seq.T;  // length of sequence j
  for (int64_t j = 0; j < n; ++j) {
    while (step > 0 && seq.batch_sizes[step - 1] <= j) --step;
    done += step;
    const int64_t next = static_cast<int64_t>(cut.size());
    if (next < tasks && done * tasks >= next * seq.rows()) cut.push_back(j + 1);
  }
  if (cut.back() != n || n == 0) cut.push_back(n);
  return cut;
}

// The sizes at which the steps are shared by units: the recurrent weights of one direction have at
// least `values` values, and each thread has fewer than `sequences` sequences. By rows, every
// thread reads the whole matrix at each step. By units it reads its part, and waits at each step
// for the other threads. (Two threads: LSTM (25,16,512,512) and (25,64,1024,1024) gained 3 to 9 %.)
struct ByUnits {
  int64_t values, sequences;
};
constexpr ByUnits kByUnits[] = {
    {1 << 15, 1},   // there are threads that by rows would have nothing to do
    {1 << 18, 6},   // the matrix does not fit a thread's L2; a tile has six rows with AVX-512
    {1 << 19, 48},  // it is far larger than L2
};
// There are two slices for each thread, so that another thread can take over half of the work of a
// late one.
constexpr int64_t kSlicesPerThread = 2;

// Packing a weight costs as much as reading it three or four times. A dot product with a weight as
// it is stored costs the sum over the lanes of a vector in addition, which is about as much as 64
// of its K values. So reading weights as stored pays if few rows use them and K is large. (One
// thread, LSTM (25,1,1024,1024) forward: 8.9 ms packed, 7.2 as stored.)
inline bool reads_as_stored(int64_t rows, int64_t K) { return rows <= K / 16; }

// The fewest sequences per task, on average, for which a task computes x W itself. A tile has six
// rows with AVX-512. With fewer rows in a step, x W is faster for the whole chunk at once.
constexpr int64_t kOwnChunkSequences = 4;

// The facts of a pass that decide its plan.
struct PlanRequest {
  const Sequences& sequences;
  int64_t columns;     // G*H of one direction
  int64_t inner;       // P
  int64_t input;       // I where x W is computed, 0 where it is not
  int64_t directions;  // the directions run at the same time
  int64_t threads;
  int64_t chunk_values;  // most values of a chunk's gate buffer, unless one step has more
};

inline Plan make_plan(const PlanRequest& q) {
  const Sequences& seq = q.sequences;
  Plan plan;
  const int64_t per_step = std::max<int64_t>(1, seq.widest() * q.columns);
  plan.chunk_steps = std::clamp<int64_t>(q.chunk_values / per_step, 1, std::max<int64_t>(1, seq.T));
  plan.as_stored = seq.widest() <= kFewRows && reads_as_stored(seq.rows(), q.inner);
  plan.x_as_stored = reads_as_stored(seq.rows(), q.input);
  plan.sequence_cut = cut_sequences(seq, (q.threads + q.directions - 1) / q.directions);
  const int64_t sequences = seq.widest() * q.directions, values = q.columns * q.inner;
  plan.by_units = q.threads > 1 &&
                  std::any_of(std::begin(kByUnits), std::end(kByUnits), [&](const ByUnits& least) {
                    return values >= least.values && sequences < least.sequences * q.threads;
                  });
  const int64_t tasks = plan.tasks_per_direction();
  plan.own_chunks = q.input > 0 && !plan.x_as_stored && !plan.by_units && q.threads > 1 &&
                    tasks * q.directions >= q.threads && seq.widest() >= kOwnChunkSequences * tasks;
  plan.slices = std::max<int64_t>(1, kSlicesPerThread * q.threads / q.directions);
  return plan;
}

inline std::string to_text(const Plan& plan) {
  std::string text = plan.x_as_stored ? "input weights as stored, " : "";
  if (plan.as_stored) text.append("recurrent weights as stored, ");
  text.append("chunks of ").append(std::to_string(plan.chunk_steps)).append(" steps, ");
  if (plan.by_units)
    return text.append("by units in ").append(std::to_string(plan.slices)).append(" slices");
  text.append("by rows, sequences cut at");
  for (int64_t cut : plan.sequence_cut) text.append(" ").append(std::to_string(cut));
  if (plan.own_chunks) text.append(", each with its x W");
  return text;
}

}  // namespace fusedrnn::cpu
