// The streamed kernel of forward.
#pragma once

#include "streamed.cuh"

namespace fusedrnn::cuda {

template <StreamedProduct Product, class Cell>
class StreamedForward {
  using Stored = typename Product::Stored;
  using V = Real<Stored>;
  using Args = StreamedForwardArgs<Stored>;
  static constexpr int kLast = Cell::kStages - 1;

 public:
  __device__ __forceinline__ StreamedForward(const Args& args, char* shared, const char* kernel)
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
    put_states();
    for (int p = static_cast<int>(a.begin); p < a.end; ++p) {  // make_plan ensures T fits an int
      const Step step = step_of(a, place, place.d == 1 ? a.T - 1 - p : p);
      if (step.n == 0) continue;
      run_stage<0>(step);
      if constexpr (kLast > 0) run_stage<kLast>(step);
      turn ^= 1;
    }
    wait_for_copies<0>();
  }

 private:
  // Row r of the product belongs to gate r / size of the block's value r % size.
  template <int s>
  __device__ __forceinline__ void load_weights() {
    constexpr Stage kStage = Cell::stage(s);
    const Span to = emit_span(a, kStage, s == kLast);
    const int64_t K = source_span(a, kStage).width;
    const Stored* weight =
        kStage.projects ? a.w_hr[place.d] : a.w_hh[place.d] + kStage.first_gate * a.H * K;
    product.template load_weights<s>(
        [&](int r, int k) -> Stored {
          const int g = r / to.size, u = to.first + r % to.size;
          if (g >= kStage.gates || u >= to.width || k >= K) return Stored{};
          return weight[(g * to.width + u) * K + k];
        },
        streamed_of(a));
  }

  // Puts h, with which the first position begins, into both buffers of the exchange. A sequence
  // that is not alive yet finds its h there when it enters.
  __device__ __forceinline__ void put_states() {
    const Span span = span_of(a, true);
    for (int first = 0; first < place.rows; first += a.shape.group) {
      for_values(span, first, min(a.shape.group, place.rows - first), [&](int, int j, int u) {
        const V h = work().h[(place.first_j + j) * a.P + span.first + u];
        for (int buffer = 0; buffer < 2; ++buffer)
          exchanged(0, buffer, j, span.first + u) = Product::exchanged(h);
      });
    }
    barrier.arrive();
  }

  template <int s>
  __device__ __forceinline__ void run_stage(const Step& step) {
    constexpr Stage kStage = Cell::stage(s);
    constexpr int kTo = s == kLast ? 0 : s + 1;  // the stage that multiplies the emit
    const Span span = emit_span(a, kStage, s == kLast);
    const int buffer = s == kLast ? turn ^ 1 : turn;
    const int64_t row = step.row - place.first_j;
    for (int first = 0; first < step.n; first += a.shape.group) {
      const int count = min(a.shape.group, step.n - first);
      ForwardValue<Stored, Cell, s> value[kPairs];
      for_values(span, first, count, [&](int i, int j, int u) {
        value[i].load(work(), row, place.first_j + j, span.first + u);
      });
      if (first == 0) barrier.wait();
      product.template multiply<s>(
          values_of(exchange_rows(a, place, s, turn)).from_row(first, a.shape.tile[s].K_pad),
          count);
      for_values(span, first, count, [&](int i, int j, int u) {
        V acc[kStage.gates];
        for (int g = 0; g < kStage.gates; ++g)
          acc[g] = memory.sum_slices(s, j - first, g * span.size + u);
        value[i].compute(acc);
        exchanged(kTo, buffer, j, span.first + u) = Product::exchanged(value[i].handed_on());
      });
      if (first + count == step.n) {
        barrier.arrive();
      } else {
        __syncthreads();  // the next product overwrites the sums
      }
      for_values(span, first, count, [&](int i, int j, int u) {
        value[i].store(work(), row, place.first_j + j, span.first + u);
      });
    }
  }

  __device__ __forceinline__ const ForwardWork<Stored>& work() const { return a.work[place.d]; }

  // The place of one of this block's values in the exchange of a stage.
  __device__ __forceinline__ Stored& exchanged(int stage, int buffer, int j, int u) const {
    return exchange_rows(a, place, stage, buffer)[int64_t(j) * a.shape.tile[stage].K_pad + u];
  }

  const Args& a;
  const Place<Args> place;
  const SharedMemory<V> memory;
  Product product;
  BarrierOf<Product> barrier;
  int turn = 0;  // the buffer of the exchange that has h_{t-1}
};

}  // namespace fusedrnn::cuda
