// The arguments of the kernels that the bindings start themselves.
#pragma once

#include "../cuda/args.h"

namespace fusedrnn::cuda {

// Copies rows of a padded batch to packed order (pack_rows) and back (unpack_rows, which zeroes the
// rows beyond a length). States are treated as such a batch, with D steps of N rows.
struct PackArgs {
  int64_t T, N, width;        // the padded batch is [T, N, width]
  int64_t steps;              // steps of the packed order, at most T
  const int64_t* row_offset;  // [steps + 1]; null where every step has N rows
  const int64_t* order;  // [N] sequence j of packed order is sequence order[j] of the padded batch
  const void* from;
  void* to;
};

// Finds where sequences begin, for the kernels of the engine (cuda/layer.h, Beginnings).
struct BeginningsArgs {
  int64_t N, steps;           // of the packed order
  const int64_t* row_offset;  // [steps + 1]; null where every step has N rows
  // [N] as in PackArgs, if the caller's rows are a padded batch; null if they are in packed order.
  const int64_t* order;
  const uint8_t* starts;  // [T, N] or [rows] in the caller's order: not 0 where a sequence begins
  uint8_t* drops[2];      // [rows] of each direction; the second is null if there is one
  uint8_t* begins;        // [N]
};

// to = from, or to += from if accumulate is set. A result is rounded once.
template <class Stored>
struct StoreArgs {
  int64_t rows, columns;
  const Real<Stored>* from;  // [rows, columns]
  Stored* to;                // [rows, columns], row stride ld
  int64_t ld;
  bool accumulate;
};

static_assert(kIsArgument<PackArgs> && kIsArgument<BeginningsArgs> && kAreArguments<StoreArgs>);

}  // namespace fusedrnn::cuda
