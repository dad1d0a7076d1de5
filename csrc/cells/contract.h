// The contract of a cell, between the math of one step and the engines that run it.
//
// A cell is a struct with compile-time constants and two function templates over a value type V: a
// SIMD vector on the CPU, a float or double on CUDA and in reference tests. It derives from
// CellDefaults<itself> and names only what is special to it. The concept `Cell` below says what the
// compiler asks for.
//
//   forward<s>(gates_x[], acc[], given, state, saved[]) -> emit
//   backward<s>(d_emit, saved[], given, state, carry, delta)
//
// A step has one or more stages. A stage is a product followed by elementwise work. Stage s
// multiplies its source (h_{t-1}, or what stage s-1 emitted) by its part of the recurrent weight.
// `acc` is that product plus b_hh, `gates_x` is x W + b_ih of the same gates. The last stage emits
// h_t. The two arrays stay apart because the reset-after GRU gates only the recurrent part.
//
// What a cell cannot be. The elementwise work runs on some units of a sequence as soon as their
// sums are complete, and sees no other unit. So there can be
//   - no reduction over units between a product and the elementwise work. Layer normalisation of h
//   U
//     or of c would need a stage that is a reduction, with its statistics saved for each row;
//   - no third state beside h and c (the sLSTM's normaliser): State, Carry, the reserve and the ops
//     have two;
//   - no stage that emits several values a unit, and no third stage (kMaxStages);
//   - no number that differs from unit to unit and from row to row, as a dropout mask on h would: a
//     parameter belongs to a unit, a row input to a row.
// A state that begins anew inside a sequence is no business of a cell: there one sequence ends and
// another begins.
#pragma once

#include "math.h"

namespace fusedrnn {

constexpr int kMaxStages = 2;

// Which part of the weights a stage multiplies, and what it leaves for others.
struct Stage {
  int first_gate = 0;       // its gates are [first_gate, first_gate + gates) of weight_hh
  int gates = 0;            // gate values per unit in its product
  bool from_hidden = true;  // source: h_{t-1} [N, P]; otherwise the emit of the stage before [N, H]
  bool takes_input = true;  // whether gates_x of its gates reaches it
  // Whether it multiplies weight_hr [P, H] instead of weight_hh: its output has width P, one value
  // a unit, and there is no bias.
  bool projects = false;
  // backward<s> writes the gate gradients [delta_begin, delta_end) and those of the parameters
  // [param_begin, param_end); forward<s> writes the saved values [saved_begin, saved_end).
  int delta_begin = 0, delta_end = 0;
  int param_begin = 0, param_end = 0;
  int saved_begin = 0, saved_end = 0;
};

// The state of one unit. Forward: on entry h_{t-1} and c_{t-1}, on exit c_t. Backward: h_{t-1} and
// c_{t-1}.
template <class V>
struct State {
  V h;  // only where kReadsH
  V c;  // only where kHasC
};

// The other inputs of a stage, which are the same in forward and backward.
template <class V>
struct Given {
  const V* params;  // [kParams] of the unit, in the order of weight_ch
  V row;            // the input of the row, only where kTakesRow
};

// Gradients handed from step t to step t-1 elementwise.
template <class V>
struct Carry {
  V d_h;  // last stage: 0 on entry; earlier stages add to what later ones left
  V d_c;  // on entry d of c_t, on exit d of c_{t-1}
};

// Gradients of a stage's inputs.
template <class V>
struct Delta {
  V* h;       // [kGates] of h U + b_hh
  V* x;       // [kGates] of x W + b_ih, only where kSeparateDeltas
  V* params;  // [kParams] of the unit's parameters, from this row
};

// The constants of most cells. Beside them a cell names
//   kName   its name in ops and in Python
//   kGates  G: rows of weight_ih and bias_ih are [G*H]
//   kSaved  values per unit that forward keeps for backward
template <class Cell>
struct CellDefaults {
  // Whether the saved value is h_t alone. It is then kept once, as h_{t-1} of the step after.
  static constexpr bool kSavesH = false;
  // Whether there is a second state, c [N, H].
  static constexpr bool kHasC = false;
  // Whether the elementwise work reads h_{t-1} (GRU).
  static constexpr bool kReadsH = false;
  // Whether backward hands d_h_{t-1} on elementwise, beside the product.
  static constexpr bool kCarriesH = false;
  // Whether the gradient of x W + b_ih differs from that of h U + b_hh.
  static constexpr bool kSeparateDeltas = false;
  // Parameters of each unit: weight_ch is [kParams*H]. Their gradients are summed like the biases'.
  static constexpr int kParams = 0;
  // Whether the stages are given one value of each row, as a mask has it.
  static constexpr bool kTakesRow = false;
  // Products in a step; stage(s) describes each.
  static constexpr int kStages = 1;

  static constexpr Stage stage(int) {
    return {.gates = Cell::kGates,
            .delta_end = Cell::kGates,
            .param_end = Cell::kParams,
            .saved_end = Cell::kSaved};
  }
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

template <class T>
constexpr bool kIsBool = false;
template <>
inline constexpr bool kIsBool<const bool> = true;
template <class T>
constexpr bool kIsInt = false;
template <>
inline constexpr bool kIsInt<const int> = true;

// Whether stage s of a cell has its two functions.
template <class C, int s>
concept CellStage =
    requires(float* values, const float* inputs, State<float>& state, const Given<float>& given,
             Carry<float>& carry, Delta<float>& delta, float (*as_float)(float)) {
      as_float(C::template forward<s>(inputs, inputs, given, state, values));
      C::template backward<s>(float{}, inputs, given, state, carry, delta);
    };

template <class C>
concept Cell = requires(const char* (*as_text)(const char*), Stage (*as_stage)(Stage)) {
  as_text(C::kName);
  as_stage(C::stage(0));
  requires kIsInt<decltype(C::kGates)> && C::kGates >= 1;
  requires kIsInt<decltype(C::kSaved)> && C::kSaved >= 1;
  requires kIsInt<decltype(C::kParams)> && C::kParams >= 0 && C::kParams <= 9;
  requires kIsInt<decltype(C::kStages)> && C::kStages >= 1 && C::kStages <= kMaxStages;
  requires kIsBool<decltype(C::kSavesH)> && kIsBool<decltype(C::kHasC)>;
  requires kIsBool<decltype(C::kReadsH)> && kIsBool<decltype(C::kCarriesH)>;
  requires kIsBool<decltype(C::kSeparateDeltas)> && kIsBool<decltype(C::kTakesRow)>;
  // h is saved by itself, and by a step of one stage.
  requires !C::kSavesH || (C::kSaved == 1 && C::kStages == 1);
} && CellStage<C, 0> && CellStage<C, C::kStages - 1>;

}  // namespace fusedrnn
