// The kernels of the per-step regime: the elementwise work of a stage. A thread takes one value at
// a time.
#include "kernels.h"
#include "storage.cuh"

namespace fusedrnn::cuda {
namespace {

// Calls body(j, u) for every sequence j of [0, n) and unit u of [0, width). Consecutive threads
// take consecutive units.
template <class Body>
__device__ __forceinline__ void for_units(int64_t n, int64_t width, const Body& body) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n * width; i += threads)
    body(i / width, i % width);
}

template <class Stored, class Cell, int s>
__device__ __forceinline__ void forward_stage(const StepForwardArgs<Stored>& a) {
  using V = Real<Stored>;
  const int64_t width = Cell::stage(s).projects ? a.P : a.H;
  for_units(a.n, width, [&](int64_t j, int64_t u) {
    constexpr Stage kStage = Cell::stage(s);
    constexpr bool kLast = s == Cell::kStages - 1;
    V gates_x[kStage.gates], acc[kStage.gates], saved[Cell::kSaved];
    for (int g = 0; g < kStage.gates; ++g) {
      acc[g] = a.acc[(j * kStage.gates + g) * width + u];
      if constexpr (!kStage.projects) {
        const int64_t column = (kStage.first_gate + g) * a.H + u;
        if (a.b_hh) acc[g] += real(a.b_hh[column]);
        gates_x[g] = a.gates_x[j * Cell::kGates * a.H + column];
        if (a.b_ih) gates_x[g] += real(a.b_ih[column]);
      }
    }
    Stored* saved_of_unit = a.saved ? a.saved + j * Cell::kSaved * a.H + u : nullptr;
    if constexpr (s > 0 && !kStage.projects) {
      for (int i = 0; i < kStage.saved_begin; ++i) saved[i] = real(saved_of_unit[i * a.H]);
    }
    Inputs<Cell, V> inputs;
    if constexpr (!kStage.projects) inputs.load_params(a.params, a.H, u);
    State<V> state;
    if constexpr (Cell::kReadsH) state.h = a.h[j * a.P + u];
    if constexpr (Cell::kHasC && s == 0) {
      state.c = a.c[j * a.H + u];
      if (a.c_in) a.c_in[j * a.H + u] = state.c;
    }

    const V emit =
        Cell::template forward<s>(gates_x, acc, inputs.of_row(a.row_input, j), state, saved);

    if constexpr (Cell::kHasC && s == 0) a.c[j * a.H + u] = state.c;
    if (saved_of_unit) {
      for (int i = kStage.saved_begin; i < kStage.saved_end; ++i)
        saved_of_unit[i * a.H] = stored<Stored>(saved[i]);
    }
    if constexpr (kLast) {
      if (a.h_in) a.h_in[j * a.P + u] = stored<Stored>(a.h[j * a.P + u]);
      a.h[j * a.P + u] = emit;
      if constexpr (kRounds<Stored>) a.h_rounded[j * a.P + u] = stored<Stored>(emit);
      a.y[j * a.y_ld + u] = stored<Stored>(emit);
    } else {
      a.emit[j * a.H + u] = stored<Stored>(emit);
    }
  });
}

