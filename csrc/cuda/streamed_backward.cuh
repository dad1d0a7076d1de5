// The streamed kernel of backward.
#pragma once

#include "streamed.cuh"

namespace fusedrnn::cuda {

template <StreamedProduct Product, class Cell>
class StreamedBackward {
  using Stored = typename Product::Stored;
  using V = Real<Stored>;
  using Args = StreamedBackwardArgs<Stored>;
  static constexpr int kLast = Cell::kStages - 1;

 public:
  __device__ __forceinline__ StreamedBackward(const Args& args, char* shared, const char* kernel)
      : a(args),
        place(args),
        memory{args.shape, shared},
        product(memory),
        barrier(barrier_of<Product>(args, place, kernel)) {}

  __device__ __forceinline__ void run() {
    load_weights<0>();
    if constexpr (kLast > 0) load_weights<kLast>();
    product.template begin<0>(streamed_of(a));
    if constexpr (kLast > 0) product.template begin<kLast>(streamed_of(a));
    // After the last position there are no rows, only the product of the last deltas. It is done in
    // the loop, so that the code of the last stage is there once.
    const int end = static_cast<int>(a.end);  // make_plan ensures T fits an int
    for (int p = static_cast<int>(a.begin); p <= end; ++p) {
      Step step = {0, 0};
      if (p < end) step = step_of(a, place, place.d == 1 ? p : a.T - 1 - p);
      if (p < end ? step.n == 0 : rows.n == 0) continue;
      rows = {step.row - place.first_j, step.n, rows.row, rows.n};
      run_stage<kLast>();
      if constexpr (kLast > 0) {
        if (step.n > 0) run_stage<0>();
      }
      turn ^= 1;
    }
    wait_for_copies<0>();
  }

 private:
  // Row r of the product belongs to value first + r of the source, which is a column of the weight.
  // k counts the stage's gates of all units, or the outputs of the projection.
  template <int s>
  __device__ __forceinline__ void load_weights() {
    constexpr Stage kStage = Cell::stage(s);
    const Span to = source_span(a, kStage);
    const int64_t K = kStage.projects ? a.P : kStage.gates * a.H;
    const Stored* weight =
        kStage.projects ? a.w_hr[place.d] : a.w_hh[place.d] + kStage.first_gate * a.H * to.width;
    product.template load_weights<s>(
        [&](int r, int k) -> Stored {
          const int u = to.first + r;
          if (r >= to.size || u >= to.width || k >= K) return Stored{};
          return weight[k * to.width + u];
        },
        streamed_of(a));
  }

  // The elementwise work of stage s, after the product that its gradients come from: in the last
  // stage that of stage 0 of the position before, else that of the stage after s.
  template <int s>
  __device__ __forceinline__ void run_stage() {
    constexpr Stage kStage = Cell::stage(s);
    constexpr int kFrom = s == kLast ? 0 : s + 1;
    const Span span = emit_span(a, kStage, s == kLast);
    // In the last stage, sequences may have a product and no work, because they ended, or work and
    // no product, because they begin.
    const int n = static_cast<int>(rows.n);
    const int products = s == kLast ? static_cast<int>(rows.n_next) : n;
    const int all = max(n, products);
    for (int first = 0; first < all; first += a.shape.group) {
      const int count = min(a.shape.group, all - first);
      BackwardValue<Stored, Cell, s> value[kPairs];
      V d_h[kPairs];
      for_values(span, first, count, [&](int i, int j, int u) {
        if constexpr (s == kLast) d_h[i] = gradient(j, span.first + u);
        if (j < n) value[i].load(work(), block_rows(), place.first_j + j, span.first + u);
      });
      if (first == 0 && products > 0) barrier.wait();
      if (first < products)
        product.template multiply<kFrom>(
            values_of(exchange_rows(a, place, kFrom, s == kLast ? turn ^ 1 : turn))
                .from_row(first, a.shape.tile[kFrom].K_pad),
            min(count, products - first));
      for_values(span, first, count, [&](int i, int j, int u) {
        V d_emit;
        if constexpr (s == kLast) {
          d_emit = d_h[i];
          if (j < products) {
            const V sum = memory.sum_slices(kFrom, j - first, u);
            d_emit = Cell::kCarriesH ? d_emit + sum : sum;
          }
          if (j >= n) {
            gradient(j, span.first + u) = d_emit;
            return;
          }
        } else {
          d_emit = memory.sum_slices(kFrom, j - first, u);
        }
        value[i].compute(d_emit);
        hand_on<s>(value[i], span, j, u);
      });
      if (first + count == all) {
        barrier.arrive();
      } else {
        __syncthreads();  // the next product overwrites the sums
      }
      for_values(span, first, count, [&](int i, int j, int u) {
        if (j < n) value[i].store(work(), block_rows(), place.first_j + j, span.first + u);
      });
    }
  }

  // Writes the deltas that stage s computes to the exchange, for the blocks that multiply them. The
  // product of an earlier stage may have some of them among its gates.
  template <int s>
  __device__ __forceinline__ void hand_on(const BackwardValue<Stored, Cell, s>& value,
                                          const Span& span, int j, int u) {
    constexpr Stage kStage = Cell::stage(s);
    if constexpr (kStage.projects) {
      exchanged(s, j, span.first + u) = Product::exchanged(value.delta(0));
    } else {
#pragma unroll
      for (int g = kStage.delta_begin; g < kStage.delta_end; ++g) {
        const int t = g < kStage.first_gate ? 0 : s;
        const int column = g - Cell::stage(t).first_gate;
        exchanged(t, j, column * span.width + span.first + u) = Product::exchanged(value.delta(g));
      }
    }
  }

  // The place of one of this block's deltas in the exchange of a stage.
  __device__ __forceinline__ Stored& exchanged(int stage, int j, int64_t column) const {
    return exchange_rows(a, place, stage, turn)[int64_t(j) * a.shape.tile[stage].K_pad + column];
  }

  // The rows of the step and of the next one for the sequences of this block.
  __device__ __forceinline__ StepRows block_rows() const {
    return {rows.row, place.first_j + rows.n, rows.next_row, place.first_j + rows.n_next};
  }

  __device__ __forceinline__ const BackwardWork<Stored>& work() const { return a.work[place.d]; }

  // The gradient of h that comes from later steps.
  __device__ __forceinline__ V& gradient(int j, int u) const {
    return work().d_h[(place.first_j + j) * a.P + u];
  }

  const Args& a;
  const Place<Args> place;
  const SharedMemory<V> memory;
  Product product;
  BarrierOf<Product> barrier;
  // The rows of this position: `n` and `n_next` count sequences of the block, and rows are those
  // of the layer's first sequence. `next` is the position that this loop ran before, whose deltas
  // are in the exchange.
  StepRows rows = {};
  int turn = 0;  // the buffer of the exchange that receives the deltas of this position
};

}  // namespace fusedrnn::cuda
