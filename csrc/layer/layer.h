// A recurrent layer as both engines see it, and the weights that each stage of its cell multiplies.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cells/cells.h"
#include "matrix.h"
#include "parameters.h"
#include "sequences.h"

namespace fusedrnn {

// The cell with this name, or kCount if there is none.
inline CellKind cell_named(const char* name) {
  for (int i = 0; i < kCellCount; ++i)
    if (std::strcmp(name, kCellInfo[i].name) == 0) return static_cast<CellKind>(i);
  return CellKind::kCount;
}

struct Layer {
  CellKind cell;
  int64_t I, H, P, D;
  const Sequences& sequences;
  // Whether the call says where sequences begin. Then a cell with saves_h saves h of every row.
  bool has_starts = false;
  // Whether y also has c after every step, behind h of both directions.
  bool c_in_y = false;

  const CellInfo& info() const { return info_of(cell); }
  int64_t y_width() const { return D * (c_in_y ? P + H : P); }
  int64_t gate_columns() const { return info().gates * H; }
  ParameterSizes parameter_sizes() const { return {info().gates, info().params, I, H, P}; }
  // The width of a stage's emit, and of its product per gate.
  int64_t width(const Stage& stage) const { return stage.projects ? P : H; }
  // The width of a stage's source.
  int64_t source_width(const Stage& stage) const { return stage.from_hidden ? P : H; }
};

// The part of the recurrent weights that a stage multiplies, [gates * width, K], or its gradient.
template <class Value>
struct StageWeight {
  int64_t gates, width, K;
  Value* weight;
  Value* bias_x;  // [gates * width] of b_ih, or null
  Value* bias_h;  // [gates * width] of b_hh, or null

  int64_t rows() const { return gates * width; }
  Matrix<Value> matrix() const { return dense(weight, rows(), K); }
};

template <class Value>
StageWeight<Value> stage_weight(const Layer& layer, const Stage& stage,
                                const Parameters<Value>& w) {
  const int64_t K = layer.source_width(stage);
  if (stage.projects) return {1, layer.P, K, w.w_hr, nullptr, nullptr};
  const int64_t first = stage.first_gate * layer.H;
  return {stage.gates,
          layer.H,
          K,
          w.w_hh ? w.w_hh + first * K : nullptr,
          w.b_ih && stage.takes_input ? w.b_ih + first : nullptr,
          w.b_hh ? w.b_hh + first : nullptr};
}

}  // namespace fusedrnn
