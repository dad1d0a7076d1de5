// The CPU engine: one time loop for every cell, compiled once per instruction set by the
// kernels_<isa>.cpp beside this file, which define
//   FUSEDRNN_VECTOR_BYTES  width of a vector
//   FUSEDRNN_REGISTERS     vector registers of the instruction set
//   FUSEDRNN_TABLE         name of the table to define
//   FUSEDRNN_ISA_NAME      its name for people
//
// A product tile (tile.h) holds `rows` sequences times the gates of a block of hidden units; when
// its sum over K is complete the cell runs on it, so no gate value travels through memory. Backward
// is the mirror: the tile is d_h of a block of units, and the derivative of the step before runs on
// it.
#include "../kernel_api.h"
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
};

// End of the sequences of this task that are alive at position p of the chunk, n_begin if none.
FUSEDRNN_INLINE int64_t alive_at(const Steps& s, int64_t p) {
  if (p < s.begin || p >= s.end) return s.n_begin;
  return max64(s.n_begin, min64(s.n_end, s.batch_sizes[step_at(s, p)]));
}

FUSEDRNN_INLINE Position position_at(const Steps& s, int64_t p) {
  Position at;
  at.row = s.row_offset[step_at(s, p)];
  at.begin = s.n_begin;
  at.end = alive_at(s, p);
  at.entering = min64(at.end, alive_at(s, p - 1));
  at.leaving = min64(at.end, alive_at(s, p + 1));
  at.previous_row = p > s.begin ? s.row_offset[step_at(s, p - 1)] : 0;
  return at;
}

// --- Forward ------------------------------------------------------------------------------------

// Where the states of a position lie; sequence j is at row j of each.
template <class T>
struct ForwardRows {
  T* h_in;    // [., P]
  T* c_in;    // [., H]
  T* h_next;  // of sequences that stay
  T* c_next;
  T* saved;  // [., kSaved*H] or null
  T* emit;   // [., H]
};

template <class T, class Cell, int s>
FUSEDRNN_INLINE void forward_stage(const ForwardArgs<T>& a, const Position& at,
                                   const ForwardRows<T>& rows, Blocks blocks) {
  using V = Vec<T>;
  constexpr Stage kStage = Cell::stage(s);
  constexpr bool kLast = s == Cell::kStages - 1;
  constexpr int kBlocks = blocks_of(kStage.gates);
  constexpr int kVectors = kStage.gates * kBlocks;
  constexpr int kUnits = kBlocks * V::kLanes;
  constexpr int kWidth = kVectors * V::kLanes;
  const int64_t width = kStage.projects ? a.P : a.H;
  const int64_t K = kStage.from_hidden ? a.P : a.H;
  const T* source = kStage.from_hidden ? rows.h_in : rows.emit;

  const auto cell = [&](int64_t block, int64_t j, const T* sums) {
    const T* bias_x = a.bias[s] + block * 2 * kWidth;
    const bool stays = j < at.leaving;
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t u = block * kUnits + b * V::kLanes;
      if (u >= width) break;
      const int lanes = lanes_at<T>(u, width);
      V gates_x[kStage.gates], acc[kStage.gates], saved[Cell::kSaved];
      for (int g = 0; g < kStage.gates; ++g) {
        acc[g] = V::load(sums + (g * kBlocks + b) * V::kLanes);
        if constexpr (kStage.takes_input) {
          const int64_t row = at.row + j - a.steps.first_row;
          const T* x = a.gates_x + (row * Cell::kGates + kStage.first_gate + g) * a.H + u;
          gates_x[g] = load(x, lanes) + V::load(bias_x + (g * kBlocks + b) * V::kLanes);
        }
      }
      const int64_t at_saved = j * Cell::kSaved * a.H + u;
      if constexpr (s > 0 && !kStage.projects) {
        for (int i = 0; i < kStage.saved_begin; ++i)
          saved[i] = load(rows.saved + at_saved + i * a.H, lanes);
      }
      State<V> state;
      if constexpr (Cell::kReadsH) state.h = load(rows.h_in + j * a.P + u, lanes);
      if constexpr (Cell::kHasC && s == 0) state.c = load(rows.c_in + j * a.H + u, lanes);

      const V emit = Cell::template forward<s>(gates_x, acc, state, saved);

      if constexpr (Cell::kHasC && s == 0) {
        store(state.c, (stays ? rows.c_next : a.c) + j * a.H + u, lanes);
      }
      if (rows.saved) {
        for (int i = kStage.saved_begin; i < kStage.saved_end; ++i)
          store(saved[i], rows.saved + at_saved + i * a.H, lanes);
      }
      if constexpr (kLast) {
        store(emit, a.y + (at.row + j) * a.y_ld + u, lanes);
        store(emit, (stays ? rows.h_next : a.h) + j * a.P + u, lanes);
      } else {
        store(emit, rows.emit + j * a.H + u, lanes);
      }
    }
  };
  products<T, kVectors>(at.begin, at.end, source, K, K, a.panels[s], blocks, a.bias[s] + kWidth,
                        2 * kWidth, cell);
}

