#include "layer.h"

#include <algorithm>
#include <string>

#include "../layer/log.h"
#include "../layer/reserve.h"
#include "arena.h"
#include "packed.h"
#include "plan.h"
#include "schedule.h"
#include "work.h"

namespace fusedrnn::cpu {
namespace {

void log_plan(const Layer& layer, const char* pass, const Plan& plan, const KernelTable& table,
              const Runtime& runtime) {
  if (!logs()) return;
  std::string text = to_text(plan) + ", ";
  text += std::to_string(runtime.threads()) + (runtime.threads() == 1 ? " thread" : " threads");
  if (*runtime.why_threads()) text.append(" (").append(runtime.why_threads()).append(")");
  log_pass(layer, std::string("cpu ").append(table.isa), pass, text);
}

// The chunk that begins at position `begin`, with all sequences.
Steps chunk_steps(const Sequences& seq, const Plan& plan, int64_t begin, bool descending) {
  const int64_t end = std::min(seq.T, begin + plan.chunk_steps);
  return {.T = seq.T,
          .batch_sizes = seq.batch_sizes.data(),
          .row_offset = seq.row_offset.data(),
          .descending = descending,
          .begin = begin,
          .end = end,
          .first_row = rows_of(seq, descending, begin, end).begin,
          .n_begin = 0,
          .n_end = seq.widest()};
}

RowRange chunk_rows(const Sequences& seq, const Steps& steps) {
  return rows_of(seq, steps.descending, steps.begin, steps.end);
}

// The largest number of rows of a chunk. The chunk that begins at step 0 has it, because batch
// sizes do not grow.
int64_t widest_chunk(const Sequences& seq, const Plan& plan) {
  return seq.row_offset[std::min(plan.chunk_steps, seq.T)];
}

template <class Value>
void fill_zero(Value* p, int64_t n) {
  if (p) std::fill(p, p + n, Value{});
}

// --- Forward ------------------------------------------------------------------------------------

// The buffers of one forward pass.
template <class Stored>
struct ForwardBuffers {
  Factor<Stored> w_ih[2];         // not used if x W reads the weights as stored
  Real<Stored>* gates_x[2] = {};  // [buffers, chunk rows, G*H]: a buffer per task if own_chunks
  int64_t chunk_values = 0;       // values of one buffer
};

template <class Stored>
void lay_out(const Layer& layer, const DtypeKernels<Stored>& kernels, const Plan& plan,
             Arena& arena, ForwardBuffers<Stored>& buffers) {
  const int64_t columns = layer.gate_columns();
  const int64_t count = plan.own_chunks ? plan.tasks_per_direction() : 1;
  buffers.chunk_values = widest_chunk(layer.sequences, plan) * columns;
  for (int d = 0; d < layer.D; ++d) {
    if (!plan.x_as_stored) buffers.w_ih[d].lay_out(arena, kernels, layer.I, columns);
    buffers.gates_x[d] = arena.take<Real<Stored>>(count * buffers.chunk_values);
  }
}

// Takes memory for the values that steps and stages hand on, if forward keeps nothing for backward.
template <class Stored>
void lay_out_states(const Layer& layer, Arena& arena, ForwardArgs<Stored>& a) {
  const CellInfo& info = layer.info();
  const int64_t N = layer.sequences.N, H = layer.H;
  a.h_in = arena.take<Stored>(2 * N * layer.P);
  if (info.stages == 1) return;
  a.saved = arena.take<Stored>(N * info.saved * H);
  a.emit = arena.take<Stored>(N * H);
}

// Sets the pointers to the caller's tensors of direction d, and to the reserve if there is one.
template <class Stored>
void give_tensors(const Layer& layer, const LayerForward<Stored>& args, int d,
                  ForwardArgs<Stored>& a) {
  const CellInfo& info = layer.info();
  const int64_t N = layer.sequences.N, H = layer.H, P = layer.P;
  a.N = N, a.H = H, a.P = P;
  a.keep = args.reserve != nullptr;
  a.h = args.h + d * N * P;
  a.c = info.has_c ? args.c + d * N * H : nullptr;
  a.y = args.y + d * P;
  a.y_c = layer.c_in_y ? args.y + layer.D * P + d * H : nullptr;
  a.y_ld = layer.y_width();
  a.params = args.w[d].w_ch;
  a.row_input = args.row_input;
  if (!a.keep) return;
  const Reserve<Stored> reserve = reserve_of<Stored>(layer, args.reserve, d);
  a.h_in = reserve.h_in;
  a.c_in = reserve.c_in;
  a.saved = reserve.saved;
  a.emit = reserve.emit;
}

// --- Backward -----------------------------------------------------------------------------------

// A gradient of a bias is summed in pieces of this many columns.
constexpr int64_t kSumColumns = 128;

// Adds the pieces of a sum over rows. If copy_to is not null, the sums are copied to it.
template <class Stored>
void add_sum_rows(Work& work, const DtypeKernels<Stored>& kernels, const SumRowsArgs<Stored>& sum,
                  Real<Stored>* copy_to) {
  const int64_t columns = sum.end;
  work.add(ceil_div(columns, kSumColumns), [=, &kernels](int64_t i) {
    SumRowsArgs<Stored> piece = sum;
    piece.begin = i * kSumColumns;
    piece.end = std::min(columns, piece.begin + kSumColumns);
    kernels.sum_rows(piece);
    if (copy_to) std::copy(sum.out + piece.begin, sum.out + piece.end, copy_to + piece.begin);
  });
}

// The gradients of the parameters and of x, as products and sums over the rows of a chunk. For the
// gradients of the weights, the right sides of the products are x and the sources of the stages,
// which are packed for one direction at a time.
template <class Stored>
class ChunkGradients {
 public:
  ChunkGradients(const Layer& layer, const DtypeKernels<Stored>& kernels,
                 const LayerBackward<Stored>& args)
      : layer_(layer), kernels_(kernels), args_(args) {}

