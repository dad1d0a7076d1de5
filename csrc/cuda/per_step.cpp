// The per-step regime: for each step and stage one product of the launcher and one kernel.
#include <algorithm>

#include "regimes.h"

namespace fusedrnn::cuda {
namespace {

// Scratch memory that all steps share. `widest` is the number of sequences of the widest step.
template <class Stored>
struct StepBuffers {
  Real<Stored>* gates_x;  // [chunk rows, G*H]
  Real<Stored>* acc;      // [widest, G*H or P] the product of a stage
  // saved and emit go from a stage to the next, in cells of several stages where forward has no
  // reserve; else they are null.
  Stored* saved;      // [widest, kSaved*H]
  Stored* emit;       // [widest, H]
  Stored* h_rounded;  // [D, N, P] h rounded for the products; null where Stored is Real<Stored>
};

template <class Stored>
StepBuffers<Stored> make_buffers(const Pass& pass, const LayerForward<Stored>& args) {
  const auto& [layer, launcher, options, scratch] = pass;
  const CellInfo& info = layer.info();
  const Sequences& seq = layer.sequences;
  const int64_t widest = seq.widest(), columns = layer.gate_columns();
  const int64_t states = layer.D * seq.N * layer.P;
  const bool hands_on = info.stages > 1 && !args.reserve;
  StepBuffers<Stored> b = {};
  scratch.want(b.gates_x, seq.row_offset[chunk_steps<Stored>(pass)] * columns);
  scratch.want(b.acc, widest * std::max(columns, layer.P));
  if (hands_on) {
    scratch.want(b.saved, widest * info.saved * layer.H);
    scratch.want(b.emit, widest * layer.H);
  }
  if constexpr (kRounds<Stored>) scratch.want(b.h_rounded, states);
  scratch.allocate(launcher);
  if constexpr (kRounds<Stored>)
    launch<Stored>(launcher, "round", grid_for(states),
                   RoundArgs<Stored>{states, args.h, b.h_rounded});
  return b;
}

// h in the stored type, in which a product reads it.
template <class Stored>
const Stored* source_h(const StepForwardArgs<Stored>& a) {
  if constexpr (kRounds<Stored>) {
    return a.h_rounded;
  } else {
    return a.h;
  }
}

// Runs all stages of the step that `a` describes.
template <class Stored>
void run_stages(const Pass& pass, const Parameters<const Stored>& w, Real<Stored>* acc,
                StepForwardArgs<Stored>& a) {
  const auto& [layer, launcher, options, scratch] = pass;
  const CellInfo& info = layer.info();
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const StageWeight<const Stored> weight = stage_weight(layer, stage, w);
    const Stored* source = stage.from_hidden ? source_h(a) : a.emit;
    multiply(launcher, dense(source, a.n, weight.K), weight.matrix().transpose(),
             dense(acc, a.n, weight.rows()));
    a.stage = s;
    launch<Stored>(launcher, "step_forward", grid_for(a.n * layer.width(stage)), a);
  }
}

}  // namespace

template <class Stored>
void forward_per_step(const Pass& pass, const LayerForward<Stored>& args) {
  const auto& [layer, launcher, options, scratch] = pass;
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t N = seq.N, H = layer.H, P = layer.P, columns = layer.gate_columns();
  const int64_t chunk = chunk_steps<Stored>(pass);
  const StepBuffers<Stored> buffers = make_buffers(pass, args);

  for (int64_t d = 0; d < layer.D; ++d) {
    const bool descending = d == 1, keep = args.reserve != nullptr;
    const Reserve<Stored> reserve =
        keep ? reserve_of<Stored>(layer, args.reserve, d) : Reserve<Stored>();
    StepForwardArgs<Stored> a = {};
    a.cell = layer.cell;
    a.H = H, a.P = P;
    a.acc = buffers.acc;
    a.b_ih = args.w[d].b_ih;
    a.b_hh = args.w[d].b_hh;
    a.params = args.w[d].w_ch;
    a.h = args.h + d * N * P;
    if (buffers.h_rounded) a.h_rounded = buffers.h_rounded + d * N * P;
    a.c = info.has_c ? args.c + d * N * H : nullptr;
    a.y_ld = layer.D * P;
    for (int64_t begin = 0; begin < seq.T; begin += chunk) {
      const int64_t end = std::min(seq.T, begin + chunk);
      const RowRange chunk_rows = rows_of(seq, descending, begin, end);
      multiply_input(pass, args, d, chunk_rows, buffers.gates_x);
      for (int64_t p = begin; p < end; ++p) {
        const RowRange rows = rows_of(seq, descending, p, p + 1);
        const int64_t row = rows.begin;
        a.n = rows.count();
        a.row_input = args.row_input ? args.row_input + row : nullptr;
        a.gates_x = buffers.gates_x + (row - chunk_rows.begin) * columns;
        a.y = args.y + row * a.y_ld + d * P;
        a.h_in = keep ? reserve.h_in + row * P : nullptr;
        a.c_in = reserve.c_in ? reserve.c_in + row * H : nullptr;
        a.saved = keep ? reserve.saved + (info.saves_h ? 0 : row * info.saved * H) : buffers.saved;
        a.emit = reserve.emit ? reserve.emit + row * H : buffers.emit;
        run_stages(pass, args.w[d], buffers.acc, a);
      }
    }
  }
}

