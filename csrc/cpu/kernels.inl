// The CPU engine: one time loop for every cell, compiled once per instruction set by the
// kernels_<isa>.cpp beside this file, which define
//   FUSEDRNN_VECTOR_BYTES  width of a vector
//   FUSEDRNN_REGISTERS     vector registers of the instruction set
//   FUSEDRNN_TABLE         name of the table to define
//   FUSEDRNN_ISA_NAME      its name for people
// or, in place of these two, for an instruction set that only adds kernels for bfloat16,
//   FUSEDRNN_BF16_KERNELS  name of the kernels to define
//
// A product tile (tile.h) holds `rows` sequences times the gates of a block of hidden units; when
// its sum over K is complete the cell runs on it, so no gate value travels through memory. Backward
// is the mirror: the tile is d_h of a block of units, and the derivative of the step before runs on
// it.
#include "../kernel_api.h"
#include "few.h"
#include "gemm.h"
#include "tile.h"

namespace fusedrnn {
namespace {

// --- Positions of a sequence --------------------------------------------------------------------

// Which sequences a position runs, and which its neighbours share with it. A sequence enters where
// its state comes from the caller's buffer and leaves where it goes back there: at the ends of the
// chunk, and at its own ends in between.
struct Position {
  int64_t row;    // packed row of sequence 0
  int64_t begin;  // sequences [begin, end) are alive
  int64_t end;
  int64_t entering;  // [entering, end) enter here; those before were alive at the position before
  int64_t leaving;   // [leaving, end) leave here; those before are alive at the next position
  int64_t previous_row;  // packed row of sequence 0 at the position before
  int64_t previous_end;  // of the sequences alive there, be it in the chunk before
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

// The blocks of a part in the direction of its step.
FUSEDRNN_INLINE Blocks in_turns(const Part& part) {
  return {part.blocks.begin, part.blocks.end, part.position % 2 == 1};
}

// --- Forward ------------------------------------------------------------------------------------

// Where the states of a position lie; sequence j is at row j of each.
template <class F>
struct ForwardRows {
  using T = Sum<F>;
  F* h_in;    // [., P]
  T* c_in;    // [., H]
  F* h_next;  // of sequences that stay
  T* c_next;
  F* saved;  // [., kSaved*H] or null
  F* emit;   // [., H]
};

// The cell on one vector of units, from u on, of the sequences [first, first + count). sums: of the
// first sequence, [count, kStage.gates * kBlocks * lanes]; bias_x: [kStage.gates, kBlocks * lanes].
// Everything that the loop reads is in locals: what it stores might change anything else.
template <class F, class Cell, int s, class Units>
__attribute__((noinline)) void forward_cells(const ForwardArgs<F>& a, const Position& at,
                                             const ForwardRows<F>& rows, Units units, int64_t u,
                                             int64_t first, int64_t count, const Sum<F>* bias_x,
                                             const Sum<F>* sums) {
  using T = Sum<F>;
  using V = Vec<T>;
  static constexpr Stage kStage = Cell::stage(s);
  constexpr int kGate = blocks_of(kStage.gates) * V::kLanes;  // from gate to gate in sums
  constexpr bool kReadsC = Cell::kHasC && s == 0;
  constexpr bool kLast = s == Cell::kStages - 1;
  const int64_t H = a.H, P = a.P, y_ld = a.y_ld;
  const int64_t x_ld = Cell::kGates * H, saved_ld = Cell::kSaved * H;
  const int64_t staying = max64(0, at.leaving - first);  // those that stay come first

  const T* x = a.gates_x + (at.row + first - a.steps.first_row) * x_ld + kStage.first_gate * H + u;
  const F* h_in = rows.h_in + first * P + u;
  const T* c_in = kReadsC ? rows.c_in + first * H + u : nullptr;
  F* saved_values = rows.saved ? rows.saved + first * saved_ld + u : nullptr;
  F* y = kLast ? a.y + (at.row + first) * y_ld + u : nullptr;
  F* h_next = rows.h_next + first * P + u;
  T* c_next = kReadsC ? rows.c_next + first * H + u : nullptr;
  F* emitted = kLast ? nullptr : rows.emit + first * H + u;

  V bias[kStage.gates];
  for (int g = 0; g < kStage.gates; ++g) bias[g] = V::load(bias_x + g * kGate);

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
        __builtin_prefetch(x + g * H + V::kLanes);  // the next units'
      }
    }
    if constexpr (s > 0 && !kStage.projects) {
      for (int i = 0; i < kStage.saved_begin; ++i) saved[i] = units.load(saved_values + i * H);
    }
    State<V> state;
    if constexpr (Cell::kReadsH) state.h = units.load(h_in);
    if constexpr (kReadsC) state.c = units.load(c_in);

