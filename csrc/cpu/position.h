// What the kernels of the time loop know about a position and a tile. Compiled once per instruction
// set, see kernels.inl.
#pragma once

#include "few.h"
#include "kernel_table.h"
#include "tile.h"

namespace fusedrnn::cpu {
namespace {

// --- Positions of a sequence --------------------------------------------------------------------

// The sequences of a position. A sequence enters at the position where its state comes from the
// caller's memory, which is its first one in the chunk. It leaves at its last one in the chunk,
// where the state goes back.
struct Position {
  int64_t row;    // packed row of sequence 0
  int64_t begin;  // sequences [begin, end) are alive
  int64_t end;
  int64_t entering;      // sequences [entering, end) enter here
  int64_t leaving;       // sequences [leaving, end) leave here
  int64_t previous_row;  // packed row of sequence 0 at the position before
  int64_t previous_end;  // end of the sequences alive there, also if it is in the chunk before
};

FUSEDRNN_INLINE Position position_at(const Steps& s, int64_t p) {
  Position at;
  at.row = s.row_offset[step_at(s, p)];
  at.begin = s.n_begin;
  at.end = alive_at(s, p);
  at.entering = min64(at.end, alive_at(s, p - 1));
  at.leaving = min64(at.end, alive_at(s, p + 1));
  at.previous_row = p > 0 ? s.row_offset[step_at(s, p - 1)] : 0;
  at.previous_end = p > 0 ? s.batch_sizes[step_at(s, p - 1)] : 0;
  return at;
}

// The panels of a part. Odd positions walk them from the last to the first, see PanelRange.
FUSEDRNN_INLINE PanelRange in_turns(const Part& part) {
  return {part.panels.begin, part.panels.end, part.position % 2 == 1};
}

// The complete sums of some sequences for a vector of units.
template <class Scalar>
struct CellTile {
  int64_t u;                // first unit
  int64_t first, count;     // sequences
  Rows<const Scalar> sums;  // [count, .], at the first gate
  const Scalar* bias_x;     // b_ih at the first gate; null in backward
};

// --- Parameters and row inputs ------------------------------------------------------------------

// The parameters of a vector of units. of_row adds the input of a row.
template <class Cell, class V>
struct Inputs {
  V params[Cell::kParams > 0 ? Cell::kParams : 1];

  template <class Args, class Units>
  FUSEDRNN_INLINE Inputs(const Args& a, Units units, int64_t u) {
    for (int k = 0; k < Cell::kParams; ++k) params[k] = units.load(a.params + k * a.H + u);
  }

  template <class Args>
  FUSEDRNN_INLINE Given<V> of_row(const Args& a, int64_t row) const {
    if constexpr (Cell::kTakesRow) {
      return {params, V::broadcast(a.row_input[row])};
    } else {
      return {params, V::zero()};
    }
  }
};

}  // namespace
}  // namespace fusedrnn::cpu
