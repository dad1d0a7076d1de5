// One recurrent layer over a whole batch, forward or backward, both directions: packs the weights,
// takes the input product out of the time loop in chunks, and hands the loop to the kernels.
// Knows no torch: threads and scratch memory come through Runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "../kernel_api.h"
#include "plan.h"

namespace fusedrnn {

// What a layer needs from its surroundings.
class Runtime {
 public:
  virtual ~Runtime() = default;
  virtual int64_t threads() const = 0;
  // body(i) for every i in [0, n), in any order, at once or one after another. What one of them
  // throws is thrown when no other runs any more.
  virtual void parallel(int64_t n, const std::function<void(int64_t)>& body) = 0;
  // Runs body, in which calls of parallel may share the same threads.
  virtual void together(const std::function<void()>& body) { body(); }
  // Uninitialised, aligned to 64 bytes, valid until the layer call returns.
  virtual void* scratch(size_t bytes) = 0;
};

struct Layer {
  CellKind cell;
  int64_t I, H, P, D;
  const Sequences& sequences;

  const CellInfo& info() const { return kCellInfo[static_cast<int>(cell)]; }
  int64_t gate_columns() const { return info().gates * H; }
};

// Parameters of one direction, contiguous. T is const for values, non-const for their gradients;
// null biases are absent, null gradients are not wanted.
template <class T>
struct Weights {
  T* w_ih;  // [G*H, I]
  T* w_hh;  // [G*H, P]
  T* b_ih;  // [G*H]
  T* b_hh;  // [G*H]
  T* w_hr;  // [P, H], projection only
};

// F is the type of a product's factors, see kernel_api.h.
template <class F>
struct LayerForward {
  const F* x;             // [S, I]
  Weights<const F> w[2];  // [D]
  F* h;                   // [D, N, P] in: h_0, out: h_n
  Sum<F>* c;              // [D, N, H] in: c_0, out: c_n; null without c
  F* y;                   // [S, D*P]
  Sum<F>* reserve;        // [reserve_size] for backward, or null
};

template <class F>
struct LayerBackward {
  const F* x;              // [S, I]
  Weights<const F> w[2];   // [D]
  const Sum<F>* reserve;   // as forward left it
  const F* d_y;            // [S, D*P] or null
  Sum<F>* d_h;             // [D, N, P] in: of h_n, out: of h_0
  Sum<F>* d_c;             // [D, N, H] the same; null without c
  Sum<F>* d_x;             // [S, I] or null
  Weights<Sum<F>> d_w[2];  // [D]
};

// Values of Sum<F> that forward keeps for backward, for `rows` rows of layer.sequences.N sequences.
template <class F>
int64_t reserve_size(const Layer& layer, int64_t rows);

template <class F>
void layer_forward(const Layer& layer, const DtypeKernels<F>& kernels, Runtime& runtime,
                   const LayerForward<F>& args);

template <class F>
void layer_backward(const Layer& layer, const DtypeKernels<F>& kernels, Runtime& runtime,
                    const LayerBackward<F>& args);

}  // namespace fusedrnn
