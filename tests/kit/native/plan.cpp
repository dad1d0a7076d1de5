// The pure functions of plan.h, layer/pieces.h and dispatch.cpp.
#include "cpu/plan.h"
#include "arrays.h"
#include "bindings.h"
#include "layer/pieces.h"
#include "old_processor.h"

namespace fusedrnn_test {
namespace {

using namespace fusedrnn;
using namespace fusedrnn::cpu;
using Sizes = std::vector<int64_t>;

// Cuts the sequences where `starts`, [rows of the caller], is not 0. batch_sizes are those of the
// caller's rows if these are packed.
Pieces cut(const Sizes& lengths, const Sizes& batch_sizes, const Array<int64_t>& starts) {
  Sizes row_offset;
  if (!batch_sizes.empty())
    row_offset = from_batch_sizes(batch_sizes, static_cast<int64_t>(lengths.size())).row_offset;
  return cut_pieces(lengths, row_offset, [&](int64_t row) {
    expect(row < starts.size(), "starts must have every row");
    return starts.data()[row] != 0;
  });
}

// given: the caller's rows. Returns the packed rows.
Array<int64_t> pack(const Pieces& pieces, const Array<int64_t>& given) {
  Fence fence;
  const int64_t row = given.shape(1), S = pieces.sequences.rows();
  const int64_t* from = fence.copy("given", given.data(), given.size());
  int64_t* to = fence.take<int64_t>("packed", S * row);
  const int64_t half = pieces.sequences.T / 2, bytes = row * static_cast<int64_t>(sizeof(int64_t));
  pack_rows(pieces, from, to, bytes, half, pieces.sequences.T);
  pack_rows(pieces, from, to, bytes, 0, half);
  fence.check();
  return numpy(to, {S, row});
}

// given: the caller's rows before the call.
Array<int64_t> unpack(const Pieces& pieces, const Array<int64_t>& packed,
                      const Array<int64_t>& given) {
  Fence fence;
  const int64_t row = given.shape(1);
  const int64_t* from = fence.copy("packed", packed.data(), packed.size());
  int64_t* to = fence.copy("given", given.data(), given.size());
  unpack_rows(pieces, from, to, row * static_cast<int64_t>(sizeof(int64_t)), 0, pieces.sequences.T);
  fence.check();
  return numpy(to, {given.shape(0), row});
}

// from: [D, N, row] if they are taken, else [D, pieces, row]. to: the other one before the call.
Array<int64_t> move_states(const Pieces& pieces, const Array<int64_t>& from,
                           const Array<int64_t>& to, bool take, bool at_begin) {
  Fence fence;
  const int64_t D = from.shape(0), row = from.shape(2);
  const int64_t* source = fence.copy("from", from.data(), from.size());
  int64_t* target = fence.copy("to", to.data(), to.size());
  (take ? take_states : give_states)(pieces, source, target, D,
                                     at_begin ? StateAt::kBegin : StateAt::kEnd,
                                     row * static_cast<int64_t>(sizeof(int64_t)));
  fence.check();
  return numpy(target, {D, to.shape(1), row});
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
  py::class_<Pieces>(m, "Pieces")
      .def(py::init(&cut), py::arg("lengths"), py::arg("batch_sizes"),
           py::arg("starts").noconvert())
      .def_property_readonly("pieces",
                             [](const Pieces& pieces) {
                               std::vector<Sizes> list;
                               for (const Piece& piece : pieces.piece)
                                 list.push_back({piece.n, piece.first, piece.length});
                               return list;
                             })
      .def_property_readonly("batch_sizes",
                             [](const Pieces& pieces) { return pieces.sequences.batch_sizes; })
      .def_property_readonly("row_offset",
                             [](const Pieces& pieces) { return pieces.sequences.row_offset; })
      .def_readonly("in_place", &Pieces::in_place)
      .def("pack", &pack, py::arg("given").noconvert())
      .def("unpack", &unpack, py::arg("packed").noconvert(), py::arg("given").noconvert())
      .def("move_states", &move_states, py::arg("from").noconvert(), py::arg("to").noconvert(),
           py::kw_only(), py::arg("take"), py::arg("at_begin"));
  m.def("old_processor_kernels_named", old_processor_kernels_named, py::arg("name"),
        "kernels_named on a processor with AVX2 and without AVX-512; \"\" gives what it chooses.");
}

}  // namespace fusedrnn_test