  // rows: the largest number of rows of a chunk.
  void lay_out(Arena& arena, int64_t rows) {
    const CellInfo& info = layer_.info();
    if (args_.d_w[0].w_ih) x_.lay_out(arena, kernels_, rows, layer_.I);
    for (int s = 0; s < info.stages && args_.d_w[0].w_hh; ++s)
      source_[s].lay_out(arena, kernels_, rows, layer_.source_width(info.stage[s]));
    for (int d = 0; d < layer_.D && args_.d_x; ++d)
      w_ih_[d].lay_out(arena, kernels_, layer_.gate_columns(), layer_.I);
  }

  void pack_weights(Work& work) {
    for (int d = 0; d < layer_.D && args_.d_x; ++d)
      w_ih_[d].pack(work, dense(args_.w[d].w_ih, layer_.gate_columns(), layer_.I));
  }

  void pack_sources(Work& work, int d, RowRange rows, const Reserve<Stored>& reserve) {
    const CellInfo& info = layer_.info();
    const auto pack = [&](Factor<Stored>& factor, const Stored* source, int64_t width) {
      factor.pack(work, dense(source + rows.begin * width, rows.count(), width));
    };
    if (args_.d_w[d].w_ih) pack(x_, args_.x, layer_.I);
    for (int s = 0; s < info.stages && args_.d_w[d].w_hh; ++s) {
      const Stage& stage = info.stage[s];
      pack(source_[s], stage.from_hidden ? reserve.h_in : reserve.emit, layer_.source_width(stage));
    }
  }

