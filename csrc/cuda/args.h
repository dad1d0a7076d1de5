// The argument structs of the kernels, one a kernel, filled by the host. Stored: as stored,
// Real<Stored>: as computed. Rows are packed rows, see layer/sequences.h; the pointers of a step
// begin at its first row.
#pragma once

#include <type_traits>

#include "../cells/cells.h"
#include "../layer/dtype.h"

namespace fusedrnn::cuda {

constexpr int kThreads = 256;  // threads of a block, in every kernel

// Whether a struct may be a kernel's argument: copied as bytes, and at most 4 KiB of them, which
// every GPU and driver takes.
template <class Args>
constexpr bool kIsArgument = std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096;
template <template <class> class Args>
constexpr bool kAreArguments = kIsArgument<Args<float>> && kIsArgument<Args<double>> &&
                               kIsArgument<Args<Half>> && kIsArgument<Args<Bf16>>;

// One stage of one step in one direction, after its product. State is updated in place, so that
// sequences that have ended, or not begun, keep theirs.
template <class Stored>
struct StepForwardArgs {
  CellKind cell;
  int stage;
  int64_t n;  // sequences of this step
  int64_t H, P;
  const Real<Stored>* gates_x;    // [n, G*H] x W
  const Real<Stored>* acc;        // [n, gates of the stage * H], or [n, P]: its product
  const Stored* b_ih;             // [G*H] or null
  const Stored* b_hh;             // [G*H] or null
  const Stored* params;           // [K*H] parameters of each unit, of cells that have them
  const Real<Stored>* row_input;  // [n] a value of each row, of cells that take one
  Real<Stored>* h;                // [N, P]
  Stored* h_rounded;  // [N, P] h as the next product reads it; null where Stored is Real<Stored>
  Real<Stored>* c;    // [N, H] or null
  Stored* y;          // [n, y_ld]
  int64_t y_ld;
  Stored* h_in;        // [n, P] gets h_{t-1}; null if not kept
  Real<Stored>* c_in;  // [n, H] gets c_{t-1}; null if not kept
  Stored* saved;  // [n, kSaved*H]; null if not kept, but for cells of several stages. Of cells that
                  // save h [N, H]: of each sequence's last step, h_in has the others
  Stored* emit;   // [n, H] what a stage hands to the next
};

// One stage of one step in one direction, before the product that takes its gradient back.
template <class Stored>
struct StepBackwardArgs {
  CellKind cell;
  int stage;
  int64_t n;
  int64_t H, P;
  const Real<Stored>* d_emit;  // [n, H] gradient of what a stage emitted; not for the last stage
  const Stored* d_y;           // [n, d_y_ld] or null
  int64_t d_y_ld;
  Real<Stored>* d_h;    // [N, P] in: of h_t from later steps; out: what goes to h_{t-1} elementwise
  Real<Stored>* d_c;    // [N, H] in: of c_t; out: of c_{t-1}
  const Stored* saved;  // [n, kSaved*H] or [N, H], as forward left it
  const Stored* h_in;   // [n, P]
  int64_t n_next;       // sequences of the step that forward took next; 0 after the last one
  const Stored* h_next;           // [n_next, P] h_in of that step, only of cells that save h
  const Real<Stored>* c_in;       // [n, H]
  Stored* delta;                  // [n, G*H] gradient of h U + b_hh
  Stored* delta_x;                // [n, G*H] gradient of x W + b_ih, only where it differs
  Stored* delta_proj;             // [n, P] gradient of the projection's product
  const Stored* params;           // as in StepForwardArgs
  const Real<Stored>* row_input;  // as in StepForwardArgs
  Stored* delta_params;           // [n, K*H] each row's part of the gradient of the parameters
};

// to[i] = from[i], rounded.
template <class Stored>
struct RoundArgs {
  int64_t count;
  const Real<Stored>* from;  // [count]
  Stored* to;                // [count]
};

// out[j] = Σ_rows m[row, j], always in the same order.
template <class Stored>
struct SumRowsArgs {
  int64_t rows, columns;
  const Stored* m;  // [rows, columns]
  Stored* out;      // [columns]
  Stored* again;    // [columns] gets the same, or null
};

// --- The resident regime ------------------------------------------------------------------------

// A thread keeps the states of this many (sequence, unit) pairs in registers.
constexpr int kPairs = 2;
// Sequences whose products are summed at once.
constexpr int kFmaRows = 8;
constexpr int kMmaRows = 16;
// Row tiles of 16 that a warp sums at once, and so the most that a stage may have.
constexpr int kMmaTiles = 4;
// How much of its stage-0 weights each thread keeps in registers, counted in iterations of its
// summation loop. The rest is in shared memory. That is 64 registers, also for 16-bit types,
// because the compiler converts them to float once, before the loop.
constexpr int kFmaHeld = 16;  // vectors of 4 values
constexpr int kMmaHeld = 2;   // groups of 64 bytes by kMmaTiles row tiles

// A block's product of one stage: R rows of weights times the source, both K long.
struct ResidentTile {
  int R;        // forward: gates of the stage * units; backward: units
  int ld;       // stride of the partial sums of one slice and sequence: R, padded
  int slices;   // parts of K that are summed by themselves
  int steps;    // iterations of a slice's sum
  int K_pad;    // values of a source row in the exchange, zero from K on
  int weights;  // byte offset in shared memory
};

// How a layer is cut into blocks: the grid is [unit_blocks, row_blocks, D].
struct ResidentShape {
  int units;     // units of a block; the last block may have fewer
  int rows;      // sequences of a block, the same
  int rows_pad;  // rows of a block in the exchange
  ResidentTile tile[kMaxStages];
  int partials;  // byte offsets in shared memory: [slices][rows_pad][ld] of the widest stage,
  int staged;    // [kFmaRows][K_pad] of the widest stage, and
  int bias;      // [2][G][units] b_ih, then b_hh; forward only
  int params;    // [K][units] parameters of each unit
  int shared_bytes;
};

// One launch for all positions [begin, end) of all directions.
template <class Stored>
struct ResidentForwardArgs {
  CellKind cell;
  ResidentShape shape;
  int64_t T, N, H, D;
  int64_t begin, end;
  const int64_t* row_offset;       // [T + 1]; null where every step has N rows
  int64_t first_row[2];            // packed row at which gates_x begins
  const Stored* w_hh[2];           // [G*H, H]
  const Stored* b_ih[2];           // [G*H] or null
  const Stored* b_hh[2];           // [G*H] or null
  const Stored* params[2];         // [K*H] parameters of each unit, of cells that have them
  const Real<Stored>* row_input;   // [rows] a value of each row, of cells that take one
  const Real<Stored>* gates_x[2];  // [chunk rows, G*H] x W
  Real<Stored>* h;                 // [D, N, H] in and out
  Real<Stored>* c;                 // [D, N, H] in and out; null without c
  Stored* y;                       // [rows, D*H]
  Stored* saved[2];              // [rows, kSaved*H] or [N, H]; with the next three null if not kept
  Stored* h_in[2];               // [rows, H]
  Real<Stored>* c_in[2];         // [rows, H]
  Stored* emit[2];               // [rows, H]
  Stored* exchange[kMaxStages];  // sources of the stages: [2, D, row_blocks * rows_pad, K_pad]
  unsigned* arrivals;            // [D * row_blocks * kArrivalStride], zero
  unsigned spin_limit;           // looks at a counter while waiting, then the kernel gives up
};

// The same backwards, over all positions.
template <class Stored>
struct ResidentBackwardArgs {
  CellKind cell;
  ResidentShape shape;
  int64_t T, N, H, D;
  const int64_t* row_offset;      // [T + 1] or null
  const Stored* w_hh[2];          // [G*H, H]
  const Stored* params[2];        // as in ResidentForwardArgs
  const Real<Stored>* row_input;  // as in ResidentForwardArgs
  const Stored* saved[2];         // [rows, kSaved*H] or [N, H]
  const Stored* h_in[2];          // [rows, H]
  const Real<Stored>* c_in[2];    // [rows, H]
  const Stored* d_y;              // [rows, D*H] or null
  Real<Stored>* d_h;              // [D, N, H] in and out
  Real<Stored>* d_c;              // [D, N, H] in and out; null without c
  Stored* delta[2];               // [rows, G*H] gradient of h U + b_hh
  Stored* delta_x[2];             // [rows, G*H] gradient of x W + b_ih, only where it differs
  Stored* delta_params[2];        // [rows, K*H] each row's part of the gradient of the parameters
  Stored* exchange[kMaxStages];   // deltas of the stages: [2, D, row_blocks * rows_pad, K_pad]
  unsigned* arrivals;             // [D * row_blocks * kArrivalStride], zero
  unsigned spin_limit;            // looks at a counter while waiting, then the kernel gives up
};

// Counters of arrivals lie in cache lines of their own.
constexpr int kArrivalStride = 32;

// Writes a few numbers of the host to device memory. They travel with the launch, so that a CUDA
// graph keeps them and no copy has to wait for the host.
constexpr int kNumbersPerLaunch = 480;  // arguments of a kernel are limited to 4 KiB
struct NumbersArgs {
  int count;
  int64_t* to;  // [count]
  int64_t values[kNumbersPerLaunch];
};

static_assert(kAreArguments<StepForwardArgs> && kAreArguments<StepBackwardArgs>);
static_assert(kAreArguments<RoundArgs> && kAreArguments<SumRowsArgs> && kIsArgument<NumbersArgs>);
static_assert(kAreArguments<ResidentForwardArgs> && kAreArguments<ResidentBackwardArgs>);

}  // namespace fusedrnn::cuda