    const V emit = Cell::template forward<s>(gates_x, acc, state, saved);

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

template <class F, class Cell, int s>
FUSEDRNN_INLINE void forward_stage(const ForwardArgs<F>& a, const Position& at,
                                   const ForwardRows<F>& rows, Blocks blocks) {
  using T = Sum<F>;
  using V = Vec<T>;
  constexpr Stage kStage = Cell::stage(s);
  constexpr int kBlocks = blocks_of(kStage.gates);
  constexpr int kVectors = kStage.gates * kBlocks;
  constexpr int kUnits = kBlocks * V::kLanes;
  constexpr int kWidth = kVectors * V::kLanes;
  const int64_t width = kStage.projects ? a.P : a.H;
  const int64_t K = kStage.from_hidden ? a.P : a.H;
  const F* source = kStage.from_hidden ? rows.h_in : rows.emit;

  const auto cells = [&](int64_t block, int64_t first, int64_t count, const T* sums) {
    const T* bias_x = a.bias[s] + block * 2 * kWidth;
    for_units<T, kBlocks>(block * kUnits, width, [&](auto units, int64_t u, int b) {
      forward_cells<F, Cell, s>(a, at, rows, units, u, first, count, bias_x + b * V::kLanes,
                                sums + b * V::kLanes);
    });
  };
  const T* bias_h = a.bias[s] + kWidth;
  if (a.weight[s]) {
    products_as_stored<F, kStage.gates>(at.begin, at.end, source, K, K, a.weight[s], width, blocks,
                                        bias_h, 2 * kWidth, cells);
  } else {
    products<F, kVectors>(at.begin, at.end, source, K, K, a.panels[s], blocks, bias_h, 2 * kWidth,
                          cells);
  }
}

// Row of h_in at which position p begins: all rows are kept, or two steps take turns.
template <class F>
FUSEDRNN_INLINE int64_t h_row(const ForwardArgs<F>& a, int64_t p) {
  return a.keep ? a.steps.row_offset[step_at(a.steps, p)] : (p & 1) * a.N;
}

// Brings in the states of the sequences that enter in this chunk. No stage reads a.h or writes
// these rows before they enter, so it can be done ahead for all positions.
template <class F>
void enter(const ForwardArgs<F>& a) {
  for (int64_t p = a.steps.begin; p < a.steps.end; ++p) {
    const Position at = position_at(a.steps, p);
    const int64_t n = at.end - at.entering;
    copy(a.h + at.entering * a.P, a.h_in + (h_row(a, p) + at.entering) * a.P, n * a.P);
    if (a.c && a.keep)
      copy(a.c + at.entering * a.H, a.c_in + (at.row + at.entering) * a.H, n * a.H);
  }
}

// Runs stage `part.stage` of one position.
template <class F, class Cell>
void forward(const ForwardArgs<F>& a, const Part& part) {
  const Steps& steps = a.steps;
  const Position at = position_at(steps, part.position);
  if (at.begin == at.end) return;
  const bool last = part.position + 1 == steps.end;
  const int64_t row = a.keep ? at.row : 0;
  const int64_t next = last ? 0 : h_row(a, part.position + 1);
  ForwardRows<F> rows;
  rows.h_in = a.h_in + h_row(a, part.position) * a.P;
  rows.h_next = last ? a.h : a.h_in + next * a.P;
  rows.c_in = rows.c_next = a.c;
  if (a.keep && Cell::kHasC) {
    rows.c_in = a.c_in + row * a.H;
    if (!last) rows.c_next = a.c_in + next * a.H;
  }
  rows.saved = a.saved ? a.saved + (Cell::kSavesH ? 0 : row) * Cell::kSaved * a.H : nullptr;
  rows.emit = a.emit[0] ? a.emit[0] + row * a.H : nullptr;
  const Blocks blocks = in_turns(part);
  if constexpr (Cell::kStages > 1) {
    if (part.stage == 1) return forward_stage<F, Cell, 1>(a, at, rows, blocks);
  }
  forward_stage<F, Cell, 0>(a, at, rows, blocks);
}

// --- Backward -----------------------------------------------------------------------------------

// Calls body(units, u, first, count, sums, sums_ld) for every vector of units of [0, width) and
// every sequence of [begin, end), some at a time, with their sums over a stage's deltas times its
// weight; zero for the sequences from `product_end` on.
template <class F, class Body>
FUSEDRNN_INLINE void backward_product(const BackwardArgs<F>& a, int stage, const F* delta,
                                      int64_t ld, int64_t K, int64_t begin, int64_t product_end,
                                      int64_t end, int64_t width, Blocks blocks, const Body& body) {
  using T = Sum<F>;
  constexpr int kLanes = Vec<T>::kLanes;
  constexpr int kUnits = kColumnBlocks * kLanes;
  const int64_t first_unit = blocks.begin * kUnits, last_unit = min64(width, blocks.end * kUnits);
  if (a.weight[stage]) {
    if (begin < product_end) {
      T* sums = a.few_sums + begin * a.few_ld;  // of its own sequences, whoever has the others
      sum_as_stored(begin, product_end, delta, ld, K, a.weight[stage], width, first_unit, last_unit,
                    sums, a.few_ld);
      for_units_of<T>(first_unit, last_unit, [&](auto units, int64_t u) {
        body(units, u, begin, product_end - begin, sums + u, a.few_ld);
      });
    }
  } else {
    products<F, kColumnBlocks>(
        begin, product_end, delta, ld, K, a.panels[stage], blocks, static_cast<const T*>(nullptr),
        0, [&](int64_t block, int64_t first, int64_t count, const T* sums) {
          for_units<T, kColumnBlocks>(block * kUnits, width, [&](auto units, int64_t u, int b) {
            body(units, u, first, count, sums + b * kLanes, kUnits);
          });
        });
  }
  if (product_end >= end) return;
  alignas(64) const T zeros[kLanes] = {};
  for_units_of<T>(first_unit, last_unit, [&](auto units, int64_t u) {
    body(units, u, product_end, end - product_end, zeros, 0);
  });
}

// The gradient of stage s's product, as the source of the product that takes it one stage back.
template <class F, class Cell, int s>
FUSEDRNN_INLINE const F* delta_of(const BackwardArgs<F>& a, int64_t row) {
  constexpr Stage kStage = Cell::stage(s);
  if constexpr (kStage.projects) return a.delta_proj + (row - a.steps.first_row) * a.P;
  return a.delta + ((row - a.steps.first_row) * Cell::kGates + kStage.first_gate) * a.H;
}

// The cell's derivative on one vector of units, from u on, of the sequences [first, first + count).
// sums: what the consumer's deltas give to each, sums_ld apart. What the next units of the same
// rows will want is fetched ahead: the hardware does not follow so many rows at once.
template <class F, class Cell, int s, class Units>
__attribute__((noinline)) void backward_cells(const BackwardArgs<F>& a, const Position& at,
                                              Units units, int64_t u, int64_t first, int64_t count,
                                              const Sum<F>* sums, int64_t sums_ld) {
  using T = Sum<F>;
  using V = Vec<T>;
  static constexpr Stage kStage = Cell::stage(s);
  constexpr bool kLast = s == Cell::kStages - 1;
  const int64_t H = a.H, P = a.P, d_y_ld = a.d_y_ld;
  const int64_t delta_ld = Cell::kGates * H, saved_ld = Cell::kSaved * H;
  const int64_t alive = max64(0, at.entering - first);  // the others enter, with d_h of their own
  // Where saved is h: how many have it as h_in of the position before; the others' is their last.
  const int64_t with_next = Cell::kSavesH ? max64(0, at.previous_end - first) : 0;

  const int64_t row = at.row + first, chunk_row = row - a.steps.first_row;
  const F* d_y = kLast && a.d_y ? a.d_y + row * d_y_ld + u : nullptr;
  T* d_h = a.d_h + first * P + u;
  T* d_c = Cell::kHasC ? a.d_c + first * H + u : nullptr;
  const F* saved_values =
      Cell::kSavesH ? a.h_in + (at.previous_row + first) * P + u : a.saved + row * saved_ld + u;
  const F* h_in = a.h_in + row * P + u;
  const T* c_in = Cell::kHasC ? a.c_in + row * H + u : nullptr;
  F* delta_proj = kStage.projects ? a.delta_proj + chunk_row * P + u : nullptr;
  F* to_delta = a.delta + chunk_row * delta_ld + u;
  F* to_delta_x = a.delta_x + chunk_row * delta_ld + u;

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
      V saved[Cell::kSaved], delta[Cell::kGates], delta_x[Cell::kGates];
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

      Cell::template backward<s>(d_emit, saved, state, carry, delta, delta_x);

      if constexpr (Cell::kHasC) {
        units.store(carry.d_c, d_c);
        d_c += H;
      }
      if constexpr (Cell::kCarriesH) units.store(carry.d_h, d_h);
      for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
        units.store(delta[g], to_delta + g * H);
        __builtin_prefetch(to_delta + g * H + V::kLanes, 1);
        if constexpr (Cell::kSeparateDeltas) units.store(delta_x[g], to_delta_x + g * H);
      }
      to_delta += delta_ld;
      if constexpr (Cell::kSeparateDeltas) to_delta_x += delta_ld;
    }
    d_h += P;
  }
}

