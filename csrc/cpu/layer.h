// One recurrent layer over a whole batch on the CPU, forward or backward, in both directions. The
// functions pack the weights, compute x W in chunks outside the time loop, and run the loop with
// the kernels. They do not depend on torch: threads and scratch memory come through Runtime.
#pragma once

#include <cstdint>

#include "../layer/layer.h"
#include "dispatch.h"
#include "runtime.h"

namespace fusedrnn::cpu {

// Pointers need only the alignment of their type. Their memory must not overlap.
template <class Stored>
struct LayerForward {
  const Stored* x;                // [S, I]
  Parameters<const Stored> w[2];  // [D]
  Stored* h;                      // [D, N, P] in: h_0, out: h_n
  Real<Stored>* c;                // [D, N, H] in: c_0, out: c_n; null if the cell has no c
  Stored* y;                      // [S, D*P], or with c_in_y [S, D*P + D*H]
  void* reserve;                  // [reserve_bytes<Stored>] for backward, or null
  const Real<Stored>* row_input;  // [S] one value per row, or null if the cell takes none
};

template <class Stored>
struct LayerBackward {
  const Stored* x;                  // [S, I]
  Parameters<const Stored> w[2];    // [D]
  const void* reserve;              // as forward left it
  const Stored* d_y;                // as y, or null
  Real<Stored>* d_h;                // [D, N, P] in: gradient of h_n, out: gradient of h_0
  Real<Stored>* d_c;                // [D, N, H] the same for c; null if the cell has no c
  Real<Stored>* d_x;                // [S, I] or null
  Parameters<Real<Stored>> d_w[2];  // [D]
  const Real<Stored>* row_input;    // as in LayerForward; it gets no gradient
};

template <class Stored>
void layer_forward(const Layer& layer, const KernelTable& table, Runtime& runtime,
                   const LayerForward<Stored>& args);

template <class Stored>
void layer_backward(const Layer& layer, const KernelTable& table, Runtime& runtime,
                    const LayerBackward<Stored>& args);

}  // namespace fusedrnn::cpu