// Row of h_in at which position p begins: all rows are kept, or two steps take turns.
template <class T>
FUSEDRNN_INLINE int64_t h_row(const ForwardArgs<T>& a, int64_t p) {
  return a.keep ? a.steps.row_offset[step_at(a.steps, p)] : (p & 1) * a.N;
}

// Brings in the states of the sequences that enter in this chunk. No stage reads a.h or writes
// these rows before they enter, so it can be done ahead for all positions.
template <class T>
void enter(const ForwardArgs<T>& a) {
  for (int64_t p = a.steps.begin; p < a.steps.end; ++p) {
    const Position at = position_at(a.steps, p);
    const int64_t n = at.end - at.entering;
    copy(a.h + at.entering * a.P, a.h_in + (h_row(a, p) + at.entering) * a.P, n * a.P);
    if (a.c && a.keep)
      copy(a.c + at.entering * a.H, a.c_in + (at.row + at.entering) * a.H, n * a.H);
  }
}

// Runs stage `part.stage` of one position.
template <class T, class Cell>
void forward(const ForwardArgs<T>& a, const Part& part) {
  const Steps& steps = a.steps;
  const Position at = position_at(steps, part.position);
  if (at.begin == at.end) return;
  const bool last = part.position + 1 == steps.end;
  const int64_t row = a.keep ? at.row : 0;
  const int64_t next = last ? 0 : h_row(a, part.position + 1);
  ForwardRows<T> rows;
  rows.h_in = a.h_in + h_row(a, part.position) * a.P;
  rows.h_next = last ? a.h : a.h_in + next * a.P;
  rows.c_in = rows.c_next = a.c;
  if (a.keep && Cell::kHasC) {
    rows.c_in = a.c_in + row * a.H;
    if (!last) rows.c_next = a.c_in + next * a.H;
  }
  rows.saved = a.saved ? a.saved + row * Cell::kSaved * a.H : nullptr;
  rows.emit = a.emit[0] ? a.emit[0] + row * a.H : nullptr;
  if constexpr (Cell::kStages > 1) {
    if (part.stage == 1) return forward_stage<T, Cell, 1>(a, at, rows, part.blocks);
  }
  forward_stage<T, Cell, 0>(a, at, rows, part.blocks);
}

// --- Backward -----------------------------------------------------------------------------------

// Calls each(j, u, lanes, value) with value = Σ over a stage's deltas times its weight, for every
// sequence of [at.begin, end) and unit of [0, width); zero for the sequences from `product_end` on.
template <class T, class Each>
FUSEDRNN_INLINE void backward_product(const T* delta, int64_t ld, int64_t K, const T* panels,
                                      int64_t begin, int64_t product_end, int64_t end,
                                      int64_t width, Blocks blocks, const Each& each) {
  using V = Vec<T>;
  constexpr int kUnits = kColumnBlocks * V::kLanes;
  const auto body = [&](int64_t block, int64_t j, const T* sums) {
    const int64_t u0 = block * kUnits;
    for (int64_t u = u0; u < min64(width, u0 + kUnits); u += V::kLanes)
      each(j, u, lanes_at<T>(u, width), V::load(sums + (u - u0)));
  };
  products<T, kColumnBlocks>(begin, product_end, delta, ld, K, panels, blocks,
                             static_cast<const T*>(nullptr), 0, body);
  alignas(64) static constexpr T kNoSums[kUnits] = {};
  for (int64_t j = product_end; j < end; ++j)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) body(block, j, kNoSums);
}

// The gradient of stage s's product, as the source of the product that takes it one stage back.
template <class T, class Cell, int s>
FUSEDRNN_INLINE const T* delta_of(const BackwardArgs<T>& a, int64_t row) {
  constexpr Stage kStage = Cell::stage(s);
  if constexpr (kStage.projects) return a.delta_proj + (row - a.steps.first_row) * a.P;
  return a.delta + ((row - a.steps.first_row) * Cell::kGates + kStage.first_gate) * a.H;
}

