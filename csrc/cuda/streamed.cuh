// The streamed regime: a launch runs many positions of all directions, as in the resident regime,
// but with any number of sequences, with projections, and with weights that do not all have room on
// the chip. What has no room is streamed (weight_stream.cuh). States and their gradients are in
// global memory; a value of them belongs to one thread for the whole launch.
//
// At each stage a block takes its sequences in groups. It loads what the elementwise work of a
// group needs, multiplies the source of the group, which is in the exchange, and does that work.
// All blocks wait for each other once in each stage: after the loads of the first group, before its
// product.
//
// This file has the code that forward (streamed_forward.cuh) and backward (streamed_backward.cuh)
// share.
#pragma once

#include "blocks.cuh"
#include "product.cuh"
#include "stage_work.cuh"

namespace fusedrnn::cuda {

// This block's part of some values of each sequence: units of H, or outputs of a projection.
struct Span {
  int first, size;  // the last blocks may own fewer, or none
  int64_t width;    // values of all blocks
};

// The block's part of h (the outputs of the projection in cells that have one), or of the units.
template <class Args>
__device__ __forceinline__ Span span_of(const Args& a, bool of_h) {
  const int size = of_h ? a.shape.proj_units : a.shape.units;
  return {static_cast<int>(blockIdx.x) * size, size, of_h ? a.P : a.H};
}
// The block's part of a stage's emit, and that of its source.
template <class Args>
__device__ __forceinline__ Span emit_span(const Args& a, Stage stage, bool last) {
  return span_of(a, last || stage.projects);
}
template <class Args>
__device__ __forceinline__ Span source_span(const Args& a, Stage stage) {
  return span_of(a, stage.from_hidden);
}

// Calls body(i, j, u) for each pair i that this thread owns in a group: sequence `first + j` of the
// block with j < count, and value span.first + u of the layer.
template <class Body>
__device__ __forceinline__ void for_values(const Span& span, int first, int count,
                                           const Body& body) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int q = i * kThreads + threadIdx.x;
    const int j = q / span.size, u = q - j * span.size;
    if (j < count && span.first + u < span.width) body(i, first + j, u);
  }
}

// A source of values.
template <class Stored>
__device__ __forceinline__ Source<Stored> values_of(const Stored* rows) {
  return {rows, nullptr, 0, 0, nullptr};
}

// The memory of this block's streamed weights.
template <class Args>
__device__ __forceinline__ char* streamed_of(const Args& a) {
  const int64_t block = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return a.streamed + block * a.shape.streamed_bytes;
}

}  // namespace fusedrnn::cuda
