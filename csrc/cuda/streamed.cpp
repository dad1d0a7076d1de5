// The host side of the streamed regime. As in the resident regime, backward is one launch of a
// kernel for all steps, and forward one launch for each chunk of steps whose x W is computed at
// once.
#include <algorithm>

#include "regimes.h"

namespace fusedrnn::cuda {
namespace {

// Fills the arguments that forward and backward share, and allocates the scratch memory of the
// pass.
template <class Stored, class Args>
void fill_streamed(const Pass& pass, const Plan& plan, const Parameters<const Stored>* w, Args& a) {
  if (plan.streamed_bytes) pass.scratch.want(a.streamed, static_cast<int64_t>(plan.streamed_bytes));
  fill_shared<Stored>(pass, plan, a);
  a.P = pass.layer.P;
  for (int64_t d = 0; d < pass.layer.D; ++d) {
    a.w_hh[d] = w[d].w_hh;
    a.w_hr[d] = w[d].w_hr;
  }
}

}  // namespace

template <class Stored>
void forward_streamed(const Pass& pass, const Plan& plan, const LayerForward<Stored>& args) {
  const auto& [layer, launcher, options, scratch] = pass;
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t columns = layer.gate_columns(), chunk = chunk_steps<Stored>(pass);
  StreamedForwardArgs<Stored> a = {};
  Real<Stored>* gates_x[2] = {};
  Stored* saved[2] = {};
  for (int64_t d = 0; d < layer.D; ++d) {
    scratch.want(gates_x[d], seq.row_offset[chunk] * columns);
    if (!args.reserve && info.stages > 1)
      scratch.want(saved[d], seq.widest() * info.saved * layer.H);
  }
  fill_streamed(pass, plan, args.w, a);
  for (int64_t d = 0; d < layer.D; ++d) {
    a.work[d] = forward_work(layer, args, d);
    a.work[d].gates_x = gates_x[d];
    if (saved[d]) a.work[d].saved = saved[d];
  }
  for (a.begin = 0; a.begin < seq.T; a.begin = a.end) {
    a.end = std::min(seq.T, a.begin + chunk);
    for (int64_t d = 0; d < layer.D; ++d) {
      const RowRange rows = rows_of(seq, d == 1, a.begin, a.end);
      a.work[d].first_row = rows.begin;
      multiply_input(pass, args, d, rows, gates_x[d]);
    }
    // The kernel expects counters that start at zero.
    if (a.begin > 0) launcher.zero(a.arrivals, plan.arrival_bytes);
    launch_loop<Stored>(plan, launcher, false, a);
  }
}

template <class Stored>
void backward_streamed(const Pass& pass, const Plan& plan, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas) {
  StreamedBackwardArgs<Stored> a = {};
  fill_streamed(pass, plan, args.w, a);
  a.end = pass.layer.sequences.T;
  for (int64_t d = 0; d < pass.layer.D; ++d)
    a.work[d] = backward_work(pass.layer, args, deltas[d], d);
  launch_loop<Stored>(plan, pass.launcher, true, a);
}

#define FUSEDRNN_STREAMED_HOST(Stored)                                                            \
  template void forward_streamed<Stored>(const Pass&, const Plan&, const LayerForward<Stored>&);  \
  template void backward_streamed<Stored>(const Pass&, const Plan&, const LayerBackward<Stored>&, \
                                          const Deltas<Stored>*);
FUSEDRNN_STREAMED_HOST(float)
FUSEDRNN_STREAMED_HOST(double)
FUSEDRNN_STREAMED_HOST(Half)
FUSEDRNN_STREAMED_HOST(Bf16)
#undef FUSEDRNN_STREAMED_HOST

}  // namespace fusedrnn::cuda