  // Adds the pieces for one chunk. `chunk` has the deltas of the rows. accumulate: whether the
  // results are added to the gradients of earlier chunks.
  void add(Work& work, int d, RowRange rows, const BackwardArgs<Stored>& chunk,
           bool accumulate) const {
    const CellInfo& info = layer_.info();
    const int64_t columns = layer_.gate_columns(), I = layer_.I, count = rows.count();
    const Parameters<Real<Stored>>& d_w = args_.d_w[d];
    const Matrix<const Stored> delta_x = dense<const Stored>(chunk.delta_x, count, columns);
    if (args_.d_x) {
      // Both directions add to d_x.
      w_ih_[d].multiply(work, delta_x, dense(args_.d_x + rows.begin * I, count, I),
                        {.accumulate = layer_.D == 2});
    }
    const Accumulation how = {.accumulate = accumulate, .whole_K = layer_.sequences.rows()};
    if (d_w.w_ih) x_.multiply(work, delta_x.transpose(), dense(d_w.w_ih, columns, I), how);
    for (int s = 0; s < info.stages; ++s) {
      const Stage& stage = info.stage[s];
      const StageWeight<Real<Stored>> d_weight = stage_weight(layer_, stage, d_w);
      if (!d_weight.weight) continue;
      const Matrix<const Stored> delta =
          stage.projects ? dense<const Stored>(chunk.delta_proj, count, layer_.P)
                         : Matrix<const Stored>{chunk.delta + stage.first_gate * layer_.H, count,
                                                d_weight.rows(), columns};
      source_[s].multiply(work, delta.transpose(), d_weight.matrix(), how);
    }
    if (d_w.w_ch) {
      const int64_t params = info.params * layer_.H;
      add_sum_rows<Stored>(work, kernels_,
                           {.m = chunk.delta_params,
                            .rows = count,
                            .ld = params,
                            .begin = 0,
                            .end = params,
                            .out = d_w.w_ch,
                            .accumulate = accumulate},
                           nullptr);
    }
    if (!d_w.b_hh) return;
    SumRowsArgs<Stored> sum = {.m = chunk.delta,
                               .rows = count,
                               .ld = columns,
                               .begin = 0,
                               .end = columns,
                               .out = d_w.b_hh,
                               .accumulate = accumulate};
    add_sum_rows(work, kernels_, sum, info.separate_deltas ? nullptr : d_w.b_ih);
    if (!info.separate_deltas) return;
    sum.m = chunk.delta_x;
    sum.out = d_w.b_ih;
    add_sum_rows<Stored>(work, kernels_, sum, nullptr);
  }

