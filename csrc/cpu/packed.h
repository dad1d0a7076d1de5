// Weights and other right sides of products, packed into panels, and the products with them.
#pragma once

#include <cstdint>

#include "../kernel_api.h"
#include "arena.h"
#include "layer.h"
#include "work.h"

namespace fusedrnn {

// The part of the recurrent weights that a stage multiplies.
template <class F>
struct StageWeight {
  int64_t gates, width, K;
  const F* weight;
  const F* bias_x;
  const F* bias_h;
};

template <class F>
StageWeight<F> stage_weight(const Layer& layer, const Stage& stage, const Weights<const F>& w) {
  if (stage.projects) return {1, layer.P, layer.H, w.w_hr, nullptr, nullptr};
  const int64_t K = stage.from_hidden ? layer.P : layer.H;
  const int64_t first = stage.first_gate * layer.H;
  return {stage.gates,
          layer.H,
          K,
          w.w_hh + first * K,
          w.b_ih && stage.takes_input ? w.b_ih + first : nullptr,
          w.b_hh ? w.b_hh + first : nullptr};
}

inline int64_t blocks(int64_t width, int64_t block) { return (width + block - 1) / block; }

// Adds a kernel's work in parts: args for some of its blocks each.
template <class Args>
void add_blocks(Work& work, int64_t blocks, void (*kernel)(const Args&), const Args& args) {
  work.split(blocks, 1, [=](int64_t begin, int64_t end) {
    Args part = args;
    part.block_begin = begin, part.block_end = end;
    kernel(part);
  });
}

// Recurrent weights of every direction and stage, packed for the time loop.
template <class F>
class Panels {
 public:
  // as_stored: the time loop takes the weights themselves; only the biases are packed.
  explicit Panels(bool as_stored) : as_stored_(as_stored) {}

  void lay_out_forward(Arena& arena, const Layer& layer, const DtypeKernels<F>& kernels,
                       const Weights<const F>* w) {
    each_stage(layer, w, [&](int d, int s, const StageWeight<F>& sw) {
      const int64_t units = kernels.gates_block(sw.gates);
      blocks_[d][s] = blocks(sw.width, units);
      if (!as_stored_) panels_[d][s] = arena.take<F>(blocks_[d][s] * units * sw.gates * sw.K);
      bias_[d][s] = arena.take<Sum<F>>(blocks_[d][s] * units * sw.gates * 2);
    });
  }

  void lay_out_backward(Arena& arena, const Layer& layer, const DtypeKernels<F>& kernels,
                        const Weights<const F>* w) {
    each_stage(layer, w, [&](int d, int s, const StageWeight<F>& sw) {
      const int64_t units = kernels.columns_block();
      blocks_[d][s] = blocks(sw.K, units);
      if (!as_stored_) panels_[d][s] = arena.take<F>(blocks_[d][s] * units * sw.gates * sw.width);
    });
  }

  void pack_forward(const Layer& layer, const DtypeKernels<F>& kernels, Work& work,
                    const Weights<const F>* w) const {
    each_stage(layer, w, [&](int d, int s, const StageWeight<F>& sw) {
      add_blocks(work, blocks_[d][s], kernels.pack_gates,
                 {.weight = sw.weight,
                  .bias_x = sw.bias_x,
                  .bias_h = sw.bias_h,
                  .gates = sw.gates,
                  .width = sw.width,
                  .K = sw.K,
                  .panels = panels_[d][s],
                  .bias = bias_[d][s]});
    });
  }

  void pack_backward(const Layer& layer, const DtypeKernels<F>& kernels, Work& work,
                     const Weights<const F>* w) const {
    if (as_stored_) return;
    each_stage(layer, w, [&](int d, int s, const StageWeight<F>& sw) {
      add_blocks(work, blocks_[d][s], kernels.pack_columns,
                 {.matrix = sw.weight,
                  .ld = sw.K,
                  .K = sw.gates * sw.width,
                  .N = sw.K,
                  .panels = panels_[d][s]});
    });
  }

  // The weights of a stage in the arguments of a time loop, in one of two forms.
  template <class Args>
  void give(const Layer& layer, const Weights<const F>* w, int d, Args& args) const {
    for (int s = 0; s < layer.info().stages; ++s) {
      args.panels[s] = panels_[d][s];
      args.weight[s] =
          as_stored_ ? stage_weight(layer, layer.info().stage[s], w[d]).weight : nullptr;
    }
  }
  const Sum<F>* bias(int d, int s) const { return bias_[d][s]; }

