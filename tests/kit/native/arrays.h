// Copies of numpy arrays in fenced memory and back, for all bindings of the tests.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "fence.h"
#include "layer/layer.h"

namespace fusedrnn_test {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using OptionalArray = std::optional<Array<T>>;

inline void expect(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline fusedrnn::CellKind cell_of(const std::string& name) {
  const fusedrnn::CellKind cell = fusedrnn::cell_named(name.c_str());
  if (cell == fusedrnn::CellKind::kCount) throw std::invalid_argument("no cell is named " + name);
  return cell;
}

template <class T>
const fusedrnn::cpu::DtypeKernels<T>& kernels_for(const std::string& isa) {
  return fusedrnn::cpu::kernels_of<T>(fusedrnn::cpu::kernels_named(isa));
}

inline int64_t size_of(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

// A fenced copy of an array, which must have this shape. None becomes null.
template <class T>
T* fenced(Fence& fence, const std::string& name, const OptionalArray<T>& array,
          const std::vector<int64_t>& shape) {
  if (!array) return nullptr;
  const std::vector<int64_t> got(array->shape(), array->shape() + array->ndim());
  expect(got == shape, name + " has the wrong shape");
  return fence.copy(name, array->data(), array->size());
}

// A numpy copy of a buffer. Null becomes None.
template <class T>
py::object numpy(const T* from, const std::vector<int64_t>& shape) {
  if (!from) return py::none();
  Array<T> array(shape);
  if (array.size()) std::memcpy(array.mutable_data(), from, array.size() * sizeof(T));
  return array;
}

// The parameters of one direction from Python: an array for each fusedrnn::Parameter, or None if it
// is absent or the cell does not have it.
template <class T>
using WeightArrays = std::vector<OptionalArray<T>>;

template <class T>
const OptionalArray<T>& array_of(const WeightArrays<T>& arrays, fusedrnn::Parameter parameter) {
  expect(arrays.size() == fusedrnn::kParameterCount,
         "weights must hold an array or None for each parameter");
  return arrays[static_cast<size_t>(parameter)];
}

inline std::vector<int64_t> array_shape(fusedrnn::Parameter parameter,
                                        const fusedrnn::ParameterSizes& sizes) {
  const fusedrnn::ParameterShape shape = fusedrnn::shape_of(parameter, sizes);
  return {shape.size, shape.size + shape.rank};
}

// Fenced copies of the parameters of one direction.
template <class T>
fusedrnn::Parameters<const T> fenced_parameters(Fence& fence, const WeightArrays<T>& arrays,
                                                const fusedrnn::ParameterSizes& sizes) {
  fusedrnn::Parameters<const T> fenced_ones = {};
  for (int i = 0; i < fusedrnn::kParameterCount; ++i) {
    const auto p = static_cast<fusedrnn::Parameter>(i);
    fenced_ones[p] =
        fenced(fence, fusedrnn::info_of(p).name, array_of(arrays, p), array_shape(p, sizes));
  }
  return fenced_ones;
}

}  // namespace fusedrnn_test
