// LSTM (Hochreiter & Schmidhuber 1997, with forget gate; torch.nn.LSTM), gates i f g o:
//   i, f, o = σ(·)   g = tanh(·)   c_t = f c_{t-1} + i g   h_t = o tanh(c_t)
// LSTM with projection (Sak et al. 2014): h_t = W_hr (o tanh(c_t)).
// LSTM with peepholes (Gers & Schmidhuber 2000; ONNX's P): the arguments of σ have one more term,
// which is p_i c_{t-1} for i, p_f c_{t-1} for f and p_o c_t for o.
#pragma once

#include "contract.h"

namespace fusedrnn {

struct Lstm : CellDefaults<Lstm> {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;  // i f g o
  static constexpr bool kHasC = true;

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>&, State<V>& state,
                               V* saved) {
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
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const Given<V>&, const State<V>& state,
                                   Carry<V>& carry, Delta<V>& delta) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(fma(f, state.c, i * g));  // cheaper to recompute than to keep
    const V d_c = fma(d_h * o, V(1) - tanh_c * tanh_c, carry.d_c);
    delta.h[0] = d_c * g * i * (V(1) - i);
    delta.h[1] = d_c * state.c * f * (V(1) - f);
    delta.h[2] = d_c * i * (V(1) - g * g);
    delta.h[3] = d_h * tanh_c * o * (V(1) - o);
    carry.d_c = d_c * f;
  }
};

struct LstmProj : CellDefaults<LstmProj> {
  static constexpr const char* kName = "lstm_proj";
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;
  static constexpr bool kHasC = true;
  static constexpr int kStages = 2;

  static constexpr Stage stage(int s) {
    if (s == 0) return Lstm::stage(0);
    return {.gates = 1,
            .from_hidden = false,
            .takes_input = false,
            .projects = true,
            .saved_begin = 4,
            .saved_end = 4};
  }

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>& given,
                               State<V>& state, V* saved) {
    if constexpr (s == 0) {
      return Lstm::forward<0>(gates_x, acc, given, state, saved);
    } else {
      return acc[0];
    }
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_emit, const V* saved, const Given<V>& given,
                                   const State<V>& state, Carry<V>& carry, Delta<V>& delta) {
    // Stage 1 emits its product unchanged. Its delta is therefore d_emit, which the engine stores.
    if constexpr (s == 0) Lstm::backward<0>(d_emit, saved, given, state, carry, delta);
  }
};

struct LstmPeephole : CellDefaults<LstmPeephole> {
  static constexpr const char* kName = "lstm_peephole";
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;   // i f g o
  static constexpr int kParams = 3;  // p_i p_f p_o
  static constexpr bool kHasC = true;

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>& given,
                               State<V>& state, V* saved) {
    const V i = sigmoid(fma(given.params[0], state.c, gates_x[0] + acc[0]));
    const V f = sigmoid(fma(given.params[1], state.c, gates_x[1] + acc[1]));
    const V g = tanh(gates_x[2] + acc[2]);
    state.c = fma(f, state.c, i * g);
    const V o = sigmoid(fma(given.params[2], state.c, gates_x[3] + acc[3]));
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    return o * tanh(state.c);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const Given<V>& given,
                                   const State<V>& state, Carry<V>& carry, Delta<V>& delta) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V c = fma(f, state.c, i * g), tanh_c = tanh(c);
    const V d_o = d_h * tanh_c * o * (V(1) - o);
    const V d_c = fma(given.params[2], d_o, fma(d_h * o, V(1) - tanh_c * tanh_c, carry.d_c));
    const V d_i = d_c * g * i * (V(1) - i);
    const V d_f = d_c * state.c * f * (V(1) - f);
    delta.h[0] = d_i;
    delta.h[1] = d_f;
    delta.h[2] = d_c * i * (V(1) - g * g);
    delta.h[3] = d_o;
    delta.params[0] = d_i * state.c;
    delta.params[1] = d_f * state.c;
    delta.params[2] = d_o * c;
    carry.d_c = fma(given.params[0], d_i, fma(given.params[1], d_f, d_c * f));
  }
};

}  // namespace fusedrnn