template <class F, class Cell, int s>
FUSEDRNN_INLINE void backward_stage(const BackwardArgs<F>& a, const Position& at, Blocks blocks) {
  constexpr Stage kStage = Cell::stage(s);
  constexpr bool kLast = s == Cell::kStages - 1;
  // Who multiplied what this stage emitted: stage 0 of the step after, or the next stage here.
  constexpr int kConsumer = kLast ? 0 : s + 1;
  constexpr Stage kConsumerStage = Cell::stage(kConsumer);
  const int64_t width = kStage.projects ? a.P : a.H;
  const int64_t K = kConsumerStage.projects ? a.P : kConsumerStage.gates * a.H;
  const int64_t ld = kConsumerStage.projects ? a.P : Cell::kGates * a.H;
  const int64_t consumer_row = kLast ? at.previous_row : at.row;
  const int64_t product_end = kLast ? at.entering : at.end;
  // Read for the sequences before product_end only.
  const F* delta_in =
      delta_of<F, Cell, kConsumer>(a, product_end > at.begin ? consumer_row : at.row);
  backward_product<F>(a, kConsumer, delta_in, ld, K, at.begin, product_end, at.end, width, blocks,
                      [&](auto units, int64_t u, int64_t first, int64_t count, const Sum<F>* sums,
                          int64_t sums_ld) {
                        backward_cells<F, Cell, s>(a, at, units, u, first, count, sums, sums_ld);
                      });
}