 private:
  template <class Body>
  void each_stage(const Layer& layer, const Weights<const F>* w, const Body& body) const {
    for (int d = 0; d < layer.D; ++d)
      for (int s = 0; s < layer.info().stages; ++s)
        body(d, s, stage_weight(layer, layer.info().stage[s], w[d]));
  }

  const bool as_stored_;
  int64_t blocks_[2][kMaxStages] = {};
  F* panels_[2][kMaxStages] = {};
  Sum<F>* bias_[2][kMaxStages] = {};
};

// The right side b [K, N] of matrix products outside the time loop, in panels.
template <class F>
class Factor {
 public:
  // K: the most rows that b will have.
  void lay_out(Arena& arena, const DtypeKernels<F>& kernels, int64_t K, int64_t N) {
    N_ = N;
    blocks_ = blocks(N, kernels.columns_block());
    panels_ = arena.take<F>(blocks_ * kernels.columns_block() * whole_terms<F>(K));
  }

  // b = matrix, [K, N] with row stride ld.
  void pack(const DtypeKernels<F>& kernels, Work& work, const F* matrix, int64_t ld, int64_t K) {
    K_ = K;
    add_blocks(work, blocks_, kernels.pack_columns,
               {.matrix = matrix, .ld = ld, .K = K, .N = N_, .panels = panels_});
  }

  // b = matrix^T, matrix [N, K] contiguous.
  void pack_transposed(const DtypeKernels<F>& kernels, Work& work, const F* matrix, int64_t K) {
    K_ = K;
    add_blocks(work, blocks_, kernels.pack_gates,
               {.weight = matrix, .gates = 1, .width = N_, .K = K, .panels = panels_});
  }

  // c (+)= a b for M rows; a is [M, K], or [K, M] if a_transposed. whole_K: of the sum to which
  // several calls add.
  void multiply(const DtypeKernels<F>& kernels, Work& work, const F* a, int64_t a_ld,
                bool a_transposed, int64_t M, Sum<F>* c, int64_t c_ld, bool accumulate,
                int64_t whole_K = 0) const {
    const GemmArgs<F> gemm = {.a = a,
                              .a_ld = a_ld,
                              .a_transposed = a_transposed,
                              .panels = panels_,
                              .c = c,
                              .c_ld = c_ld,
                              .K = K_,
                              .N = N_,
                              .m_end = M,
                              .block_end = blocks_,
                              .accumulate = accumulate,
                              .whole_K = whole_K};
    // Few rows: every thread would read all of b for them, so it is b that is cut, if it is wide.
    if (M < kRowsToSplit * work.threads() && blocks_ >= work.threads()) {
      add_blocks(work, blocks_, kernels.gemm, gemm);
    } else {
      work.split(M, M < kRowsToSplit * work.threads() ? 1 : kRowsToSplit,
                 [&kernels, gemm](int64_t begin, int64_t end) {
                   GemmArgs<F> part = gemm;
                   part.m_begin = begin, part.m_end = end;
                   kernels.gemm(part);
                 });
    }
  }

  // c (+)= a b for the rows of the sequences of one task in a chunk, by the thread that asks.
  void multiply_own(const DtypeKernels<F>& kernels, const Steps& steps, const F* a, int64_t a_ld,
                    Sum<F>* c, int64_t c_ld) const {
    kernels.gemm({.a = a,
                  .a_ld = a_ld,
                  .panels = panels_,
                  .c = c,
                  .c_ld = c_ld,
                  .K = K_,
                  .N = N_,
                  .block_end = blocks_,
                  .steps = &steps});
  }

 private:
  static constexpr int64_t kRowsToSplit = 48;
  int64_t K_ = 0, N_ = 0, blocks_ = 0;
  F* panels_ = nullptr;
};

// c = a b^T, a [M, K], b [N, K] a weight as torch stores it.
template <class F>
void multiply_as_stored(const DtypeKernels<F>& kernels, Work& work, const F* a, int64_t M,
                        const F* b, int64_t N, int64_t K, Sum<F>* c) {
  add_blocks(work, blocks(N, kernels.columns_block()), kernels.gemm_as_stored,
             {.a = a, .b = b, .c = c, .M = M, .N = N, .K = K});
}

}  // namespace fusedrnn
