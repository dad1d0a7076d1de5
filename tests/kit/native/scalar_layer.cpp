// A layer of one direction on plain scalars, written as simply as possible. It uses the cells of
// csrc/cells by their contract and nothing of the CPU engine, as CUDA does.
#include <algorithm>

#include "arrays.h"
#include "bindings.h"
#include "cells/cells.h"

namespace fusedrnn_test {
namespace {

using namespace fusedrnn;
using namespace fusedrnn::cpu;

// A row-major matrix. row(i) has `columns` numbers.
template <class V>
struct Table {
  int64_t columns;
  std::vector<V> values;
  Table(int64_t rows, int64_t n) : columns(n), values(static_cast<size_t>(rows * n)) {}
  V* row(int64_t i) { return values.data() + i * columns; }
};

template <class V>
struct ScalarLayer {
  int64_t I, H, P, G, K, N, T, S;
  Parameters<const V> w;  // a null bias is zero
  const V* row_input;     // [S] or null
  std::vector<int64_t> batch_sizes, row_offset;
  bool descending;

  int64_t step(int64_t p) const { return descending ? T - 1 - p : p; }

  // The product of a stage: row u of gate g times a source of K numbers.
  V product(const Stage& stage, int g, int64_t u, const V* source) const {
    const int64_t K = stage.from_hidden ? P : H;
    const int64_t row = (stage.first_gate + g) * H + u;
    const V* weight = stage.projects ? w.w_hr + u * H : w.w_hh + row * K;
    V sum = stage.projects || !w.b_hh ? V(0) : w.b_hh[row];
    for (int64_t k = 0; k < K; ++k) sum += weight[k] * source[k];
    return sum;
  }
};

// The parameters of unit u and the input of a row.
template <class Cell, class V>
struct Inputs {
  V params[Cell::kParams + 1];
  Given<V> given;

