// What a cell is: the contract between the math of one step and the engines that run it.
//
// A cell is a struct with compile-time constants and two function templates over a value type V
// (a SIMD vector on the CPU, a float or double on CUDA and in reference tests):
//
//   kName          its name in ops and in Python
//   kGates         G: rows of weight_ih and bias_ih are [G*H]
//   kSaved         values per unit that forward keeps for backward
//   kSavesH        whether that is h_t alone. It is then kept once, as h_{t-1} of the step after
//   kHasC          whether there is a second state, c [N, H]
//   kReadsH        whether the elementwise part reads h_{t-1} (GRU)
//   kCarriesH      whether backward hands d_h_{t-1} on elementwise, beside the product
//   kSeparateDeltas whether the gradient of (x W + b_ih) differs from that of (h U + b_hh)
//   kStages        products in a step; stage(s) describes each
//
//   forward<s>(gates_x[], acc[], state, saved[]) -> emit
//   backward<s>(d_emit, saved[], state, carry, delta[], delta_x[])
//
// A stage is a product followed by elementwise work. Stage s multiplies its source (h_{t-1}, or
// what stage s-1 emitted) by its part of the recurrent weight; `acc` is that product plus b_hh,
// `gates_x` is x W + b_ih of the same gates. The last stage emits h_t. The two arrays stay apart
// because the reset-after GRU gates only the recurrent part.
#pragma once

#include "math.h"

namespace fusedrnn {

constexpr int kMaxStages = 2;

// Which part of the weights a stage multiplies, and what it leaves for others.
struct Stage {
  int first_gate;    // its gates are [first_gate, first_gate + gates) of weight_hh
  int gates;         // gate values per unit in its product
  bool from_hidden;  // source: h_{t-1} [N, P]; otherwise the emit of the stage before [N, H]
  bool takes_input;  // whether gates_x of its gates reaches it
  bool
      projects;  // weight_hr [P, H] instead of weight_hh: output width P, one value a unit, no bias
  int delta_begin;  // backward<s> writes the gate gradients [delta_begin, delta_end)
  int delta_end;
  int saved_begin;  // forward<s> writes the saved values [saved_begin, saved_end)
  int saved_end;
};

// State of one unit. Forward: on entry h_{t-1} and c_{t-1}, on exit c_t. Backward: h_{t-1},
// c_{t-1}.
template <class V>
struct State {
  V h;  // only where kReadsH
  V c;  // only where kHasC
};

// Gradients handed from step t to step t-1 elementwise.
template <class V>
struct Carry {
  V d_h;  // last stage: 0 on entry; earlier stages add to what later ones left
  V d_c;  // on entry d of c_t, on exit d of c_{t-1}
};

// The number of a stage as a type, for a generic lambda to be called with.
template <int stage>
struct StageNumber {
  static constexpr int value = stage;
};

// Calls body with the number of a stage that is known only at run time.
template <class Cell, class Body>
FUSEDRNN_HD void with_stage(int stage, const Body& body) {
  static_assert(Cell::kStages <= 2);
  if constexpr (Cell::kStages > 1) {
    if (stage == 1) return body(StageNumber<1>());
  }
  body(StageNumber<0>());
}

}  // namespace fusedrnn
