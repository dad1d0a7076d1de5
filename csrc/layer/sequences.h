// The sequences of a batch in packed order. pieces.h brings a batch into it.
//
// A batch is a list of S rows in time-major packed order: step t holds the rows
// [row_offset[t], row_offset[t + 1]) for the sequences 0 .. batch_sizes[t] - 1, which are sorted by
// length, longest first. A plain [T, N] batch is the case batch_sizes[t] = N.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fusedrnn {

struct Sequences {
  int64_t T = 0;
  int64_t N = 0;                     // including sequences of length 0
  std::vector<int64_t> batch_sizes;  // [T]
  std::vector<int64_t> row_offset;   // [T + 1]

  int64_t rows() const { return row_offset.empty() ? 0 : row_offset.back(); }
  int64_t widest() const { return batch_sizes.empty() ? 0 : batch_sizes[0]; }
};

inline Sequences from_batch_sizes(std::vector<int64_t> batch_sizes, int64_t N) {
  Sequences seq;
  seq.T = static_cast<int64_t>(batch_sizes.size());
  seq.N = N;
  seq.row_offset.resize(seq.T + 1);
  for (int64_t t = 0; t < seq.T; ++t) seq.row_offset[t + 1] = seq.row_offset[t] + batch_sizes[t];
  seq.batch_sizes = std::move(batch_sizes);
  return seq;
}

// Packed rows [begin, end).
struct RowRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// The rows of the positions [begin, end). Position p is step T - 1 - p if descending, else step p.
inline RowRange rows_of(const Sequences& seq, bool descending, int64_t begin, int64_t end) {
  const int64_t lowest = descending ? seq.T - end : begin;
  return {seq.row_offset[lowest], seq.row_offset[lowest + end - begin]};
}

}  // namespace fusedrnn