  Inputs(const ScalarLayer<V>& l, int64_t row, int64_t u) : given{params, V(0)} {
    for (int k = 0; k < Cell::kParams; ++k) params[k] = l.w.w_ch[k * l.H + u];
    if constexpr (Cell::kTakesRow) given.row = l.row_input[row];
  }
};

// The values that forward keeps. Each has one row for each packed row.
template <class V>
struct Kept {
  Table<V> saved, h_in, c_in, emit;  // [S, kSaved*H], [S, P], [S, H], [S, H]
  Kept(int64_t S, int64_t saved_per_unit, int64_t H, int64_t P)
      : saved(S, saved_per_unit * H), h_in(S, P), c_in(S, H), emit(S, H) {}
};

template <class Cell, int s, class V>
void forward_stage(const ScalarLayer<V>& l, int64_t row, const V* x, Kept<V>& kept, V* c, V* out) {
  constexpr Stage kStage = Cell::stage(s);
  const V* source = kStage.from_hidden ? kept.h_in.row(row) : kept.emit.row(row);
  for (int64_t u = 0; u < (kStage.projects ? l.P : l.H); ++u) {
    V gates_x[kStage.gates], acc[kStage.gates], saved[Cell::kSaved];
    for (int g = 0; g < kStage.gates; ++g) {
      acc[g] = l.product(kStage, g, u, source);
      if constexpr (kStage.takes_input) {
        const int64_t column = (kStage.first_gate + g) * l.H + u;
        gates_x[g] = l.w.b_ih ? l.w.b_ih[column] : V(0);
        for (int64_t i = 0; i < l.I; ++i) gates_x[g] += l.w.w_ih[column * l.I + i] * x[i];
      }
    }
    // The units of a projection have no parameters.
    const Inputs<Cell, V> inputs(l, row, kStage.projects ? 0 : u);
    State<V> state;
    if constexpr (Cell::kReadsH) state.h = kept.h_in.row(row)[u];
    if constexpr (Cell::kHasC && s == 0) state.c = c[u];
    // The units of a projection are not the units whose values are saved.
    if constexpr (!kStage.projects)
      for (int i = 0; i < kStage.saved_begin; ++i) saved[i] = kept.saved.row(row)[i * l.H + u];
    out[u] = Cell::template forward<s>(gates_x, acc, inputs.given, state, saved);
    for (int i = kStage.saved_begin; i < kStage.saved_end; ++i)
      kept.saved.row(row)[i * l.H + u] = saved[i];
    if constexpr (Cell::kHasC && s == 0) c[u] = state.c;
  }
}

// h and c: [N, P] and [N, H], updated in place; y [S, P].
template <class Cell, class V>
Kept<V> forward(const ScalarLayer<V>& l, const V* x, V* h, V* c, V* y) {
  Kept<V> kept(l.S, Cell::kSaved, l.H, l.P);
  for (int64_t p = 0; p < l.T; ++p) {
    for (int64_t j = 0; j < l.batch_sizes[l.step(p)]; ++j) {
      const int64_t row = l.row_offset[l.step(p)] + j;
      std::copy_n(h + j * l.P, l.P, kept.h_in.row(row));
      if constexpr (Cell::kHasC) std::copy_n(c + j * l.H, l.H, kept.c_in.row(row));
      V* h_t = y + row * l.P;
      if constexpr (Cell::kStages == 1) {
        forward_stage<Cell, 0>(l, row, x + row * l.I, kept, c + j * l.H, h_t);
      } else {
        forward_stage<Cell, 0>(l, row, x + row * l.I, kept, c + j * l.H, kept.emit.row(row));
        forward_stage<Cell, 1>(l, row, x + row * l.I, kept, c + j * l.H, h_t);
      }
      std::copy_n(h_t, l.P, h + j * l.P);
    }
  }
  return kept;
}

// Gradients of the parameters and of x. Gradients of absent parameters stay zero.
template <class V>
struct Gradients {
  Table<V> x, w_ih, w_hh, b_ih, b_hh, w_hr, w_ch;
  explicit Gradients(const ScalarLayer<V>& l)
      : x(l.S, l.I),
        w_ih(l.G * l.H, l.I),
        w_hh(l.G * l.H, l.P),
        b_ih(l.G * l.H, 1),
        b_hh(l.G * l.H, 1),
        w_hr(l.P, l.H),
        w_ch(1, l.K * l.H) {}
};

// d_emit: the gradient of the emit of stage s. Adds the gradient of the stage's source to d_source,
// and updates carry.
template <class Cell, int s, class V>
void backward_stage(const ScalarLayer<V>& l, int64_t row, const V* x, Kept<V>& kept,
                    const V* d_emit, Carry<V>* carry, V* delta, V* delta_x, V* d_source,
                    Gradients<V>& d) {
  constexpr Stage kStage = Cell::stage(s);
  const V* source = kStage.from_hidden ? kept.h_in.row(row) : kept.emit.row(row);
  const int64_t K = kStage.from_hidden ? l.P : l.H;
  if constexpr (kStage.projects) {
    for (int64_t u = 0; u < l.P; ++u) {
      for (int64_t k = 0; k < l.H; ++k) {
        d_source[k] += d_emit[u] * l.w.w_hr[u * l.H + k];
        d.w_hr.row(u)[k] += d_emit[u] * source[k];
      }
    }
    return;
  }
  for (int64_t u = 0; u < l.H; ++u) {
    V saved[Cell::kSaved], d_gate[Cell::kGates], d_gate_x[Cell::kGates];
    V d_params[Cell::kParams + 1];
    Delta<V> d_stage = {d_gate, d_gate_x, d_params};
    const Inputs<Cell, V> inputs(l, row, u);
    for (int i = 0; i < Cell::kSaved; ++i) saved[i] = kept.saved.row(row)[i * l.H + u];
    State<V> state;
    if constexpr (Cell::kReadsH) state.h = kept.h_in.row(row)[u];
    if constexpr (Cell::kHasC) state.c = kept.c_in.row(row)[u];
    Cell::template backward<s>(d_emit[u], saved, inputs.given, state, carry[u], d_stage);
    for (int k = kStage.param_begin; k < kStage.param_end; ++k)
      d.w_ch.row(0)[k * l.H + u] += d_params[k];
    for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
      delta[g * l.H + u] = d_gate[g];
      delta_x[g * l.H + u] = Cell::kSeparateDeltas ? d_gate_x[g] : d_gate[g];
    }
  }
  for (int64_t g = kStage.first_gate * l.H; g < (kStage.first_gate + kStage.gates) * l.H; ++g) {
    d.b_hh.row(g)[0] += delta[g];
    d.b_ih.row(g)[0] += delta_x[g];
    for (int64_t k = 0; k < K; ++k) {
      d_source[k] += delta[g] * l.w.w_hh[g * K + k];
      d.w_hh.row(g)[k] += delta[g] * source[k];
    }
    for (int64_t i = 0; i < l.I; ++i) {
      d.x.row(row)[i] += delta_x[g] * l.w.w_ih[g * l.I + i];
      d.w_ih.row(g)[i] += delta_x[g] * x[i];
    }
  }
}

// d_h and d_c: [N, P] and [N, H]. They hold the gradients of h_n and c_n before, and of h_0 and c_0
// after.
template <class Cell, class V>
Gradients<V> backward(const ScalarLayer<V>& l, const V* x, Kept<V>& kept, const V* d_y, V* d_h,
                      V* d_c) {
  Gradients<V> d(l);
  for (int64_t p = l.T - 1; p >= 0; --p) {
    for (int64_t j = 0; j < l.batch_sizes[l.step(p)]; ++j) {
      const int64_t row = l.row_offset[l.step(p)] + j;
      std::vector<Carry<V>> carry(l.H);
      for (int64_t u = 0; u < l.H; ++u) {
        carry[u].d_h = 0;
        carry[u].d_c = Cell::kHasC ? d_c[j * l.H + u] : V(0);
      }
      std::vector<V> delta(l.G * l.H), delta_x(l.G * l.H), d_emit(l.P), between(l.H), d_before(l.P);
      for (int64_t u = 0; u < l.P; ++u) d_emit[u] = d_y[row * l.P + u] + d_h[j * l.P + u];
      const V* d_stage_0 = d_emit.data();
      if constexpr (Cell::kStages > 1) {
        backward_stage<Cell, 1>(l, row, x + row * l.I, kept, d_emit.data(), carry.data(),
                                delta.data(), delta_x.data(), between.data(), d);
        d_stage_0 = between.data();
      }
      backward_stage<Cell, 0>(l, row, x + row * l.I, kept, d_stage_0, carry.data(), delta.data(),
                              delta_x.data(), d_before.data(), d);
      for (int64_t u = 0; u < l.P; ++u)
        d_h[j * l.P + u] = d_before[u] + (Cell::kCarriesH ? carry[u].d_h : V(0));
      for (int64_t u = 0; Cell::kHasC && u < l.H; ++u) d_c[j * l.H + u] = carry[u].d_c;
    }
  }
  return d;
}

template <class Cell, class V>
py::dict run(const ScalarLayer<V>& l, const V* x, std::vector<V> h, std::vector<V> c, const V* d_y,
             std::vector<V> d_h, std::vector<V> d_c) {
  std::vector<V> y(l.S * l.P);
  Kept<V> kept = forward<Cell>(l, x, h.data(), c.data(), y.data());
  Gradients<V> d = backward<Cell>(l, x, kept, d_y, d_h.data(), d_c.data());
  py::dict out;
  out["y"] = numpy(y.data(), {l.S, l.P});
  out["h"] = numpy(h.data(), {l.N, l.P});
  out["c"] = numpy(Cell::kHasC ? c.data() : nullptr, {l.N, l.H});
  out["d_x"] = numpy(d.x.row(0), {l.S, l.I});
  out["d_h0"] = numpy(d_h.data(), {l.N, l.P});
  out["d_c0"] = numpy(Cell::kHasC ? d_c.data() : nullptr, {l.N, l.H});
  out["d_w_ih"] = numpy(d.w_ih.row(0), {l.G * l.H, l.I});
  out["d_w_hh"] = numpy(d.w_hh.row(0), {l.G * l.H, l.P});
  out["d_b_ih"] = numpy(l.w.b_ih ? d.b_ih.row(0) : nullptr, {l.G * l.H});
  out["d_b_hh"] = numpy(l.w.b_hh ? d.b_hh.row(0) : nullptr, {l.G * l.H});
  out["d_w_hr"] = numpy(l.w.w_hr ? d.w_hr.row(0) : nullptr, {l.P, l.H});
  out["d_w_ch"] = numpy(l.w.w_ch ? d.w_ch.row(0) : nullptr, {l.K * l.H});
  return out;
}

template <class V>
py::dict scalar_layer(const std::string& cell, const Array<V>& x, const WeightArrays<V>& w,
                      const std::vector<int64_t>& batch_sizes, const Array<V>& h0,
                      const OptionalArray<V>& c0, const Array<V>& d_y, const Array<V>& d_h,
                      const OptionalArray<V>& d_c, const OptionalArray<V>& row_input,
                      bool descending) {
  ScalarLayer<V> l = {};
  for (int i = 0; i < kParameterCount; ++i) {
    const auto p = static_cast<Parameter>(i);
    if (array_of(w, p)) l.w[p] = array_of(w, p)->data();
  }
  l.row_input = row_input ? row_input->data() : nullptr;
  const Array<V>& w_hh = *array_of(w, Parameter::kWeightHh);
  l.batch_sizes = batch_sizes;
  l.row_offset = {0};
  for (int64_t n : batch_sizes) l.row_offset.push_back(l.row_offset.back() + n);
  l.T = static_cast<int64_t>(batch_sizes.size());
  l.S = l.row_offset.back();
  l.descending = descending;
  l.N = h0.shape(0);
  l.I = x.shape(1);
  l.P = w_hh.shape(1);
  const auto values = [](const OptionalArray<V>& a) {
    return a ? std::vector<V>(a->data(), a->data() + a->size()) : std::vector<V>();
  };
  py::dict out;
  const auto run_cell = [&]<class Cell>() {
    if (cell != Cell::kName) return;
    l.G = Cell::kGates;
    l.K = Cell::kParams;
    l.H = w_hh.shape(0) / l.G;
    out = run<Cell, V>(l, x.data(), values(h0), values(c0), d_y.data(), values(d_h), values(d_c));
  };
#define FUSEDRNN_RUN(kind, type) run_cell.template operator()<type>();
  FUSEDRNN_CELLS(FUSEDRNN_RUN)
#undef FUSEDRNN_RUN
  return out;
}

template <class V>
void define_for(py::module_& m) {
  const auto exact = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("scalar_layer", scalar_layer<V>, py::arg("cell"), exact("x"), exact("weights"),
        py::arg("batch_sizes"), exact("h0"), exact("c0"), exact("d_y"), exact("d_h"), exact("d_c"),
        py::kw_only(), exact("row_input") = py::none(), py::arg("descending"),
        "Outputs and all gradients of one direction, on the cells with V = the arrays' dtype.");
}

}  // namespace

void define_scalar_layer(py::module_& m) {
  define_for<float>(m);
  define_for<double>(m);
}

}  // namespace fusedrnn_test