 private:
  const Layer& layer_;
  const DtypeKernels<Stored>& kernels_;
  const LayerBackward<Stored>& args_;
  Factor<Stored> x_;                   // [rows, I]
  Factor<Stored> source_[kMaxStages];  // [rows, P or H]
  Factor<Stored> w_ih_[2];             // [G*H, I]
};

// Takes memory for the deltas of a chunk.
template <class Stored>
void lay_out_deltas(const Layer& layer, const DtypeKernels<Stored>& kernels, const Plan& plan,
                    Arena& arena, BackwardArgs<Stored>& a) {
  const CellInfo& info = layer.info();
  const int64_t rows = widest_chunk(layer.sequences, plan), columns = layer.gate_columns();
  a.delta = arena.take<Stored>(rows * columns);
  a.delta_x = info.separate_deltas ? arena.take<Stored>(rows * columns) : a.delta;
  if (info.projects) a.delta_proj = arena.take<Stored>(rows * layer.P);
  if (info.params) a.delta_params = arena.take<Stored>(rows * info.params * layer.H);
  if (!plan.as_stored) return;
  const int64_t units = kernels.units_of_columns_panel();
  a.few_ld = ceil_div(std::max(layer.H, layer.P), units) * units;
  a.few_sums = arena.take<Real<Stored>>(kFewRows * a.few_ld);
}

// Sets the pointers to the caller's tensors of direction d.
template <class Stored>
void give_tensors(const Layer& layer, const LayerBackward<Stored>& args, int d,
                  const Reserve<Stored>& reserve, BackwardArgs<Stored>& a) {
  const int64_t N = layer.sequences.N, H = layer.H, P = layer.P;
  a.N = N, a.H = H, a.P = P;
  a.params = args.w[d].w_ch;
  a.row_input = args.row_input;
  a.saved = reserve.saved;
  a.h_in = reserve.h_in;
  a.c_in = reserve.c_in;
  a.d_y = args.d_y ? args.d_y + d * P : nullptr;
  a.d_y_c = args.d_y && layer.c_in_y ? args.d_y + layer.D * P + d * H : nullptr;
  a.d_y_ld = layer.y_width();
  a.d_h = args.d_h + d * N * P;
  a.d_c = layer.info().has_c ? args.d_c + d * N * H : nullptr;
}

}  // namespace

template <class Stored>
void layer_forward(const Layer& layer, const KernelTable& table, Runtime& runtime,
                   const LayerForward<Stored>& args) {
  const DtypeKernels<Stored>& kernels = kernels_of<Stored>(table);
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t columns = layer.gate_columns(), I = layer.I;
  zero_unwritten<Stored>(layer, args.reserve, fill_zero<Stored>);
  if (seq.rows() == 0) return;  // without a step, h_n = h_0 and c_n = c_0
  const Plan plan = make_plan({.sequences = seq,
                               .columns = columns,
                               .inner = layer.P,
                               .input = I,
                               .directions = layer.D,
                               .threads = runtime.threads(),
                               .chunk_values = kForwardChunkValues});
  log_plan(layer, args.reserve ? "forward for training" : "forward", plan, table, runtime);

  PackedWeights<Stored> weights(layer, kernels, args.w, plan.as_stored);
  ForwardBuffers<Stored> buffers;
  ForwardArgs<Stored> fwd[2] = {};
  allocate(runtime, [&](Arena& arena) {
    weights.lay_out_forward(arena);
    lay_out(layer, kernels, plan, arena, buffers);
    for (int d = 0; d < layer.D && !args.reserve; ++d) lay_out_states(layer, arena, fwd[d]);
  });
  for (int d = 0; d < layer.D; ++d) {
    give_tensors(layer, args, d, fwd[d]);
    fwd[d].weights = weights.of_direction(d);
    for (int s = 0; s < info.stages; ++s) fwd[d].bias[s] = weights.bias(d, s);
    fwd[d].gates_x = buffers.gates_x[d];
  }

  Loop<ForwardArgs<Stored>> loop = {
      fwd, layer.D, kernels.enter, kernels.forward[static_cast<int>(layer.cell)], {}};
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    loop.stages.push_back(
        {s, ceil_div(layer.width(stage), kernels.units_of_gates_panel(stage.gates)), false});
  }
  if (layer.c_in_y)
    loop.stages.push_back(
        {info.stages, ceil_div(layer.H, kernels.units_of_columns_panel()), false});
  const auto x_of = [&](RowRange rows) { return dense(args.x + rows.begin * I, rows.count(), I); };
  runtime.together([&] {
    Work work(runtime);
    weights.pack_forward(work);
    for (int d = 0; d < layer.D && !plan.x_as_stored; ++d)
      buffers.w_ih[d].pack(work, dense(args.w[d].w_ih, columns, I).transpose());
    work.run();
    if (plan.own_chunks) {
      add_by_rows(work, plan, loop, [&](int64_t d, int64_t task, ForwardArgs<Stored> a) {
        Real<Stored>* const own_gates_x = buffers.gates_x[d] + task * buffers.chunk_values;
        a.gates_x = own_gates_x;
        for (int64_t begin = 0; begin < seq.T; begin += plan.chunk_steps) {
          Steps steps = chunk_steps(seq, plan, begin, d == 1);
          steps.n_begin = a.steps.n_begin, steps.n_end = a.steps.n_end;
          a.steps = steps;
          const RowRange rows = chunk_rows(seq, steps);
          buffers.w_ih[d].multiply_own(a.steps, x_of(rows),
                                       dense(own_gates_x, rows.count(), columns));
          run_sequences(loop, a);
        }
      });
      return work.run();
    }
    for (int64_t begin = 0; begin < seq.T; begin += plan.chunk_steps) {
      for (int d = 0; d < layer.D; ++d) {
        fwd[d].steps = chunk_steps(seq, plan, begin, d == 1);
        const RowRange rows = chunk_rows(seq, fwd[d].steps);
        Real<Stored>* const gates_x = buffers.gates_x[d];
        if (plan.x_as_stored) {
          multiply_as_stored(kernels, work, x_of(rows), dense(args.w[d].w_ih, columns, I), gates_x);
        } else {
          buffers.w_ih[d].multiply(work, x_of(rows), dense(gates_x, rows.count(), columns));
        }
      }
      work.run();
      run_or_add(runtime, work, plan, loop);
      work.run();
    }
  });
}

