// The CPU engine: one time loop for every cell, compiled once per instruction set by the
// kernels_<isa>.cpp beside this file, which define
//   FUSEDRNN_VECTOR_BYTES  width of a vector
//   FUSEDRNN_REGISTERS     vector registers of the instruction set
//   FUSEDRNN_TABLE         name of the table to define
//   FUSEDRNN_ISA_NAME      its name for people
// An instruction set that only adds kernels for bfloat16 defines, in place of the last two,
//   FUSEDRNN_BF16_KERNELS  name of the kernels to define
//
// A product tile (tile.h) holds the sums of some sequences for all gates of some units. When they
// are complete the cell runs on them, so no gate value travels through memory. In backward the tile
// holds the gradient of an emit, and the derivative of the stage that emitted it runs on it.
#include "few.h"
#include "gemm.h"
#include "kernel_table.h"
#include "position.h"
#include "tile.h"

namespace fusedrnn::cpu {
namespace {

// --- Forward ------------------------------------------------------------------------------------

// Pointers to the states of one position. Sequence j has row j of each.
template <class Stored>
struct ForwardRows {
  using Scalar = Real<Stored>;
  Stored* h_in;    // [., P]
  Scalar* c_in;    // [., H]
  Stored* h_next;  // h_t and c_t of the sequences that do not leave
  Scalar* c_next;
  Stored* saved;  // [., kSaved*H] or null
  Stored* emit;   // [., H]
};

// Runs the cell on a tile. In bias_x and the sums, consecutive gates are one panel's units apart.
// The loop reads only local variables, because for the compiler its stores might change any other.
template <class Stored, class Cell, int s, class Units>
__attribute__((noinline)) void forward_cells(const ForwardArgs<Stored>& a, const Position& at,
                                             const ForwardRows<Stored>& rows, Units units,
                                             const CellTile<Real<Stored>>& tile) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  static constexpr Stage kStage = Cell::stage(s);
  constexpr int kGate = vectors_per_gate(kStage.gates) * V::kLanes;
  constexpr bool kReadsC = Cell::kHasC && s == 0;
  constexpr bool kLast = s == Cell::kStages - 1;
  const int64_t H = a.H, P = a.P, y_ld = a.y_ld;
  const int64_t x_ld = Cell::kGates * H, saved_ld = Cell::kSaved * H;
  const int64_t u = tile.u, first = tile.first, count = tile.count;
  const Scalar* sums = tile.sums.data;
  const int64_t staying = max64(0, at.leaving - first);  // sequences that do not leave

  const Scalar* x =
      a.gates_x + (at.row + first - a.steps.first_row) * x_ld + kStage.first_gate * H + u;
  const Stored* h_in = rows.h_in + first * P + u;
  const Scalar* c_in = kReadsC ? rows.c_in + first * H + u : nullptr;
  Stored* saved_values = rows.saved ? rows.saved + first * saved_ld + u : nullptr;
  Stored* y = kLast ? a.y + (at.row + first) * y_ld + u : nullptr;
  Stored* h_next = rows.h_next + first * P + u;
  Scalar* c_next = kReadsC ? rows.c_next + first * H + u : nullptr;
  Stored* emitted = kLast ? nullptr : rows.emit + first * H + u;

  Inputs<Cell, V> inputs(a, units, u);
  V bias[kStage.gates];
  for (int g = 0; g < kStage.gates; ++g) bias[g] = V::load(tile.bias_x + g * kGate);

