// The seam between engines and everything above them: plain structs of pointers and sizes, and a
// table of functions per instruction set. Knows no torch.
//
// A batch is a list of S rows in time-major packed order: step t holds the rows
// [row_offset[t], row_offset[t + 1]) for the sequences 0 .. batch_sizes[t] - 1, which are sorted by
// length, longest first. A plain [T, N] batch is the case batch_sizes[t] = N.
#pragma once

#include <cstdint>

#include "cells/cells.h"

namespace fusedrnn {

// A chunk of a batch in one direction: some steps of some sequences.
// Position p counts steps in the order in which they are processed.
struct Steps {
  int64_t T;
  const int64_t* batch_sizes;  // [T], non-increasing
  const int64_t* row_offset;   // [T + 1]
  bool descending;             // position p is step T - 1 - p instead of p
  int64_t begin, end;          // positions
  int64_t first_row;           // packed row at which the chunk's own buffers begin
  int64_t n_begin, n_end;      // sequences
};

// A bfloat16 in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// F is the type of a product's factors and of what a cell saves: float, double or Bf16. Everything
// that is summed, and c, is of type Sum<F>.
template <class F>
struct SumOf {
  using Type = F;
};
template <>
struct SumOf<Bf16> {
  using Type = float;
};
template <class F>
using Sum = typename SumOf<F>::Type;

// Terms of a sum that one instruction multiplies and adds. Panels keep as many terms of a unit side
// by side, and I, H and P are multiples of it: where they are not, the layer computes in Sum<F>.
template <class F>
constexpr int64_t kTerms = static_cast<int64_t>(sizeof(Sum<F>) / sizeof(F));

// Terms with those that complete the last group, which are zero. (Always inline, as all here: this
// header is compiled for every instruction set.)
template <class F>
inline __attribute__((always_inline)) constexpr int64_t whole_terms(int64_t K) {
  return (K + kTerms<F> - 1) / kTerms<F> * kTerms<F>;
}

// The step at a position.
inline __attribute__((always_inline)) int64_t step_at(const Steps& s, int64_t p) {
  return s.descending ? s.T - 1 - p : p;
}

// The most sequences for which a time loop reads weights as torch stores them.
constexpr int kFewRows = 3;

// Blocks of units [begin, end). Steps walk them in turns from the first and from the last: the next
// step then begins with the weights that are still in the nearest cache.
struct Blocks {
  int64_t begin, end;
  bool from_last = false;
};

// A piece of one position's work. Pieces of one stage may run at once; every stage of every
// position must be complete, for the same sequences, before the next begins.
struct Part {
  int64_t position;
  int stage;
  Blocks blocks;
};

template <class F>
struct ForwardArgs {
  using T = Sum<F>;

  Steps steps;
  int64_t N, H, P;
  bool keep;  // keep what backward needs: h_in, c_in, saved and emit then hold every row

  // Recurrent weights of each stage, packed by pack_gates, or as torch stores them, the other null.
  const F* panels[kMaxStages];
  const F* weight[kMaxStages];  // [gates * width, K], for at most kFewRows sequences
  const T* bias[kMaxStages];    // [block][2][gates * blocks * lanes]: b_ih, then b_hh; zero padded
  const T* gates_x;             // [chunk rows, G*H]: x W, without bias

  F* h;                 // [N, P] in: before the chunk; out: after it
  T* c;                 // [N, H] the same; null without c
  F* y;                 // [S, y_ld]
  int64_t y_ld;         // D*P where both directions share y
  F* h_in;              // h_{t-1} of every row: [S, P] if keep, else two steps [2, N, P]
  T* c_in;              // c_{t-1} of every row: [S, H] if keep, else null (c is updated in place)
  F* saved;             // [S, kSaved*H] if keep; [N, kSaved*H] for cells of several stages, and for
                        // those that save h, of each sequence's last step: h_in has the others
  F* emit[kMaxStages];  // what a stage hands to the next: [S, H] if keep, else [N, H]
};

template <class F>
struct BackwardArgs {
  using T = Sum<F>;
  Steps steps;
  int64_t N, H, P;

