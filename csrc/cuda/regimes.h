// The two regimes, in which the time loop of a layer runs on a device. README.md describes them.
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

// The parts of a call that both regimes need.
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

}  // namespace fusedrnn::cuda
