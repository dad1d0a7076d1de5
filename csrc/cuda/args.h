// The argument structs of the kernels, which the host fills. Stored is the stored type and
// Real<Stored> the compute type. Rows are packed rows (layer/sequences.h). In the structs for one
// step, pointers to rows point to the first row of that step.
#pragma once

#include <type_traits>

#include "../cells/cells.h"
#include "../layer/dtype.h"

namespace fusedrnn::cuda {

constexpr int kThreads = 256;  // threads of a block, in every kernel

// Whether a struct may be a kernel's argument: it is copied as bytes, and it has at most 4 KiB,
// which every GPU and driver accepts.
template <class Args>
constexpr bool kIsArgument = std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096;
template <template <class> class Args>
constexpr bool kAreArguments = kIsArgument<Args<float>> && kIsArgument<Args<double>> &&
                               kIsArgument<Args<Half>> && kIsArgument<Args<Bf16>>;

// The rows of one step in one direction.
struct StepRows {
  int64_t row;  // packed row of the first sequence
  int64_t n;    // how many sequences are alive
  // Backward only: the same of the step that follows in forward. n_next is 0 if none does.
  int64_t next_row, n_next;
};

// What the elementwise work of one direction reads and writes in forward. h and c are updated in
// place, so a sequence that is not alive at a step keeps its state.
template <class Stored>
struct ForwardWork {
  int64_t H, P;
  const Real<Stored>* gates_x;  // [.., G*H] x W, from packed row first_row on
  int64_t first_row;
  const Stored* b_ih;             // [G*H] or null
  const Stored* b_hh;             // [G*H] or null
  const Stored* params;           // [kParams*H] parameters of each unit, in cells that have them
  const Real<Stored>* row_input;  // [rows] one value for each row, in cells that take it
  Real<Stored>* h;                // [N, P]
  Stored* h_rounded;              // [N, P] receives h rounded for the next product, or null
  Real<Stored>* c;                // [N, H] or null
  // [rows] or null: whether the state of a sequence after this row's step is dropped, because
  // another sequence begins behind it in the order in which the direction runs. Then h and c of the
  // next position are zero, and in backward no gradient comes from there.
  const uint8_t* drops;
  Stored* y;    // [rows, y_ld] receives h_t
  Stored* y_c;  // [rows, y_ld] receives c_t, or null
  int64_t y_ld;
  Stored* h_in;        // [rows, P] receives h_{t-1}; null if it is not kept
  Real<Stored>* c_in;  // [rows, H] receives c_{t-1}; null if it is not kept
  // There are three cases:
  // - Forward keeps values for backward: [rows, kSaved*H]. In cells that save h, if there are no
  //   `drops`, it is [N, H] and receives h of the last position of each sequence. h of every other
  //   position is h_in of the next one.
  // - Nothing is kept, and the cell has several stages: [N, kSaved*H], scratch between the stages.
  // - Nothing is kept, and the cell has one stage: null.
  Stored* saved;
  Stored* emit;  // [rows, H] or, if nothing is kept, [N, H]: the emit of a stage before the last
  bool keeps;    // whether forward keeps values for backward
};

// What the elementwise work of one direction reads and writes in backward.
template <class Stored>
struct BackwardWork {
  int64_t H, P;
  const uint8_t* drops;  // as in ForwardWork
  const Stored* d_y;     // [rows, d_y_ld] gradient of h_t, or null
  const Stored* d_y_c;   // [rows, d_y_ld] gradient of c_t that comes from y, or null
  int64_t d_y_ld;
  // [N, P] in: gradient of h_t from later steps; out: the elementwise part of that of h_{t-1}
  Real<Stored>* d_h;
  Real<Stored>* d_c;  // [N, H] in: gradient of c_t; out: gradient of c_{t-1}
  // As forward wrote it: [rows, kSaved*H], or [N, H] if the cell saves h and there are no `drops`.
  const Stored* saved;
  const Stored* h_in;        // [rows, P]
  const Real<Stored>* c_in;  // [rows, H]
  Stored* delta;             // [rows, G*H] gradient of h U + b_hh
  Stored* delta_x;           // [rows, G*H] gradient of x W + b_ih, written if it differs from delta
  Stored* delta_proj;        // [rows, P] gradient of the projection's product
  const Stored* params;      // as in ForwardWork
  const Real<Stored>* row_input;  // as in ForwardWork
  Stored* delta_params;           // [rows, kParams*H] each row's part of the gradient of params
};

// The elementwise work of one stage of one step, after the stage's product.
template <class Stored>
struct StepForwardArgs {
  CellKind cell;
  int stage;
  StepRows rows;
  const Real<Stored>* acc;  // [n, gates of the stage * H], or [n, P]: the product
  ForwardWork<Stored> work;
};

// The elementwise work of one stage of one step, before the product that takes the stage's deltas
// back to the stage's source.
template <class Stored>
struct StepBackwardArgs {
  CellKind cell;
  int stage;
  StepRows rows;
  const Real<Stored>* d_emit;  // [n, H] gradient of the stage's emit; unused in the last stage
  BackwardWork<Stored> work;
};

// Zeroes the states, or their gradients, of the sequences that begin anew at their first step. They
// are of the first direction, because in the reverse direction a sequence ends at that step.
struct DropStatesArgs {
  int64_t n;              // how many sequences have a first step
  const uint8_t* begins;  // [n]
  uint32_t* h;            // [n, h_words] states as words of 4 bytes
  int64_t h_words;
  uint32_t* c;  // [n, c_words], or null in cells without c
  int64_t c_words;
};

// to[i] = from[i], rounded.
template <class Stored>
struct RoundArgs {
  int64_t count;
  const Real<Stored>* from;  // [count]
  Stored* to;                // [count]
};

// Sums over rows, in one launch for a whole pass: out[j] = Σ_rows m[row, j] for each matrix of
// `sums`. Rows are cut into ranges. A block sums kSumColumns columns over a range, and the last of
// the blocks that have finished the same columns adds the sums of their ranges, in the order of the
// rows. So the order of a sum depends only on the number of rows.
constexpr int kMostSums = 6;    // for each direction those for b_hh, b_ih and w_ch
constexpr int kSumBytes = 512;  // a warp reads this much of a row, in vectors of 16 bytes
template <class Stored>
constexpr int kSumColumns = kSumBytes / int(sizeof(Stored));

// The rows of a range. A warp sums every eighth row of it, so at most 64. There are about 32 ranges
// unless that would make them too short or too long: enough blocks to fill a GPU even where there
// are few columns, and few sums of ranges to add.
constexpr int64_t rows_of_range(int64_t rows) {
  const int64_t even = (rows + 255) / 256 * 8;
  return even < 64 ? 64 : even > 512 ? 512 : even;
}

template <class Stored>
struct RowSum {
  int64_t columns;
  const Stored* m;  // [rows, columns]
  Stored* out;      // [columns]
  Stored* again;    // [columns] receives a copy of out, or null
};

// The grid is [ranges * column_blocks, sums], where column_blocks is that of the widest sum.
template <class Stored>
struct SumRowsArgs {
  int64_t rows;
  int ranges, column_blocks;
  RowSum<Stored> sum[kMostSums];
  // The next two are unused if there is one range.
  Real<Stored>* partial;  // [sums, ranges, column_blocks * kSumColumns] the sum of each range
  unsigned* finished;     // [sums, column_blocks] zero, and zero again after the launch
};

// From here to kArrivalStride, everything belongs to the resident and the streamed regime.

// A thread owns this many pairs (sequence, unit) at once. In the resident regime it keeps their
// states in registers.
constexpr int kPairs = 2;
// How many sequences are multiplied at once, on the ordinary cores and on the tensor cores.
constexpr int kFmaRows = 8;
constexpr int kMmaRows = 16;
// A warp sums this many row tiles, of 16 weight rows each, at once. A block's product of a stage
// may have no more of them.
constexpr int kMmaTiles = 4;
// How much of its stage-0 weights each thread keeps in registers, counted in iterations of its
// summation loop. The rest is in shared memory. kFmaHeld vectors of 4 floats take 64 registers, and
// so they do for 16-bit types, because the compiler converts their values to float once, before the
// time loop. kMmaHeld groups take 64 registers too: 8 for each row tile of a group. Of float64,
// kFmaHeldDouble vectors take 32.
constexpr int kFmaHeld = 16;  // an iteration is a vector of 4 values
constexpr int kFmaHeldDouble = 4;
constexpr int kMmaHeld = 2;          // an iteration is a group of 64 bytes, in kMmaTiles row tiles
constexpr int kMmaHeldStreamed = 1;  // the same in the streamed regime
// How many bytes of a stage's streamed weights are on their way for each thread.
constexpr int kRingBytes = 128;

// A block's product of one stage: R weight rows times the rows of the source. A row has K values.
struct ProductTile {
  int R;         // weight rows; forward: gates of the stage * units; backward: units; in a
                 // cluster those of all its blocks, one block after the other
  int ld;        // distance between the partial sums of two sequences in a slice: at least R
  int slices;    // K is cut into this many slices
  int steps;     // iterations of the loop that sums a slice
  int on_chip;   // of these, iterations whose weights stay in registers or shared memory
  int K;         // values of a row of the source
  int K_pad;     // values of a row in the exchange; those from K on are zero
  int K_part;    // values of a row that this block multiplies: K_pad / cluster
  int weights;   // byte offset in shared memory of the weights that stay there
  int ring;      // byte offset in shared memory of the ring of the streamed weights
  int streamed;  // byte offset of the streamed weights in those of the block
};

// How a layer is cut into blocks: the grid is [unit blocks, row_blocks, D].
struct BlockShape {
  int units;         // units of a block; the last blocks may have fewer or none
  int proj_units;    // the same of a projection's outputs; equal to units in other cells
  int rows;          // sequences of a block; the last block may have fewer
  int rows_pad;      // rows of a block in the exchange
  int group;         // sequences whose elementwise work is done at once; all, if resident
  int partial_rows;  // rows of a slice of partial sums
  int cluster;       // blocks of a cluster (cluster.cuh), 1 where there are none
  ProductTile tile[kMaxStages];
  int streamed_bytes;  // bytes of a block's streamed weights
  // Byte offsets in shared memory. The stages share `partials` and `staged`, each of which is as
  // large as the stage that needs most.
  int partials;  // [slices][partial_rows][ld] partial sums
  int staged;    // [at most kFmaRows][K_part] the source in the compute type; FMA only
  int received;  // [cluster][partial_rows][R / cluster] sums of all blocks; in clusters only
  int bias;      // [2][G][units] b_ih, then b_hh; resident forward only
  int params;    // [kParams][units] parameters of each unit; resident only
  int shared_bytes;
};

// One launch of forward, which runs the positions [begin, end) of all directions.
template <class Stored>
struct ResidentForwardArgs {
  CellKind cell;
  BlockShape shape;
  int64_t T, N, H, D;
  int64_t begin, end;
  const int64_t* row_offset;       // [T + 1]; null where every step has N rows
  int64_t first_row[2];            // the packed row at which gates_x begins
  const Stored* w_hh[2];           // [G*H, H]
  const Stored* b_ih[2];           // [G*H] or null
  const Stored* b_hh[2];           // [G*H] or null
  const Stored* params[2];         // [kParams*H] parameters of each unit, in cells that have them
  const Real<Stored>* row_input;   // [rows] one value for each row, in cells that take it
  const Real<Stored>* gates_x[2];  // [chunk rows, G*H] x W
  Real<Stored>* h;                 // [D, N, H] in and out
  Real<Stored>* c;                 // [D, N, H] in and out; null in cells without c
  const uint8_t* drops[2];         // [rows] or null, as in ForwardWork
  Stored* y;                       // [rows, y_ld] receives h_t of all directions, D*H values
  Stored* y_c;                     // [rows, y_ld] receives c_t of all directions, or null
  int64_t y_ld;
  // The next four are null if forward keeps nothing.
  Stored* saved[2];              // as in ForwardWork
  Stored* h_in[2];               // [rows, H]
  Real<Stored>* c_in[2];         // [rows, H]
  Stored* emit[2];               // [rows, H]
  Stored* exchange[kMaxStages];  // source of each stage: [2, D, row_blocks * rows_pad, K_pad]
  bool words;                    // whether the exchange has words instead (words.cuh)
  bool as_one;                   // whether a cluster arrives at the barrier as one
  unsigned* arrivals;            // [D * row_blocks * kArrivalStride], zero
  unsigned spin_limit;           // how often a waiting block looks before the kernel gives up
};

// One launch of backward, which runs all positions of all directions.
template <class Stored>
struct ResidentBackwardArgs {
  CellKind cell;
  BlockShape shape;
  int64_t T, N, H, D;
  const int64_t* row_offset;      // [T + 1] or null
  const Stored* w_hh[2];          // [G*H, H]
  const Stored* params[2];        // as in ResidentForwardArgs
  const Real<Stored>* row_input;  // as in ResidentForwardArgs
  const Stored* saved[2];         // as in BackwardWork
  const Stored* h_in[2];          // [rows, H]
  const Real<Stored>* c_in[2];    // [rows, H]
  const uint8_t* drops[2];        // [rows] or null, as in ForwardWork
  const Stored* d_y;              // [rows, d_y_ld] gradient of h_t of all directions, or null
  const Stored* d_y_c;            // [rows, d_y_ld] gradient of c_t that comes from y, or null
  int64_t d_y_ld;
  Real<Stored>* d_h;             // [D, N, H] in and out
  Real<Stored>* d_c;             // [D, N, H] in and out; null in cells without c
  Stored* delta[2];              // [rows, G*H] gradient of h U + b_hh
  Stored* delta_x[2];            // [rows, G*H] gradient of x W + b_ih, written if it differs
  Stored* delta_params[2];       // [rows, kParams*H] each row's part of the gradient of params
  Stored* exchange[kMaxStages];  // deltas of each stage: [2, D, row_blocks * rows_pad, K_pad]
  bool words;                    // as in ResidentForwardArgs
  bool as_one;                   // as in ResidentForwardArgs
  unsigned* arrivals;            // [D * row_blocks * kArrivalStride], zero
  unsigned spin_limit;           // as in ResidentForwardArgs
};

// One launch of the streamed regime in either way, which runs the positions [begin, end) of all
// directions. Work is ForwardWork or BackwardWork.
template <class Stored, class Work>
struct StreamedArgs {
  CellKind cell;
  BlockShape shape;
  int64_t T, N, H, P, D;
  int64_t begin, end;
  const int64_t* row_offset;  // [T + 1] or null
  const Stored* w_hh[2];      // [G*H, P]
  const Stored* w_hr[2];      // [P, H] in cells that project
  Work work[2];
  Stored* exchange[kMaxStages];  // source of each stage, as in the resident regime
  char* streamed;                // [blocks, streamed_bytes] scratch for the streamed weights
  unsigned* arrivals;            // [D * row_blocks * kArrivalStride], zero
  unsigned spin_limit;           // as in ResidentForwardArgs
};
template <class Stored>
using StreamedForwardArgs = StreamedArgs<Stored, ForwardWork<Stored>>;
template <class Stored>
using StreamedBackwardArgs = StreamedArgs<Stored, BackwardWork<Stored>>;

// The distance between two counters of arrivals: each has a cache line of 128 bytes to itself.
constexpr int kArrivalStride = 32;

// A kernel that writes numbers of the host to device memory. The numbers travel with the launch, so
// a CUDA graph keeps them and no copy has to wait for the host.
constexpr int kNumbersPerLaunch = 480;  // fewer than 512, the 4 KiB that an argument may have
struct NumbersArgs {
  int count;
  int64_t* to;  // [count]
  int64_t values[kNumbersPerLaunch];
};

static_assert(kAreArguments<StepForwardArgs> && kAreArguments<StepBackwardArgs>);
static_assert(kAreArguments<RoundArgs> && kAreArguments<SumRowsArgs> && kIsArgument<NumbersArgs>);
static_assert(kIsArgument<DropStatesArgs>);
static_assert(kAreArguments<ResidentForwardArgs> && kAreArguments<ResidentBackwardArgs>);
static_assert(kAreArguments<StreamedForwardArgs> && kAreArguments<StreamedBackwardArgs>);

}  // namespace fusedrnn::cuda