  // Recurrent weights of each stage, packed by pack_columns, or as torch stores them, the other
  // null.
  const F* panels[kMaxStages];
  const F* weight[kMaxStages];  // [gates * width, K], for at most kFewRows sequences
  T* few_sums;                  // [kFewRows, few_ld], a row a sequence, where weight is used
  int64_t few_ld;               // at least K of every stage, whole vectors
  const F* saved;               // [S, kSaved*H] or [N, H], as forward left it
  const F* h_in;                // [S, P]
  const T* c_in;                // [S, H]
  const F* d_y;                 // [S, d_y_ld] or null
  int64_t d_y_ld;

  T* d_h;         // [N, P] in: gradient of h after the chunk; out: of h before it
  T* d_c;         // [N, H] the same
  F* delta;       // [chunk rows, G*H] gradient of h U + b_hh
  F* delta_x;     // [chunk rows, G*H] gradient of x W + b_ih where it differs
  F* delta_proj;  // [chunk rows, P] gradient of the projection's product
};

// Rows of a weight as torch stores it, [gates * width, K], to panels that interleave the gates of a
// block of units: [block][K][gates][units], zero padded; K in groups of kTerms<F>, which lie
// side by side.
template <class F>
struct PackGatesArgs {
  const F* weight;            // [gates * width, K]
  const F* bias_x = nullptr;  // [gates * width] or null
  const F* bias_h = nullptr;  // [gates * width] or null
  int64_t gates, width, K;
  int64_t block_begin = 0, block_end = 0;
  F* panels;               // or null where not wanted
  Sum<F>* bias = nullptr;  // [block][2][gates][units], or null where not wanted
};

// Columns of a matrix [K, N] to panels [block][K][units], zero padded.
template <class F>
struct PackColumnsArgs {
  const F* matrix;
  int64_t ld, K, N;
  int64_t block_begin = 0, block_end = 0;
  F* panels;
};

// Rows [m_begin, m_end) and blocks of columns of c = a b or c += a b, with b in panels of
// pack_columns (or of pack_gates with one gate, which transposes).
template <class F>
struct GemmArgs {
  const F* a;  // [M, K] with row stride a_ld, or [K, M] if a_transposed
  int64_t a_ld;
  bool a_transposed = false;
  const F* panels;
  Sum<F>* c;  // [M, N], row stride c_ld
  int64_t c_ld;
  int64_t K, N;
  int64_t m_begin = 0, m_end = 0;
  int64_t block_begin = 0, block_end = 0;
  bool accumulate = false;
  int64_t whole_K = 0;  // of the whole sum where this product is a part of it, else 0
  // Unless null, the rows are those of these sequences in these steps, counted from first_row, and
  // not [m_begin, m_end); a is not transposed.
  const Steps* steps = nullptr;
};

// Blocks of columns of c = a b^T, b as torch stores a weight.
template <class F>
struct GemmAsStoredArgs {
  const F* a;  // [M, K]
  const F* b;  // [N, K]
  Sum<F>* c;   // [M, N]
  int64_t M, N, K;
  int64_t block_begin = 0, block_end = 0;
};

template <class F>
struct DtypeKernels {
  // First enter, then for each position the stages in order; backward: the stages from last to
  // first, then the stage number `stages`, which hands gradients to sequences that leave.
  void (*enter)(const ForwardArgs<F>&);
  void (*forward[kCellCount])(const ForwardArgs<F>&, const Part&);
  void (*backward[kCellCount])(const BackwardArgs<F>&, const Part&);

  int64_t (*gates_block)(int64_t gates);  // units in a block of pack_gates
  int64_t (*columns_block)();             // units in a block of pack_columns and gemm_as_stored
  void (*pack_gates)(const PackGatesArgs<F>&);
  void (*pack_columns)(const PackColumnsArgs<F>&);
  void (*gemm)(const GemmArgs<F>&);
  void (*gemm_as_stored)(const GemmAsStoredArgs<F>&);

  // out[j] (+)= Σ_rows m[row, j] for columns [begin, end), rows in fixed blocks.
  void (*sum_rows)(const F* m, int64_t rows, int64_t ld, int64_t begin, int64_t end, Sum<F>* out,
                   bool accumulate);
};

struct KernelTable {
  const char* isa;
  DtypeKernels<float> f32;
  DtypeKernels<double> f64;
  const DtypeKernels<Bf16>* bf16;  // or null: such layers compute in float
};

extern const KernelTable kKernelsPortable;
extern const KernelTable kKernelsAvx2;
extern const KernelTable kKernelsAvx512;
extern const DtypeKernels<Bf16> kBf16KernelsAvx512;

}  // namespace fusedrnn
