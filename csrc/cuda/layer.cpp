#include "layer.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "../layer/log.h"
#include "../layer/reserve.h"
#include "launches.h"
#include "regimes.h"

namespace fusedrnn::cuda {
namespace {

// The plan of a pass. Throws RegimeRefused if the regime that was asked for cannot run.
template <class Stored>
Plan checked_plan(const Pass& pass, bool backward) {
  const auto& [layer, launcher, options] = pass;
  constexpr Dtype kDtype = DtypeOf<Stored>::kDtype;
  const Plan plan = plan_layer(layer, launcher, kDtype, backward, options);
  if (logs()) {
    const std::string how = std::string(name_of(kDtype)) + (backward ? " backward" : " forward");
    log_pass(layer, "cuda", how.c_str(), to_text(plan));
  }
  if (options.regime && plan.regime != *options.regime)
    throw RegimeRefused("the " + std::string(name_of(*options.regime)) +
                        " regime was asked for, but " + plan.why_per_step +
                        ": leave the choice to the library");
  return plan;
}

template <class Stored>
std::vector<Deltas<Stored>> make_deltas(const Pass& pass) {
  const auto& [layer, launcher, options] = pass;
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows(), columns = layer.gate_columns();
  std::vector<Deltas<Stored>> deltas(layer.D);
  for (Deltas<Stored>& d : deltas) {
    d.delta = scratch<Stored>(launcher, rows * columns);
    d.delta_x = info.separate_deltas ? scratch<Stored>(launcher, rows * columns) : d.delta;
    if (info.projects) d.delta_proj = scratch<Stored>(launcher, rows * layer.P);
    if (info.params) d.delta_params = scratch<Stored>(launcher, rows * info.params * layer.H);
  }
  return deltas;
}

// out[column] = Σ_rows m[row, column]. `again` receives a copy of the sums unless it is null.
template <class Stored>
void sum_rows(Launcher& launcher, const Matrix<const Stored>& m, Stored* out, Stored* again) {
  launch<Stored>(launcher, "sum_rows", {static_cast<unsigned>(ceil_div(m.columns, 32))},
                 SumRowsArgs<Stored>{m.rows, m.columns, m.data, out, again});
}

// Computes the gradients of x and of one direction's parameters. Each of them is one product or one
// sum over all rows.
template <class Stored>
void gradients(const Pass& pass, const LayerBackward<Stored>& args, int64_t d,
               const Deltas<Stored>& deltas) {
  const auto& [layer, launcher, options] = pass;
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows(), columns = layer.gate_columns(), I = layer.I;
  const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
  const Parameters<Stored>& d_w = args.d_w[d];
  const Matrix<const Stored> delta = dense<const Stored>(deltas.delta, rows, columns);
  const Matrix<const Stored> delta_x = dense<const Stored>(deltas.delta_x, rows, columns);
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
  if (d_w.w_ch) {
    const int64_t params = info.params * layer.H;
    sum_rows<Stored>(launcher, dense<const Stored>(deltas.delta_params, rows, params), d_w.w_ch,
                     nullptr);
  }
  if (!d_w.b_hh) return;
  sum_rows(launcher, delta, d_w.b_hh, info.separate_deltas ? nullptr : d_w.b_ih);
  if (info.separate_deltas) sum_rows<Stored>(launcher, delta_x, d_w.b_ih, nullptr);
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
                   .device = launcher.device()};
  if (dtype != Dtype::kFloat64) {
    const auto registers = [&](Cores cores) {
      return launcher.registers_of(loop_kernel(Regime::kResident, backward, cores, dtype));
    };
    q.registers_fma = registers(Cores::kFma);
    q.registers_mma = registers(Cores::kMma);
  }
  return make_plan(q);
}

template <class Stored>
void layer_forward(const Layer& layer, Launcher& launcher, const Options& options,
                   const LayerForward<Stored>& args) {
  zero_unwritten<Stored>(layer, args.reserve,
                         [&](Stored* p, int64_t values) { zero(launcher, p, values); });
  if (layer.sequences.rows() == 0) return;  // without steps, h_n is h_0 and c_n is c_0
  const Pass pass = {layer, launcher, options};
  const Plan plan = checked_plan<Stored>(pass, false);
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
  const Pass pass = {layer, launcher, options};
  const std::vector<Deltas<Stored>> deltas = make_deltas<Stored>(pass);
  const Plan plan = checked_plan<Stored>(pass, true);
  if (plan.regime == Regime::kResident) {
    backward_resident(pass, plan, args, deltas.data());
  } else if (plan.regime == Regime::kStreamed) {
    backward_streamed(pass, plan, args, deltas.data());
  } else {
    backward_per_step(pass, args, deltas.data());
  }
  for (int64_t d = 0; d < layer.D; ++d) gradients(pass, args, d, deltas[d]);
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