template <class Stored>
void backward_per_step(const Pass& pass, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas) {
  const auto& [layer, launcher, options, scratch] = pass;
  using Scalar = Real<Stored>;
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t N = seq.N, H = layer.H, P = layer.P, columns = layer.gate_columns();
  Scalar* d_emit = nullptr;
  if (info.stages > 1) scratch.want(d_emit, seq.widest() * H);
  scratch.allocate(launcher);

  for (int64_t d = 0; d < layer.D; ++d) {
    const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
    StepBackwardArgs<Stored> a = {};
    a.cell = layer.cell;
    a.H = H, a.P = P;
    a.d_emit = d_emit;
    a.d_y_ld = layer.D * P;
    a.d_h = args.d_h + d * N * P;
    a.params = args.w[d].w_ch;
    a.d_c = info.has_c ? args.d_c + d * N * H : nullptr;
    for (int64_t p = 0; p < seq.T; ++p) {
      const RowRange rows = rows_of(seq, d == 0, p, p + 1);
      const int64_t row = rows.begin;
      a.n_next = a.n;  // the step that this loop ran before is the next one in time
      a.h_next = a.h_in;
      a.n = rows.count();
      a.d_y = args.d_y ? args.d_y + row * a.d_y_ld + d * P : nullptr;
      a.saved = reserve.saved + (info.saves_h ? 0 : row * info.saved * H);
      a.h_in = reserve.h_in + row * P;
      a.c_in = reserve.c_in ? reserve.c_in + row * H : nullptr;
      a.delta = deltas[d].delta + row * columns;
      a.delta_x = deltas[d].delta_x ? deltas[d].delta_x + row * columns : nullptr;
      a.delta_proj = info.projects ? deltas[d].delta_proj + row * P : nullptr;
      a.row_input = args.row_input ? args.row_input + row : nullptr;
      if (info.params) a.delta_params = deltas[d].delta_params + row * info.params * H;
      for (int s = info.stages - 1; s >= 0; --s) {
        const Stage& stage = info.stage[s];
        a.stage = s;
        launch<Stored>(launcher, "step_backward", grid_for(a.n * layer.width(stage)), a);
        const StageWeight<const Stored> weight = stage_weight(layer, stage, args.w[d]);
        const Matrix<const Stored> delta =
            stage.projects
                ? dense<const Stored>(a.delta_proj, a.n, P)
                : Matrix<const Stored>{a.delta + stage.first_gate * H, a.n, weight.rows(), columns};
        Scalar* out = s == 0 ? a.d_h : d_emit;
        multiply(launcher, delta, weight.matrix(), dense(out, a.n, weight.K),
                 s == 0 && info.carries_h);
      }
    }
  }
}

#define FUSEDRNN_PER_STEP(Stored)                                                    \
  template void forward_per_step<Stored>(const Pass&, const LayerForward<Stored>&);  \
  template void backward_per_step<Stored>(const Pass&, const LayerBackward<Stored>&, \
                                          const Deltas<Stored>*);
FUSEDRNN_PER_STEP(float)
FUSEDRNN_PER_STEP(double)
FUSEDRNN_PER_STEP(Half)
FUSEDRNN_PER_STEP(Bf16)
#undef FUSEDRNN_PER_STEP

}  // namespace fusedrnn::cuda
