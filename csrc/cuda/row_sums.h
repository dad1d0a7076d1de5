// The sums over rows of a pass, which one launch of the kernel sum_rows computes.
#pragma once

#include <algorithm>

#include "launches.h"

namespace fusedrnn::cuda {

template <class Stored>
class RowSums {
 public:
  // Asks for the scratch memory of at most `most` sums over matrices of `rows` rows and at most
  // `widest` columns.
  RowSums(Scratch& scratch, int64_t rows, int64_t widest, int most) {
    args_.rows = rows;
    // With no rows there is one range, which is empty, and the sums are zero.
    args_.ranges = static_cast<int>(std::max<int64_t>(1, ceil_div(rows, rows_of_range(rows))));
    if (args_.ranges == 1 || most == 0) return;
    const int64_t blocks = blocks_of(widest);
    scratch.want(args_.partial, most * args_.ranges * blocks * kSumColumns<Stored>);
    scratch.want_zero(args_.finished, most * blocks);
  }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  // out[column] = Σ_rows m[row, column]. `again` receives a copy of the sums unless it is null.
  void add(const Matrix<const Stored>& m, Stored* out, Stored* again = nullptr) {
    args_.sum[count_++] = {m.columns, m.data, out, again};
    args_.column_blocks = std::max(args_.column_blocks, static_cast<int>(blocks_of(m.columns)));
  }

  void run(Launcher& launcher) const {
    if (count_ == 0) return;
    launch<Stored>(
        launcher, "sum_rows",
        {static_cast<unsigned>(args_.ranges * args_.column_blocks), static_cast<unsigned>(count_)},
        args_);
  }

 private:
  static int64_t blocks_of(int64_t columns) { return ceil_div(columns, kSumColumns<Stored>); }

  SumRowsArgs<Stored> args_ = {};
  int count_ = 0;
};

}  // namespace fusedrnn::cuda
