// GRU (Cho et al. 2014), gates r z n, torch's convention for z:
//   r, z = σ(·)   h_t = (1 - z) n + z h_{t-1}
// reset after (torch.nn.GRU, cuDNN):  n = tanh(x W_n + b_in + r (h U_n + b_hn))
// reset before (the paper; Keras and ONNX offer it too):  n = tanh(x W_n + b_in + (r h) U_n + b_hn)
#pragma once

#include "contract.h"

namespace fusedrnn {

struct Gru : CellDefaults<Gru> {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;
  static constexpr int kSaved = 4;  // r z n, and h U_n + b_hn
  static constexpr bool kReadsH = true;
  static constexpr bool kCarriesH = true;
  static constexpr bool kSeparateDeltas = true;  // the delta of n is d_n for x W, d_n r for h U

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>&, State<V>& state,
                               V* saved) {
    const V r = sigmoid(gates_x[0] + acc[0]);
    const V z = sigmoid(gates_x[1] + acc[1]);
    const V n = tanh(fma(r, acc[2], gates_x[2]));
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = acc[2];
    return fma(z, state.h - n, n);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const Given<V>&, const State<V>& state,
                                   Carry<V>& carry, Delta<V>& delta) {
    const V r = saved[0], z = saved[1], n = saved[2], u_n = saved[3];
    const V d_n = d_h * (V(1) - z) * (V(1) - n * n);
    delta.x[0] = delta.h[0] = d_n * u_n * r * (V(1) - r);
    delta.x[1] = delta.h[1] = d_h * (state.h - n) * z * (V(1) - z);
    delta.x[2] = d_n;
    delta.h[2] = d_n * r;
    carry.d_h = d_h * z;
  }
};

struct GruResetBefore : CellDefaults<GruResetBefore> {
  static constexpr const char* kName = "gru_reset_before";
  static constexpr int kGates = 3;
  static constexpr int kSaved = 3;  // r z n
  static constexpr bool kReadsH = true;
  static constexpr bool kCarriesH = true;
  static constexpr int kStages = 2;

  // Stage 0 emits r h, and stage 1 multiplies it by U_n. In backward, stage 1 runs first and writes
  // the deltas of z and n; stage 0 writes the delta of r.
  static constexpr Stage stage(int s) {
    if (s == 0) return {.gates = 2, .delta_end = 1, .saved_end = 2};
    return {.first_gate = 2,
            .gates = 1,
            .from_hidden = false,
            .delta_begin = 1,
            .delta_end = 3,
            .saved_begin = 2,
            .saved_end = 3};
  }

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>&, State<V>& state,
                               V* saved) {
    if constexpr (s == 0) {
      saved[0] = sigmoid(gates_x[0] + acc[0]);
      saved[1] = sigmoid(gates_x[1] + acc[1]);
      return saved[0] * state.h;
    } else {
      const V z = saved[1];
      const V n = tanh(gates_x[0] + acc[0]);
      saved[2] = n;
      return fma(z, state.h - n, n);
    }
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_emit, const V* saved, const Given<V>&, const State<V>& state,
                                   Carry<V>& carry, Delta<V>& delta) {
    const V r = saved[0], z = saved[1], n = saved[2];
    if constexpr (s == 1) {
      delta.h[1] = d_emit * (state.h - n) * z * (V(1) - z);
      delta.h[2] = d_emit * (V(1) - z) * (V(1) - n * n);
      carry.d_h = d_emit * z;
    } else {
      delta.h[0] = d_emit * state.h * r * (V(1) - r);
      carry.d_h = fma(d_emit, r, carry.d_h);
    }
  }
};

}  // namespace fusedrnn