  for (int64_t r = 0; r < count; ++r) {
    if (r == staying) {
      h_next = a.h + (first + r) * P + u;
      if constexpr (kReadsC) c_next = a.c + (first + r) * H + u;
    }
    V gates_x[kStage.gates], acc[kStage.gates], saved[Cell::kSaved];
    for (int g = 0; g < kStage.gates; ++g) {
      acc[g] = V::load(sums + g * kGate);
      if constexpr (kStage.takes_input) {
        gates_x[g] = units.load(x + g * H) + bias[g];
        __builtin_prefetch(x + g * H + V::kLanes);  // of the next units
      }
    }
    if constexpr (s > 0 && !kStage.projects) {
      for (int i = 0; i < kStage.saved_begin; ++i) saved[i] = units.load(saved_values + i * H);
    }
    State<V> state;
    if constexpr (Cell::kReadsH) state.h = units.load(h_in);
    if constexpr (kReadsC) state.c = units.load(c_in);

    const V emit =
        Cell::template forward<s>(gates_x, acc, inputs.of_row(a, at.row + first + r), state, saved);

    if constexpr (kReadsC) {
      units.store(state.c, c_next);
      c_in += H;
      c_next += H;
    }
    if (saved_values) {
      for (int i = kStage.saved_begin; i < kStage.saved_end; ++i)
        units.store(saved[i], saved_values + i * H);
      saved_values += saved_ld;
    }
    if constexpr (kLast) {
      units.store(emit, y);
      units.store(emit, h_next);
      y += y_ld;
      h_next += P;
    } else {
      units.store(emit, emitted);
      emitted += H;
    }
    if constexpr (kStage.takes_input) x += x_ld;
    if constexpr (Cell::kReadsH) h_in += P;
    sums += kStage.gates * kGate;
  }
}

template <class Stored, class Cell, int s>
FUSEDRNN_INLINE void forward_stage(const ForwardArgs<Stored>& a, const Position& at,
                                   const ForwardRows<Stored>& rows, PanelRange range) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  constexpr Stage kStage = Cell::stage(s);
  constexpr int kVectors = vectors_per_gate(kStage.gates);
  constexpr int kUnits = kVectors * V::kLanes;
  constexpr int kWidth = kStage.gates * kUnits;
  const int64_t width = kStage.projects ? a.P : a.H;
  const int64_t K = kStage.from_hidden ? a.P : a.H;

  const auto cells = [&](int64_t panel, int64_t first, int64_t count, const Scalar* sums) {
    const Scalar* bias_x = a.bias[s] + panel * 2 * kWidth;
    for_units<Scalar, kVectors>(panel * kUnits, width, [&](auto units, int64_t u, int v) {
      forward_cells<Stored, Cell, s>(a, at, rows, units,
                                     {.u = u,
                                      .first = first,
                                      .count = count,
                                      .sums = {sums + v * V::kLanes, kWidth},
                                      .bias_x = bias_x + v * V::kLanes});
    });
  };
  const StageProduct<Stored> product = {.begin = at.begin,
                                        .end = at.end,
                                        .source = {kStage.from_hidden ? rows.h_in : rows.emit, K},
                                        .K = K,
                                        .panels = a.weights.panels[s],
                                        .as_stored = a.weights.as_stored[s],
                                        .width = width,
                                        .range = range,
                                        .starts = {a.bias[s] + kWidth, 2 * kWidth}};
  if (product.as_stored) {
    products_as_stored<Stored, kStage.gates>(product, cells);
  } else {
    products<Stored, kStage.gates * kVectors>(product, cells);
  }
}

// Row of h_in at which position p begins. h_in has every row if keep, else two steps in turns.
template <class Stored>
FUSEDRNN_INLINE int64_t h_row(const ForwardArgs<Stored>& a, int64_t p) {
  return a.keep ? a.steps.row_offset[step_at(a.steps, p)] : (p & 1) * a.N;
}

// Copies the states of the sequences that enter in this chunk. No stage reads a.h or writes these
// rows before the sequences enter, so the copies for all positions are made before the first one.
template <class Stored>
void enter(const ForwardArgs<Stored>& a) {
  for (int64_t p = a.steps.begin; p < a.steps.end; ++p) {
    const Position at = position_at(a.steps, p);
    const int64_t n = at.end - at.entering;
    copy(a.h + at.entering * a.P, a.h_in + (h_row(a, p) + at.entering) * a.P, n * a.P);
    if (a.c && a.keep)
      copy(a.c + at.entering * a.H, a.c_in + (at.row + at.entering) * a.H, n * a.H);
  }
}

