// The pure functions of plan.h, layer/sequences.h and dispatch.cpp.
#include "cpu/plan.h"
#include "arrays.h"
#include "bindings.h"
#include "layer/sequences.h"
#include "old_processor.h"

namespace fusedrnn_test {
namespace {

using namespace fusedrnn;
using namespace fusedrnn::cpu;
using Sizes = std::vector<int64_t>;

Array<int64_t> pack(const Sizes& lengths, const Array<int64_t>& padded) {
  const PaddedRows rows = from_lengths(lengths.data(), static_cast<int64_t>(lengths.size()));
  Fence fence;
  const int64_t row = padded.shape(2), S = rows.sequences.rows();
  const int64_t* from = fence.copy("padded", padded.data(), padded.size());
  int64_t* to = fence.take<int64_t>("packed", S * row);
  pack_rows(rows, from, to, row * static_cast<int64_t>(sizeof(int64_t)));
  fence.check();
  return numpy(to, {S, row});
}

// padded: the values in the padded batch before the call.
Array<int64_t> unpack(const Sizes& lengths, const Array<int64_t>& packed,
                      const Array<int64_t>& padded) {
  const PaddedRows rows = from_lengths(lengths.data(), static_cast<int64_t>(lengths.size()));
  Fence fence;
  const int64_t row = padded.shape(2);
  const int64_t* from = fence.copy("packed", packed.data(), packed.size());
  int64_t* to = fence.copy("padded", padded.data(), padded.size());
  unpack_rows(rows, from, to, row * static_cast<int64_t>(sizeof(int64_t)));
  fence.check();
  return numpy(to, {padded.shape(0), padded.shape(1), row});
}

// states: [D, N, row].
Array<int64_t> permute(const Sizes& lengths, const Array<int64_t>& states, bool sort) {
  const PaddedRows rows = from_lengths(lengths.data(), static_cast<int64_t>(lengths.size()));
  Fence fence;
  const int64_t D = states.shape(0), row = states.shape(2);
  const int64_t* from = fence.copy("from", states.data(), states.size());
  int64_t* to = fence.take<int64_t>("to", states.size());
  (sort ? sort_states : unsort_states)(rows, from, to, D,
                                       row * static_cast<int64_t>(sizeof(int64_t)));
  fence.check();
  return numpy(to, {D, states.shape(1), row});
}

}  // namespace

void define_plan(py::module_& m) {
  m.def(
      "cut_sequences",
      [](const Sizes& batch_sizes, int64_t N, int64_t tasks) {
        return cut_sequences(from_batch_sizes(batch_sizes, N), tasks);
      },
      py::arg("batch_sizes"), py::arg("N"), py::arg("tasks"));
  m.def(
      "make_plan",
      [](const Sizes& batch_sizes, int64_t N, int64_t columns, int64_t inner, int64_t input,
         int64_t directions, int64_t threads, int64_t chunk_values) {
        const Sequences sequences = from_batch_sizes(batch_sizes, N);
        const Plan plan = make_plan({.sequences = sequences,
                                     .columns = columns,
                                     .inner = inner,
                                     .input = input,
                                     .directions = directions,
                                     .threads = threads,
                                     .chunk_values = chunk_values});
        return py::make_tuple(plan.chunk_steps, plan.sequence_cut, plan.by_units ? plan.slices : 0,
                              to_text(plan));
      },
      py::arg("batch_sizes"), py::arg("N"), py::arg("columns"), py::arg("inner"), py::arg("input"),
      py::arg("directions"), py::arg("threads"), py::arg("chunk_values"),
      "chunk_steps, sequence_cut, slices (0 by rows) and their text.");
  m.def("chunk_values",
        [] { return std::vector<int64_t>{kForwardChunkValues, kBackwardChunkValues}; });
  m.def(
      "from_lengths",
      [](const Sizes& lengths) {
        const PaddedRows rows = from_lengths(lengths.data(), static_cast<int64_t>(lengths.size()));
        return py::make_tuple(rows.order, rows.sequences.batch_sizes, rows.sequences.row_offset);
      },
      py::arg("lengths"), "order, batch_sizes and row_offset.");
  m.def("pack_rows", pack, py::arg("lengths"), py::arg("padded").noconvert());
  m.def("unpack_rows", unpack, py::arg("lengths"), py::arg("packed").noconvert(),
        py::arg("padded").noconvert());
  m.def("permute_states", permute, py::arg("lengths"), py::arg("states").noconvert(),
        py::arg("sort"));
  m.def("old_processor_kernels_named", old_processor_kernels_named, py::arg("name"),
        "kernels_named on a processor with AVX2 and without AVX-512; \"\" gives what it chooses.");
}

}  // namespace fusedrnn_test