template <class T, class Cell, int s>
FUSEDRNN_INLINE void backward_stage(const BackwardArgs<T>& a, const Position& at, Blocks blocks) {
  using V = Vec<T>;
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
  const T* delta_in =
      delta_of<T, Cell, kConsumer>(a, product_end > at.begin ? consumer_row : at.row);

  const auto each = [&](int64_t j, int64_t u, int lanes, V d_emit) {
    const int64_t row = at.row + j;
    const int64_t chunk_row = row - a.steps.first_row;
    if constexpr (kLast) {
      if (a.d_y) d_emit += load(a.d_y + row * a.d_y_ld + u, lanes);
      if (Cell::kCarriesH || j >= at.entering) d_emit += load(a.d_h + j * a.P + u, lanes);
    }
    if constexpr (kStage.projects) {
      store(d_emit, a.delta_proj + chunk_row * a.P + u, lanes);
    } else {
      V saved[Cell::kSaved], delta[Cell::kGates], delta_x[Cell::kGates];
      for (int i = 0; i < Cell::kSaved; ++i)
        saved[i] = load(a.saved + (row * Cell::kSaved + i) * a.H + u, lanes);
      State<V> state;
      Carry<V> carry;
      if constexpr (Cell::kReadsH) state.h = load(a.h_in + row * a.P + u, lanes);
      if constexpr (Cell::kHasC) {
        state.c = load(a.c_in + row * a.H + u, lanes);
        carry.d_c = load(a.d_c + j * a.H + u, lanes);
      }
      if constexpr (Cell::kCarriesH) {
        carry.d_h = kLast ? V::zero() : load(a.d_h + j * a.P + u, lanes);
      }

      Cell::template backward<s>(d_emit, saved, state, carry, delta, delta_x);

      if constexpr (Cell::kHasC) store(carry.d_c, a.d_c + j * a.H + u, lanes);
      if constexpr (Cell::kCarriesH) store(carry.d_h, a.d_h + j * a.P + u, lanes);
      for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
        const int64_t at_gate = (chunk_row * Cell::kGates + g) * a.H + u;
        store(delta[g], a.delta + at_gate, lanes);
        if constexpr (Cell::kSeparateDeltas) store(delta_x[g], a.delta_x + at_gate, lanes);
      }
    }
  };
  backward_product<T>(delta_in, ld, K, a.panels[kConsumer], at.begin, product_end, at.end, width,
                      blocks, each);
}

// Sequences that leave take the gradient of the state they came with.
template <class T, class Cell>
FUSEDRNN_INLINE void backward_leave(const BackwardArgs<T>& a, const Position& at, Blocks blocks) {
  backward_product<T>(delta_of<T, Cell, 0>(a, at.row), Cell::kGates * a.H,
                      Cell::stage(0).gates * a.H, a.panels[0], at.leaving, at.end, at.end, a.P,
                      blocks, [&](int64_t j, int64_t u, int lanes, Vec<T> d_h) {
                        T* out = a.d_h + j * a.P + u;
                        if constexpr (Cell::kCarriesH) d_h += load(out, lanes);
                        store(d_h, out, lanes);
                      });
}

// Runs stage `part.stage` of one position, or what comes after its stages where that is kStages.
template <class T, class Cell>
void backward(const BackwardArgs<T>& a, const Part& part) {
  const Position at = position_at(a.steps, part.position);
  if (at.begin == at.end) return;
  if (part.stage == Cell::kStages) return backward_leave<T, Cell>(a, at, part.blocks);
  if constexpr (Cell::kStages > 1) {
    if (part.stage == 1) return backward_stage<T, Cell, 1>(a, at, part.blocks);
  }
  backward_stage<T, Cell, 0>(a, at, part.blocks);
}

// --- Table --------------------------------------------------------------------------------------

#define FUSEDRNN_FORWARD(kind, type) &forward<T, type>,
#define FUSEDRNN_BACKWARD(kind, type) &backward<T, type>,
template <class T>
constexpr DtypeKernels<T> dtype_kernels() {
  return {.enter = &enter<T>,
          .forward = {FUSEDRNN_CELLS(FUSEDRNN_FORWARD)},
          .backward = {FUSEDRNN_CELLS(FUSEDRNN_BACKWARD)},
          .gates_block = &gates_block<T>,
          .columns_block = &columns_block<T>,
          .pack_gates = &pack_gates<T>,
          .pack_columns = &pack_columns<T>,
          .gemm = &gemm<T>,
          .sum_rows = &sum_rows<T>};
}
#undef FUSEDRNN_FORWARD
#undef FUSEDRNN_BACKWARD

}  // namespace

const KernelTable FUSEDRNN_TABLE = {
    .isa = FUSEDRNN_ISA_NAME, .f32 = dtype_kernels<float>(), .f64 = dtype_kernels<double>()};

}  // namespace fusedrnn
