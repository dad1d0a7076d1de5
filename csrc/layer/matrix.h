// A matrix in memory, as the operands and the result of a product are given.
#pragma once

#include <cstdint>

namespace fusedrnn {

// Row i begins at data + i * ld. A transposed matrix is stored as [columns, rows]: there it is
// column i that begins at data + i * ld.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, ld;
  bool transposed = false;

  Matrix transpose() const { return {data, columns, rows, ld, !transposed}; }
};

// A matrix whose rows lie side by side.
template <class T>
Matrix<T> dense(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns};
}

}  // namespace fusedrnn
