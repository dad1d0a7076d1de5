// The CPU engine: one time loop for every cell, compiled once per instruction set by the
// kernels_<isa>.cpp beside this file, which define
//   FUSEDRNN_VECTOR_BYTES  width of a vector
//   FUSEDRNN_REGISTERS     vector registers of the instruction set
//   FUSEDRNN_TABLE         name of the table to define
//   FUSEDRNN_ISA_NAME      its name for people
//
// A product tile holds `rows` sequences times the gates of a block of hidden units; when its sum
// over K is complete the cell runs on it, so no gate value travels through memory. Backward is the
// mirror: the tile is d_h of a block of units, and the derivative of the step before runs on it.
#include "../kernel_api.h"
#include "simd.h"
#include "vecmath.h"

namespace fusedrnn {
namespace {

// Vectors in a tile's width. Four give a broadcast enough products to hide behind; fewer gates
// than that take several vectors of units each.
constexpr int blocks_of(int gates) { return gates >= 3 ? 1 : 4 / gates; }

// Rows of a tile: accumulators, one row of panel vectors and a temporary fill the registers.
constexpr int tile_rows(int vectors) { return (FUSEDRNN_REGISTERS - vectors - 1) / vectors; }

// Vectors in the width of a panel of pack_columns.
constexpr int kColumnBlocks = 4;

FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDRNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lanes of a vector at unit u of `width`.
template <class T>
FUSEDRNN_INLINE int lanes_at(int64_t u, int64_t width) {
  return static_cast<int>(min64(Vec<T>::kLanes, width - u));
}

template <class T>
FUSEDRNN_INLINE Vec<T> load(const T* p, int lanes) {
  return lanes == Vec<T>::kLanes ? Vec<T>::load(p) : Vec<T>::load_partial(p, lanes);
}

template <class T>
FUSEDRNN_INLINE void store(Vec<T> v, T* p, int lanes) {
  if (lanes == Vec<T>::kLanes) {
    v.store(p);
  } else {
    v.store_partial(p, lanes);
  }
}

template <class T>
FUSEDRNN_INLINE void copy(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// --- Product tile -------------------------------------------------------------------------------

// out[p][r][v] = start[p][v] + Σ_k source[r, k] panel_p[k][v], for kRows rows, kPanels panels that
// lie panel_ld apart (their starts start_ld) and kVectors vectors of each. The source is row-major,
// or [K][kRows] if kTile. Every sum runs over k in order, whatever the tile: results do not depend
// on how rows are shared out.
template <class T, int kRows, int kPanels, int kVectors, bool kTile>
void product_rows(const T* source, int64_t ld, int64_t K, const T* panel, int64_t panel_ld,
                  const T* start, int64_t start_ld, T* out) {
  using V = Vec<T>;
  V acc[kPanels][kRows][kVectors];
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V first = start ? V::load(start + p * start_ld + v * V::kLanes) : V::zero();
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[p][r][v] = first;
    }
  for (int64_t k = 0; k < K; ++k, panel += kVectors * V::kLanes) {
    V a[kRows];
    if constexpr (kPanels > 1) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        a[r] = V::broadcast(kTile ? source[k * kRows + r] : source[r * ld + k]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      V b[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) b[v] = V::load(panel + p * panel_ld + v * V::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kPanels == 1)
          a[r] = V::broadcast(kTile ? source[k * kRows + r] : source[r * ld + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[p][r][v] = fma(a[r], b[v], acc[p][r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        acc[p][r][v].store(out + ((p * kRows + r) * kVectors + v) * V::kLanes);
}

// One panel and a number of rows known only at run time, at most tile_rows(kVectors).
template <class T, int kVectors, bool kTile = false, int kRows = tile_rows(kVectors)>
FUSEDRNN_INLINE void product(int64_t rows, const T* source, int64_t ld, int64_t K, const T* panel,
                             const T* start, T* out) {
  if (rows == kRows) {
    product_rows<T, kRows, 1, kVectors, kTile>(source, ld, K, panel, 0, start, 0, out);
  } else if constexpr (kRows > 1) {
    product<T, kVectors, kTile, kRows - 1>(rows, source, ld, K, panel, start, out);
  }
}

// Panels that so few rows take at once: the sums of one panel would wait for each other.
constexpr int panels_at_once(int rows, int vectors) {
  const int fit = (FUSEDRNN_REGISTERS - 6) / (rows * vectors);
  return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

template <class T, int kVectors, int kRows, int kPanels = panels_at_once(kRows, kVectors)>
FUSEDRNN_INLINE void product_panels(int64_t panels, const T* source, int64_t ld, int64_t K,
                                    const T* panel, int64_t panel_ld, const T* start,
                                    int64_t start_ld, T* out) {
  if (panels >= kPanels) {
    product_rows<T, kRows, kPanels, kVectors, false>(source, ld, K, panel, panel_ld, start,
                                                     start_ld, out);
  } else if constexpr (kPanels > 1) {
    product_panels<T, kVectors, kRows, kPanels - 1>(panels, source, ld, K, panel, panel_ld, start,
                                                    start_ld, out);
  }
}

// Calls body(first, count) for the sequences [begin, end) in tiles of nearly equal height.
template <int kMaxRows, class Body>
FUSEDRNN_INLINE void for_tiles(int64_t begin, int64_t end, const Body& body) {
  const int64_t n = end - begin;
  if (n <= 0) return;
  const int64_t tiles = ceil_div(n, kMaxRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = begin + n * i / tiles;
    body(first, begin + n * (i + 1) / tiles - first);
  }
}

// Products of the rows [begin, end) of a source with the panels of some blocks,
// [block][K][kVectors]. Calls body(block, j, sums [kVectors * lanes]) for each row and block while
// the sums are in L1. starts: [block][kVectors * lanes], start_ld apart, or null.
template <class T, int kVectors, int kRows = 0, class Body>
FUSEDRNN_INLINE void for_products(int64_t begin, int64_t end, const T* source, int64_t ld,
                                  int64_t K, const T* panels, Blocks blocks, const T* starts,
                                  int64_t start_ld, const Body& body) {
  constexpr int kWidth = kVectors * Vec<T>::kLanes;
  const int64_t panel_ld = K * kWidth;
  if constexpr (kRows > 0) {  // exactly so many rows
    constexpr int kPanels = panels_at_once(kRows, kVectors);
    alignas(64) T tile[kPanels * kRows * kWidth];
    for (int64_t block = blocks.begin; block < blocks.end; block += kPanels) {
      const int64_t count = min64(kPanels, blocks.end - block);
      product_panels<T, kVectors, kRows>(
          count, source + begin * ld, ld, K, panels + block * panel_ld, panel_ld,
          starts ? starts + block * start_ld : nullptr, start_ld, tile);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t r = 0; r < kRows; ++r)
          body(block + p, begin + r, tile + (p * kRows + r) * kWidth);
    }
  } else {
    constexpr int kMaxRows = tile_rows(kVectors);
    alignas(64) T tile[kMaxRows * kWidth];
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      for_tiles<kMaxRows>(begin, end, [&](int64_t first, int64_t count) {
        product<T, kVectors>(count, source + first * ld, ld, K, panels + block * panel_ld,
                             starts ? starts + block * start_ld : nullptr, tile);
        for (int64_t r = 0; r < count; ++r) body(block, first + r, tile + r * kWidth);
      });
    }
  }
}

template <class T, int kVectors, class Body>
void products(int64_t begin, int64_t end, const T* source, int64_t ld, int64_t K, const T* panels,
              Blocks blocks, const T* starts, int64_t start_ld, const Body& body) {
  switch (end - begin) {
    case 1:
      return for_products<T, kVectors, 1>(begin, end, source, ld, K, panels, blocks, starts,
                                          start_ld, body);
    case 2:
      return for_products<T, kVectors, 2>(begin, end, source, ld, K, panels, blocks, starts,
                                          start_ld, body);
    case 3:
      return for_products<T, kVectors, 3>(begin, end, source, ld, K, panels, blocks, starts,
                                          start_ld, body);
    default:
      return for_products<T, kVectors>(begin, end, source, ld, K, panels, blocks, starts, start_ld,
                                       body);
  }
}

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

FUSEDRNN_INLINE int64_t step_at(const Steps& s, int64_t p) {
  return s.descending ? s.T - 1 - p : p;
}

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
      T* saved_row = rows.saved + (j * Cell::kSaved) * a.H + u;
      if constexpr (s > 0 && !kStage.projects) {
        for (int i = 0; i < kStage.saved_begin; ++i) saved[i] = load(saved_row + i * a.H, lanes);
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
          store(saved[i], saved_row + i * a.H, lanes);
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
  rows.c_in = a.keep ? a.c_in + row * a.H : a.c;
  rows.c_next = a.keep && !last ? a.c_in + next * a.H : a.c;
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

// --- Packing ------------------------------------------------------------------------------------

template <class T>
int64_t gates_block(int64_t gates) {
  return blocks_of(static_cast<int>(gates)) * Vec<T>::kLanes;
}

template <class T>
int64_t columns_block() {
  return kColumnBlocks * Vec<T>::kLanes;
}

// to[k][i] = from[i][k] for a vector's width of i, of which `inside` exist and the rest are zero:
// it reads as many streams and writes whole vectors.
template <class T>
FUSEDRNN_INLINE void transpose(const T* from, int64_t from_ld, int inside, int64_t K, T* to,
                               int64_t to_ld) {
  constexpr int kLanes = Vec<T>::kLanes;
  if (inside == kLanes) {
    for (int64_t k = 0; k < K; ++k)
      for (int i = 0; i < kLanes; ++i) to[k * to_ld + i] = from[i * from_ld + k];
  } else {
    for (int64_t k = 0; k < K; ++k)
      for (int i = 0; i < kLanes; ++i)
        to[k * to_ld + i] = i < inside ? from[i * from_ld + k] : T(0);
  }
}

template <class T>
void pack_gates(const PackGatesArgs<T>& a) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t units = gates_block<T>(a.gates);
  const int64_t columns = a.gates * units;
  for (int64_t block = a.block_begin; block < a.block_end; ++block) {
    T* panel = a.panels + block * a.K * columns;
    T* bias = a.bias ? a.bias + block * 2 * columns : nullptr;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t u = block * units + column % units;
      const int64_t row = column / units * a.width + u;
      const int inside = static_cast<int>(max64(0, min64(kLanes, a.width - u)));
      transpose(a.weight + (inside ? row * a.K : 0), a.K, inside, a.K, panel + column, columns);
      if (!bias) continue;
      for (int i = 0; i < kLanes; ++i) {
        bias[column + i] = i < inside && a.bias_x ? a.bias_x[row + i] : T(0);
        bias[columns + column + i] = i < inside && a.bias_h ? a.bias_h[row + i] : T(0);
      }
    }
  }
}

template <class T>
void pack_columns(const PackColumnsArgs<T>& a) {
  using V = Vec<T>;
  const int64_t units = columns_block<T>();
  for (int64_t block = a.block_begin; block < a.block_end; ++block) {
    const int64_t first = block * units;
    const int64_t inside = min64(units, a.N - first);
    T* panel = a.panels + block * a.K * units;
    for (int64_t k = 0; k < a.K; ++k, panel += units) {
      const T* from = a.matrix + k * a.ld + first;
      for (int64_t i = 0; i < units; i += V::kLanes) {
        const int lanes = static_cast<int>(max64(0, min64(V::kLanes, inside - i)));
        load(from + i, lanes).store(panel + i);
      }
    }
  }
}

// --- Matrix products outside the time loop ------------------------------------------------------

// Terms of a sum that run over one part of a panel, and rows that share it while it is near. A part
// is 64 KiB of float: half of the smallest L2 that comes with AVX2, an eighth of one with AVX-512.
constexpr int64_t kGemmTerms = 256;
constexpr int64_t kGemmRows = 48;

// A gradient of weights sums over all T*N rows, and the error of a sum grows with its length: so
// many terms are summed, then the sums. Sums of about √K of K terms make the least error; more than
// 32 sums in a row of tiles would cost more than a tenth of the time.
FUSEDRNN_INLINE int64_t sum_terms(int64_t K) { return K <= 64 ? 8 : K <= 256 ? 16 : 32; }

// c[r, :] (+)= tile[r][:] for a tile of columns of which `columns` exist.
template <class T>
FUSEDRNN_INLINE void store_tile(const T* tile, int64_t rows, int64_t columns, T* c, int64_t c_ld,
                                bool accumulate) {
  using V = Vec<T>;
  for (int64_t r = 0; r < rows; ++r, tile += kColumnBlocks * V::kLanes) {
    for (int64_t u = 0; u < columns; u += V::kLanes) {
      const int lanes = lanes_at<T>(u, columns);
      V sum = V::load(tile + u);
      if (accumulate) sum += load(c + r * c_ld + u, lanes);
      store(sum, c + r * c_ld + u, lanes);
    }
  }
}

// out[r][v] = Σ_k source[k][r] panel[k][v], in sums of so many terms. sums: as large as out.
template <class T, int kVectors>
FUSEDRNN_INLINE void product_in_sums(int64_t rows, const T* source, int64_t K, const T* panel,
                                     int64_t terms, T* sums, T* out) {
  using V = Vec<T>;
  constexpr int kWidth = kVectors * V::kLanes;
  for (int64_t k0 = 0; k0 < K; k0 += terms) {
    product<T, kVectors, true>(rows, source + k0 * rows, 0, min64(terms, K - k0),
                               panel + k0 * kWidth, nullptr, k0 ? sums : out);
    if (k0 == 0) continue;
    for (int64_t i = 0; i < rows * kWidth; i += V::kLanes)
      (V::load(out + i) + V::load(sums + i)).store(out + i);
  }
}

template <class T>
void gemm(const GemmArgs<T>& a) {
  constexpr int kVectors = kColumnBlocks;
  constexpr int kMaxRows = tile_rows(kVectors);
  constexpr int kUnits = kVectors * Vec<T>::kLanes;
  alignas(64) T tile[kMaxRows * kUnits];
  alignas(64) T sums[kMaxRows * kUnits];
  alignas(64) T tiles_of_a[kGemmRows * kGemmTerms + Vec<T>::kLanes];
  static_assert(kMaxRows <= Vec<T>::kLanes);
  for (int64_t m0 = a.m_begin; m0 < a.m_end; m0 += kGemmRows) {
    const int64_t m1 = min64(a.m_end, m0 + kGemmRows);
    for (int64_t k0 = 0; k0 < a.K; k0 += kGemmTerms) {
      const int64_t terms = min64(kGemmTerms, a.K - k0);
      if (a.a_transposed) {
        for_tiles<kMaxRows>(m0, m1, [&](int64_t first, int64_t count) {
          T* to = tiles_of_a + (first - m0) * terms;
          const T* from = a.a + k0 * a.a_ld + first;
          // Whole vectors are stored; the next row, the next tile or the slack takes the surplus.
          for (int64_t k = 0; k < terms; ++k, to += count, from += a.a_ld)
            Vec<T>::load_partial(from, static_cast<int>(count)).store(to);
        });
      }
      for (int64_t block = a.block_begin; block < a.block_end; ++block) {
        const int64_t u = block * kUnits;
        const T* panel = a.panels + (block * a.K + k0) * kUnits;
        for_tiles<kMaxRows>(m0, m1, [&](int64_t first, int64_t count) {
          if (a.a_transposed) {
            product_in_sums<T, kVectors>(count, tiles_of_a + (first - m0) * terms, terms, panel,
                                         sum_terms(max64(a.K, a.whole_K)), sums, tile);
          } else {
            product<T, kVectors>(count, a.a + first * a.a_ld + k0, a.a_ld, terms, panel, nullptr,
                                 tile);
          }
          store_tile(tile, count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld,
                     a.accumulate || k0 > 0);
        });
      }
    }
  }
}

// --- Sums over rows -----------------------------------------------------------------------------

// Sixteen rows are summed, then sixteen such sums, then those: short sums keep the error small.
template <class T>
void sum_rows(const T* m, int64_t rows, int64_t ld, int64_t begin, int64_t end, T* out,
              bool accumulate) {
  using V = Vec<T>;
  constexpr int64_t kFew = 16, kMany = kFew * kFew;
  for (int64_t u = begin; u < end; u += V::kLanes) {
    const int lanes = lanes_at<T>(u, end);
    V total = accumulate ? load(out + u, lanes) : V::zero();
    for (int64_t r0 = 0; r0 < rows; r0 += kMany) {
      V many = V::zero();
      for (int64_t r1 = r0; r1 < min64(rows, r0 + kMany); r1 += kFew) {
        V few = V::zero();
        for (int64_t r = r1; r < min64(rows, r1 + kFew); ++r) few += load(m + r * ld + u, lanes);
        many += few;
      }
      total += many;
    }
    store(total, out + u, lanes);
  }
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

extern const KernelTable FUSEDRNN_TABLE;
const KernelTable FUSEDRNN_TABLE = {
    .isa = FUSEDRNN_ISA_NAME, .f32 = dtype_kernels<float>(), .f64 = dtype_kernels<double>()};

}  // namespace fusedrnn
