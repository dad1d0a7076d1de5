// The host side of the resident regime. Backward is one launch of a kernel for all steps, forward
// one launch for each chunk of steps whose x W is computed at once.
#include <algorithm>

#include "regimes.h"

namespace fusedrnn::cuda {
namespace {

// Whether every step has the same rows, so that a kernel needs no offsets.
bool is_plain(const Sequences& seq) { return seq.batch_sizes.back() == seq.N; }

// Fills the arguments that forward and backward share, and allocates the scratch memory of the
// pass, of which the exchange and the counters of arrivals are a part. The rows of the exchange are
// padded to K_pad values, and the padding must be zero.
template <class Stored, class Args>
void fill_shared(const Pass& pass, const Plan& plan, Args& a) {
  const auto& [layer, launcher, options, scratch] = pass;
  const Sequences& seq = layer.sequences;
  a.cell = layer.cell;
  a.shape = plan.shape;
  a.T = seq.T;
  a.N = seq.N;
  a.H = layer.H;
  a.D = layer.D;
  a.spin_limit = options.spin_limit;
  char* memory = nullptr;
  scratch.want_zero(memory, static_cast<int64_t>(plan.workspace_bytes()));
  int64_t* row_offset = nullptr;
  const bool puts_offsets = !is_plain(seq) && !options.row_offset;
  if (puts_offsets) scratch.want(row_offset, static_cast<int64_t>(seq.row_offset.size()));
  scratch.allocate(launcher);
  if (puts_offsets) put_numbers(launcher, seq.row_offset, row_offset);
  if (!is_plain(seq)) a.row_offset = puts_offsets ? row_offset : options.row_offset;
  a.arrivals = reinterpret_cast<unsigned*>(memory);
  memory += plan.arrival_bytes;
  for (int s = 0; s < kMaxStages; ++s) {
    a.exchange[s] = reinterpret_cast<Stored*>(memory);
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

}  // namespace

template <class Stored>
void forward_resident(const Pass& pass, const Plan& plan, const LayerForward<Stored>& args) {
  const auto& [layer, launcher, options, scratch] = pass;
  const Sequences& seq = layer.sequences;
  const int64_t columns = layer.gate_columns(), chunk = chunk_steps<Stored>(pass);
  ResidentForwardArgs<Stored> a = {};
  Real<Stored>* gates_x[2] = {};
  for (int64_t d = 0; d < layer.D; ++d) scratch.want(gates_x[d], seq.row_offset[chunk] * columns);
  fill_shared<Stored>(pass, plan, a);
  a.h = args.h;
  a.c = layer.info().has_c ? args.c : nullptr;
  a.y = args.y;
  a.row_input = args.row_input;
  for (int64_t d = 0; d < layer.D; ++d) {
    a.gates_x[d] = gates_x[d];
    a.w_hh[d] = args.w[d].w_hh;
    a.b_ih[d] = args.w[d].b_ih;
    a.b_hh[d] = args.w[d].b_hh;
    a.params[d] = args.w[d].w_ch;
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
    if (a.begin > 0) launcher.zero(a.arrivals, plan.arrival_bytes);
    launch_resident(plan, launcher, resident_kernel(false, plan.cores, DtypeOf<Stored>::kDtype), a);
  }
}

template <class Stored>
void backward_resident(const Pass& pass, const Plan& plan, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas) {
  const Layer& layer = pass.layer;
  ResidentBackwardArgs<Stored> a = {};
  fill_shared<Stored>(pass, plan, a);
  a.d_y = args.d_y;
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
    a.delta_params[d] = deltas[d].delta_params;
  }
  launch_resident(plan, pass.launcher, resident_kernel(true, plan.cores, DtypeOf<Stored>::kDtype),
                  a);
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
