// Whole layers, packing, products and sums of the CPU engine on numpy arrays in fenced memory.
#include <algorithm>
#include <cstring>
#include <limits>

#include "arrays.h"
#include "bindings.h"
#include "cpu/layer.h"
#include "layer/reserve.h"

namespace fusedrnn_test {
namespace {

using namespace fusedrnn;
using namespace fusedrnn::cpu;

// The sizes of a call, which follow from the shapes of its arrays.
template <class T>
struct Shapes {
  CellKind kind;
  Sequences sequences;
  int64_t I, H, P, D;
  bool c_in_y;

  Shapes(const std::string& cell, const Array<T>& x, const std::vector<WeightArrays<T>>& weights,
         const std::vector<int64_t>& batch_sizes, int64_t N, bool c_in_y)
      : kind(cell_of(cell)), sequences(from_batch_sizes(batch_sizes, N)), c_in_y(c_in_y) {
    expect(x.ndim() == 2 && x.shape(0) == sequences.rows(), "x must be [S, I]");
    D = static_cast<int64_t>(weights.size());
    expect(D == 1 || D == 2, "weights must be of one or two directions");
    for (const auto& w : weights) {
      const auto& w_ih = array_of(w, Parameter::kWeightIh);
      const auto& w_hh = array_of(w, Parameter::kWeightHh);
      expect(w_ih && w_hh && w_ih->ndim() == 2 && w_hh->ndim() == 2, "w_ih and w_hh are matrices");
    }
    I = x.shape(1);
    H = weights[0][1]->shape(0) / info().gates;
    P = weights[0][1]->shape(1);
  }

  const CellInfo& info() const { return info_of(kind); }
  Layer layer() const { return {kind, I, H, P, D, sequences, false, c_in_y}; }
  std::vector<int64_t> h_shape() const { return {D, sequences.N, P}; }
  std::vector<int64_t> c_shape() const { return {D, sequences.N, H}; }
  std::vector<int64_t> y_shape() const { return {sequences.rows(), layer().y_width()}; }

