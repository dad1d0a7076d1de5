// The right sides of products, weights and others, packed into panels, and the products with them.
#pragma once

#include <cstdint>

#include "../layer/layer.h"
#include "arena.h"
#include "kernel_table.h"
#include "work.h"

namespace fusedrnn::cpu {

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Adds the work of a kernel in pieces. Each piece calls it with args for some of the panels.
template <class Args>
void add_panels(Work& work, int64_t panels, void (*kernel)(const Args&), const Args& args) {
  work.split(panels, 1, [=](int64_t begin, int64_t end) {
    Args piece = args;
    piece.panel_begin = begin, piece.panel_end = end;
    kernel(piece);
  });
}

// The recurrent weights of every direction and stage, packed for the time loop.
template <class Stored>
class PackedWeights {
 public:
  // If as_stored, the time loop reads the weights as torch stores them, and only the biases are
  // packed.
  PackedWeights(const Layer& layer, const DtypeKernels<Stored>& kernels,
                const Parameters<const Stored>* w, bool as_stored)
      : layer_(layer), kernels_(kernels), w_(w), as_stored_(as_stored) {}

  void lay_out_forward(Arena& arena) {
    each_stage([&](int d, int s, const StageWeight<const Stored>& weight) {
      const int64_t units = kernels_.units_of_gates_panel(weight.gates);
      count_[d][s] = ceil_div(weight.width, units);
      const int64_t columns = count_[d][s] * units * weight.gates;
      if (!as_stored_) panels_[d][s] = arena.take<Stored>(columns * weight.K);
      bias_[d][s] = arena.take<Real<Stored>>(columns * 2);
    });
  }

  void lay_out_backward(Arena& arena) {
    each_stage([&](int d, int s, const StageWeight<const Stored>& weight) {
      const int64_t units = kernels_.units_of_columns_panel();
      count_[d][s] = ceil_div(weight.K, units);
      if (!as_stored_) panels_[d][s] = arena.take<Stored>(count_[d][s] * units * weight.rows());
    });
  }

  void pack_forward(Work& work) const {
    each_stage([&](int d, int s, const StageWeight<const Stored>& weight) {
      add_panels(work, count_[d][s], kernels_.pack_gates,
                 {.weight = weight.weight,
                  .bias_x = weight.bias_x,
                  .bias_h = weight.bias_h,
                  .gates = weight.gates,
                  .width = weight.width,
                  .K = weight.K,
                  .panels = panels_[d][s],
                  .bias = bias_[d][s]});
    });
  }

  void pack_backward(Work& work) const {
    if (as_stored_) return;
    each_stage([&](int d, int s, const StageWeight<const Stored>& weight) {
      add_panels(work, count_[d][s], kernels_.pack_columns,
                 {.matrix = weight.weight,
                  .ld = weight.K,
                  .K = weight.rows(),
                  .N = weight.K,
                  .panels = panels_[d][s]});
    });
  }

  // The pointers through which the time loop of direction d reads the weights.
  StageWeights<Stored> of_direction(int d) const {
    StageWeights<Stored> weights = {};
    for (int s = 0; s < layer_.info().stages; ++s) {
      weights.panels[s] = panels_[d][s];
      if (as_stored_)
        weights.as_stored[s] = stage_weight(layer_, layer_.info().stage[s], w_[d]).weight;
    }
    return weights;
  }
  const Real<Stored>* bias(int d, int s) const { return bias_[d][s]; }

 private:
  template <class Body>
  void each_stage(const Body& body) const {
    for (int d = 0; d < layer_.D; ++d)
      for (int s = 0; s < layer_.info().stages; ++s)
        body(d, s, stage_weight(layer_, layer_.info().stage[s], w_[d]));
  }

