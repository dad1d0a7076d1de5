// The kernels of the per-step regime: the elementwise work of a stage. A thread takes one value at
// a time.
#include "kernels.h"
#include "stage_work.cuh"

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
  constexpr Stage kStage = Cell::stage(s);
  const int64_t width = kStage.projects ? a.work.P : a.work.H;
  for_units(a.rows.n, width, [&](int64_t j, int64_t u) {
    Real<Stored> acc[kStage.gates];
    for (int g = 0; g < kStage.gates; ++g) acc[g] = a.acc[(j * kStage.gates + g) * width + u];
    ForwardValue<Stored, Cell, s> value;
    value.load(a.work, a.rows.row, j, u);
    value.compute(acc);
    value.store(a.work, a.rows.row, j, u);
  });
}

template <class Stored, class Cell, int s>
__device__ __forceinline__ void backward_stage(const StepBackwardArgs<Stored>& a) {
  const int64_t H = a.work.H, P = a.work.P;
  for_units(a.rows.n, Cell::stage(s).projects ? P : H, [&](int64_t j, int64_t u) {
    constexpr bool kLast = s == Cell::kStages - 1;
    BackwardValue<Stored, Cell, s> value;
    value.load(a.work, a.rows, j, u);
    value.compute(kLast ? a.work.d_h[j * P + u] : a.d_emit[j * H + u]);
    value.store(a.work, a.rows, j, u);
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
