#include "layer.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "arena.h"
#include "packed.h"
#include "schedule.h"
#include "work.h"

namespace fusedrnn {
namespace {

void log_plan(const Layer& layer, const char* what, const Plan& plan) {
  static const char* wanted = std::getenv("FUSEDRNN_LOG");
  if (!wanted || *wanted != '1') return;
  const Sequences& seq = layer.sequences;
  std::fprintf(stderr, "fusedrnn: %s %s T=%lld N=%lld I=%lld H=%lld P=%lld D=%lld: %s\n",
               layer.info().name, what, static_cast<long long>(seq.T),
               static_cast<long long>(seq.N), static_cast<long long>(layer.I),
               static_cast<long long>(layer.H), static_cast<long long>(layer.P),
               static_cast<long long>(layer.D), describe(plan).c_str());
}

// What forward keeps of one direction. The same row of each belongs to the same step.
template <class F>
struct Kept {
  F* saved;      // [rows, kSaved*H]; [N, H] of cells that save h
  F* h_in;       // [rows, P]
  Sum<F>* c_in;  // [rows, H]
  F* emit;       // [rows, H], cells of several stages
};

int64_t saved_size(const Layer& layer, int64_t rows) {
  const CellInfo& info = layer.info();
  return info.saves_h ? layer.sequences.N * layer.H : rows * info.saved * layer.H;
}

// Values of Sum<F>. Whole groups of factors, as H and P are.
template <class F>
int64_t kept_size(const Layer& layer, int64_t rows) {
  const CellInfo& info = layer.info();
  const int64_t factors = saved_size(layer, rows) + rows * (layer.P + (info.stages > 1) * layer.H);
  return factors / kTerms<F> + rows * info.has_c * layer.H;
}

template <class F>
Kept<F> kept(const Layer& layer, Sum<F>* reserve, int64_t d) {
  const CellInfo& info = layer.info();
  const int64_t rows = layer.sequences.rows();
  Kept<F> k;
  k.saved = reinterpret_cast<F*>(reserve + d * kept_size<F>(layer, rows));
  k.h_in = k.saved + saved_size(layer, rows);
  auto* rest = reinterpret_cast<Sum<F>*>(k.h_in + rows * layer.P);
  k.c_in = info.has_c ? rest : nullptr;
  k.emit = reinterpret_cast<F*>(rest + (info.has_c ? rows * layer.H : 0));
  return k;
}

// Steps of the chunk that begins at `begin` in one direction, for the sequences [n_begin, n_end).
Steps chunk_steps(const Sequences& seq, const Plan& plan, int64_t begin, bool descending,
                  int64_t n_begin, int64_t n_end) {
  const int64_t end = std::min(seq.T, begin + plan.chunk_steps);
  const int64_t lowest = descending ? seq.T - end : begin;
  return {.T = seq.T,
          .batch_sizes = seq.batch_sizes.data(),
          .row_offset = seq.row_offset.data(),
          .descending = descending,
          .begin = begin,
          .end = end,
          .first_row = seq.row_offset[lowest],
          .n_begin = n_begin,
          .n_end = n_end};
}

int64_t chunk_rows(const Sequences& seq, const Steps& steps) {
  const int64_t highest = steps.descending ? seq.T - steps.begin : steps.end;
  return seq.row_offset[highest] - steps.first_row;
}

// Rows of the widest chunk: the first one, since batch sizes do not grow.
int64_t widest_chunk(const Sequences& seq, const Plan& plan) {
  return seq.row_offset[plan.chunk_steps < seq.T ? plan.chunk_steps : seq.T];
}

// Bias gradients are summed in slices of columns, one task each.
constexpr int64_t kSumColumns = 128;

// copy_to: takes the same sums, or null.
template <class F>
void sum_rows(Work& work, const DtypeKernels<F>& kernels, const F* m, int64_t rows, int64_t columns,
              Sum<F>* out, Sum<F>* copy_to, bool accumulate) {
  work.add(blocks(columns, kSumColumns), [=, &kernels](int64_t i) {
    const int64_t begin = i * kSumColumns;
    const int64_t end = begin + kSumColumns < columns ? begin + kSumColumns : columns;
    kernels.sum_rows(m, rows, columns, begin, end, out, accumulate);
    if (copy_to) std::copy(out + begin, out + end, copy_to + begin);
  });
}

// The products of backward that sum over the rows of a chunk: right sides for each source.
template <class F>
struct ChunkFactors {
  Factor<F> x;                   // [rows, I]
  Factor<F> source[kMaxStages];  // [rows, P or H]
};

// Packs them for one direction.
template <class F>
void pack_sources(const Layer& layer, const DtypeKernels<F>& kernels, Work& work, int64_t first_row,
                  int64_t rows, const Kept<F>& keep, const F* x, const Weights<Sum<F>>& d_w,
                  ChunkFactors<F>& factors) {
  if (d_w.w_ih) factors.x.pack(kernels, work, x + first_row * layer.I, layer.I, rows);
  for (int s = 0; s < layer.info().stages && d_w.w_hh; ++s) {
    const bool from_hidden = layer.info().stage[s].from_hidden;
    const int64_t K = from_hidden ? layer.P : layer.H;
    const F* source = from_hidden ? keep.h_in : keep.emit;
    factors.source[s].pack(kernels, work, source + first_row * K, K, rows);
  }
}

// Gradients of one direction's parameters from the rows of one chunk.
template <class F>
void weight_gradients(const Layer& layer, const DtypeKernels<F>& kernels, Work& work,
                      const BackwardArgs<F>& chunk, int64_t rows, bool accumulate,
                      const ChunkFactors<F>& factors, const Weights<Sum<F>>& d_w) {
  const CellInfo& info = layer.info();
  const int64_t columns = layer.gate_columns(), S = layer.sequences.rows();
  if (d_w.w_ih) {
    factors.x.multiply(kernels, work, chunk.delta_x, columns, true, columns, d_w.w_ih, layer.I,
                       accumulate, S);
  }
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    Sum<F>* out = stage.projects ? d_w.w_hr : d_w.w_hh;
    if (!out) continue;
    const int64_t K = stage.from_hidden ? layer.P : layer.H;
    if (stage.projects) {
      factors.source[s].multiply(kernels, work, chunk.delta_proj, layer.P, true, layer.P, out, K,
                                 accumulate, S);
    } else {
      const int64_t first = stage.first_gate * layer.H;
      factors.source[s].multiply(kernels, work, chunk.delta + first, columns, true,
                                 stage.gates * layer.H, out + first * K, K, accumulate, S);
    }
  }
  if (!d_w.b_hh) return;
  sum_rows(work, kernels, chunk.delta, rows, columns, d_w.b_hh,
           info.separate_deltas ? nullptr : d_w.b_ih, accumulate);
  if (info.separate_deltas)
    sum_rows<F>(work, kernels, chunk.delta_x, rows, columns, d_w.b_ih, nullptr, accumulate);
}

template <class T>
void fill_zero(T* p, int64_t n) {
  if (p) std::fill(p, p + n, T{});
}

}  // namespace