// Columns [begin, end) of some panels of a state of H units.
FUSEDRNN_INLINE UnitRange units_of(PanelRange range, int64_t panel_units, int64_t H) {
  return {range.begin * panel_units, min64(H, range.end * panel_units)};
}

// Writes c_t of the sequences of a position to y_c.
template <class Stored>
__attribute__((noinline)) void keep_c(const ForwardArgs<Stored>& a, const Position& at,
                                      const ForwardRows<Stored>& rows, PanelRange range) {
  using V = Vec<Real<Stored>>;
  const UnitRange units_range = units_of(range, kColumnVectors * V::kLanes, a.H);
  for (int64_t j = at.begin; j < at.end; ++j) {
    const Real<Stored>* c = (j < at.leaving ? rows.c_next : a.c) + j * a.H;
    Stored* y_c = a.y_c + (at.row + j) * a.y_ld;
    for_units_of<Real<Stored>>(units_range.begin, units_range.end, [&](auto units, int64_t u) {
      units.store(V(units.load(c + u)), y_c + u);
    });
  }
}

// Runs stage `part.stage` of one position. The stage number kStages stands for keep_c.
template <class Stored, class Cell>
void forward(const ForwardArgs<Stored>& a, const Part& part) {
  const Steps& steps = a.steps;
  const Position at = position_at(steps, part.position);
  if (at.begin == at.end) return;
  const bool last = part.position + 1 == steps.end;
  const int64_t row = a.keep ? at.row : 0;
  const int64_t next = last ? 0 : h_row(a, part.position + 1);
  ForwardRows<Stored> rows;
  rows.h_in = a.h_in + h_row(a, part.position) * a.P;
  rows.h_next = last ? a.h : a.h_in + next * a.P;
  rows.c_in = rows.c_next = a.c;
  if (a.keep && Cell::kHasC) {
    rows.c_in = a.c_in + row * a.H;
    if (!last) rows.c_next = a.c_in + next * a.H;
  }
  rows.saved = a.saved ? a.saved + (Cell::kSavesH ? 0 : row) * Cell::kSaved * a.H : nullptr;
  rows.emit = a.emit ? a.emit + row * a.H : nullptr;
  if (Cell::kHasC && part.stage == Cell::kStages) return keep_c(a, at, rows, part.panels);
  with_stage<Cell>(part.stage, [&](auto s) FUSEDRNN_INLINE_LAMBDA {
    forward_stage<Stored, Cell, s.value>(a, at, rows, in_turns(part));
  });
}

// --- Backward -----------------------------------------------------------------------------------

// Calls body(units, tile) with tiles that together have the units of p's panels below p.width, for
// the sequences [p.begin, end). The sums of a tile are the product p, which multiplies a stage's
// deltas by its weight. For the sequences from p.end on, the sums are zero.
template <class Stored, class Body>
FUSEDRNN_INLINE void backward_product(const BackwardArgs<Stored>& a, const StageProduct<Stored>& p,
                                      int64_t end, const Body& body) {
  using Scalar = Real<Stored>;
  constexpr int kLanes = Vec<Scalar>::kLanes;
  constexpr int kUnits = kColumnVectors * kLanes;
  const UnitRange columns = {p.range.begin * kUnits, min64(p.width, p.range.end * kUnits)};
  const auto on_sequences = [&](int64_t first, int64_t count, Rows<const Scalar> sums, auto units,
                                int64_t u) FUSEDRNN_INLINE_LAMBDA {
    body(units,
         CellTile<Scalar>{.u = u, .first = first, .count = count, .sums = sums, .bias_x = nullptr});
  };
  if (p.as_stored) {
    if (p.begin < p.end) {
      // Other tasks may be using the other rows of few_sums.
      const Rows<Scalar> sums = Rows<Scalar>{a.few_sums, a.few_ld}.from(p.begin);
      sum_as_stored(p, columns, sums);
      for_units_of<Scalar>(columns.begin, columns.end, [&](auto units, int64_t u) {
        on_sequences(p.begin, p.end - p.begin, {sums.data + u, sums.ld}, units, u);
      });
    }
  } else {
    products<Stored, kColumnVectors>(p, [&](int64_t panel, int64_t first, int64_t count,
                                            const Scalar* sums) {
      for_units<Scalar, kColumnVectors>(panel * kUnits, p.width, [&](auto units, int64_t u, int v) {
        on_sequences(first, count, {sums + v * kLanes, kUnits}, units, u);
      });
    });
  }
  if (p.end >= end) return;
  alignas(64) const Scalar zeros[kLanes] = {};
  for_units_of<Scalar>(columns.begin, columns.end, [&](auto units, int64_t u) {
    on_sequences(p.end, end - p.end, {zeros, 0}, units, u);
  });
}

