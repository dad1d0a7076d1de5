// LSTM (Hochreiter & Schmidhuber 1997, with forget gate; torch.nn.LSTM), gates i f g o:
//   i, f, o = σ(·)   g = tanh(·)   c_t = f c_{t-1} + i g   h_t = o tanh(c_t)
// LSTM with projection (Sak et al. 2014): h_t = W_hr (o tanh(c_t)).
#pragma once

#include "contract.h"

namespace fusedrnn {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;  // i f g o
  static constexpr bool kSavesH = false;
  static constexpr bool kHasC = true;
  static constexpr bool kReadsH = false;
  static constexpr bool kCarriesH = false;
  static constexpr bool kSeparateDeltas = false;
  static constexpr int kStages = 1;

  static constexpr Stage stage(int) {
    return {.first_gate = 0,
            .gates = 4,
            .from_hidden = true,
            .takes_input = true,
            .projects = false,
            .delta_begin = 0,
            .delta_end = 4,
            .saved_begin = 0,
            .saved_end = 4};
  }

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, State<V>& state, V* saved) {
    const V i = sigmoid(gates_x[0] + acc[0]);
    const V f = sigmoid(gates_x[1] + acc[1]);
    const V g = tanh(gates_x[2] + acc[2]);
    const V o = sigmoid(gates_x[3] + acc[3]);
    state.c = fma(f, state.c, i * g);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    return o * tanh(state.c);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const State<V>& state, Carry<V>& carry,
                                   V* delta, V*) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(fma(f, state.c, i * g));  // cheaper to recompute than to keep
    const V d_c = fma(d_h * o, V(1) - tanh_c * tanh_c, carry.d_c);
    delta[0] = d_c * g * i * (V(1) - i);
    delta[1] = d_c * state.c * f * (V(1) - f);
    delta[2] = d_c * i * (V(1) - g * g);
    delta[3] = d_h * tanh_c * o * (V(1) - o);
    carry.d_c = d_c * f;
  }
};

struct LstmProj {
  static constexpr const char* kName = "lstm_proj";
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;
  static constexpr bool kSavesH = false;
  static constexpr bool kHasC = true;
  static constexpr bool kReadsH = false;
  static constexpr bool kCarriesH = false;
  static constexpr bool kSeparateDeltas = false;
  static constexpr int kStages = 2;

  static constexpr Stage stage(int s) {
    if (s == 0) return Lstm::stage(0);
    return {.first_gate = 0,
            .gates = 1,
            .from_hidden = false,
            .takes_input = false,
            .projects = true,
            .delta_begin = 0,
            .delta_end = 0,
            .saved_begin = 4,
            .saved_end = 4};
  }

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, State<V>& state, V* saved) {
    if constexpr (s == 0) {
      return Lstm::forward<0>(gates_x, acc, state, saved);
    } else {
      return acc[0];
    }
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_emit, const V* saved, const State<V>& state, Carry<V>& carry,
                                   V* delta, V* delta_x) {
    // The projection is the identity on its product: the engine keeps d_emit as its delta.
    if constexpr (s == 0) Lstm::backward<0>(d_emit, saved, state, carry, delta, delta_x);
  }
};

}  // namespace fusedrnn