// Sequences that leave take the gradient of the state they came with.
template <class F, class Cell>
FUSEDRNN_INLINE void backward_leave(const BackwardArgs<F>& a, const Position& at, Blocks blocks) {
  backward_product<F>(a, 0, delta_of<F, Cell, 0>(a, at.row), Cell::kGates * a.H,
                      Cell::stage(0).gates * a.H, at.leaving, at.end, at.end, a.P, blocks,
                      [&](auto units, int64_t u, int64_t first, int64_t count, const Sum<F>* sums,
                          int64_t sums_ld) {
                        Sum<F>* out = a.d_h + first * a.P + u;
                        for (int64_t r = 0; r < count; ++r, out += a.P, sums += sums_ld) {
                          Vec<Sum<F>> d_h = Vec<Sum<F>>::load(sums);
                          if constexpr (Cell::kCarriesH) d_h += units.load(out);
                          units.store(d_h, out);
                        }
                      });
}

// Runs stage `part.stage` of one position, or what comes after its stages where that is kStages.
template <class F, class Cell>
void backward(const BackwardArgs<F>& a, const Part& part) {
  const Position at = position_at(a.steps, part.position);
  if (at.begin == at.end) return;
  const Blocks blocks = in_turns(part);
  if (part.stage == Cell::kStages) return backward_leave<F, Cell>(a, at, blocks);
  if constexpr (Cell::kStages > 1) {
    if (part.stage == 1) return backward_stage<F, Cell, 1>(a, at, blocks);
  }
  backward_stage<F, Cell, 0>(a, at, blocks);
}

// --- Table --------------------------------------------------------------------------------------

#define FUSEDRNN_FORWARD(kind, type) &forward<F, type>,
#define FUSEDRNN_BACKWARD(kind, type) &backward<F, type>,
template <class F>
constexpr DtypeKernels<F> dtype_kernels() {
  using T = Sum<F>;
  return {.enter = &enter<F>,
          .forward = {FUSEDRNN_CELLS(FUSEDRNN_FORWARD)},
          .backward = {FUSEDRNN_CELLS(FUSEDRNN_BACKWARD)},
          .gates_block = &gates_block<T>,
          .columns_block = &columns_block<T>,
          .pack_gates = &pack_gates<F>,
          .pack_columns = &pack_columns<F>,
          .gemm = &gemm<F>,
          .gemm_as_stored = &gemm_as_stored<F>,
          .sum_rows = &sum_rows<F>};
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

}  // namespace fusedrnn