  T* fenced_row_input(Fence& fence, const OptionalArray<T>& row_input) const {
    expect(row_input.has_value() == info().takes_row,
           "row_input must be there exactly for cells that take it");
    return fenced<T>(fence, "row_input", row_input, {sequences.rows()});
  }
};

template <class T>
py::tuple forward(const std::string& isa, const std::string& cell, const Array<T>& x,
                  const std::vector<WeightArrays<T>>& weights,
                  const std::vector<int64_t>& batch_sizes, const Array<T>& h0,
                  const OptionalArray<T>& c0, const OptionalArray<T>& row_input, bool c_in_y,
                  bool keep, int64_t threads, bool at_once) {
  const Shapes<T> shapes(cell, x, weights, batch_sizes, h0.shape(1), c_in_y);
  const Layer layer = shapes.layer();
  expect(c0.has_value() == layer.info().has_c, "c0 must be there exactly for cells with c");
  const auto reserve_values =
      static_cast<int64_t>(reserve_bytes<T>(layer, shapes.sequences.rows()) / sizeof(T));

  Fence fence;
  LayerForward<T> args = {};
  for (int64_t d = 0; d < layer.D; ++d)
    args.w[d] = fenced_parameters(fence, weights[d], layer.parameter_sizes());
  args.x = fence.copy("x", x.data(), x.size());
  args.row_input = shapes.fenced_row_input(fence, row_input);
  args.h = fenced<T>(fence, "h", h0, shapes.h_shape());
  args.c = fenced<T>(fence, "c", c0, shapes.c_shape());
  args.y = fence.take<T>("y", shapes.sequences.rows() * layer.y_width());
  T* const reserve = keep ? fence.take<T>("reserve", reserve_values) : nullptr;
  args.reserve = reserve;
  FencedRuntime runtime(fence, threads, at_once);
  layer_forward<T>(layer, kernels_named(isa), runtime, args);
  fence.check();
  return py::make_tuple(numpy(args.y, shapes.y_shape()), numpy(args.h, shapes.h_shape()),
                        numpy(args.c, shapes.c_shape()), numpy(reserve, {reserve_values}));
}

template <class T>
py::tuple backward(const std::string& isa, const std::string& cell, const Array<T>& x,
                   const std::vector<WeightArrays<T>>& weights,
                   const std::vector<int64_t>& batch_sizes, const Array<T>& reserve,
                   const OptionalArray<T>& d_y, const Array<T>& d_h, const OptionalArray<T>& d_c,
                   const OptionalArray<T>& row_input, bool c_in_y, bool want_x, bool want_weights,
                   int64_t threads, bool at_once) {
  const Shapes<T> shapes(cell, x, weights, batch_sizes, d_h.shape(1), c_in_y);
  const Layer layer = shapes.layer();
  expect(d_c.has_value() == layer.info().has_c, "d_c must be there exactly for cells with c");

  Fence fence;
  LayerBackward<T> args = {};
  for (int64_t d = 0; d < layer.D; ++d)
    args.w[d] = fenced_parameters(fence, weights[d], layer.parameter_sizes());
  args.x = fence.copy("x", x.data(), x.size());
  args.row_input = shapes.fenced_row_input(fence, row_input);
  const size_t bytes = reserve_bytes<T>(layer, shapes.sequences.rows());
  args.reserve = fenced<T>(fence, "reserve", reserve, {static_cast<int64_t>(bytes / sizeof(T))});
  args.d_y = fenced<T>(fence, "d_y", d_y, shapes.y_shape());
  args.d_h = fenced<T>(fence, "d_h", d_h, shapes.h_shape());
  args.d_c = fenced<T>(fence, "d_c", d_c, shapes.c_shape());
  args.d_x = want_x ? fence.take<T>("d_x", x.size()) : nullptr;
  const ParameterSizes sizes = layer.parameter_sizes();
  for (int64_t d = 0; d < layer.D && want_weights; ++d) {
    for (const Parameter p : parameters_of(layer.info(), true)) {
      if (!args.w[d][p]) continue;
      args.d_w[d][p] =
          fence.take<T>(std::string("d_") + info_of(p).name, fusedrnn::shape_of(p, sizes).values());
    }
  }
  FencedRuntime runtime(fence, threads, at_once);
  layer_backward<T>(layer, kernels_named(isa), runtime, args);
  fence.check();

  py::list weight_gradients;
  for (int64_t d = 0; d < layer.D; ++d) {
    py::list gradients;
    for (int i = 0; i < kParameterCount; ++i) {
      const auto p = static_cast<Parameter>(i);
      gradients.append(numpy(args.d_w[d][p], array_shape(p, sizes)));
    }
    weight_gradients.append(gradients);
  }
  return py::make_tuple(numpy(args.d_x, {x.shape(0), x.shape(1)}),
                        numpy(args.d_h, shapes.h_shape()), numpy(args.d_c, shapes.c_shape()),
                        weight_gradients);
}

// --- Single functions of the table --------------------------------------------------------------

// Packs panels [begin, end) into memory for `count` panels. Returns the panels, the biases and the
// number of units in a panel.
template <class T>
py::tuple pack_gates(const std::string& isa, const Array<T>& weight, const OptionalArray<T>& bias_x,
                     const OptionalArray<T>& bias_h, int64_t gates, int64_t count, int64_t begin,
                     int64_t end, bool want_bias) {
  const DtypeKernels<T>& kernels = kernels_for<T>(isa);
  const int64_t units = kernels.units_of_gates_panel(gates), K = weight.shape(1);
  Fence fence;
  PackGatesArgs<T> args = {};
  args.weight = fence.copy("weight", weight.data(), weight.size());
  args.bias_x = fenced(fence, "bias_x", bias_x, {weight.shape(0)});
  args.bias_h = fenced(fence, "bias_h", bias_h, {weight.shape(0)});
  args.gates = gates, args.width = weight.shape(0) / gates, args.K = K;
  args.panel_begin = begin, args.panel_end = end;
  args.panels = fence.take<T>("panels", count * K * gates * units);
  args.bias = want_bias ? fence.take<T>("bias", count * 2 * gates * units) : nullptr;
  kernels.pack_gates(args);
  fence.check();
  return py::make_tuple(numpy(args.panels, {count, K, gates, units}),
                        numpy(args.bias, {count, 2, gates, units}), units);
}

// A fenced copy of the first `columns` columns of a row-major matrix. The last row ends with them,
// since a kernel may not read more.
template <class T>
const T* fence_columns(Fence& fence, const char* name, const Array<T>& matrix, int64_t columns) {
  const int64_t rows = matrix.shape(0);
  return fence.copy(name, matrix.data(), rows ? (rows - 1) * matrix.shape(1) + columns : 0);
}

// Packs the first N columns of matrix [K, ld].
template <class T>
py::tuple pack_columns(const std::string& isa, const Array<T>& matrix, int64_t N, int64_t count,
                       int64_t begin, int64_t end) {
  const DtypeKernels<T>& kernels = kernels_for<T>(isa);
  const int64_t units = kernels.units_of_columns_panel(), K = matrix.shape(0);
  Fence fence;
  T* panels = fence.take<T>("panels", count * K * units);
  kernels.pack_columns(
      {fence_columns(fence, "matrix", matrix, N), matrix.shape(1), K, N, begin, end, panels});
  fence.check();
  return py::make_tuple(numpy(panels, {count, K, units}), units);
}

// c (+)= a b for rows [m_begin, m_end) and columns of panels [panel_begin, panel_end).
// a: [M, a_ld], or [K, a_ld] if a_transposed; b: [K, N]; c: [M, c_ld]. Returns the new c.
template <class T>
py::object gemm(const std::string& isa, const Array<T>& a, bool a_transposed, const Array<T>& b,
                const Array<T>& c, bool accumulate, int64_t m_begin, int64_t m_end,
                int64_t panel_begin, int64_t panel_end) {
  const DtypeKernels<T>& kernels = kernels_for<T>(isa);
  const int64_t M = c.shape(0), K = b.shape(0), N = b.shape(1);
  const int64_t units = kernels.units_of_columns_panel(), count = (N + units - 1) / units;
  Fence fence;
  T* panels = fence.take<T>("panels", count * K * units);
  kernels.pack_columns({fence.copy("b", b.data(), b.size()), N, K, N, 0, count, panels});
  T* out = fence.copy("c", c.data(), c.size());
  const T* left = fence_columns(fence, "a", a, a_transposed ? M : K);
  kernels.gemm({left, a.shape(1), a_transposed, panels, out, c.shape(1), K, N, m_begin, m_end,
                panel_begin, std::min(panel_end, count), accumulate});
  fence.check();
  return numpy(out, {M, c.shape(1)});
}

// m: [rows, ld]; out: [ld]. Returns the new out.
template <class T>
py::object sum_rows(const std::string& isa, const Array<T>& m, const Array<T>& out, int64_t begin,
                    int64_t end, bool accumulate) {
  Fence fence;
  const T* from = fence.copy("m", m.data(), m.size());
  T* to = fence.copy("out", out.data(), out.size());
  kernels_for<T>(isa).sum_rows({.m = from,
                                .rows = m.shape(0),
                                .ld = m.shape(1),
                                .begin = begin,
                                .end = end,
                                .out = to,
                                .accumulate = accumulate});
  fence.check();
  return numpy(to, {out.size()});
}

template <class T>
void define_for(py::module_& m) {
  const auto exact = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("layer_forward", forward<T>, py::arg("isa"), py::arg("cell"), exact("x"), exact("weights"),
        py::arg("batch_sizes"), exact("h0"), exact("c0"), py::kw_only(),
        exact("row_input") = py::none(), py::arg("c_in_y") = false, py::arg("keep"),
        py::arg("threads") = 1, py::arg("at_once") = false,
        "y [S, D*P], h_n [D, N, P], c_n [D, N, H] or None, reserve or None.");
  m.def("layer_backward", backward<T>, py::arg("isa"), py::arg("cell"), exact("x"),
        exact("weights"), py::arg("batch_sizes"), exact("reserve"), exact("d_y"), exact("d_h"),
        exact("d_c"), py::kw_only(), exact("row_input") = py::none(), py::arg("c_in_y") = false,
        py::arg("want_x") = true, py::arg("want_weights") = true, py::arg("threads") = 1,
        py::arg("at_once") = false,
        "d_x, d_h0, d_c0 and per direction a gradient for each parameter; None if absent.");
  m.def("pack_gates", pack_gates<T>, py::arg("isa"), exact("weight"), exact("bias_x"),
        exact("bias_h"), py::arg("gates"), py::arg("count"), py::arg("begin"), py::arg("end"),
        py::arg("want_bias") = true);
  m.def("pack_columns", pack_columns<T>, py::arg("isa"), exact("matrix"), py::arg("N"),
        py::arg("count"), py::arg("begin"), py::arg("end"));
  m.def("gemm", gemm<T>, py::arg("isa"), exact("a"), py::arg("a_transposed"), exact("b"),
        exact("c"), py::arg("accumulate"), py::arg("m_begin"), py::arg("m_end"),
        py::arg("panel_begin") = 0, py::arg("panel_end") = std::numeric_limits<int64_t>::max());
  m.def("sum_rows", sum_rows<T>, py::arg("isa"), exact("m"), exact("out"), py::arg("begin"),
        py::arg("end"), py::arg("accumulate"));
}

}  // namespace

void define_kernels(py::module_& m) {
  define_for<float>(m);
  define_for<double>(m);
  m.def(
      "overrun",
      [](int64_t at) {
        Fence fence;
        volatile float* p = fence.take<float>("ten", 10);
        p[at] = 1;
        fence.check();
      },
      py::arg("at"), "Writes one number at an index of a buffer of ten: what a fence must notice.");
  m.def("parameters", [] {
    py::list names;
    for (int i = 0; i < kParameterCount; ++i) names.append(info_of(static_cast<Parameter>(i)).name);
    return names;
  });
  m.def("cells", [] {
    py::list names;
    for (const CellInfo& cell : kCellInfo) names.append(cell.name);
    return names;
  });
  define_steps(m);
  define_scalar_layer(m);
  define_plan(m);
}

}  // namespace fusedrnn_test
