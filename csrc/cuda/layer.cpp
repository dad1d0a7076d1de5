#include "layer.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "args.h"
#include "estimate.h"

namespace fusedrnn::cuda {
namespace {

template <class S>
size_t align_for_real(size_t bytes) {
  return (bytes + sizeof(Real<S>) - 1) / sizeof(Real<S>) * sizeof(Real<S>);
}

// What forward keeps of one direction. The same row of each belongs to the same step.
template <class S>
struct Kept {
  S* saved = nullptr;       // [rows, kSaved*H]; [N, H] of cells that save h
  S* h_in = nullptr;        // [rows, P]
  Real<S>* c_in = nullptr;  // [rows, H]
  S* emit = nullptr;        // [rows, H]
};

int64_t saved_rows(const Layer& layer, int64_t rows) {
  return layer.info().saves_h ? layer.sequences.N : rows;
}

template <class S>
size_t kept_bytes(const Layer& layer, int64_t rows) {
  const CellInfo& info = layer.info();
  const int64_t saved = saved_rows(layer, rows) * info.saved * layer.H;
  size_t bytes = static_cast<size_t>(saved + rows * layer.P) * sizeof(S);
  if (info.has_c) bytes = align_for_real<S>(bytes) + rows * layer.H * sizeof(Real<S>);
  if (info.stages > 1) bytes += rows * layer.H * sizeof(S);
  return align_for_real<S>(bytes);
}

template <class S>
Kept<S> kept(const Layer& layer, const void* reserve, int64_t d) {
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows();
  // The caller's constness is that of the pass: backward only reads what it finds here.
  char* base = static_cast<char*>(const_cast<void*>(reserve)) + d * kept_bytes<S>(layer, rows);
  Kept<S> k;
  k.saved = reinterpret_cast<S*>(base);
  k.h_in = k.saved + saved_rows(layer, rows) * info.saved * layer.H;
  S* rest = k.h_in + rows * layer.P;
  if (info.has_c) {
    const size_t offset = align_for_real<S>(reinterpret_cast<char*>(rest) - base);
    k.c_in = reinterpret_cast<Real<S>*>(base + offset);
    rest = reinterpret_cast<S*>(k.c_in + rows * layer.H);
  }
  if (info.stages > 1) k.emit = rest;
  return k;
}

// The part of the recurrent weights that a stage multiplies: [gates * width, K].
template <class S>
struct StageWeight {
  int64_t rows, K;
  const S* weight;
};

template <class S>
StageWeight<S> stage_weight(const Layer& layer, const Stage& stage, const Weights<const S>& w) {
  if (stage.projects) return {layer.P, layer.H, w.w_hr};
  const int64_t K = stage.from_hidden ? layer.P : layer.H;
  return {stage.gates * layer.H, K, w.w_hh + stage.first_gate * layer.H * K};
}

template <class S>
void multiply(Launcher& launcher, int64_t M, int64_t N, int64_t K, const S* a, int64_t a_ld,
              bool a_transposed, const S* b, int64_t b_ld, bool b_transposed, auto* c, int64_t c_ld,
              bool accumulate) {
  constexpr Dtype kC = DtypeOf<std::remove_pointer_t<decltype(c)>>::kDtype;
  launcher.multiply({.dtype = DtypeOf<S>::kDtype,
                     .c_dtype = kC,
                     .M = M,
                     .N = N,
                     .K = K,
                     .a = a,
                     .a_ld = a_ld,
                     .a_transposed = a_transposed,
                     .b = b,
                     .b_ld = b_ld,
                     .b_transposed = b_transposed,
                     .c = c,
                     .c_ld = c_ld,
                     .accumulate = accumulate});
}

template <class Args>
void launch(Launcher& launcher, const char* kernel, Dtype dtype, Dim3 grid, const Args& args) {
  launcher.launch({.kernel = std::string(kernel) + "_" + name_of(dtype),
                   .grid = grid,
                   .block = {kThreads},
                   .args = &args,
                   .args_bytes = sizeof(args)});
}

template <class S>
S* scratch(Launcher& launcher, int64_t values) {
  return static_cast<S*>(launcher.scratch(static_cast<size_t>(values) * sizeof(S)));
}

// Blocks for `count` values, one a thread. The kernels go round where there are more.
Dim3 grid_for(int64_t count) {
  return {static_cast<unsigned>(std::min<int64_t>(ceil_div(count, kThreads), 1 << 20))};
}

// Steps of x W that come at once.
template <class S>
int64_t chunk_steps(const Layer& layer, const Options& options) {
  const Sequences& seq = layer.sequences;
  const int64_t step_bytes = seq.widest() * layer.gate_columns() * int64_t(sizeof(Real<S>));
  return std::clamp<int64_t>(options.gates_bytes / (layer.D * step_bytes), 1, seq.T);
}

// Packed rows [begin, end) of some positions; position p is step T - 1 - p if descending.
struct RowRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

RowRange rows_of(const Sequences& seq, bool descending, int64_t begin, int64_t end) {
  const int64_t lowest = descending ? seq.T - end : begin;
  return {seq.row_offset[lowest], seq.row_offset[lowest + end - begin]};
}

template <class S>
void input_product(const Layer& layer, Launcher& launcher, const LayerForward<S>& args, int64_t d,
                   RowRange rows, Real<S>* gates_x) {
  const int64_t columns = layer.gate_columns(), I = layer.I;
  multiply(launcher, rows.count(), columns, I, args.x + rows.begin * I, I, false, args.w[d].w_ih, I,
           true, gates_x, columns, false);
}

// --- Per step -----------------------------------------------------------------------------------

template <class S>
void forward_per_step(const Layer& layer, Launcher& launcher, const Options& options,
                      const LayerForward<S>& args) {
  using V = Real<S>;
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t N = seq.N, H = layer.H, P = layer.P, columns = layer.gate_columns();
  const int64_t chunk = chunk_steps<S>(layer, options);
  const bool keep = args.reserve != nullptr, several = info.stages > 1;

  V* gates_x = scratch<V>(launcher, seq.row_offset[chunk] * columns);
  V* acc = scratch<V>(launcher, seq.widest() * std::max(columns, P));
  S* saved = several && !keep ? scratch<S>(launcher, seq.widest() * info.saved * H) : nullptr;
  S* emit = several && !keep ? scratch<S>(launcher, seq.widest() * H) : nullptr;
  S* h_rounded = nullptr;
  if constexpr (kRounds<S>) {
    const int64_t count = layer.D * N * P;
    h_rounded = scratch<S>(launcher, count);
    launch(launcher, "round", DtypeOf<S>::kDtype, grid_for(count),
           RoundArgs<S>{count, args.h, h_rounded});
  }

  for (int64_t d = 0; d < layer.D; ++d) {
    const bool descending = d == 1;
    const Kept<S> k = keep ? kept<S>(layer, args.reserve, d) : Kept<S>();
    StepForwardArgs<S> a = {};
    a.cell = layer.cell;
    a.H = H, a.P = P;
    a.acc = acc;
    a.b_ih = args.w[d].b_ih;
    a.b_hh = args.w[d].b_hh;
    a.h = args.h + d * N * P;
    if constexpr (kRounds<S>) a.h_rounded = h_rounded + d * N * P;
    a.c = info.has_c ? args.c + d * N * H : nullptr;
    a.y_ld = layer.D * P;
    const S* source_h;
    if constexpr (kRounds<S>) {
      source_h = a.h_rounded;
    } else {
      source_h = a.h;
    }
    for (int64_t begin = 0; begin < seq.T; begin += chunk) {
      const int64_t end = std::min(seq.T, begin + chunk);
      const RowRange chunk_rows = rows_of(seq, descending, begin, end);
      input_product(layer, launcher, args, d, chunk_rows, gates_x);
      for (int64_t p = begin; p < end; ++p) {
        const RowRange rows = rows_of(seq, descending, p, p + 1);
        const int64_t row = rows.begin;
        a.n = rows.count();
        a.gates_x = gates_x + (row - chunk_rows.begin) * columns;
        a.y = args.y + row * a.y_ld + d * P;
        a.h_in = keep ? k.h_in + row * P : nullptr;
        a.c_in = keep && info.has_c ? k.c_in + row * H : nullptr;
        a.saved = keep ? k.saved + (info.saves_h ? 0 : row * info.saved * H) : saved;
        a.emit = keep && several ? k.emit + row * H : emit;
        for (int s = 0; s < info.stages; ++s) {
          const Stage& stage = info.stage[s];
          const StageWeight<S> w = stage_weight(layer, stage, args.w[d]);
          const S* source = stage.from_hidden ? source_h : a.emit;
          multiply(launcher, a.n, w.rows, w.K, source, w.K, false, w.weight, w.K, true, acc, w.rows,
                   false);
          a.stage = s;
          launch(launcher, "step_forward", DtypeOf<S>::kDtype,
                 grid_for(a.n * (stage.projects ? P : H)), a);
        }
      }
    }
  }
}

// Gradients of the products' left sides, over all rows of one direction.
template <class S>
struct Deltas {
  S* delta;       // [rows, G*H]
  S* delta_x;     // [rows, G*H], may be delta
  S* delta_proj;  // [rows, P] or null
};

template <class S>
void backward_per_step(const Layer& layer, Launcher& launcher, const LayerBackward<S>& args,
                       const Deltas<S>* deltas) {
  using V = Real<S>;
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t N = seq.N, H = layer.H, P = layer.P, columns = layer.gate_columns();
  V* d_emit = info.stages > 1 ? scratch<V>(launcher, seq.widest() * H) : nullptr;

  for (int64_t d = 0; d < layer.D; ++d) {
    const Kept<S> k = kept<S>(layer, args.reserve, d);
    StepBackwardArgs<S> a = {};
    a.cell = layer.cell;
    a.H = H, a.P = P;
    a.d_emit = d_emit;
    a.d_y_ld = layer.D * P;
    a.d_h = args.d_h + d * N * P;
    a.d_c = info.has_c ? args.d_c + d * N * H : nullptr;
    for (int64_t p = 0; p < seq.T; ++p) {
      const RowRange rows = rows_of(seq, d == 0, p, p + 1);
      const int64_t row = rows.begin;
      a.n_next = a.n;  // the step before
      a.h_next = a.h_in;
      a.n = rows.count();
      a.d_y = args.d_y ? args.d_y + row * a.d_y_ld + d * P : nullptr;
      a.saved = k.saved + (info.saves_h ? 0 : row * info.saved * H);
      a.h_in = k.h_in + row * P;
      a.c_in = info.has_c ? k.c_in + row * H : nullptr;
      a.delta = deltas[d].delta + row * columns;
      a.delta_x = deltas[d].delta_x + row * columns;
      a.delta_proj = info.projects ? deltas[d].delta_proj + row * P : nullptr;
      for (int s = info.stages - 1; s >= 0; --s) {
        const Stage& stage = info.stage[s];
        a.stage = s;
        launch(launcher, "step_backward", DtypeOf<S>::kDtype,
               grid_for(a.n * (stage.projects ? P : H)), a);
        const StageWeight<S> w = stage_weight(layer, stage, args.w[d]);
        const S* delta = stage.projects ? a.delta_proj : a.delta + stage.first_gate * H;
        V* out = s == 0 ? a.d_h : d_emit;
        multiply(launcher, a.n, w.K, w.rows, delta, stage.projects ? P : columns, false, w.weight,
                 w.K, false, out, w.K, s == 0 && info.carries_h);
      }
    }
  }
}

// --- Resident -----------------------------------------------------------------------------------

// Whether every step has the same rows, so that a kernel needs no offsets.
bool is_plain(const Sequences& seq) { return seq.batch_sizes.back() == seq.N; }

// row_offset on the device, or null for a plain batch.
const int64_t* put_offsets(const Sequences& seq, Launcher& launcher) {
  if (is_plain(seq)) return nullptr;
  const int64_t count = seq.T + 1;
  int64_t* offsets = scratch<int64_t>(launcher, count);
  for (int64_t begin = 0; begin < count; begin += kOffsetsPerLaunch) {
    OffsetsArgs args = {};
    args.count = static_cast<int>(std::min<int64_t>(kOffsetsPerLaunch, count - begin));
    args.to = offsets + begin;
    std::copy_n(seq.row_offset.data() + begin, args.count, args.values);
    launcher.launch({.kernel = "write_offsets",
                     .grid = {},
                     .block = {kThreads},
                     .args = &args,
                     .args_bytes = sizeof(args)});
  }
  return offsets;
}

// The part of the arguments that forward and backward share.
template <class Args>
void describe_block(const Layer& layer, const Options& options, const Plan& plan,
                    const int64_t* row_offset, Args& a) {
  a.cell = layer.cell;
  a.shape = plan.shape;
  a.T = layer.sequences.T;
  a.N = layer.sequences.N;
  a.H = layer.H;
  a.D = layer.D;
  a.row_offset = row_offset;
  a.spin_limit = options.spin_limit;
}

// Buffers between blocks. Where the source ends before its rows do, it is zero.
template <class S, class Args>
void put_exchange(const Plan& plan, Launcher& launcher, Args& a) {
  char* memory = scratch<char>(launcher, plan.workspace_bytes());
  launcher.zero(memory, plan.workspace_bytes());
  a.arrivals = reinterpret_cast<unsigned*>(memory);
  memory += plan.arrival_bytes;
  for (int s = 0; s < kMaxStages; ++s) {
    a.exchange[s] = reinterpret_cast<S*>(memory);
    memory += plan.exchange_bytes[s];
  }
}

template <class Args>
void launch_resident(const Plan& plan, Launcher& launcher, const std::string& kernel,
                     const Args& args) {
  launcher.launch({.kernel = kernel,
                   .grid = plan.grid,
                   .block = {kThreads},
                   .shared_bytes = static_cast<size_t>(plan.shape.shared_bytes),
                   .args = &args,
                   .args_bytes = sizeof(args),
                   .cooperative = true});
}

template <class S>
void forward_resident(const Layer& layer, Launcher& launcher, const Options& options,
                      const Plan& plan, const LayerForward<S>& args) {
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t columns = layer.gate_columns(), chunk = chunk_steps<S>(layer, options);
  ResidentForwardArgs<S> a = {};
  describe_block(layer, options, plan, put_offsets(seq, launcher), a);
  put_exchange<S>(plan, launcher, a);
  a.h = args.h;
  a.c = info.has_c ? args.c : nullptr;
  a.y = args.y;
  Real<S>* gates_x[2] = {};
  for (int64_t d = 0; d < layer.D; ++d) {
    gates_x[d] = scratch<Real<S>>(launcher, seq.row_offset[chunk] * columns);
    a.gates_x[d] = gates_x[d];
    a.w_hh[d] = args.w[d].w_hh;
    a.b_ih[d] = args.w[d].b_ih;
    a.b_hh[d] = args.w[d].b_hh;
    if (!args.reserve) continue;
    const Kept<S> k = kept<S>(layer, args.reserve, d);
    a.saved[d] = k.saved;
    a.h_in[d] = k.h_in;
    a.c_in[d] = k.c_in;
    a.emit[d] = k.emit;
  }
  for (a.begin = 0; a.begin < seq.T; a.begin = a.end) {
    a.end = std::min(seq.T, a.begin + chunk);
    for (int64_t d = 0; d < layer.D; ++d) {
      const RowRange rows = rows_of(seq, d == 1, a.begin, a.end);
      a.first_row[d] = rows.begin;
      input_product(layer, launcher, args, d, rows, gates_x[d]);
    }
    // Arrivals count from zero in each launch.
    if (a.begin > 0) launcher.zero(a.arrivals, plan.arrival_bytes);
    launch_resident(plan, launcher, resident_kernel(false, plan.cores, DtypeOf<S>::kDtype), a);
  }
}

template <class S>
void backward_resident(const Layer& layer, Launcher& launcher, const Options& options,
                       const Plan& plan, const LayerBackward<S>& args, const Deltas<S>* deltas) {
  const Sequences& seq = layer.sequences;
  ResidentBackwardArgs<S> a = {};
  describe_block(layer, options, plan, put_offsets(seq, launcher), a);
  put_exchange<S>(plan, launcher, a);
  a.d_y = args.d_y;
  a.d_h = args.d_h;
  a.d_c = layer.info().has_c ? args.d_c : nullptr;
  for (int64_t d = 0; d < layer.D; ++d) {
    const Kept<S> k = kept<S>(layer, args.reserve, d);
    a.w_hh[d] = args.w[d].w_hh;
    a.saved[d] = k.saved;
    a.h_in[d] = k.h_in;
    a.c_in[d] = k.c_in;
    a.delta[d] = deltas[d].delta;
    a.delta_x[d] = deltas[d].delta_x;
  }
  launch_resident(plan, launcher, resident_kernel(true, plan.cores, DtypeOf<S>::kDtype), a);
}

void log_plan(const Layer& layer, Dtype dtype, bool backward, const Plan& plan) {
  static const char* wanted = std::getenv("FUSEDRNN_LOG");
  if (!wanted || *wanted != '1') return;
  const Sequences& seq = layer.sequences;
  std::fprintf(stderr, "fusedrnn: cuda %s %s %s T=%lld N=%lld I=%lld H=%lld P=%lld D=%lld: %s\n",
               layer.info().name, name_of(dtype), backward ? "backward" : "forward",
               static_cast<long long>(seq.T), static_cast<long long>(seq.N),
               static_cast<long long>(layer.I), static_cast<long long>(layer.H),
               static_cast<long long>(layer.P), static_cast<long long>(layer.D),
               describe(plan).c_str());
}

// The plan of a pass, or an error where what was asked for cannot run.
template <class S>
Plan checked_plan(const Layer& layer, Launcher& launcher, bool backward, const Options& options) {
  const Plan plan = plan_layer(layer, launcher, DtypeOf<S>::kDtype, backward, options);
  log_plan(layer, DtypeOf<S>::kDtype, backward, plan);
  if (options.regime == Regime::kResident && plan.regime != Regime::kResident)
    throw RegimeRefused("the resident regime was asked for, but " + plan.why_per_step +
                        ": leave the choice to the library");
  return plan;
}

// --- Both regimes -------------------------------------------------------------------------------

template <class S>
void zero(Launcher& launcher, S* p, int64_t values) {
  if (p && values) launcher.zero(p, static_cast<size_t>(values) * sizeof(S));
}

template <class S>
void sum_rows(Launcher& launcher, const S* m, int64_t rows, int64_t columns, S* out, S* again) {
  launch(launcher, "sum_rows", DtypeOf<S>::kDtype, {static_cast<unsigned>(ceil_div(columns, 32))},
         SumRowsArgs<S>{rows, columns, m, out, again});
}

// Gradients of x and of one direction's parameters: each one product over all rows.
template <class S>
void gradients(const Layer& layer, Launcher& launcher, const LayerBackward<S>& args, int64_t d,
               const Deltas<S>& deltas) {
  const CellInfo& info = layer.info();
  const int64_t S_rows = layer.sequences.rows(), H = layer.H, P = layer.P, I = layer.I;
  const int64_t columns = layer.gate_columns();
  const Kept<S> k = kept<S>(layer, args.reserve, d);
  const Weights<S>& d_w = args.d_w[d];
  if (args.d_x) {
    multiply(launcher, S_rows, I, columns, deltas.delta_x, columns, false, args.w[d].w_ih, I, false,
             args.d_x, I, d == 1);
  }
  if (d_w.w_ih) {
    multiply(launcher, columns, I, S_rows, deltas.delta_x, columns, true, args.x, I, false,
             d_w.w_ih, I, false);
  }
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const int64_t K = stage.from_hidden ? P : H;
    const S* source = stage.from_hidden ? k.h_in : k.emit;
    if (stage.projects && d_w.w_hr) {
      multiply(launcher, P, K, S_rows, deltas.delta_proj, P, true, source, K, false, d_w.w_hr, K,
               false);
    } else if (!stage.projects && d_w.w_hh) {
      const int64_t first = stage.first_gate * H;
      multiply(launcher, stage.gates * H, K, S_rows, deltas.delta + first, columns, true, source, K,
               false, d_w.w_hh + first * K, K, false);
    }
  }
  if (!d_w.b_hh) return;
  if (info.separate_deltas) {
    sum_rows<S>(launcher, deltas.delta, S_rows, columns, d_w.b_hh, nullptr);
    sum_rows<S>(launcher, deltas.delta_x, S_rows, columns, d_w.b_ih, nullptr);
  } else {
    sum_rows<S>(launcher, deltas.delta, S_rows, columns, d_w.b_hh, d_w.b_ih);
  }
}

}  // namespace