// The deltas of stage s at packed row `row`: the left side of the product that goes one stage back.
template <class Stored, class Cell, int s>
FUSEDRNN_INLINE const Stored* delta_of(const BackwardArgs<Stored>& a, int64_t row) {
  constexpr Stage kStage = Cell::stage(s);
  if constexpr (kStage.projects) return a.delta_proj + (row - a.steps.first_row) * a.P;
  return a.delta + ((row - a.steps.first_row) * Cell::kGates + kStage.first_gate) * a.H;
}

// Runs the cell's derivative on a tile. The sums are the gradient of the stage's emit, as far as it
// comes from the stage that multiplied it. The values of the next units are fetched ahead in each
// row, because the hardware does not follow this many rows at once.
template <class Stored, class Cell, int s, class Units>
__attribute__((noinline)) void backward_cells(const BackwardArgs<Stored>& a, const Position& at,
                                              Units units, const CellTile<Real<Stored>>& tile) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  static constexpr Stage kStage = Cell::stage(s);
  constexpr bool kLast = s == Cell::kStages - 1;
  const int64_t H = a.H, P = a.P, d_y_ld = a.d_y_ld;
  const int64_t u = tile.u, first = tile.first, count = tile.count;
  const Scalar* sums = tile.sums.data;
  const int64_t sums_ld = tile.sums.ld;
  const int64_t delta_ld = Cell::kGates * H, saved_ld = Cell::kSaved * H;
  const int64_t alive = max64(0, at.entering - first);  // sequences from here on enter: add d_h
  // Cells with kSavesH find h_t in h_in of the next step, which backward ran just before. Only the
  // first `with_next` sequences have a row there. For the others this is their last step, and h_t
  // is in a.saved.
  const int64_t with_next = Cell::kSavesH ? max64(0, at.previous_end - first) : 0;

  const int64_t row = at.row + first, chunk_row = row - a.steps.first_row;
  const Stored* d_y = kLast && a.d_y ? a.d_y + row * d_y_ld + u : nullptr;
  Scalar* d_h = a.d_h + first * P + u;
  Scalar* d_c = Cell::kHasC ? a.d_c + first * H + u : nullptr;
  const Stored* saved_values =
      Cell::kSavesH ? a.h_in + (at.previous_row + first) * P + u : a.saved + row * saved_ld + u;
  const Stored* h_in = a.h_in + row * P + u;
  const Scalar* c_in = Cell::kHasC ? a.c_in + row * H + u : nullptr;
  Stored* delta_proj = kStage.projects ? a.delta_proj + chunk_row * P + u : nullptr;
  Stored* to_delta = a.delta + chunk_row * delta_ld + u;
  Stored* to_delta_x = a.delta_x + chunk_row * delta_ld + u;
  Stored* to_delta_params =
      Cell::kParams > 0 ? a.delta_params + chunk_row * Cell::kParams * H + u : nullptr;

  Inputs<Cell, V> inputs(a, units, u);
  for (int64_t r = 0; r < count; ++r, sums += sums_ld) {
    V d_emit = V::load(sums);
    if constexpr (kLast) {
      if (d_y) {
        d_emit += units.load(d_y);
        __builtin_prefetch(d_y + V::kLanes);
        d_y += d_y_ld;
      }
      if (Cell::kCarriesH || r >= alive) d_emit += units.load(d_h);
    }
    if constexpr (kStage.projects) {
      units.store(d_emit, delta_proj);
      delta_proj += P;
    } else {
      V saved[Cell::kSaved], delta_h[Cell::kGates], delta_x[Cell::kGates];
      V delta_params[Cell::kParams > 0 ? Cell::kParams : 1];
      Delta<V> delta = {delta_h, delta_x, delta_params};
      if (Cell::kSavesH && r == with_next) saved_values = a.saved + (first + r) * H + u;
      for (int i = 0; i < Cell::kSaved; ++i) {
        saved[i] = units.load(saved_values + i * H);
        __builtin_prefetch(saved_values + i * H + V::kLanes);
      }
      saved_values += saved_ld;
      State<V> state;
      Carry<V> carry;
      if constexpr (Cell::kReadsH) {
        state.h = units.load(h_in);
        h_in += P;
      }
      if constexpr (Cell::kHasC) {
        state.c = units.load(c_in);
        __builtin_prefetch(c_in + V::kLanes);
        carry.d_c = units.load(d_c);
        c_in += H;
      }
      if constexpr (Cell::kCarriesH) carry.d_h = kLast ? V::zero() : units.load(d_h);

      Cell::template backward<s>(d_emit, saved, inputs.of_row(a, row + r), state, carry, delta);

      if constexpr (Cell::kHasC) {
        units.store(carry.d_c, d_c);
        d_c += H;
      }
      if constexpr (Cell::kCarriesH) units.store(carry.d_h, d_h);
      for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
        units.store(delta_h[g], to_delta + g * H);
        __builtin_prefetch(to_delta + g * H + V::kLanes, 1);
        if constexpr (Cell::kSeparateDeltas) units.store(delta_x[g], to_delta_x + g * H);
      }
      for (int k = kStage.param_begin; k < kStage.param_end; ++k)
        units.store(delta_params[k], to_delta_params + k * H);
      if constexpr (Cell::kParams > 0) to_delta_params += Cell::kParams * H;
      to_delta += delta_ld;
      if constexpr (Cell::kSeparateDeltas) to_delta_x += delta_ld;
    }
    d_h += P;
  }
}

