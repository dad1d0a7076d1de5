// The host side of the resident regime. Backward is one launch of a kernel for all steps, forward
// one launch for each chunk of steps whose x W is computed at once.
#include <algorithm>

#include "regimes.h"

namespace fusedrnn::cuda {
template <class Stored>
void forward_resident(const Pass& pass, const Plan& plan, const LayerForward<Stored>& args) {
  const auto& [layer, launcher, options, scratch] = pass;
  const Sequences& seq = layer.sequences;
  const int64_t columns = layer.gate_columns(), chunk = chunk_steps<Stored>(pass);
  ResidentForwardArgs<Stored> a = {};
  Real<Stored>* gates_x[2] = {};
  for (int64_t d = 0; d < layer.D; ++d) scratch.want(gates_x[d], seq.row_offset[chunk] * columns);
  fill_shared<Stored>(pass, plan, a);
  if (plan.words) a.arrivals = nullptr;
  a.words = plan.words;
  a.as_one = plan.as_one;
  a.h = args.h;
  a.c = layer.info().has_c ? args.c : nullptr;
  a.y = args.y;
  a.y_c = layer.c_in_y ? args.y + layer.D * layer.H : nullptr;
  a.y_ld = layer.y_width();
  a.row_input = args.row_input;
  for (int64_t d = 0; d < layer.D; ++d) {
    a.gates_x[d] = gates_x[d];
    a.w_hh[d] = args.w[d].w_hh;
    a.b_ih[d] = args.w[d].b_ih;
    a.b_hh[d] = args.w[d].b_hh;
    a.params[d] = args.w[d].w_ch;
    a.drops[d] = args.beginnings.drops[d];
    if (!args.reserve) continue;
    const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
    a.saved[d] = reserve.saved;
    a.h_in[d] = reserve.h_in;
    a.c_in[d] = reserve.c_in;
    a.emit[d] = reserve.emit;
  }
  for (a.begin = 0; a.begin < seq.T; a.begin = a.end) {
    a.end = std::min(seq.T, a.begin + chunk);
    for (int64_t d = 0; d < layer.D; ++d) {
      const RowRange rows = rows_of(seq, d == 1, a.begin, a.end);
      a.first_row[d] = rows.begin;
      multiply_input(pass, args, d, rows, gates_x[d]);
    }
    // The kernel expects counters that start at zero.
    if (a.begin > 0 && a.arrivals) launcher.zero(a.arrivals, plan.arrival_bytes);
    launch_loop<Stored>(plan, launcher, false, a);
  }
}

template <class Stored>
void backward_resident(const Pass& pass, const Plan& plan, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas) {
  const Layer& layer = pass.layer;
  ResidentBackwardArgs<Stored> a = {};
  fill_shared<Stored>(pass, plan, a);
  if (plan.words) a.arrivals = nullptr;
  a.words = plan.words;
  a.as_one = plan.as_one;
  a.d_y = args.d_y;
  a.d_y_c = args.d_y && layer.c_in_y ? args.d_y + layer.D * layer.H : nullptr;
  a.d_y_ld = layer.y_width();
  a.row_input = args.row_input;
  a.d_h = args.d_h;
  a.d_c = layer.info().has_c ? args.d_c : nullptr;
  for (int64_t d = 0; d < layer.D; ++d) {
    const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
    a.w_hh[d] = args.w[d].w_hh;
    a.saved[d] = reserve.saved;
    a.h_in[d] = reserve.h_in;
    a.c_in[d] = reserve.c_in;
    a.delta[d] = deltas[d].delta;
    a.delta_x[d] = deltas[d].delta_x;
    a.params[d] = args.w[d].w_ch;
    a.drops[d] = args.beginnings.drops[d];
    a.delta_params[d] = deltas[d].delta_params;
  }
  launch_loop<Stored>(plan, pass.launcher, true, a);
}

#define FUSEDRNN_RESIDENT_HOST(Stored)                                                            \
  template void forward_resident<Stored>(const Pass&, const Plan&, const LayerForward<Stored>&);  \
  template void backward_resident<Stored>(const Pass&, const Plan&, const LayerBackward<Stored>&, \
                                          const Deltas<Stored>*);
FUSEDRNN_RESIDENT_HOST(float)
FUSEDRNN_RESIDENT_HOST(double)
FUSEDRNN_RESIDENT_HOST(Half)
FUSEDRNN_RESIDENT_HOST(Bf16)
#undef FUSEDRNN_RESIDENT_HOST

}  // namespace fusedrnn::cuda
