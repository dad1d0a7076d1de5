// The host side of the CUDA engine: forward and backward of one layer over a whole batch, in all
// its directions. It knows neither torch nor the CUDA runtime, and asks a Launcher for everything
// that happens on the device. Pointers to tensors are device pointers. Stored is the stored type,
// and Real<Stored> the compute type, which states have between steps (float for 16-bit types).
#pragma once

#include <optional>
#include <stdexcept>

#include "../layer/dtype.h"
#include "../layer/layer.h"
#include "launcher.h"
#include "plan.h"

namespace fusedrnn::cuda {

// Thrown if the regime that was asked for cannot run. what() says why.
struct RegimeRefused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The choices that a caller has.
struct Options {
  bool allow_tf32 = false;  // float32 products on tensor cores, with 10 bits of mantissa
  // The regime that must run, or none, which leaves the choice to the plan. A regime that cannot
  // run is an error.
  std::optional<Regime> regime;
  PlanChoice choice;  // more of the plan, for measurements
  // x W is computed for a chunk of steps at once. Its results for all directions have at most this
  // many bytes (or those of one step, if a step has more). So a product has enough rows to be
  // efficient, and long sequences need no more memory than that.
  int64_t gates_bytes = int64_t(64) << 20;
  // How often a block looks whether the other blocks have arrived before the kernel ends in an
  // error. A look takes a trip to L2, by estimate 0.35 us, so 2^27 looks take 47 s. A block usually
  // waits some microseconds for a step. The limit counts looks and not time, because a context that
  // is switched out does not look.
  unsigned spin_limit = 1u << 27;
  // The row_offset of the layer's sequences in device memory, if the caller has it there.
  const int64_t* row_offset = nullptr;
};

// Where sequences begin inside those of the batch, if the call says so (Layer::has_starts). Then a
// pass reads this on the device; the host never does.
struct Beginnings {
  // [rows] for each direction: whether the state after this row's step is dropped, because another
  // sequence begins behind it in the order in which the direction runs. It is never set at the last
  // position of a sequence of the batch.
  const uint8_t* drops[2];
  // [N] whether a sequence begins anew at step 0, so that it takes nothing from h_0 and c_0 in the
  // first direction. Only the sequences that are alive at step 0 count.
  const uint8_t* begins;
};

template <class Stored>
struct LayerForward {
  const Stored* x;                // [rows, I]
  Parameters<const Stored> w[2];  // [D]
  Real<Stored>* h;                // [D, N, P] in: h_0; out: h_n
  Real<Stored>* c;                // [D, N, H] in: c_0; out: c_n; null in cells without c
  Stored* y;                      // [rows, y_width]
  void* reserve;                  // [reserve_bytes<Stored>] filled for backward, or null
  const Real<Stored>* row_input;  // [rows] one value for each row, in cells that take it; else null
  Beginnings beginnings;
};

template <class Stored>
struct LayerBackward {
  const Stored* x;                // [rows, I]
  Parameters<const Stored> w[2];  // [D]
  const void* reserve;            // as forward wrote it
  const Stored* d_y;              // [rows, y_width] or null
  Real<Stored>* d_h;              // [D, N, P] in: gradient of h_n; out: gradient of h_0
  Real<Stored>* d_c;              // [D, N, H] the same for c; null in cells without c
  Stored* d_x;                    // [rows, I] or null
  // [D] A gradient that is not wanted is null. w_hh and w_hr are wanted together, and so are b_ih
  // and b_hh.
  Parameters<Stored> d_w[2];
  const Real<Stored>* row_input;  // as in LayerForward; it has no gradient
  Beginnings beginnings;
};

// The plan of a pass over a layer on the launcher's device.
Plan plan_layer(const Layer& layer, Launcher& launcher, Dtype dtype, bool backward,
                const Options& options);

template <class Stored>
void layer_forward(const Layer& layer, Launcher& launcher, const Options& options,
                   const LayerForward<Stored>& args);

template <class Stored>
void layer_backward(const Layer& layer, Launcher& launcher, const Options& options,
                    const LayerBackward<Stored>& args);

}  // namespace fusedrnn::cuda
