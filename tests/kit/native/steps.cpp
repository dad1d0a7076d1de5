// Calls the kernels of one direction as the layer does, with any chunks, runs of sequences and
// slices of units. Every pointer of kernel_table.h has a fenced buffer.
#include <algorithm>

#include "arrays.h"
#include "bindings.h"
#include "layer/sequences.h"

namespace fusedrnn_test {
namespace {

using namespace fusedrnn;
using namespace fusedrnn::cpu;

// How a call is cut up.
struct Cuts {
  int64_t chunk_steps;
  std::vector<int64_t> sequences;  // run i is [sequences[i], sequences[i + 1])
  int64_t slices;                  // of the panels of a stage
};

// Calls body(steps, rows) for each chunk, in the order of positions.
template <class Body>
void for_chunks(const Sequences& seq, bool descending, const Cuts& cuts, const Body& body) {
  for (int64_t begin = 0; begin < seq.T; begin += cuts.chunk_steps) {
    const int64_t end = std::min(seq.T, begin + cuts.chunk_steps);
    const int64_t low = descending ? seq.T - end : begin;
    const int64_t high = descending ? seq.T - begin : end;
    const Steps steps = {.T = seq.T,
                         .batch_sizes = seq.batch_sizes.data(),
                         .row_offset = seq.row_offset.data(),
                         .descending = descending,
                         .begin = begin,
                         .end = end,
                         .first_row = seq.row_offset[low],
                         .n_begin = 0,
                         .n_end = seq.widest()};
    body(steps, seq.row_offset[high] - seq.row_offset[low]);
  }
}

struct StagePanels {
  int stage;
  int64_t panels;
};

int64_t ceil_div(int64_t width, int64_t units) { return (width + units - 1) / units; }

// Runs one chunk. The last run of sequences comes first, and the last slice of each stage.
template <class Args>
void run(void (*kernel)(const Args&, const Part&), Args args, const Cuts& cuts,
         const std::vector<StagePanels>& stages) {
  for (size_t i = cuts.sequences.size() - 1; i > 0; --i) {
    args.steps.n_begin = cuts.sequences[i - 1];
    args.steps.n_end = cuts.sequences[i];
    for (int64_t p = args.steps.begin; p < args.steps.end; ++p)
      for (const StagePanels& s : stages)
        for (int64_t k = cuts.slices - 1; k >= 0; --k)
          kernel(args,
                 {p, s.stage, {s.panels * k / cuts.slices, s.panels * (k + 1) / cuts.slices}});
  }
}

template <class T>
struct Direction {
  const CellInfo& info;
  Sequences seq;
  int64_t N, H, P;

  Direction(CellKind kind, const WeightArrays<T>& w, const std::vector<int64_t>& batch_sizes,
            int64_t n)
      : info(info_of(kind)), seq(from_batch_sizes(batch_sizes, n)), N(n) {
    const auto& w_hh = array_of(w, Parameter::kWeightHh);
    expect(w_hh && w_hh->ndim() == 2, "w_hh must be a matrix");
    H = w_hh->shape(0) / info.gates;
    P = w_hh->shape(1);
  }

  int64_t rows() const { return seq.rows(); }
  int64_t columns() const { return info.gates * H; }

  int64_t width(int s) const { return info.stage[s].projects ? P : H; }
  int64_t inner(int s) const { return info.stage[s].from_hidden ? P : H; }

  const T* parameter(Fence& fence, const WeightArrays<T>& w, Parameter p) const {
    return fenced(fence, info_of(p).name, array_of(w, p),
                  array_shape(p, {info.gates, info.params, 0, H, P}));
  }

