#include "layer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../layer/log.h"
#include "../layer/reserve.h"
#include "launches.h"
#include "regimes.h"
#include "row_sums.h"

namespace fusedrnn::cuda {
namespace {

// The plan of a pass. Throws RegimeRefused if the regime that was asked for cannot run.
template <class Stored>
Plan checked_plan(const Pass& pass, bool backward) {
  const auto& [layer, launcher, options, scratch] = pass;
  constexpr Dtype kDtype = DtypeOf<Stored>::kDtype;
  const Plan plan = plan_layer(layer, launcher, kDtype, backward, options);
  if (logs()) {
    const std::string how = std::string(name_of(kDtype)) + (backward ? " backward" : " forward");
    log_pass(layer, "cuda", how.c_str(), to_text(plan));
  }
  if (is_refused(options.regime, options.choice, plan)) {
    const std::string what =
        options.choice.any()
            ? std::string("a plan of the ") + (backward ? "backward" : "forward") + " pass"
            : std::string("the ") + name_of(*options.regime) + " regime";
    throw RegimeRefused(what + " was asked for, but " + plan.why_per_step +
                        ": leave the choice to the library");
  }
  return plan;
}

// Asks for the memory of one direction's deltas.
template <class Stored>
void want_deltas(const Pass& pass, Deltas<Stored>& d) {
  const Layer& layer = pass.layer;
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows(), columns = layer.gate_columns();
  pass.scratch.want(d.delta, rows * columns);
  if (info.separate_deltas) pass.scratch.want(d.delta_x, rows * columns);
  if (info.projects) pass.scratch.want(d.delta_proj, rows * layer.P);
  if (info.params) pass.scratch.want(d.delta_params, rows * info.params * layer.H);
}

// How many sums over rows a backward pass takes in all.
template <class Stored>
int count_sums(const Layer& layer, const LayerBackward<Stored>& args) {
  int count = 0;
  for (int64_t d = 0; d < layer.D; ++d) {
    if (args.d_w[d].w_ch) ++count;
    if (args.d_w[d].b_hh) count += layer.info().separate_deltas ? 2 : 1;
  }
  return count;
}

// Computes the gradients of x and of one direction's parameters. Each of them is one product over
// all rows, or one of `sums`.
template <class Stored>
void gradients(const Pass& pass, const LayerBackward<Stored>& args, int64_t d,
               const Deltas<Stored>& deltas, RowSums<Stored>& sums) {
  const auto& [layer, launcher, options, scratch] = pass;
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows(), columns = layer.gate_columns(), I = layer.I;
  const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
  const Parameters<Stored>& d_w = args.d_w[d];
  const Matrix<const Stored> delta = dense<const Stored>(deltas.delta, rows, columns);
  const Matrix<const Stored> delta_x =
      deltas.delta_x ? dense<const Stored>(deltas.delta_x, rows, columns) : delta;
  if (args.d_x)
    multiply(launcher, delta_x, dense(args.w[d].w_ih, columns, I), dense(args.d_x, rows, I),
             d == 1);
  if (d_w.w_ih)
    multiply(launcher, delta_x.transpose(), dense(args.x, rows, I), dense(d_w.w_ih, columns, I));
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const StageWeight<Stored> d_weight = stage_weight(layer, stage, d_w);
    if (!d_weight.weight) continue;
    const Matrix<const Stored> of_stage =
        stage.projects ? dense<const Stored>(deltas.delta_proj, rows, layer.P)
                       : Matrix<const Stored>{deltas.delta + stage.first_gate * layer.H, rows,
                                              d_weight.rows(), columns};
    const Stored* source = stage.from_hidden ? reserve.h_in : reserve.emit;
    multiply(launcher, of_stage.transpose(), dense(source, rows, d_weight.K), d_weight.matrix());
  }
  if (d_w.w_ch)
    sums.add(dense<const Stored>(deltas.delta_params, rows, info.params * layer.H), d_w.w_ch);
  if (!d_w.b_hh) return;
  sums.add(delta, d_w.b_hh, deltas.delta_x ? nullptr : d_w.b_ih);
  if (deltas.delta_x) sums.add(delta_x, d_w.b_ih);
}

// Zeroes h and c, or their gradients, of the sequences that begin anew at step 0.
template <class V>
void drop_states(const Layer& layer, Launcher& launcher, const Beginnings& beginnings, V* h, V* c) {
  if (!beginnings.begins) return;
  constexpr int64_t kWords = sizeof(V) / sizeof(uint32_t);
  DropStatesArgs a = {};
  a.n = layer.sequences.widest();
  a.begins = beginnings.begins;
  a.h = reinterpret_cast<uint32_t*>(h);
  a.h_words = layer.P * kWords;
  a.c = layer.info().has_c ? reinterpret_cast<uint32_t*>(c) : nullptr;
  a.c_words = layer.info().has_c ? layer.H * kWords : 0;
  launcher.launch({.kernel = "drop_states",
                   .grid = grid_for(a.n * (a.h_words + a.c_words)),
                   .block = {kThreads},
                   .args = &a,
                   .args_bytes = sizeof(a)});
}

}  // namespace

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
                   .device = launcher.device(),
                   .choice = options.choice};
  if (dtype != Dtype::kFloat64) {
    const auto registers = [&](Cores cores) {
      return launcher.registers_of(loop_kernel(Regime::kResident, false, backward, cores, dtype));
    };
    q.registers_fma = registers(Cores::kFma);
    q.registers_mma = registers(Cores::kMma);
  }
  return make_plan(q);
}

