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

// The step at a position. (Always inline: this header is compiled for every instruction set.)
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

template <class T>
struct ForwardArgs {
  Steps steps;
  int64_t N, H, P;
  bool keep;  // keep what backward needs: h_in, c_in, saved and emit then hold every row

  // Recurrent weights of each stage, packed by pack_gates, or as torch stores them, the other null.
  const T* panels[kMaxStages];
  const T* weight[kMaxStages];  // [gates * width, K], for at most kFewRows sequences
  const T* bias[kMaxStages];    // [block][2][gates * blocks * lanes]: b_ih, then b_hh; zero padded
  const T* gates_x;             // [chunk rows, G*H]: x W, without bias

  T* h;                 // [N, P] in: before the chunk; out: after it
  T* c;                 // [N, H] the same; null without c
  T* y;                 // [S, y_ld]
  int64_t y_ld;         // D*P where both directions share y
  T* h_in;              // h_{t-1} of every row: [S, P] if keep, else two steps [2, N, P]
  T* c_in;              // c_{t-1} of every row: [S, H] if keep, else null (c is updated in place)
  T* saved;             // [S, kSaved*H] if keep; [N, kSaved*H] for cells of several stages, and for
                        // those that save h, of each sequence's last step: h_in has the others
  T* emit[kMaxStages];  // what a stage hands to the next: [S, H] if keep, else [N, H]
};

template <class T>
struct BackwardArgs {
  Steps steps;
  int64_t N, H, P;

  // Recurrent weights of each stage, packed by pack_columns, or as torch stores them, the other
  // null.
  const T* panels[kMaxStages];
  const T* weight[kMaxStages];  // [gates * width, K], for at most kFewRows sequences
  T* few_sums;                  // [kFewRows, few_ld], a row a sequence, where weight is used
  int64_t few_ld;               // at least K of every stage, whole vectors
  const T* saved;               // [S, kSaved*H] or [N, H], as forward left it
  const T* h_in;                // [S, P]
  const T* c_in;                // [S, H]
  const T* d_y;                 // [S, d_y_ld] or null
  int64_t d_y_ld;

  T* d_h;         // [N, P] in: gradient of h after the chunk; out: of h before it
  T* d_c;         // [N, H] the same
  T* delta;       // [chunk rows, G*H] gradient of h U + b_hh
  T* delta_x;     // [chunk rows, G*H] gradient of x W + b_ih where it differs
  T* delta_proj;  // [chunk rows, P] gradient of the projection's product
};

// Rows of a weight as torch stores it, [gates * width, K], to panels that interleave the gates of a
// block of units: [block][K][gates][units], zero padded.
template <class T>
struct PackGatesArgs {
  const T* weight;  // [gates * width, K]
  const T* bias_x;  // [gates * width] or null
  const T* bias_h;  // [gates * width] or null
  int64_t gates, width, K;
  int64_t block_begin, block_end;
  T* panels;  // or null where not wanted
  T* bias;    // [block][2][gates][units], or null where not wanted
};

// Columns of a matrix [K, N] to panels [block][K][units], zero padded.
template <class T>
struct PackColumnsArgs {
  const T* matrix;
  int64_t ld, K, N;
  int64_t block_begin, block_end;
  T* panels;
};

// Rows [m_begin, m_end) and blocks of columns of c = a b or c += a b, with b in panels of
// pack_columns (or of pack_gates with one gate, which transposes).
template <class T>
struct GemmArgs {
  const T* a;  // [M, K] with row stride a_ld, or [K, M] if a_transposed
  int64_t a_ld;
  bool a_transposed;
  const T* panels;
  T* c;  // [M, N], row stride c_ld
  int64_t c_ld;
  int64_t K, N;
  int64_t m_begin, m_end;
  int64_t block_begin, block_end;
  bool accumulate;
  int64_t whole_K = 0;  // of the whole sum where this product is a part of it, else 0
};

// Blocks of columns of c = a b^T, b as torch stores a weight.
template <class T>
struct GemmAsStoredArgs {
  const T* a;  // [M, K]
  const T* b;  // [N, K]
  T* c;        // [M, N]
  int64_t M, N, K;
  int64_t block_begin, block_end;
};

template <class T>
struct DtypeKernels {
  // First enter, then for each position the stages in order; backward: the stages from last to
  // first, then the stage number `stages`, which hands gradients to sequences that leave.
  void (*enter)(const ForwardArgs<T>&);
  void (*forward[kCellCount])(const ForwardArgs<T>&, const Part&);
  void (*backward[kCellCount])(const BackwardArgs<T>&, const Part&);

  int64_t (*gates_block)(int64_t gates);  // units in a block of pack_gates
  int64_t (*columns_block)();             // units in a block of pack_columns and gemm_as_stored
  void (*pack_gates)(const PackGatesArgs<T>&);
  void (*pack_columns)(const PackColumnsArgs<T>&);
  void (*gemm)(const GemmArgs<T>&);
  void (*gemm_as_stored)(const GemmAsStoredArgs<T>&);

  // out[j] (+)= Σ_rows m[row, j] for columns [begin, end), rows in fixed blocks.
  void (*sum_rows)(const T* m, int64_t rows, int64_t ld, int64_t begin, int64_t end, T* out,
                   bool accumulate);
};

struct KernelTable {
  const char* isa;
  DtypeKernels<float> f32;
  DtypeKernels<double> f64;
};

extern const KernelTable kKernelsPortable;
extern const KernelTable kKernelsAvx2;
extern const KernelTable kKernelsAvx512;

}  // namespace fusedrnn
