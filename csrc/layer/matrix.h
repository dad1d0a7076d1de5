// A matrix in memory: the form in which a product takes its factors and its result.
#pragma once

#include <cstdint>

namespace fusedrnn {

// Row i begins at data + i * ld. A transposed matrix is stored as [columns, rows], and its column i
// begins at data + i * ld.
template <class Value>
struct Matrix {
  Value* data;
  int64_t rows, columns, ld;
  bool transposed = false;

  Matrix transpose() const { return {data, columns, rows, ld, !transposed}; }
};

// A matrix whose rows follow each other without a gap.
template <class Value>
Matrix<Value> dense(Value* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns};
}

}  // namespace fusedrnn