// The product that gives the gradient of the source of stage s, for the sequences [begin, end): its
// deltas, at the packed rows from `row` on, times its weight.
template <class Stored, class Cell, int s>
FUSEDRNN_INLINE StageProduct<Stored> product_of_deltas(const BackwardArgs<Stored>& a, int64_t row,
                                                       int64_t begin, int64_t end,
                                                       PanelRange range) {
  constexpr Stage kStage = Cell::stage(s);
  return {.begin = begin,
          .end = end,
          .source = {delta_of<Stored, Cell, s>(a, row), kStage.projects ? a.P : Cell::kGates * a.H},
          .K = kStage.projects ? a.P : kStage.gates * a.H,
          .panels = a.weights.panels[s],
          .as_stored = a.weights.as_stored[s],
          .width = kStage.from_hidden ? a.P : a.H,
          .range = range,
          .starts = {nullptr, 0}};
}

template <class Stored, class Cell, int s>
FUSEDRNN_INLINE void backward_stage(const BackwardArgs<Stored>& a, const Position& at,
                                    PanelRange range) {
  constexpr bool kLast = s == Cell::kStages - 1;
  // The stage that multiplied the emit of this one: stage 0 of the next step, or the next stage of
  // the same step.
  constexpr int kConsumer = kLast ? 0 : s + 1;
  const int64_t product_end = kLast ? at.entering : at.end;
  // `row` is read only for the sequences before product_end.
  const int64_t row = kLast && product_end > at.begin ? at.previous_row : at.row;
  backward_product<Stored>(
      a, product_of_deltas<Stored, Cell, kConsumer>(a, row, at.begin, product_end, range), at.end,
      [&](auto units, const CellTile<Real<Stored>>& tile) {
        backward_cells<Stored, Cell, s>(a, at, units, tile);
      });
}

