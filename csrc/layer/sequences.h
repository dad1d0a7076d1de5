// The sequences of a batch in packed order, and the conversion of a padded batch to it.
//
// A batch is a list of S rows in time-major packed order: step t holds the rows
// [row_offset[t], row_offset[t + 1]) for the sequences 0 .. batch_sizes[t] - 1, which are sorted by
// length, longest first. A plain [T, N] batch is the case batch_sizes[t] = N.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
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

// A padded batch [T, N]. Only the first lengths[n] steps of sequence n are live.
struct PaddedRows {
  std::vector<int64_t> order;  // [N]: sequence j in packed order is order[j] of the batch
  Sequences sequences;
};

// lengths: [N], each in [0, T].
inline PaddedRows from_lengths(const int64_t* lengths, int64_t N) {
  PaddedRows rows;
  rows.order.resize(N);
  std::iota(rows.order.begin(), rows.order.end(), 0);
  std::stable_sort(rows.order.begin(), rows.order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<int64_t> batch_sizes(N ? lengths[rows.order[0]] : 0);
  int64_t alive = N;
  for (size_t t = 0; t < batch_sizes.size(); ++t) {
    while (lengths[rows.order[alive - 1]] <= static_cast<int64_t>(t)) --alive;
    batch_sizes[t] = alive;
  }
  rows.sequences = from_batch_sizes(std::move(batch_sizes), N);
  return rows;
}

// Calls body(padded row, packed row) for every live row.
template <class Body>
void for_live_rows(const PaddedRows& rows, const Body& body) {
  const Sequences& seq = rows.sequences;
  for (int64_t t = 0; t < seq.T; ++t)
    for (int64_t j = 0; j < seq.batch_sizes[t]; ++j)
      body(t * seq.N + rows.order[j], seq.row_offset[t] + j);
}

inline void copy_row(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t bytes) {
  std::memcpy(static_cast<char*>(to) + to_row * bytes,
              static_cast<const char*>(from) + from_row * bytes, static_cast<size_t>(bytes));
}

// Copies the live rows from padded [T, N, row] to packed [S, row], or back. A row has `bytes`
// bytes. Rows beyond a sequence's length are neither read nor written.
inline void pack_rows(const PaddedRows& rows, const void* padded, void* packed, int64_t bytes) {
  for_live_rows(rows, [&](int64_t from, int64_t to) { copy_row(padded, from, packed, to, bytes); });
}
inline void unpack_rows(const PaddedRows& rows, const void* packed, void* padded, int64_t bytes) {
  for_live_rows(rows, [&](int64_t to, int64_t from) { copy_row(packed, from, padded, to, bytes); });
}

// Copies states [D, N, row] from the caller's order of sequences to packed order, or back.
inline void sort_states(const PaddedRows& rows, const void* from, void* to, int64_t D,
                        int64_t bytes) {
  const int64_t N = rows.sequences.N;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t j = 0; j < N; ++j) copy_row(from, d * N + rows.order[j], to, d * N + j, bytes);
}
inline void unsort_states(const PaddedRows& rows, const void* from, void* to, int64_t D,
                          int64_t bytes) {
  const int64_t N = rows.sequences.N;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t j = 0; j < N; ++j) copy_row(from, d * N + j, to, d * N + rows.order[j], bytes);
}

}  // namespace fusedrnn
