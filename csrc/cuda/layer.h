// One recurrent layer over a whole batch on a GPU, forward or backward, both directions: the host
// side of the CUDA engine. Knows neither torch nor the CUDA runtime: all that happens on the device
// is asked of a Launcher, in order. Pointers to tensors are device pointers; Stored is the type in
// which they are stored, Real<Stored> that in which states are kept between steps (float for 16-bit
// types).
#pragma once

#include <optional>
#include <stdexcept>

#include "../layer/dtype.h"
#include "../layer/layer.h"
#include "launcher.h"
#include "plan.h"

namespace fusedrnn::cuda {

// Thrown where the regime that was asked for cannot run; what() says why.
struct RegimeRefused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The options of a caller.
struct Options {
  bool allow_tf32 = false;       // float32 products on tensor cores, with 10 bits of mantissa
  std::optional<Regime> regime;  // an error where it cannot run; by default what fits
  // x W of as many steps as fit this comes at once: enough rows for an efficient product, and no
  // more memory, however long the sequences are.
  int64_t gates_bytes = int64_t(64) << 20;
  // How often a block looks whether the others have arrived before the kernel ends in an error. A
  // look takes a trip to L2, by estimate 0.35 us: 2^27 of them 47 s, where a step is waited for
  // some microseconds. Looks and not time, since a context that is switched out does not look.
  unsigned spin_limit = 1u << 27;
};

template <class Stored>
struct LayerForward {
  const Stored* x;                // [rows, I]
  Parameters<const Stored> w[2];  // [D]
  Real<Stored>* h;                // [D, N, P] in: h_0, out: h_n
  Real<Stored>* c;                // [D, N, H] in: c_0, out: c_n; null without c
  Stored* y;                      // [rows, D*P]
  void* reserve;                  // [reserve_bytes<Stored>] for backward, or null
  const Real<Stored>* row_input;  // [rows] a value of each row, of cells that take one; else null
};

template <class Stored>
struct LayerBackward {
  const Stored* x;                // [rows, I]
  Parameters<const Stored> w[2];  // [D]
  const void* reserve;            // as forward left it
  const Stored* d_y;              // [rows, D*P] or null
  Real<Stored>* d_h;              // [D, N, P] in: of h_n, out: of h_0
  Real<Stored>* d_c;              // [D, N, H] the same; null without c
  Stored* d_x;                    // [rows, I] or null
  Parameters<Stored> d_w[2];      // [D]; w_hh and w_hr are wanted together, and b_ih and b_hh
  const Real<Stored>* row_input;  // as in LayerForward; it gets no gradient
};

// How a pass over a layer would run there.
Plan plan_layer(const Layer& layer, Launcher& launcher, Dtype dtype, bool backward,
                const Options& options);

template <class Stored>
void layer_forward(const Layer& layer, Launcher& launcher, const Options& options,
                   const LayerForward<Stored>& args);

template <class Stored>
void layer_backward(const Layer& layer, Launcher& launcher, const Options& options,
                    const LayerBackward<Stored>& args);

}  // namespace fusedrnn::cuda