template <class Stored>
void layer_backward(const Layer& layer, const KernelTable& table, Runtime& runtime,
                    const LayerBackward<Stored>& args) {
  const DtypeKernels<Stored>& kernels = kernels_of<Stored>(table);
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  if (seq.rows() == 0) {
    for (int d = 0; d < layer.D; ++d)
      for_wanted(info, layer.parameter_sizes(), args.d_w[d], fill_zero<Real<Stored>>);
    return;
  }
  const Plan plan = make_plan({.sequences = seq,
                               .columns = layer.gate_columns(),
                               .inner = layer.P,
                               .input = 0,
                               .directions = layer.D,
                               .threads = runtime.threads(),
                               .chunk_values = kBackwardChunkValues});
  log_plan(layer, "backward", plan, table, runtime);

  PackedWeights<Stored> weights(layer, kernels, args.w, plan.as_stored);
  ChunkGradients<Stored> gradients(layer, kernels, args);
  BackwardArgs<Stored> bwd[2] = {};
  allocate(runtime, [&](Arena& arena) {
    weights.lay_out_backward(arena);
    gradients.lay_out(arena, widest_chunk(seq, plan));
    for (int d = 0; d < layer.D; ++d) lay_out_deltas(layer, kernels, plan, arena, bwd[d]);
  });
  Reserve<Stored> reserve[2];
  for (int d = 0; d < layer.D; ++d) {
    reserve[d] = reserve_of<Stored>(layer, args.reserve, d);
    give_tensors(layer, args, d, reserve[d], bwd[d]);
    bwd[d].weights = weights.of_direction(d);
  }
  // Both directions add to d_x, and they reach a row in different chunks. So d_x begins with zeros.
  if (layer.D == 2) fill_zero(args.d_x, seq.rows() * layer.I);

  Loop<BackwardArgs<Stored>> loop = {
      bwd, layer.D, nullptr, kernels.backward[static_cast<int>(layer.cell)], {}};
  const auto add_stage = [&](int stage, int64_t width, bool only_leaving) {
    loop.stages.push_back({stage, ceil_div(width, kernels.units_of_columns_panel()), only_leaving});
  };
  if (layer.c_in_y && args.d_y) add_stage(info.stages + 1, layer.H, false);
  for (int s = info.stages - 1; s >= 0; --s) add_stage(s, layer.width(info.stage[s]), false);
  add_stage(info.stages, layer.P, true);
  runtime.together([&] {
    Work work(runtime);
    weights.pack_backward(work);
    gradients.pack_weights(work);
    work.run();
    for (int64_t begin = 0; begin < seq.T; begin += plan.chunk_steps) {
      for (int d = 0; d < layer.D; ++d) bwd[d].steps = chunk_steps(seq, plan, begin, d == 0);
      run_or_add(runtime, work, plan, loop);
      // The directions run one after the other, because they share the memory of the packed sources
      // and add to the same d_x.
      for (int d = 0; d < layer.D; ++d) {
        const RowRange rows = chunk_rows(seq, bwd[d].steps);
        gradients.pack_sources(work, d, rows, reserve[d]);
        work.run();
        gradients.add(work, d, rows, bwd[d], begin > 0);
        work.run();
      }
    }
  });
}

#define FUSEDRNN_LAYER(Stored)                                                     \
  template void layer_forward<Stored>(const Layer&, const KernelTable&, Runtime&,  \
                                      const LayerForward<Stored>&);                \
  template void layer_backward<Stored>(const Layer&, const KernelTable&, Runtime&, \
                                       const LayerBackward<Stored>&);
FUSEDRNN_LAYER(float)
FUSEDRNN_LAYER(double)
FUSEDRNN_LAYER(Bf16)
#undef FUSEDRNN_LAYER

}  // namespace fusedrnn::cpu