template <class Stored, class Cell, int s>
__device__ __forceinline__ void backward_stage(const StepBackwardArgs<Stored>& a) {
  using V = Real<Stored>;
  for_units(a.n, Cell::stage(s).projects ? a.P : a.H, [&](int64_t j, int64_t u) {
    constexpr Stage kStage = Cell::stage(s);
    constexpr bool kLast = s == Cell::kStages - 1;
    V d_emit;
    if constexpr (kLast) {
      d_emit = a.d_h[j * a.P + u];
      if (a.d_y) d_emit += real(a.d_y[j * a.d_y_ld + u]);
    } else {
      d_emit = a.d_emit[j * a.H + u];
    }
    if constexpr (kStage.projects) {
      a.delta_proj[j * a.P + u] = stored<Stored>(d_emit);
    } else {
      V saved[Cell::kSaved], delta_h[Cell::kGates], delta_x[Cell::kGates];
      V delta_params[Cell::kParams > 0 ? Cell::kParams : 1];
      Delta<V> delta = {delta_h, delta_x, delta_params};
      Inputs<Cell, V> inputs;
      inputs.load_params(a.params, a.H, u);
      const Stored* saved_of_row = a.saved + j * Cell::kSaved * a.H;
      if (Cell::kSavesH && j < a.n_next) saved_of_row = a.h_next + j * a.P;
      for (int i = 0; i < Cell::kSaved; ++i) saved[i] = real(saved_of_row[i * a.H + u]);
      State<V> state;
      Carry<V> carry;
      if constexpr (Cell::kReadsH) state.h = real(a.h_in[j * a.P + u]);
      if constexpr (Cell::kHasC) {
        state.c = a.c_in[j * a.H + u];
        carry.d_c = a.d_c[j * a.H + u];
      }
      if constexpr (Cell::kCarriesH) carry.d_h = kLast ? V(0) : a.d_h[j * a.P + u];

      Cell::template backward<s>(d_emit, saved, inputs.of_row(a.row_input, j), state, carry, delta);

      if constexpr (Cell::kHasC) a.d_c[j * a.H + u] = carry.d_c;
      if constexpr (Cell::kCarriesH) a.d_h[j * a.P + u] = carry.d_h;
      for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
        const int64_t at = (j * Cell::kGates + g) * a.H + u;
        a.delta[at] = stored<Stored>(delta_h[g]);
        if constexpr (Cell::kSeparateDeltas) a.delta_x[at] = stored<Stored>(delta_x[g]);
      }
      for (int k = kStage.param_begin; k < kStage.param_end; ++k)
        a.delta_params[(j * Cell::kParams + k) * a.H + u] = stored<Stored>(delta_params[k]);
    }
  });
}

template <class Stored>
__device__ __forceinline__ void step_forward(const StepForwardArgs<Stored>& a) {
  with_cell(a.cell, [&](auto cell) {
    using Cell = decltype(cell);
    with_stage<Cell>(a.stage, [&](auto s) { forward_stage<Stored, Cell, s.value>(a); });
  });
}

template <class Stored>
__device__ __forceinline__ void step_backward(const StepBackwardArgs<Stored>& a) {
  with_cell(a.cell, [&](auto cell) {
    using Cell = decltype(cell);
    with_stage<Cell>(a.stage, [&](auto s) { backward_stage<Stored, Cell, s.value>(a); });
  });
}

}  // namespace
}  // namespace fusedrnn::cuda

#define FUSEDRNN_STEP(name, Stored)                                                               \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads)                          \
      step_forward_##name(const __grid_constant__ fusedrnn::cuda::StepForwardArgs<Stored> args) { \
    fusedrnn::cuda::step_forward(args);                                                           \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads) step_backward_##name(    \
      const __grid_constant__ fusedrnn::cuda::StepBackwardArgs<Stored> args) {                    \
    fusedrnn::cuda::step_backward(args);                                                          \
  }
FUSEDRNN_STEP(f32, float)
FUSEDRNN_STEP(f64, double)
FUSEDRNN_STEP(f16, fusedrnn::Half)
FUSEDRNN_STEP(bf16, fusedrnn::Bf16)
#undef FUSEDRNN_STEP

const std::vector<fusedrnn::cuda::Kernel> fusedrnn::cuda::kStepKernels = {
    FUSEDRNN_KERNEL(step_forward_f32),  FUSEDRNN_KERNEL(step_backward_f32),
    FUSEDRNN_KERNEL(step_forward_f64),  FUSEDRNN_KERNEL(step_backward_f64),
    FUSEDRNN_KERNEL(step_forward_f16),  FUSEDRNN_KERNEL(step_backward_f16),
    FUSEDRNN_KERNEL(step_forward_bf16), FUSEDRNN_KERNEL(step_backward_bf16),
};