template <class Stored>
void layer_forward(const Layer& layer, Launcher& launcher, const Options& options,
                   const LayerForward<Stored>& args) {
  // With beginnings, the kernels write every row of the reserve.
  if (!layer.has_starts)
    zero_unwritten<Stored>(layer, args.reserve,
                           [&](Stored* p, int64_t values) { zero(launcher, p, values); });
  if (layer.sequences.rows() == 0) return;  // without steps, h_n is h_0 and c_n is c_0
  Scratch scratch;
  const Pass pass = {layer, launcher, options, scratch};
  const Plan plan = checked_plan<Stored>(pass, false);
  drop_states(layer, launcher, args.beginnings, args.h, args.c);
  if (plan.regime == Regime::kResident) {
    forward_resident(pass, plan, args);
  } else if (plan.regime == Regime::kStreamed) {
    forward_streamed(pass, plan, args);
  } else {
    forward_per_step(pass, args);
  }
}

template <class Stored>
void layer_backward(const Layer& layer, Launcher& launcher, const Options& options,
                    const LayerBackward<Stored>& args) {
  if (layer.sequences.rows() == 0) {
    for (int64_t d = 0; d < layer.D; ++d)
      for_wanted(layer.info(), layer.parameter_sizes(), args.d_w[d],
                 [&](Stored* p, int64_t values) { zero(launcher, p, values); });
    return;
  }
  Scratch scratch;
  const Pass pass = {layer, launcher, options, scratch};
  Deltas<Stored> deltas[2] = {};
  for (int64_t d = 0; d < layer.D; ++d) want_deltas(pass, deltas[d]);
  const int64_t widest = std::max(layer.gate_columns(), layer.info().params * layer.H);
  RowSums<Stored> sums(scratch, layer.sequences.rows(), widest, count_sums(layer, args));
  const Plan plan = checked_plan<Stored>(pass, true);
  if (plan.regime == Regime::kResident) {
    backward_resident(pass, plan, args, deltas);
  } else if (plan.regime == Regime::kStreamed) {
    backward_streamed(pass, plan, args, deltas);
  } else {
    backward_per_step(pass, args, deltas);
  }
  drop_states(layer, launcher, args.beginnings, args.d_h, args.d_c);
  for (int64_t d = 0; d < layer.D; ++d) gradients(pass, args, d, deltas[d], sums);
  sums.run(launcher);
}

#define FUSEDRNN_LAYER(Stored)                                                  \
  template void layer_forward<Stored>(const Layer&, Launcher&, const Options&,  \
                                      const LayerForward<Stored>&);             \
  template void layer_backward<Stored>(const Layer&, Launcher&, const Options&, \
                                       const LayerBackward<Stored>&);
FUSEDRNN_LAYER(float)
FUSEDRNN_LAYER(double)
FUSEDRNN_LAYER(Half)
FUSEDRNN_LAYER(Bf16)
#undef FUSEDRNN_LAYER

}  // namespace fusedrnn::cuda
