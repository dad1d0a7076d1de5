// What the bindings share: numpy arrays in and out of fenced memory.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "fence.h"

namespace fusedrnn_test {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using OptionalArray = std::optional<Array<T>>;

inline void expect(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline fusedrnn::CellKind cell_named(const std::string& name) {
  for (int i = 0; i < fusedrnn::kCellCount; ++i)
    if (name == fusedrnn::kCellInfo[i].name) return static_cast<fusedrnn::CellKind>(i);
  throw std::invalid_argument("no cell is named " + name);
}

template <class T>
const fusedrnn::DtypeKernels<T>& kernels_for(const std::string& isa) {
  return fusedrnn::kernels_of<T>(fusedrnn::kernels_named(isa));
}

inline int64_t size_of(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

// A fenced copy of an array of exactly this shape; null for None.
template <class T>
T* fenced(Fence& fence, const std::string& name, const OptionalArray<T>& array,
          const std::vector<int64_t>& shape) {
  if (!array) return nullptr;
  const std::vector<int64_t> got(array->shape(), array->shape() + array->ndim());
  expect(got == shape, name + " has the wrong shape");
  return fence.copy(name, array->data(), array->size());
}

// A numpy copy of a buffer; None for null.
template <class T>
py::object numpy(const T* from, const std::vector<int64_t>& shape) {
  if (!from) return py::none();
  Array<T> array(shape);
  if (array.size()) std::memcpy(array.mutable_data(), from, array.size() * sizeof(T));
  return array;
}

// Recurrent weights of one direction, as Python gives them: w_ih, w_hh, b_ih, b_hh, w_hr.
template <class T>
using WeightArrays = std::vector<OptionalArray<T>>;

inline void expect_five(size_t n) {
  expect(n == 5, "weights must be w_ih, w_hh, b_ih, b_hh, w_hr, absent ones None");
}

}  // namespace fusedrnn_test