template <class F>
int64_t reserve_size(const Layer& layer, int64_t rows) {
  return layer.D * kept_size<F>(layer, rows);
}

template <class F>
void layer_forward(const Layer& layer, const DtypeKernels<F>& kernels, Runtime& runtime,
                   const LayerForward<F>& args) {
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t N = seq.N, H = layer.H, P = layer.P, columns = layer.gate_columns();
  const bool keep = args.reserve != nullptr;
  // Sequences of length 0 have no last step.
  for (int d = 0; d < layer.D && keep && info.saves_h; ++d)
    fill_zero(kept<F>(layer, args.reserve, d).saved + seq.widest() * H, (N - seq.widest()) * H);
  if (seq.rows() == 0) return;  // h and c are their own result
  const Plan plan =
      make_plan(seq, columns, P, layer.I, layer.D, runtime.threads(), kForwardChunkValues);
  log_plan(layer, keep ? "forward for training" : "forward", plan);

  const int64_t chunk_values = widest_chunk(seq, plan) * columns;
  const int64_t buffers = plan.own_chunks ? plan.tasks_per_direction() : 1;

  Panels<F> panels(plan.as_stored);
  Factor<F> w_ih[2];
  ForwardArgs<F> fwd[2] = {};
  Sum<F>* gates_x[2] = {};
  allocate(runtime, [&](Arena& arena) {
    panels.lay_out_forward(arena, layer, kernels, args.w);
    for (int d = 0; d < layer.D; ++d) {
      if (!plan.x_as_stored) w_ih[d].lay_out(arena, kernels, layer.I, columns);
      gates_x[d] = arena.take<Sum<F>>(buffers * chunk_values);
      if (keep) continue;
      fwd[d].h_in = arena.take<F>(2 * N * P);
      if (info.stages > 1) {
        fwd[d].saved = arena.take<F>(N * info.saved * H);
        fwd[d].emit[0] = arena.take<F>(N * H);
      }
    }
  });

  for (int d = 0; d < layer.D; ++d) {
    ForwardArgs<F>& a = fwd[d];
    a.N = N, a.H = H, a.P = P;
    a.keep = keep;
    panels.give(layer, args.w, d, a);
    for (int s = 0; s < info.stages; ++s) a.bias[s] = panels.bias(d, s);
    a.gates_x = gates_x[d];
    a.h = args.h + d * N * P;
    a.c = info.has_c ? args.c + d * N * H : nullptr;
    a.y = args.y + d * P;
    a.y_ld = layer.D * P;
    if (keep) {
      const Kept<F> k = kept<F>(layer, args.reserve, d);
      a.h_in = k.h_in;
      a.c_in = k.c_in;
      a.saved = k.saved;
      if (info.stages > 1) a.emit[0] = k.emit;
    }
  }

  Loop<ForwardArgs<F>> loop = {
      fwd, layer.D, kernels.enter, kernels.forward[static_cast<int>(layer.cell)], {}};
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    loop.stages.push_back(
        {s, blocks(stage.projects ? P : H, kernels.gates_block(stage.gates)), false});
  }
  runtime.together([&] {
    Work work(runtime);
    panels.pack_forward(layer, kernels, work, args.w);
    for (int d = 0; d < layer.D && !plan.x_as_stored; ++d)
      w_ih[d].pack_transposed(kernels, work, args.w[d].w_ih, layer.I);
    work.run();
    const auto rows_of_x = [&](const Steps& steps) { return args.x + steps.first_row * layer.I; };
    if (plan.own_chunks) {
      add_by_rows(work, plan, loop, [&](int64_t d, int64_t task, ForwardArgs<F> a) {
        Sum<F>* const own_gates_x = gates_x[d] + task * chunk_values;
        a.gates_x = own_gates_x;
        for (int64_t begin = 0; begin < seq.T; begin += plan.chunk_steps) {
          a.steps = chunk_steps(seq, plan, begin, d == 1, a.steps.n_begin, a.steps.n_end);
          w_ih[d].multiply_own(kernels, a.steps, rows_of_x(a.steps), layer.I, own_gates_x, columns);
          run_sequences(loop, a);
        }
      });
      return work.run();
    }
    for (int64_t begin = 0; begin < seq.T; begin += plan.chunk_steps) {
      for (int d = 0; d < layer.D; ++d) {
        fwd[d].steps = chunk_steps(seq, plan, begin, d == 1, 0, seq.widest());
        const int64_t rows = chunk_rows(seq, fwd[d].steps);
        const F* x = rows_of_x(fwd[d].steps);
        if (plan.x_as_stored) {
          multiply_as_stored(kernels, work, x, rows, args.w[d].w_ih, columns, layer.I, gates_x[d]);
        } else {
          w_ih[d].multiply(kernels, work, x, layer.I, false, rows, gates_x[d], columns, false);
        }
      }
      work.run();
      run_or_add(runtime, work, plan, loop);
      work.run();
    }
  });
}

