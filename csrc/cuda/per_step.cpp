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
    return a.work.h_rounded;
  } else {
    return a.work.h;
  }
}

// The emit of an earlier stage, for the sequences of the step.
template <class Stored>
const Stored* emit_of(const StepForwardArgs<Stored>& a, int64_t H) {
  return a.work.emit + (a.work.keeps ? a.rows.row * H : 0);
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
    const Stored* source = stage.from_hidden ? source_h(a) : emit_of(a, layer.H);
    multiply(launcher, dense(source, a.rows.n, weight.K), weight.matrix().transpose(),
             dense(acc, a.rows.n, weight.rows()));
    a.stage = s;
    launch<Stored>(launcher, "step_forward", grid_for(a.rows.n * layer.width(stage)), a);
  }
}

}  // namespace

template <class Stored>
void forward_per_step(const Pass& pass, const LayerForward<Stored>& args) {
  const auto& [layer, launcher, options, scratch] = pass;
  const Sequences& seq = layer.sequences;
  const int64_t chunk = chunk_steps<Stored>(pass);
  const StepBuffers<Stored> buffers = make_buffers(pass, args);

  for (int64_t d = 0; d < layer.D; ++d) {
    const bool descending = d == 1;
    StepForwardArgs<Stored> a = {};
    a.cell = layer.cell;
    a.acc = buffers.acc;
    a.work = forward_work(layer, args, d);
    a.work.gates_x = buffers.gates_x;
    if (buffers.h_rounded) a.work.h_rounded = buffers.h_rounded + d * seq.N * layer.P;
    if (!args.reserve) {
      a.work.saved = buffers.saved;
      a.work.emit = buffers.emit;
    }
    for (int64_t begin = 0; begin < seq.T; begin += chunk) {
      const int64_t end = std::min(seq.T, begin + chunk);
      const RowRange chunk_rows = rows_of(seq, descending, begin, end);
      multiply_input(pass, args, d, chunk_rows, buffers.gates_x);
      a.work.first_row = chunk_rows.begin;
      for (int64_t p = begin; p < end; ++p) {
        const RowRange rows = rows_of(seq, descending, p, p + 1);
        a.rows = {rows.begin, rows.count(), 0, 0};
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
  const int64_t H = layer.H, P = layer.P, columns = layer.gate_columns();
  Scalar* d_emit = nullptr;
  if (info.stages > 1) scratch.want(d_emit, seq.widest() * H);
  scratch.allocate(launcher);

  for (int64_t d = 0; d < layer.D; ++d) {
    StepBackwardArgs<Stored> a = {};
    a.cell = layer.cell;
    a.d_emit = d_emit;
    a.work = backward_work(layer, args, deltas[d], d);
    for (int64_t p = 0; p < seq.T; ++p) {
      const RowRange rows = rows_of(seq, d == 0, p, p + 1);
      // The step that this loop ran before is the next one in time.
      a.rows = {rows.begin, rows.count(), a.rows.row, a.rows.n};
      const int64_t n = a.rows.n;
      for (int s = info.stages - 1; s >= 0; --s) {
        const Stage& stage = info.stage[s];
        a.stage = s;
        launch<Stored>(launcher, "step_backward", grid_for(n * layer.width(stage)), a);
        const StageWeight<const Stored> weight = stage_weight(layer, stage, args.w[d]);
        const Matrix<const Stored> delta =
            stage.projects
                ? dense<const Stored>(a.work.delta_proj + a.rows.row * P, n, P)
                : Matrix<const Stored>{a.work.delta + a.rows.row * columns + stage.first_gate * H,
                                       n, weight.rows(), columns};
        Scalar* out = s == 0 ? a.work.d_h : d_emit;
        multiply(launcher, delta, weight.matrix(), dense(out, n, weight.K),
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
