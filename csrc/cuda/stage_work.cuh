// The elementwise work of a stage for one value, in three parts: load what does not depend on the
// stage's product, compute, and store. The per-step kernels run the three at once. The streamed
// kernels load before they wait for the product, and store after they have handed the result on.
#pragma once

#include "storage.cuh"

namespace fusedrnn::cuda {

// A value of a stage's emit in forward: unit u of sequence j.
template <class Stored, class Cell, int s>
class ForwardValue {
  using V = Real<Stored>;
  static constexpr Stage kStage = Cell::stage(s);
  static constexpr bool kLast = s == Cell::kStages - 1;
  static constexpr bool kKeepsC = Cell::kHasC && s == 0;

 public:
  // Also keeps h_{t-1} and c_{t-1} for backward.
  __device__ __forceinline__ void load(const ForwardWork<Stored>& a, int64_t row, int64_t j,
                                       int64_t u) {
    if constexpr (!kStage.projects) {
      const V* gates_x = a.gates_x + (row + j - a.first_row) * Cell::kGates * a.H;
      for (int g = 0; g < kStage.gates; ++g) {
        const int64_t column = (kStage.first_gate + g) * a.H + u;
        gates_x_[g] = gates_x[column];
        if (a.b_ih) gates_x_[g] += real(a.b_ih[column]);
        bias_[g] = a.b_hh ? real(a.b_hh[column]) : V(0);
      }
      inputs_.load_params(a.params, a.H, u);
      if constexpr (Cell::kTakesRow) row_input_ = a.row_input[row + j];
    }
    if constexpr (s > 0 && !kStage.projects) {
      const Stored* saved = a.saved + saved_at(a, row, j) + u;
      for (int i = 0; i < kStage.saved_begin; ++i) saved_[i] = real(saved[i * a.H]);
    }
    if constexpr (Cell::kReadsH) state_.h = a.h[j * a.P + u];
    if constexpr (kLast || kKeepsC) dropped_ = a.drops && a.drops[row + j];
    if constexpr (kLast) {
      if (a.h_in) a.h_in[(row + j) * a.P + u] = stored<Stored>(a.h[j * a.P + u]);
    }
    if constexpr (kKeepsC) {
      state_.c = a.c[j * a.H + u];
      if (a.c_in) a.c_in[(row + j) * a.H + u] = state_.c;
    }
  }

  // acc is the product of each gate. Returns the emit.
  __device__ __forceinline__ V compute(V (&acc)[kStage.gates]) {
    if constexpr (!kStage.projects) {
      for (int g = 0; g < kStage.gates; ++g) acc[g] += bias_[g];
    }
    const Given<V> given = {inputs_.params, Cell::kTakesRow ? row_input_ : V(0)};
    emit_ = Cell::template forward<s>(gates_x_, acc, given, state_, saved_);
    return emit_;
  }

  // The emit as the next product takes it: in the last stage that of the next position.
  __device__ __forceinline__ V handed_on() const { return kLast && dropped_ ? V(0) : emit_; }

  __device__ __forceinline__ void store(const ForwardWork<Stored>& a, int64_t row, int64_t j,
                                        int64_t u) const {
    if constexpr (kKeepsC) {
      a.c[j * a.H + u] = dropped_ ? V(0) : state_.c;
      if (a.y_c) a.y_c[(row + j) * a.y_ld + u] = stored<Stored>(state_.c);
    }
    if (a.saved) {
      Stored* saved = a.saved + saved_at(a, row, j) + u;
      for (int i = kStage.saved_begin; i < kStage.saved_end; ++i)
        saved[i * a.H] = stored<Stored>(saved_[i]);
    }
    if constexpr (kLast) {
      a.h[j * a.P + u] = handed_on();
      if (a.h_rounded) a.h_rounded[j * a.P + u] = stored<Stored>(handed_on());
      a.y[(row + j) * a.y_ld + u] = stored<Stored>(emit_);
    } else if (a.emit) {
      a.emit[(a.keeps ? row + j : j) * a.H + u] = stored<Stored>(emit_);
    }
  }

 private:
  static __device__ __forceinline__ int64_t saved_at(const ForwardWork<Stored>& a, int64_t row,
                                                     int64_t j) {
    return (a.keeps && (!Cell::kSavesH || a.drops) ? row + j : j) * Cell::kSaved * a.H;
  }

