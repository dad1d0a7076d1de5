// The three regimes, in which the time loop of a layer runs on a device. README.md describes them.
#pragma once

#include "../layer/reserve.h"
#include "launches.h"
#include "layer.h"

namespace fusedrnn::cuda {

// The deltas of one direction, for all rows. The gradients of x and of the parameters are computed
// from them.
template <class Stored>
struct Deltas {
  Stored* delta;         // [rows, G*H] gradient of h U + b_hh
  Stored* delta_x;       // [rows, G*H] gradient of x W + b_ih; null if it is delta
  Stored* delta_proj;    // [rows, P] gradient of the projection's product, or null
  Stored* delta_params;  // [rows, kParams*H] each row's part of the gradient of params, or null
};

// The parts of a call that all regimes need.
struct Pass {
  const Layer& layer;
  Launcher& launcher;
  const Options& options;
  // The regime asks here for what it needs and then allocates everything, with what layer.cpp asked
  // for before: the pointers of the deltas are set from then on.
  Scratch& scratch;
};

template <class Stored>
void forward_per_step(const Pass& pass, const LayerForward<Stored>& args);
template <class Stored>
void backward_per_step(const Pass& pass, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas);

template <class Stored>
void forward_resident(const Pass& pass, const Plan& plan, const LayerForward<Stored>& args);
template <class Stored>
void backward_resident(const Pass& pass, const Plan& plan, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas);

template <class Stored>
void forward_streamed(const Pass& pass, const Plan& plan, const LayerForward<Stored>& args);
template <class Stored>
void backward_streamed(const Pass& pass, const Plan& plan, const LayerBackward<Stored>& args,
                       const Deltas<Stored>* deltas);

// Fills the arguments that all kernels with a time loop share, and allocates the scratch memory of
// the pass, of which the exchange and the counters of arrivals are a part. The rows of the exchange
// are padded to K_pad values, and the padding must be zero.
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
  // If every step has the same rows, a kernel needs no offsets.
  const bool plain = seq.batch_sizes.back() == seq.N;
  int64_t* row_offset = nullptr;
  const bool puts_offsets = !plain && !options.row_offset;
  if (puts_offsets) scratch.want(row_offset, static_cast<int64_t>(seq.row_offset.size()));
  scratch.allocate(launcher);
  if (puts_offsets) put_numbers(launcher, seq.row_offset, row_offset);
  if (!plain) a.row_offset = puts_offsets ? row_offset : options.row_offset;
  a.arrivals = reinterpret_cast<unsigned*>(memory);
  memory += plan.arrival_bytes;
  for (int s = 0; s < kMaxStages; ++s) {
    a.exchange[s] = reinterpret_cast<Stored*>(memory);
    memory += plan.exchange_bytes[s];
  }
}

// Starts the kernel of a plan that has the time loop in a kernel.
template <class Stored, class Args>
void launch_loop(const Plan& plan, Launcher& launcher, bool backward, const Args& args) {
  launcher.launch({.kernel = loop_kernel(plan.regime, plan.shape.cluster > 1, backward, plan.cores,
                                         DtypeOf<Stored>::kDtype),
                   .grid = plan.grid,
                   .block = {kThreads},
                   .shared_bytes = static_cast<size_t>(plan.shape.shared_bytes),
                   .args = &args,
                   .args_bytes = sizeof(args),
                   .cooperative = true,
                   .cluster = static_cast<unsigned>(plan.shape.cluster)});
}

// The number of steps of a chunk, whose x W is computed at once.
template <class Stored>
int64_t chunk_steps(const Pass& pass) {
  const Sequences& seq = pass.layer.sequences;
  const int64_t step_bytes =
      seq.widest() * pass.layer.gate_columns() * int64_t(sizeof(Real<Stored>));
  return std::clamp<int64_t>(pass.options.gates_bytes / (pass.layer.D * step_bytes), 1, seq.T);
}

// gates_x = x W for some rows of direction d.
template <class Stored>
void multiply_input(const Pass& pass, const LayerForward<Stored>& args, int64_t d, RowRange rows,
                    Real<Stored>* gates_x) {
  const int64_t columns = pass.layer.gate_columns(), I = pass.layer.I;
  multiply(pass.launcher, dense(args.x + rows.begin * I, rows.count(), I),
           dense(args.w[d].w_ih, columns, I).transpose(), dense(gates_x, rows.count(), columns));
}

// What the elementwise work of direction d needs in forward, but for gates_x, and for the scratch
// memory of passes that keep nothing.
template <class Stored>
ForwardWork<Stored> forward_work(const Layer& layer, const LayerForward<Stored>& args, int64_t d) {
  const int64_t N = layer.sequences.N, H = layer.H, P = layer.P;
  ForwardWork<Stored> work = {};
  work.H = H, work.P = P;
  work.b_ih = args.w[d].b_ih;
  work.b_hh = args.w[d].b_hh;
  work.params = args.w[d].w_ch;
  work.row_input = args.row_input;
  work.h = args.h + d * N * P;
  work.c = layer.info().has_c ? args.c + d * N * H : nullptr;
  work.drops = args.beginnings.drops[d];
  work.y = args.y + d * P;
  work.y_c = layer.c_in_y ? args.y + layer.D * P + d * H : nullptr;
  work.y_ld = layer.y_width();
  if (!args.reserve) return work;
  const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
  work.keeps = true;
  work.h_in = reserve.h_in;
  work.c_in = reserve.c_in;
  work.saved = reserve.saved;
  work.emit = reserve.emit;
  return work;
}

// What the elementwise work of direction d needs in backward.
template <class Stored>
BackwardWork<Stored> backward_work(const Layer& layer, const LayerBackward<Stored>& args,
                                   const Deltas<Stored>& deltas, int64_t d) {
  const int64_t N = layer.sequences.N, H = layer.H, P = layer.P;
  const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
  BackwardWork<Stored> work = {};
  work.H = H, work.P = P;
  work.drops = args.beginnings.drops[d];
  work.d_y = args.d_y ? args.d_y + d * P : nullptr;
  work.d_y_c = args.d_y && layer.c_in_y ? args.d_y + layer.D * P + d * H : nullptr;
  work.d_y_ld = layer.y_width();
  work.d_h = args.d_h + d * N * P;
  work.d_c = layer.info().has_c ? args.d_c + d * N * H : nullptr;
  work.saved = reserve.saved;
  work.h_in = reserve.h_in;
  work.c_in = reserve.c_in;
  work.delta = deltas.delta;
  work.delta_x = deltas.delta_x;
  work.delta_proj = deltas.delta_proj;
  work.params = args.w[d].w_ch;
  work.row_input = args.row_input;
  work.delta_params = deltas.delta_params;
  return work;
}

}  // namespace fusedrnn::cuda