  // The weight of a stage, [gates * width, inner], and its biases if it has any.
  PackGatesArgs<T> weight_of(Fence& fence, const WeightArrays<T>& w, int s) const {
    const Stage& stage = info.stage[s];
    PackGatesArgs<T> args = {};
    args.gates = stage.gates, args.width = width(s), args.K = inner(s);
    if (stage.projects) {
      args.weight = parameter(fence, w, Parameter::kWeightHr);
      return args;
    }
    const int64_t first = stage.first_gate * H;
    args.weight = parameter(fence, w, Parameter::kWeightHh) + first * P;
    if (const T* b_ih = parameter(fence, w, Parameter::kBiasIh)) args.bias_x = b_ih + first;
    if (const T* b_hh = parameter(fence, w, Parameter::kBiasHh)) args.bias_h = b_hh + first;
    return args;
  }
};

template <class T>
py::dict forward(const std::string& isa, const std::string& cell, const Array<T>& gates_x,
                 const WeightArrays<T>& w, const std::vector<int64_t>& batch_sizes,
                 const Array<T>& h0, const OptionalArray<T>& c0, bool descending, bool keep,
                 int64_t y_ld, const Cuts& cuts) {
  const DtypeKernels<T>& kernels = kernels_for<T>(isa);
  const CellKind kind = cell_of(cell);
  const Direction<T> dir(kind, w, batch_sizes, h0.shape(0));
  const int64_t S = dir.rows(), N = dir.N, H = dir.H, P = dir.P;
  expect(gates_x.ndim() == 2 && gates_x.shape(0) == S && gates_x.shape(1) == dir.columns(),
         "gates_x must be [S, G*H]");

  Fence fence;
  ForwardArgs<T> a = {};
  a.N = N, a.H = H, a.P = P;
  a.keep = keep;
  std::vector<StagePanels> loop;
  for (int s = 0; s < dir.info.stages; ++s) {
    PackGatesArgs<T> pack = dir.weight_of(fence, w, s);
    const int64_t units = kernels.units_of_gates_panel(pack.gates);
    pack.panel_end = ceil_div(pack.width, units);
    a.weights.panels[s] = pack.panels =
        fence.take<T>("panels", pack.panel_end * pack.K * pack.gates * units);
    a.bias[s] = pack.bias = fence.take<T>("bias", pack.panel_end * 2 * pack.gates * units);
    kernels.pack_gates(pack);
    loop.push_back({s, pack.panel_end});
  }
  a.params = dir.parameter(fence, w, Parameter::kWeightCh);
  const bool stages = dir.info.stages > 1;
  const int64_t rows = keep ? S : N, saved_rows = dir.info.saves_h ? N : rows;
  a.h = fenced<T>(fence, "h", h0, {N, P});
  a.c = fenced<T>(fence, "c", c0, {N, H});
  a.y = fence.take<T>("y", S * y_ld);
  a.y_ld = y_ld;
  a.h_in = fence.take<T>("h_in", keep ? S * P : 2 * N * P);
  a.c_in = keep && dir.info.has_c ? fence.take<T>("c_in", S * H) : nullptr;
  a.saved = keep || stages ? fence.take<T>("saved", saved_rows * dir.info.saved * H) : nullptr;
  a.emit = stages ? fence.take<T>("emit", rows * H) : nullptr;
  for_chunks(dir.seq, descending, cuts, [&](const Steps& steps, int64_t chunk_rows) {
    a.steps = steps;
    a.gates_x = fence.copy("gates_x", gates_x.data() + steps.first_row * dir.columns(),
                           chunk_rows * dir.columns());
    kernels.enter(a);
    run(kernels.forward[static_cast<int>(kind)], a, cuts, loop);
  });
  fence.check();

  py::dict out;
  out["y"] = numpy(a.y, {S, y_ld});
  out["h"] = numpy(a.h, {N, P});
  out["c"] = numpy(a.c, {N, H});
  if (keep) {
    out["saved"] = numpy(a.saved, {saved_rows, dir.info.saved, H});
    out["h_in"] = numpy(a.h_in, {S, P});
    out["c_in"] = numpy(a.c_in, {S, H});
    out["emit"] = numpy(a.emit, {S, H});
  }
  return out;
}

// kept: the results of forward. d_y: [S, d_y_ld] or None.
template <class T>
py::dict backward(const std::string& isa, const std::string& cell, const py::dict& kept,
                  const WeightArrays<T>& w, const std::vector<int64_t>& batch_sizes,
                  const OptionalArray<T>& d_y, const Array<T>& d_h, const OptionalArray<T>& d_c,
                  bool descending, const Cuts& cuts) {
  const DtypeKernels<T>& kernels = kernels_for<T>(isa);
  const CellKind kind = cell_of(cell);
  const Direction<T> dir(kind, w, batch_sizes, d_h.shape(0));
  const int64_t S = dir.rows(), N = dir.N, H = dir.H, P = dir.P, columns = dir.columns();

  Fence fence;
  BackwardArgs<T> a = {};
  a.N = N, a.H = H, a.P = P;
  const int64_t units = kernels.units_of_columns_panel();
  std::vector<StagePanels> loop;
  for (int s = dir.info.stages - 1; s >= 0; --s) {
    const PackGatesArgs<T> weight = dir.weight_of(fence, w, s);
    const int64_t rows = weight.gates * weight.width, end = ceil_div(weight.K, units);
    T* panels = fence.take<T>("panels", end * rows * units);
    kernels.pack_columns({weight.weight, weight.K, rows, weight.K, 0, end, panels});
    a.weights.panels[s] = panels;
    loop.push_back({s, ceil_div(dir.width(s), units)});
  }
  loop.push_back({dir.info.stages, ceil_div(P, units)});
  const auto kept_array = [&](const char* name, std::vector<int64_t> shape) {
    return fenced(fence, name, kept[name].template cast<OptionalArray<T>>(), shape);
  };
  a.saved = kept_array("saved", {dir.info.saves_h ? N : S, dir.info.saved, H});
  a.h_in = kept_array("h_in", {S, P});
  a.c_in = kept_array("c_in", {S, H});
  if (d_y) {
    a.d_y_ld = d_y->shape(1);
    a.d_y = fenced(fence, "d_y", d_y, {S, a.d_y_ld});
  }
  a.d_h = fenced<T>(fence, "d_h", d_h, {N, P});
  a.d_c = fenced<T>(fence, "d_c", d_c, {N, H});
  a.params = dir.parameter(fence, w, Parameter::kWeightCh);
  const int64_t params = dir.info.params * H;
  std::vector<T> delta(S * columns), delta_x(S * columns), delta_proj(S * P);
  std::vector<T> delta_params(S * params);
  const auto gather = [](std::vector<T>& all, const T* chunk, int64_t first, int64_t n) {
    if (chunk) std::copy_n(chunk, n, all.begin() + first);
  };
  for_chunks(dir.seq, !descending, cuts, [&](const Steps& steps, int64_t rows) {
    a.steps = steps;
    a.delta = fence.take<T>("delta", rows * columns);
    a.delta_x = dir.info.separate_deltas ? fence.take<T>("delta_x", rows * columns) : nullptr;
    a.delta_proj = dir.info.projects ? fence.take<T>("delta_proj", rows * P) : nullptr;
    a.delta_params = params ? fence.take<T>("delta_params", rows * params) : nullptr;
    run(kernels.backward[static_cast<int>(kind)], a, cuts, loop);
    gather(delta, a.delta, steps.first_row * columns, rows * columns);
    gather(delta_x, a.delta_x ? a.delta_x : a.delta, steps.first_row * columns, rows * columns);
    gather(delta_proj, a.delta_proj, steps.first_row * P, rows * P);
    gather(delta_params, a.delta_params, steps.first_row * params, rows * params);
  });
  fence.check();

  py::dict out;
  out["delta"] = numpy(delta.data(), {S, columns});
  out["delta_x"] = numpy(delta_x.data(), {S, columns});
  out["delta_proj"] = numpy(dir.info.projects ? delta_proj.data() : nullptr, {S, P});
  out["delta_params"] = numpy(params ? delta_params.data() : nullptr, {S, params});
  out["d_h"] = numpy(a.d_h, {N, P});
  out["d_c"] = numpy(a.d_c, {N, H});
  return out;
}

template <class T>
void define_for(py::module_& m) {
  const auto exact = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("steps_forward", forward<T>, py::arg("isa"), py::arg("cell"), exact("gates_x"),
        exact("weights"), py::arg("batch_sizes"), exact("h0"), exact("c0"), py::kw_only(),
        py::arg("descending"), py::arg("keep"), py::arg("y_ld"), py::arg("cuts"),
        "One direction from gates_x = x W on: y [S, y_ld], h, c and what keep keeps.");
  m.def("steps_backward", backward<T>, py::arg("isa"), py::arg("cell"), py::arg("kept"),
        exact("weights"), py::arg("batch_sizes"), exact("d_y"), exact("d_h"), exact("d_c"),
        py::kw_only(), py::arg("descending"), py::arg("cuts"),
        "delta, delta_x, delta_proj, delta_params, and d_h and d_c of the initial states.");
}

}  // namespace

void define_steps(py::module_& m) {
  py::class_<Cuts>(m, "Cuts").def(py::init<int64_t, std::vector<int64_t>, int64_t>(),
                                  py::arg("chunk_steps"), py::arg("sequences"), py::arg("slices"));
  define_for<float>(m);
  define_for<double>(m);
}

}  // namespace fusedrnn_test
