// The argument structs of the kernels, one a kernel, filled by the host. S: as stored, Real<S>: as
// computed. Rows are packed rows, see kernel_api.h; the pointers of a step begin at its first row.
#pragma once

#include "../kernel_api.h"
#include "dtype.h"

namespace fusedrnn::cuda {

constexpr int kThreads = 256;  // of a block, every kernel

// One stage of one step in one direction, after its product. State is updated in place, so that
// sequences that have ended, or not begun, keep theirs.
template <class S>
struct StepForwardArgs {
  CellKind cell;
  int stage;
  int64_t n;  // sequences of this step
  int64_t H, P;
  const Real<S>* gates_x;  // [n, G*H] x W
  const Real<S>* acc;      // [n, gates of the stage * H], or [n, P]: its product
  const S* b_ih;           // [G*H] or null
  const S* b_hh;           // [G*H] or null
  Real<S>* h;              // [N, P]
  S* h_rounded;            // [N, P] h as the next product reads it; null where S is Real<S>
  Real<S>* c;              // [N, H] or null
  S* y;                    // [n, y_ld]
  int64_t y_ld;
  S* h_in;        // [n, P] gets h_{t-1}; null if not kept
  Real<S>* c_in;  // [n, H] gets c_{t-1}; null if not kept
  S* saved;       // [n, kSaved*H]; null if not kept, but for cells of several stages
  S* emit;        // [n, H] what a stage hands to the next
};

// One stage of one step in one direction, before the product that takes its gradient back.
template <class S>
struct StepBackwardArgs {
  CellKind cell;
  int stage;
  int64_t n;
  int64_t H, P;
  const Real<S>* d_emit;  // [n, H] gradient of what a stage emitted; not for the last stage
  const S* d_y;           // [n, d_y_ld] or null
  int64_t d_y_ld;
  Real<S>* d_h;         // [N, P] in: of h_t from later steps; out: what goes to h_{t-1} elementwise
  Real<S>* d_c;         // [N, H] in: of c_t; out: of c_{t-1}
  const S* saved;       // [n, kSaved*H]
  const S* h_in;        // [n, P]
  const Real<S>* c_in;  // [n, H]
  S* delta;             // [n, G*H] gradient of h U + b_hh
  S* delta_x;           // [n, G*H] gradient of x W + b_ih, only where it differs
  S* delta_proj;        // [n, P] gradient of the projection's product
};

// to[i] = from[i], rounded.
template <class S>
struct RoundArgs {
  int64_t count;
  const Real<S>* from;  // [count]
  S* to;                // [count]
};

// out[j] = Σ_rows m[row, j], always in the same order.
template <class S>
struct SumRowsArgs {
  int64_t rows, columns;
  const S* m;  // [rows, columns]
  S* out;      // [columns]
  S* again;    // [columns] gets the same, or null
};

}  // namespace fusedrnn::cuda
