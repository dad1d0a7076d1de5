// One recurrent layer over a whole batch on a GPU, forward or backward, both directions: the host
// side of the CUDA engine. Knows neither torch nor the CUDA runtime: all that happens on the device
// is asked of a Launcher, in order. Pointers to tensors are device pointers; S is the type in which
// they are stored, Real<S> that in which states are kept between steps (float for 16-bit types).
#pragma once

#include <optional>
#include <stdexcept>

#include "../cpu/layer.h"
#include "dtype.h"
#include "launcher.h"
#include "plan.h"

namespace fusedrnn::cuda {

// Thrown where the regime that was asked for cannot run; what() says why.
struct RegimeRefused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// What a caller may choose.
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

template <class S>
struct LayerForward {
  const S* x;             // [rows, I]
  Weights<const S> w[2];  // [D]
  Real<S>* h;             // [D, N, P] in: h_0, out: h_n
  Real<S>* c;             // [D, N, H] in: c_0, out: c_n; null without c
  S* y;                   // [rows, D*P]
  void* reserve;          // [reserve_bytes] for backward, or null
};

template <class S>
struct LayerBackward {
  const S* x;             // [rows, I]
  Weights<const S> w[2];  // [D]
  const void* reserve;    // as forward left it
  const S* d_y;           // [rows, D*P] or null
  Real<S>* d_h;           // [D, N, P] in: of h_n, out: of h_0
  Real<S>* d_c;           // [D, N, H] the same; null without c
  S* d_x;                 // [rows, I] or null
  Weights<S> d_w[2];      // [D]; w_hh and w_hr are wanted together, and b_ih and b_hh
};

// Bytes that forward keeps for backward, for `rows` rows. For each direction, as on the CPU: saved
// [rows, kSaved*H] ([N, H] of cells that save h), h_in [rows, P], c_in [rows, H] (where there is
// c), emit [rows, H] (where there are two stages), all of type S but c_in, which is Real<S>.
template <class S>
size_t reserve_bytes(const Layer& layer, int64_t rows);

// How a pass over a layer would run there.
Plan plan_layer(const Layer& layer, Launcher& launcher, Dtype dtype, bool backward,
                const Options& options);

template <class S>
void layer_forward(const Layer& layer, Launcher& launcher, const Options& options,
                   const LayerForward<S>& args);

template <class S>
void layer_backward(const Layer& layer, Launcher& launcher, const Options& options,
                    const LayerBackward<S>& args);

}  // namespace fusedrnn::cuda
