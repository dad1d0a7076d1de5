// Elman RNN (torch.nn.RNN): h_t = φ(x W + b_ih + h U + b_hh), φ = tanh or relu.
#pragma once

#include "contract.h"

namespace fusedrnn {

template <class Cell>
struct RnnDefaults : CellDefaults<Cell> {
  static constexpr int kGates = 1;
  static constexpr int kSaved = 1;
  static constexpr bool kSavesH = true;  // both derivatives are functions of h_t
};

struct RnnTanh : RnnDefaults<RnnTanh> {
  static constexpr const char* kName = "rnn_tanh";

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>&, State<V>&,
                               V* saved) {
    return saved[0] = tanh(gates_x[0] + acc[0]);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const Given<V>&, const State<V>&,
                                   Carry<V>&, Delta<V>& delta) {
    delta.h[0] = d_h * (V(1) - saved[0] * saved[0]);
  }
};

struct RnnRelu : RnnDefaults<RnnRelu> {
  static constexpr const char* kName = "rnn_relu";

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>&, State<V>&,
                               V* saved) {
    return saved[0] = relu(gates_x[0] + acc[0]);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const Given<V>&, const State<V>&,
                                   Carry<V>&, Delta<V>& delta) {
    delta.h[0] = relu_grad(saved[0], d_h);
  }
};

}  // namespace fusedrnn