// Writes d_h of the sequences that leave: the gradient of h before their first step of the chunk.
template <class Stored, class Cell>
FUSEDRNN_INLINE void backward_leave(const BackwardArgs<Stored>& a, const Position& at,
                                    PanelRange range) {
  using V = Vec<Real<Stored>>;
  backward_product<Stored>(
      a, product_of_deltas<Stored, Cell, 0>(a, at.row, at.leaving, at.end, range), at.end,
      [&](auto units, const CellTile<Real<Stored>>& tile) {
        const Rows<Real<Stored>> out = {a.d_h + tile.first * a.P + tile.u, a.P};
        for (int64_t r = 0; r < tile.count; ++r) {
          V d_h = V::load(tile.sums[r]);
          if constexpr (Cell::kCarriesH) d_h += units.load(out[r]);
          units.store(d_h, out[r]);
        }
      });
}

// Adds the gradients of y_c to those of c_t, for the sequences of a position.
template <class Stored>
__attribute__((noinline)) void add_d_c(const BackwardArgs<Stored>& a, const Position& at,
                                       PanelRange range) {
  using V = Vec<Real<Stored>>;
  const UnitRange units_range = units_of(range, kColumnVectors * V::kLanes, a.H);
  for (int64_t j = at.begin; j < at.end; ++j) {
    const Stored* d_y_c = a.d_y_c + (at.row + j) * a.d_y_ld;
    Real<Stored>* d_c = a.d_c + j * a.H;
    for_units_of<Real<Stored>>(units_range.begin, units_range.end, [&](auto units, int64_t u) {
      units.store(V(units.load(d_c + u)) + units.load(d_y_c + u), d_c + u);
    });
  }
}

// Runs stage `part.stage` of one position. The stage number kStages stands for backward_leave, and
// the one after it for add_d_c.
template <class Stored, class Cell>
void backward(const BackwardArgs<Stored>& a, const Part& part) {
  const Position at = position_at(a.steps, part.position);
  if (at.begin == at.end) return;
  if (Cell::kHasC && part.stage == Cell::kStages + 1) return add_d_c(a, at, part.panels);
  if (part.stage == Cell::kStages) return backward_leave<Stored, Cell>(a, at, in_turns(part));
  with_stage<Cell>(part.stage, [&](auto s) FUSEDRNN_INLINE_LAMBDA {
    backward_stage<Stored, Cell, s.value>(a, at, in_turns(part));
  });
}

// --- Table --------------------------------------------------------------------------------------

#define FUSEDRNN_FORWARD(kind, type) &forward<Stored, type>,
#define FUSEDRNN_BACKWARD(kind, type) &backward<Stored, type>,
template <class Stored>
constexpr DtypeKernels<Stored> dtype_kernels() {
  using Scalar = Real<Stored>;
  return {.enter = &enter<Stored>,
          .forward = {FUSEDRNN_CELLS(FUSEDRNN_FORWARD)},
          .backward = {FUSEDRNN_CELLS(FUSEDRNN_BACKWARD)},
          .units_of_gates_panel = &units_of_gates_panel<Scalar>,
          .units_of_columns_panel = &units_of_columns_panel<Scalar>,
          .pack_gates = &pack_gates<Stored>,
          .pack_columns = &pack_columns<Stored>,
          .gemm = &gemm<Stored>,
          .gemm_as_stored = &gemm_as_stored<Stored>,
          .sum_rows = &sum_rows<Stored>};
}
#undef FUSEDRNN_FORWARD
#undef FUSEDRNN_BACKWARD

}  // namespace

#ifdef FUSEDRNN_BF16_KERNELS
const DtypeKernels<Bf16> FUSEDRNN_BF16_KERNELS = dtype_kernels<Bf16>();
#else
const KernelTable FUSEDRNN_TABLE = {.isa = FUSEDRNN_ISA_NAME,
                                    .f32 = dtype_kernels<float>(),
                                    .f64 = dtype_kernels<double>(),
                                    .bf16 = nullptr};
#endif

}  // namespace fusedrnn::cpu