  const Layer& layer_;
  const DtypeKernels<Stored>& kernels_;
  const Parameters<const Stored>* const w_;
  const bool as_stored_;
  int64_t count_[2][kMaxStages] = {};  // number of panels
  Stored* panels_[2][kMaxStages] = {};
  Real<Stored>* bias_[2][kMaxStages] = {};
};

// How a product is written to its result.
struct Accumulation {
  bool accumulate = false;  // whether it is added to the values that are there
  int64_t whole_K = 0;      // terms of the whole sum if several products add to it, else 0
};

// The right side b [K, N] of matrix products outside the time loop, in panels.
template <class Stored>
class Factor {
 public:
  // K is the largest number of rows that b will have.
  void lay_out(Arena& arena, const DtypeKernels<Stored>& kernels, int64_t K, int64_t N) {
    kernels_ = &kernels;
    N_ = N;
    count_ = ceil_div(N, kernels.units_of_columns_panel());
    panels_ =
        arena.take<Stored>(count_ * kernels.units_of_columns_panel() * whole_terms<Stored>(K));
  }

  // Packs the matrix as b. A transposed matrix must be dense.
  void pack(Work& work, const Matrix<const Stored>& matrix) {
    K_ = matrix.rows;
    if (matrix.transposed) {
      add_panels(work, count_, kernels_->pack_gates,
                 {.weight = matrix.data, .gates = 1, .width = N_, .K = K_, .panels = panels_});
    } else {
      add_panels(work, count_, kernels_->pack_columns,
                 {.matrix = matrix.data, .ld = matrix.ld, .K = K_, .N = N_, .panels = panels_});
    }
  }

  // Adds the pieces of c = a b, or of c += a b if how.accumulate.
  void multiply(Work& work, const Matrix<const Stored>& a, const Matrix<Real<Stored>>& c,
                const Accumulation& how = {}) const {
    GemmArgs<Stored> gemm = product(a, c);
    gemm.m_end = a.rows;
    gemm.accumulate = how.accumulate;
    gemm.whole_K = how.whole_K;
    // If a has few rows and its rows were shared among the threads, each thread would read all of b
    // for its few rows. Therefore the panels of b are shared instead, if there are enough.
    if (a.rows < kRowsToSplit * work.threads() && count_ >= work.threads()) {
      add_panels(work, count_, kernels_->gemm, gemm);
    } else {
      work.split(a.rows, a.rows < kRowsToSplit * work.threads() ? 1 : kRowsToSplit,
                 [kernel = kernels_->gemm, gemm](int64_t begin, int64_t end) {
                   GemmArgs<Stored> piece = gemm;
                   piece.m_begin = begin, piece.m_end = end;
                   kernel(piece);
                 });
    }
  }

  // Computes c = a b on the calling thread, for the rows of one task's sequences in a chunk. a and
  // c have all rows of the chunk.
  void multiply_own(const Steps& steps, const Matrix<const Stored>& a,
                    const Matrix<Real<Stored>>& c) const {
    GemmArgs<Stored> gemm = product(a, c);
    gemm.steps = &steps;
    kernels_->gemm(gemm);
  }

 private:
  GemmArgs<Stored> product(const Matrix<const Stored>& a, const Matrix<Real<Stored>>& c) const {
    return {.a = a.data,
            .a_ld = a.ld,
            .a_transposed = a.transposed,
            .panels = panels_,
            .c = c.data,
            .c_ld = c.ld,
            .K = K_,
            .N = N_,
            .panel_end = count_};
  }

  static constexpr int64_t kRowsToSplit = 48;
  const DtypeKernels<Stored>* kernels_ = nullptr;
  int64_t K_ = 0, N_ = 0, count_ = 0;  // count_ is the number of panels
  Stored* panels_ = nullptr;
};

// Adds the pieces of c = a b^T, where b is a weight as torch stores it. All three are dense.
template <class Stored>
void multiply_as_stored(const DtypeKernels<Stored>& kernels, Work& work,
                        const Matrix<const Stored>& a, const Matrix<const Stored>& b,
                        Real<Stored>* c) {
  add_panels(work, ceil_div(b.rows, kernels.units_of_columns_panel()), kernels.gemm_as_stored,
             {.a = a.data, .b = b.data, .c = c, .M = a.rows, .N = b.rows, .K = a.columns});
}

}  // namespace fusedrnn::cpu