  V gates_x_[kStage.gates], bias_[kStage.gates], saved_[Cell::kSaved];
  V row_input_, emit_;
  Inputs<Cell, V> inputs_;
  State<V> state_;
  bool dropped_;  // whether the next position takes zeros in place of h and c
};

// A value of a stage's emit in backward.
template <class Stored, class Cell, int s>
class BackwardValue {
  using V = Real<Stored>;
  static constexpr Stage kStage = Cell::stage(s);
  static constexpr bool kLast = s == Cell::kStages - 1;

 public:
  __device__ __forceinline__ void load(const BackwardWork<Stored>& a, const StepRows& rows,
                                       int64_t j, int64_t u) {
    const int64_t row = rows.row + j;
    [[maybe_unused]] const bool dropped = a.drops && a.drops[row];
    if constexpr (kLast) {
      d_y_ = a.d_y ? real(a.d_y[row * a.d_y_ld + u]) : V(0);
      dropped_ = dropped;
    }
    if constexpr (!kStage.projects) {
      inputs_.load_params(a.params, a.H, u);
      if constexpr (Cell::kTakesRow) row_input_ = a.row_input[row];
      const bool once = Cell::kSavesH && !a.drops;  // whether h is saved as h_in of the next row
      const Stored* saved = a.saved + (once ? j : row) * Cell::kSaved * a.H;
      if (once && j < rows.n_next) saved = a.h_in + (rows.next_row + j) * a.P;
      for (int i = 0; i < Cell::kSaved; ++i) saved_[i] = real(saved[i * a.H + u]);
      if constexpr (Cell::kReadsH) state_.h = real(a.h_in[row * a.P + u]);
      if constexpr (Cell::kHasC) {
        state_.c = a.c_in[row * a.H + u];
        carry_.d_c = dropped ? V(0) : a.d_c[j * a.H + u];
        if (a.d_y_c) carry_.d_c += real(a.d_y_c[row * a.d_y_ld + u]);
      }
      if constexpr (Cell::kCarriesH) carry_.d_h = kLast ? V(0) : a.d_h[j * a.P + u];
    }
  }

  // d_emit is the gradient of the emit, in the last stage without that of y.
  __device__ __forceinline__ void compute(V d_emit) {
    if constexpr (kLast) d_emit = (dropped_ ? V(0) : d_emit) + d_y_;
    if constexpr (kStage.projects) {
      delta_h_[0] = d_emit;
    } else {
      const Given<V> given = {inputs_.params, Cell::kTakesRow ? row_input_ : V(0)};
      Delta<V> delta = {delta_h_, delta_x_, delta_params_};
      Cell::template backward<s>(d_emit, saved_, given, state_, carry_, delta);
    }
  }

  // The gradient of h U + b_hh for a gate that the stage computes, or, as gate 0, that of the
  // projection's product.
  __device__ __forceinline__ V delta(int g) const { return delta_h_[g]; }

  __device__ __forceinline__ void store(const BackwardWork<Stored>& a, const StepRows& rows,
                                        int64_t j, int64_t u) const {
    const int64_t row = rows.row + j;
    if constexpr (kStage.projects) {
      a.delta_proj[row * a.P + u] = stored<Stored>(delta_h_[0]);
    } else {
      if constexpr (Cell::kHasC) a.d_c[j * a.H + u] = carry_.d_c;
      if constexpr (Cell::kCarriesH) a.d_h[j * a.P + u] = carry_.d_h;
      for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
        const int64_t at = (row * Cell::kGates + g) * a.H + u;
        a.delta[at] = stored<Stored>(delta_h_[g]);
        if constexpr (Cell::kSeparateDeltas) a.delta_x[at] = stored<Stored>(delta_x_[g]);
      }
      for (int k = kStage.param_begin; k < kStage.param_end; ++k)
        a.delta_params[(row * Cell::kParams + k) * a.H + u] = stored<Stored>(delta_params_[k]);
    }
  }

 private:
  V saved_[Cell::kSaved], delta_h_[Cell::kGates], delta_x_[Cell::kGates];
  V delta_params_[Cell::kParams > 0 ? Cell::kParams : 1];
  V d_y_, row_input_;
  Inputs<Cell, V> inputs_;
  State<V> state_;
  Carry<V> carry_;
  bool dropped_;  // whether no gradient comes from the next position
};

}  // namespace fusedrnn::cuda
