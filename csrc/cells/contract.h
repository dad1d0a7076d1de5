// The contract of a cell, between the math of one step and the engines that run it.
//
// A cell is a struct with compile-time constants and two function templates over a value type V: a
// SIMD vector on the CPU, a float or double on CUDA and in reference tests. It derives from
// CellDefaults<itself> and names only the constants in which it differs from most cells. The
// concept `Cell` below lists what the compiler checks.
//
//   forward<s>(gates_x[], acc[], given, state, saved[]) -> emit
//   backward<s>(d_emit, saved[], given, state, carry, delta)
//
// A step has one or more stages. A stage is a product followed by elementwise work. Stage s
// multiplies its source (h_{t-1}, or the emit of stage s-1) by its part of the recurrent weight.
// `acc` is that product plus b_hh, and `gates_x` is x W + b_ih of the same gates. The last stage
// emits h_t. The two arrays stay apart because the reset gate of the reset-after GRU multiplies
// only `acc`.
//
// The contract has limits. The elementwise work runs on some units of a sequence as soon as their
// sums are complete, and it sees no other unit. Therefore the following do not fit:
//   - A reduction over units between a product and the elementwise work. Layer normalisation (of
//     h U, or of c) would need a stage that is a reduction, with its statistics saved for each row.
//   - A third state beside h and c, such as the normaliser of the sLSTM. State, Carry, the reserve
//     and the ops have two.
//   - A stage that emits several values per unit, or a third stage (kMaxStages).
//   - An input that differs both from unit to unit and from row to row, such as a dropout mask on
//     h. A parameter belongs to a unit, and a row input to a row.
// A cell need not reset its state inside a sequence: the caller says where another one begins
// (Layer::has_starts).
#pragma once

#include "math.h"

namespace fusedrnn {

constexpr int kMaxStages = 2;

// The part of the weights that a stage multiplies, and the values that the stage writes.
struct Stage {
  int first_gate = 0;       // its gates are [first_gate, first_gate + gates) of weight_hh
  int gates = 0;            // gate values per unit in its product
  bool from_hidden = true;  // source: h_{t-1} [N, P]; otherwise the emit of the stage before [N, H]
  bool takes_input = true;  // whether the stage reads gates_x of its gates
  // Whether the stage multiplies weight_hr [P, H] instead of weight_hh. Its emit then has width P,
  // its product has one value per element of the emit, and there is no bias.
  bool projects = false;
  // backward<s> writes the gate gradients [delta_begin, delta_end) and those of the parameters
  // [param_begin, param_end); forward<s> writes the saved values [saved_begin, saved_end).
  int delta_begin = 0, delta_end = 0;
  int param_begin = 0, param_end = 0;
  int saved_begin = 0, saved_end = 0;
};

// The state of one unit. It holds h_{t-1} and c_{t-1}; forward replaces c_{t-1} by c_t.
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

// The gradients that step t hands to step t-1 elementwise, beside the product.
template <class V>
struct Carry {
  V d_h;  // 0 on entry to the last stage; an earlier stage adds to the value of the later one
  V d_c;  // on entry the gradient of c_t, on exit the gradient of c_{t-1}
};

// Gradients of a stage's inputs.
template <class V>
struct Delta {
  V* h;       // [kGates] of h U + b_hh
  V* x;       // [kGates] of x W + b_ih, only where kSeparateDeltas
  V* params;  // [kParams] of the unit's parameters, from this row
};

// The constants as most cells have them. In addition, every cell names
//   kName   its name in ops and in Python
//   kGates  G: rows of weight_ih and bias_ih are [G*H]
//   kSaved  values per unit that forward keeps for backward
template <class Cell>
struct CellDefaults {
  // Whether the only saved value is h_t. It is then stored once, as h_{t-1} of the next step.
  static constexpr bool kSavesH = false;
  // Whether there is a second state, c [N, H].
  static constexpr bool kHasC = false;
  // Whether the elementwise work reads h_{t-1} (GRU).
  static constexpr bool kReadsH = false;
  // Whether backward hands a part of the gradient of h_{t-1} on elementwise, beside the product.
  static constexpr bool kCarriesH = false;
  // Whether the gradient of x W + b_ih differs from that of h U + b_hh.
  static constexpr bool kSeparateDeltas = false;
  // The number of parameters of each unit: weight_ch is [kParams*H]. Their gradients are summed
  // over all rows, as the gradients of the biases are.
  static constexpr int kParams = 0;
  // Whether the stages are given one value per row, for instance a mask.
  static constexpr bool kTakesRow = false;
  // The number of stages of a step; stage(s) describes stage s.
  static constexpr int kStages = 1;

  static constexpr Stage stage(int) {
    return {.gates = Cell::kGates,
            .delta_end = Cell::kGates,
            .param_end = Cell::kParams,
            .saved_end = Cell::kSaved};
  }
};

// The number of a stage as a type. A generic lambda takes it as its argument.
template <int stage>
struct StageNumber {
  static constexpr int value = stage;
};

// Calls body with the StageNumber of a stage that is known only at run time.
template <class Cell, class Body>
FUSEDRNN_HD void with_stage(int stage, const Body& body) {
  static_assert(Cell::kStages <= 2);
  if constexpr (Cell::kStages > 1) {
    if (stage == 1) return body(StageNumber<1>());
  }
  body(StageNumber<0>());
}

template <class Type>
constexpr bool kIsBool = false;
template <>
inline constexpr bool kIsBool<const bool> = true;
template <class Type>
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
  // A cell that saves h saves nothing else, and has one stage.
  requires !C::kSavesH || (C::kSaved == 1 && C::kStages == 1);
} && CellStage<C, 0> && CellStage<C, C::kStages - 1>;

}  // namespace fusedrnn
