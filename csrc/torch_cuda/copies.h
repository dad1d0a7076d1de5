// The arguments of the kernels that the bindings start themselves.
#pragma once

#include "../cuda/args.h"

namespace fusedrnn::cuda {

// Rows of a padded batch to packed order (pack_rows) and back (unpack_rows, which zeroes the rows
// beyond a length). States are such a batch too: D steps of N rows.
struct PackArgs {
  int64_t T, N, width;        // of the padded batch, [T, N, width]
  int64_t steps;              // of the packed order, at most T
  const int64_t* row_offset;  // [steps + 1]; null where every step has N rows
  const int64_t* order;       // [N] packed j is padded order[j]
  const void* from;
  void* to;
};

// to = from or, where it accumulates, to += from; rounded once.
template <class Stored>
struct StoreArgs {
  int64_t rows, columns;
  const Real<Stored>* from;  // [rows, columns]
  Stored* to;                // [rows, columns], row stride ld
  int64_t ld;
  bool accumulate;
};

static_assert(kIsArgument<PackArgs> && kAreArguments<StoreArgs>);

}  // namespace fusedrnn::cuda
