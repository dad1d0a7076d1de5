// Elman RNN (torch.nn.RNN): h_t = φ(x W + b_ih + h U + b_hh), φ = tanh or relu.
#pragma once

#include "contract.h"

namespace fusedrnn {

struct RnnBase {
  static constexpr int kGates = 1;
  static constexpr int kSaved = 1;
  static constexpr bool kSavesH = true;  // both derivatives are functions of it
  static constexpr bool kHasC = false;
  static constexpr bool kReadsH = false;
  static constexpr bool kCarriesH = false;
  static constexpr bool kSeparateDeltas = false;
  static constexpr int kStages = 1;

  static constexpr Stage stage(int) {
    return {.first_gate = 0,
            .gates = 1,
            .from_hidden = true,
            .takes_input = true,
            .projects = false,
            .delta_begin = 0,
            .delta_end = 1,
            .saved_begin = 0,
            .saved_end = 1};
  }
};

struct RnnTanh : RnnBase {
  static constexpr const char* kName = "rnn_tanh";

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, State<V>&, V* saved) {
    return saved[0] = tanh(gates_x[0] + acc[0]);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const State<V>&, Carry<V>&, V* delta,
                                   V*) {
    delta[0] = d_h * (V(1) - saved[0] * saved[0]);
  }
};

struct RnnRelu : RnnBase {
  static constexpr const char* kName = "rnn_relu";

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, State<V>&, V* saved) {
    return saved[0] = relu(gates_x[0] + acc[0]);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const State<V>&, Carry<V>&, V* delta,
                                   V*) {
    delta[0] = relu_grad(saved[0], d_h);
  }
};

}  // namespace fusedrnn
