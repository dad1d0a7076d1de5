// How a layer call is cut up: a pure function of sizes and threads, so that it can be tested and
// printed without running anything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../kernel_api.h"

namespace fusedrnn {

// The sequences of a call in packed order, see kernel_api.h.
struct Sequences {
  int64_t T = 0;
  int64_t N = 0;                     // including sequences of length 0
  std::vector<int64_t> batch_sizes;  // [T]
  std::vector<int64_t> row_offset;   // [T + 1]

  int64_t rows() const { return row_offset.empty() ? 0 : row_offset.back(); }
  int64_t widest() const { return batch_sizes.empty() ? 0 : batch_sizes[0]; }
};

struct Plan {
  bool as_stored = false;    // the time loop reads weights as torch stores them, without packing
  bool x_as_stored = false;  // the same of x W
  int64_t chunk_steps = 1;   // steps per chunk of x W (forward) or of deltas (backward)
  // By rows: task i runs sequences [cut[i], cut[i + 1]) through all steps, nobody waits. By units:
  // every step is cut into slices of hidden units, and a step waits for the one before.
  bool by_units = false;
  std::vector<int64_t> sequence_cut;
  // Forward by rows: a task computes x W of its own sequences too, so that threads meet only at the
  // end.
  bool own_chunks = false;
  int64_t slices = 1;

  int64_t tasks_per_direction() const { return static_cast<int64_t>(sequence_cut.size()) - 1; }
};

// Values of a chunk's gate buffer: 512 KiB of float stay in L2 between the product that writes them
// and the loop that reads them. Backward: products over a chunk sum over its rows and want more of
// them. (One thread, LSTM 100,32,256,256: forward 16.5 ms with 2^20, 15.8 with 2^17; training 53.6
// with 2^22, 50.1 with 2^18, 52.1 with 2^20.)
constexpr int64_t kForwardChunkValues = 1 << 17;
constexpr int64_t kBackwardChunkValues = 1 << 20;

// Fewer sequences than this, on average, read the panels for too few rows to be worth a thread.
constexpr int64_t kMinSequencesPerTask = 2;

// Cuts the sequences into at most `tasks` runs of about equal work (sum of lengths).
inline std::vector<int64_t> cut_sequences(const Sequences& seq, int64_t tasks) {
  const int64_t n = seq.widest();
  tasks = std::clamp<int64_t>(tasks, 1, std::max<int64_t>(1, n / kMinSequencesPerTask));
  std::vector<int64_t> cut = {0};
  // Work of the first j sequences: Σ_t min(j, batch_sizes[t]).
  int64_t done = 0;
  int64_t step = seq.T;  // sequences j .. are alive in steps [0, step)
  for (int64_t j = 0; j < n; ++j) {
    while (step > 0 && seq.batch_sizes[step - 1] <= j) --step;
    done += step;
    const int64_t next = static_cast<int64_t>(cut.size());
    if (next < tasks && done * tasks >= next * seq.rows()) cut.push_back(j + 1);
  }
  if (cut.back() != n || n == 0) cut.push_back(n);
  return cut;
}

// Few sequences share one matrix: by rows every thread would read all of it each step, by units its
// part, for the price of waiting at each step. That pays from these sizes on: where threads would
// have nothing to do, or where the matrix does not fit a thread's L2; far beyond that for more
// sequences too. (Two threads: LSTM (25,16,512,512) and (25,64,1024,1024) gained 3 to 9 %.)
constexpr int64_t kByUnitsValues = 1 << 15;
constexpr int64_t kByUnitsFarValues = 1 << 18;
constexpr int64_t kByUnitsSequences = 6;  // per thread: a tile's rows with AVX-512
constexpr int64_t kByUnitsVeryFarValues = 1 << 19;
constexpr int64_t kByUnitsManySequences = 48;
constexpr int64_t kSlicesPerThread = 2;  // so that another can take over half of a late thread's

// Packing a weight costs as much as reading it three or four times; a dot product over K values of
// a weight as it is stored costs the sum over its lanes besides, about as much as 64 of its values.
// So it pays where few rows use a weight, and long ones. (One thread, LSTM (25,1,1024,1024)
// forward: 8.9 ms packed, 7.2 as stored.)
inline bool reads_as_stored(int64_t rows, int64_t K) { return rows <= K / 16; }

// A tile's rows with AVX-512 are six: of fewer rows a step, x W goes better by whole chunks.
constexpr int64_t kOwnChunkSequences = 4;

// columns: G*H, inner: P, of one direction. input: I where x W is computed, 0 where it is not.
// directions: run side by side.
inline Plan make_plan(const Sequences& seq, int64_t columns, int64_t inner, int64_t input,
                      int64_t directions, int64_t threads, int64_t chunk_values) {
  Plan plan;
  const int64_t per_step = std::max<int64_t>(1, seq.widest() * columns);
  plan.chunk_steps = std::clamp<int64_t>(chunk_values / per_step, 1, std::max<int64_t>(1, seq.T));
  plan.as_stored = seq.widest() <= kFewRows && reads_as_stored(seq.rows(), inner);
  plan.x_as_stored = reads_as_stored(seq.rows(), input);
  plan.sequence_cut = cut_sequences(seq, (threads + directions - 1) / directions);
  const int64_t sequences = seq.widest() * directions, values = columns * inner;
  plan.by_units =
      threads > 1 &&
      ((sequences < threads && values >= kByUnitsValues) ||
       (sequences < kByUnitsSequences * threads && values >= kByUnitsFarValues) ||
       (sequences < kByUnitsManySequences * threads && values >= kByUnitsVeryFarValues));
  const int64_t tasks = plan.tasks_per_direction();
  plan.own_chunks = input > 0 && !plan.x_as_stored && !plan.by_units && threads > 1 &&
                    tasks * directions >= threads && seq.widest() >= kOwnChunkSequences * tasks;
  plan.slices = std::max<int64_t>(1, kSlicesPerThread * threads / directions);
  return plan;
}

inline std::string describe(const Plan& plan) {
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

}  // namespace fusedrnn