template <class F>
void layer_backward(const Layer& layer, const DtypeKernels<F>& kernels, Runtime& runtime,
                    const LayerBackward<F>& args) {
  const Sequences& seq = layer.sequences;
  const CellInfo& info = layer.info();
  const int64_t N = seq.N, H = layer.H, P = layer.P, columns = layer.gate_columns();
  if (seq.rows() == 0) {
    for (int d = 0; d < layer.D; ++d) {
      fill_zero(args.d_w[d].w_ih, columns * layer.I);
      fill_zero(args.d_w[d].w_hh, columns * P);
      fill_zero(args.d_w[d].b_ih, columns);
      fill_zero(args.d_w[d].b_hh, columns);
      fill_zero(args.d_w[d].w_hr, P * H);
    }
    return;
  }
  const Plan plan = make_plan(seq, columns, P, 0, layer.D, runtime.threads(), kBackwardChunkValues);
  log_plan(layer, "backward", plan);

  Panels<F> panels(plan.as_stored);
  Factor<F> w_ih[2];
  ChunkFactors<F> factors;
  BackwardArgs<F> bwd[2] = {};
  allocate(runtime, [&](Arena& arena) {
    panels.lay_out_backward(arena, layer, kernels, args.w);
    const int64_t rows = widest_chunk(seq, plan);
    if (args.d_w[0].w_ih) factors.x.lay_out(arena, kernels, rows, layer.I);
    for (int s = 0; s < info.stages && args.d_w[0].w_hh; ++s)
      factors.source[s].lay_out(arena, kernels, rows, info.stage[s].from_hidden ? P : H);
    for (int d = 0; d < layer.D; ++d) {
      if (args.d_x) w_ih[d].lay_out(arena, kernels, columns, layer.I);
      bwd[d].delta = arena.take<F>(rows * columns);
      bwd[d].delta_x = info.separate_deltas ? arena.take<F>(rows * columns) : bwd[d].delta;
      if (info.projects) bwd[d].delta_proj = arena.take<F>(rows * P);
      if (plan.as_stored) {
        bwd[d].few_ld = blocks(std::max(H, P), kernels.columns_block()) * kernels.columns_block();
        bwd[d].few_sums = arena.take<Sum<F>>(kFewRows * bwd[d].few_ld);
      }
    }
  });
  Kept<F> keep[2];  // is only read
  for (int d = 0; d < layer.D; ++d) {
    BackwardArgs<F>& a = bwd[d];
    keep[d] = kept<F>(layer, const_cast<Sum<F>*>(args.reserve), d);
    a.N = N, a.H = H, a.P = P;
    panels.give(layer, args.w, d, a);
    a.saved = keep[d].saved;
    a.h_in = keep[d].h_in;
    a.c_in = keep[d].c_in;
    a.d_y = args.d_y ? args.d_y + d * P : nullptr;
    a.d_y_ld = layer.D * P;
    a.d_h = args.d_h + d * N * P;
    a.d_c = info.has_c ? args.d_c + d * N * H : nullptr;
  }
  // Both directions add to d_x, each in its own order of chunks.
  if (layer.D == 2) fill_zero(args.d_x, seq.rows() * layer.I);

  Loop<BackwardArgs<F>> loop = {
      bwd, layer.D, nullptr, kernels.backward[static_cast<int>(layer.cell)], {}};
  for (int s = info.stages - 1; s >= 0; --s) {
    loop.stages.push_back(
        {s, blocks(info.stage[s].projects ? P : H, kernels.columns_block()), false});
  }
  loop.stages.push_back({info.stages, blocks(P, kernels.columns_block()), true});
  runtime.together([&] {
    Work work(runtime);
    panels.pack_backward(layer, kernels, work, args.w);
    for (int d = 0; d < layer.D && args.d_x; ++d)
      w_ih[d].pack(kernels, work, args.w[d].w_ih, layer.I, columns);
    work.run();
    for (int64_t begin = 0; begin < seq.T; begin += plan.chunk_steps) {
      for (int d = 0; d < layer.D; ++d)
        bwd[d].steps = chunk_steps(seq, plan, begin, d == 0, 0, seq.widest());
      run_or_add(runtime, work, plan, loop);
      // Directions one after another: they share the packed sources and add to the same d_x.
      for (int d = 0; d < layer.D; ++d) {
        const int64_t first_row = bwd[d].steps.first_row, rows = chunk_rows(seq, bwd[d].steps);
        pack_sources(layer, kernels, work, first_row, rows, keep[d], args.x, args.d_w[d], factors);
        work.run();
        if (args.d_x) {
          w_ih[d].multiply(kernels, work, bwd[d].delta_x, columns, false, rows,
                           args.d_x + first_row * layer.I, layer.I, layer.D == 2);
        }
        weight_gradients(layer, kernels, work, bwd[d], rows, begin > 0, factors, args.d_w[d]);
        work.run();
      }
    }
  });
}

#define FUSEDRNN_LAYER(F)                                                         \
  template int64_t reserve_size<F>(const Layer&, int64_t);                        \
  template void layer_forward<F>(const Layer&, const DtypeKernels<F>&, Runtime&,  \
                                 const LayerForward<F>&);                         \
  template void layer_backward<F>(const Layer&, const DtypeKernels<F>&, Runtime&, \
                                  const LayerBackward<F>&);
FUSEDRNN_LAYER(float)
FUSEDRNN_LAYER(double)
FUSEDRNN_LAYER(Bf16)
#undef FUSEDRNN_LAYER

}  // namespace fusedrnn
