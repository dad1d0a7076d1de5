// How the sequences of a call become sequences in packed order. A beginning inside a sequence ends
// one and starts another: a sequence of the caller is cut there into pieces, which the engine runs
// as sequences of their own. Without beginnings a sequence is one piece.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "sequences.h"

namespace fusedrnn {

// The steps [first, first + length) of the caller's sequence n.
struct Piece {
  int64_t n, first, length;
};

struct Pieces {
  Sequences sequences;       // the pieces, longest first
  std::vector<Piece> piece;  // [sequences.N]
  int64_t N = 0;             // sequences of the caller
  // [N] the pieces with the first and the last step of a sequence
  std::vector<int64_t> head, tail;
  // [N] whether a sequence begins at its first step, so that nothing comes from its initial state
  std::vector<char> begins;
  // The caller's rows are [step][N] if this is empty. Else they are packed, and this is the offset
  // of each step.
  std::vector<int64_t> row_offset;
  // Whether the pieces are the caller's sequences in the order of the caller's rows.
  bool in_place = false;

  int64_t row_of(int64_t n, int64_t step) const {
    return (row_offset.empty() ? step * N : row_offset[step]) + n;
  }
};

// Cuts the sequences. begins(row) says whether a new sequence begins at a row of the caller.
// lengths: [N]. row_offset: as in Pieces.
template <class Begins>
Pieces cut_pieces(const std::vector<int64_t>& lengths, std::vector<int64_t> row_offset,
                  const Begins& begins) {
  Pieces pieces;
  pieces.N = static_cast<int64_t>(lengths.size());
  pieces.row_offset = std::move(row_offset);
  const int64_t N = pieces.N;
  const int64_t steps = N ? *std::max_element(lengths.begin(), lengths.end()) : 0;
  std::vector<Piece> cut;
  std::vector<int64_t> open(N);  // the piece that each sequence is in
  for (int64_t n = 0; n < N; ++n) {
    open[n] = n;
    cut.push_back({n, 0, lengths[n]});
  }
  pieces.begins.assign(N, 0);
  std::vector<int64_t> live(N);  // the sequences that have step t
  std::iota(live.begin(), live.end(), 0);
  for (int64_t t = 0; t < steps; ++t) {
    std::erase_if(live, [&](int64_t n) { return lengths[n] <= t; });
    for (const int64_t n : live) {
      if (!begins(pieces.row_of(n, t))) continue;
      if (t == 0) {
        pieces.begins[n] = 1;
        continue;
      }
      cut[open[n]].length = t - cut[open[n]].first;
      open[n] = static_cast<int64_t>(cut.size());
      cut.push_back({n, t, lengths[n] - t});
    }
  }

  const int64_t count = static_cast<int64_t>(cut.size());
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return cut[a].length > cut[b].length; });
  pieces.head.resize(N);
  pieces.tail.resize(N);
  pieces.piece.resize(count);
  for (int64_t j = 0; j < count; ++j) {
    const Piece& piece = pieces.piece[j] = cut[order[j]];
    if (piece.first == 0) pieces.head[piece.n] = j;
    if (order[j] == open[piece.n]) pieces.tail[piece.n] = j;
  }
  std::vector<int64_t> batch_sizes(count ? pieces.piece[0].length : 0);
  int64_t alive = count;
  for (size_t t = 0; t < batch_sizes.size(); ++t) {
    while (pieces.piece[alive - 1].length <= static_cast<int64_t>(t)) --alive;
    batch_sizes[t] = alive;
  }
  pieces.sequences = from_batch_sizes(std::move(batch_sizes), count);
  const bool all_alive = !pieces.row_offset.empty() || pieces.sequences.rows() == N * steps;
  pieces.in_place = count == N && all_alive && std::is_sorted(order.begin(), order.end()) && N > 0;
  return pieces;
}

// A padded batch [T, N] of which only the first lengths[n] steps of sequence n are live.
inline Pieces from_lengths(const int64_t* lengths, int64_t N) {
  Pieces pieces =
      cut_pieces(std::vector<int64_t>(lengths, lengths + N), {}, [](int64_t) { return false; });
  pieces.in_place = false;  // the padded batch may have more steps
  return pieces;
}

// Calls body(row of the caller, packed row) for the live rows of the steps [begin, end).
template <class Body>
void for_live_rows(const Pieces& pieces, int64_t begin, int64_t end, const Body& body) {
  const Sequences& seq = pieces.sequences;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t j = 0; j < seq.batch_sizes[t]; ++j) {
      const Piece& piece = pieces.piece[j];
      body(pieces.row_of(piece.n, piece.first + t), seq.row_offset[t] + j);
    }
}

inline void copy_row(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t bytes) {
  std::memcpy(static_cast<char*>(to) + to_row * bytes,
              static_cast<const char*>(from) + from_row * bytes, static_cast<size_t>(bytes));
}

// Copies the live rows of the steps [begin, end) from the caller's order to packed order, or back.
// A row has `bytes` bytes. Rows beyond a sequence's length are neither read nor written.
inline void pack_rows(const Pieces& pieces, const void* given, void* packed, int64_t bytes,
                      int64_t begin, int64_t end) {
  for_live_rows(pieces, begin, end,
                [&](int64_t from, int64_t to) { copy_row(given, from, packed, to, bytes); });
}
inline void unpack_rows(const Pieces& pieces, const void* packed, void* given, int64_t bytes,
                        int64_t begin, int64_t end) {
  for_live_rows(pieces, begin, end,
                [&](int64_t to, int64_t from) { copy_row(packed, from, given, to, bytes); });
}

// A state of a sequence: the one before the first position in a direction, or the one after the
// last position.
enum class StateAt { kBegin, kEnd };

// Calls body(row of the caller's states [D, N, ·], row of the pieces' states) for the pieces that
// take a state of the caller or give one. The second direction begins at a sequence's last step.
template <class Body>
void for_states(const Pieces& pieces, int64_t D, StateAt at, const Body& body) {
  const int64_t N = pieces.N, count = pieces.sequences.N;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < N; ++n) {
      const bool first_step = (at == StateAt::kBegin) == (d == 0);
      if (at == StateAt::kBegin && d == 0 && pieces.begins[n]) continue;
      body(d * N + n, d * count + (first_step ? pieces.head[n] : pieces.tail[n]));
    }
}

// Copies states from the caller's [D, N, row] to the pieces, or back. States that no piece takes or
// gives are not written.
inline void take_states(const Pieces& pieces, const void* given, void* own, int64_t D, StateAt at,
                        int64_t bytes) {
  for_states(pieces, D, at,
             [&](int64_t from, int64_t to) { copy_row(given, from, own, to, bytes); });
}
inline void give_states(const Pieces& pieces, const void* own, void* given, int64_t D, StateAt at,
                        int64_t bytes) {
  for_states(pieces, D, at,
             [&](int64_t to, int64_t from) { copy_row(own, from, given, to, bytes); });
}

}  // namespace fusedrnn