template <class S>
size_t reserve_bytes(const Layer& layer, int64_t rows) {
  return layer.D * kept_bytes<S>(layer, rows);
}

Plan plan_layer(const Layer& layer, Launcher& launcher, Dtype dtype, bool backward,
                const Options& options) {
  PlanRequest q = {.cell = layer.cell,
                   .dtype = dtype,
                   .T = layer.sequences.T,
                   .N = layer.sequences.widest(),
                   .I = layer.I,
                   .H = layer.H,
                   .P = layer.P,
                   .D = layer.D,
                   .backward = backward,
                   .allow_tf32 = options.allow_tf32,
                   .regime = options.regime,
                   .device = launcher.device()};
  if (dtype != Dtype::kFloat64) {
    q.registers_fma = launcher.registers_of(resident_kernel(backward, Cores::kFma, dtype));
    q.registers_mma = launcher.registers_of(resident_kernel(backward, Cores::kMma, dtype));
  }
  return make_plan(q);
}

template <class S>
void layer_forward(const Layer& layer, Launcher& launcher, const Options& options,
                   const LayerForward<S>& args) {
  const Sequences& seq = layer.sequences;
  // Sequences of length 0 have no last step.
  for (int64_t d = 0; d < layer.D && args.reserve && layer.info().saves_h; ++d)
    zero(launcher, kept<S>(layer, args.reserve, d).saved + seq.widest() * layer.H,
         (seq.N - seq.widest()) * layer.H);
  if (seq.rows() == 0) return;  // h and c are their own result
  const Plan plan = checked_plan<S>(layer, launcher, false, options);
  if (plan.regime == Regime::kResident) {
    forward_resident(layer, launcher, options, plan, args);
  } else {
    forward_per_step(layer, launcher, options, args);
  }
}

