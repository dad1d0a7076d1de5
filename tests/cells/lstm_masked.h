// A cell that takes a number with each row, for tests. No cell of the library does. It is an LSTM
// whose row input m in [0, 1] says how much of a step counts; at 0 the state stays as it was:
//   c_t = m c'_t + (1 - m) c_{t-1}   h_t = m h'_t + (1 - m) h_{t-1}
// where c'_t and h'_t are those of the LSTM.
#pragma once

#include "lstm.h"

namespace fusedrnn {

struct LstmMasked : CellDefaults<LstmMasked> {
  static constexpr const char* kName = "lstm_masked";
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;  // i f g o
  static constexpr bool kHasC = true;
  static constexpr bool kReadsH = true;
  static constexpr bool kCarriesH = true;
  static constexpr bool kTakesRow = true;

  template <int s, class V>
  static FUSEDRNN_HD V forward(const V* gates_x, const V* acc, const Given<V>& given,
                               State<V>& state, V* saved) {
    const V c = state.c;
    const V h = Lstm::forward<0>(gates_x, acc, given, state, saved);
    state.c = fma(given.row, state.c - c, c);
    return fma(given.row, h - state.h, state.h);
  }

  template <int s, class V>
  static FUSEDRNN_HD void backward(V d_h, const V* saved, const Given<V>& given,
                                   const State<V>& state, Carry<V>& carry, Delta<V>& delta) {
    const V rest = V(1) - given.row, d_c = carry.d_c;
    carry.d_c = given.row * d_c;
    Lstm::backward<0>(given.row * d_h, saved, given, state, carry, delta);
    carry.d_c = fma(rest, d_c, carry.d_c);
    carry.d_h = rest * d_h;
  }
};

}  // namespace fusedrnn