template <class S>
void layer_backward(const Layer& layer, Launcher& launcher, const Options& options,
                    const LayerBackward<S>& args) {
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows(), columns = layer.gate_columns();
  if (rows == 0) {
    for (int64_t d = 0; d < layer.D; ++d) {
      zero(launcher, args.d_w[d].w_ih, columns * layer.I);
      zero(launcher, args.d_w[d].w_hh, columns * layer.P);
      zero(launcher, args.d_w[d].b_ih, columns);
      zero(launcher, args.d_w[d].b_hh, columns);
      zero(launcher, args.d_w[d].w_hr, layer.P * layer.H);
    }
    return;
  }
  Deltas<S> deltas[2] = {};
  for (int64_t d = 0; d < layer.D; ++d) {
    deltas[d].delta = scratch<S>(launcher, rows * columns);
    deltas[d].delta_x =
        info.separate_deltas ? scratch<S>(launcher, rows * columns) : deltas[d].delta;
    if (info.projects) deltas[d].delta_proj = scratch<S>(launcher, rows * layer.P);
  }
  const Plan plan = checked_plan<S>(layer, launcher, true, options);
  if (plan.regime == Regime::kResident) {
    backward_resident(layer, launcher, options, plan, args, deltas);
  } else {
    backward_per_step(layer, launcher, args, deltas);
  }
  for (int64_t d = 0; d < layer.D; ++d) gradients(layer, launcher, args, d, deltas[d]);
}

#define FUSEDRNN_LAYER(S)                                                                          \
  template size_t reserve_bytes<S>(const Layer&, int64_t);                                         \
  template void layer_forward<S>(const Layer&, Launcher&, const Options&, const LayerForward<S>&); \
  template void layer_backward<S>(const Layer&, Launcher&, const Options&, const LayerBackward<S>&);
FUSEDRNN_LAYER(float)
FUSEDRNN_LAYER(double)
FUSEDRNN_LAYER(Half)
FUSEDRNN_LAYER(BFloat16)
#undef FUSEDRNN_LAYER

}  // namespace fusedrnn::cuda
