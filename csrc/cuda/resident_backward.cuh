// The resident kernel of backward. At each position it first multiplies the deltas of the position
// before, which all blocks have put into the exchange.
#pragma once

#include "resident.cuh"

namespace fusedrnn::cuda {

template <BlockProduct Product, class Cell>
class ResidentBackward {
  using Stored = typename Product::Stored;
  using V = Real<Stored>;
  using Args = ResidentBackwardArgs<Stored>;
  static constexpr int kLast = Cell::kStages - 1;

 public:
  __device__ __forceinline__ ResidentBackward(const Args& args, char* shared, const char* kernel)
      : a(args),
        place(args),
        memory{args.shape, shared},
        product(memory),
        barrier(barrier_of<Product>(args, place, kernel)),
        kernel(kernel) {}

  __device__ __forceinline__ void run() {
    load_weights<0>();
    if constexpr (kLast > 0) load_weights<kLast>();
    load_params<Cell>(a, place, memory);
    load_gradients();
    // After the last position there are no rows, only the product of the last deltas. It is done in
    // the loop, so that its code is there once.
    const int end = static_cast<int>(a.T);  // make_plan ensures T fits an int
    for (int p = 0; p <= end; ++p) {
      Step step = {0, 0};
      if (p < end) step = step_of(a, place, place.d == 1 ? p : a.T - 1 - p);
      if (p < end && step.n == 0) continue;
      load_reserve(step);
      add_product();
      if (p == end) break;
      if constexpr (kLast > 0) {
        run_stage<kLast>(step);
        barrier.wait();
        product.template multiply<kLast>(source_of<Product>(a, place, kLast, turn, number, kernel),
                                         step.n);
      }
      run_stage<0>(step);
      turn ^= 1;
      ++number;
      pending = step.n;
      pending_row = step.row;
      store_deltas(step);
    }
    store_gradients();
    barrier.leave();
  }

 private:
  // Row r of the product belongs to unit first_u + r of h, which is a column of weight_hh. k counts
  // the stage's gates of all units.
  template <int s>
  __device__ __forceinline__ void load_weights() {
    const int k_0 = first_k<Product>(a, s);
    product.template load_weights<s>([&](int row, int k_of_part) -> Stored {
      constexpr Stage kStage = Cell::stage(s);
      const auto [first_u, r] = owner_of<Product>(a, place, row, place.units);
      const int u = first_u + r, k = k_0 + k_of_part;
      if (r >= place.units || u >= a.H || k >= kStage.gates * a.H) return Stored{};
      return a.w_hh[place.d][(kStage.first_gate * a.H + k) * a.H + u];
    });
  }

  __device__ __forceinline__ void load_gradients() {
    for_pairs(a, place, place.rows, [&](int i, int j, int u) {
      d_h[i] = a.d_h[state_at(j, u)];
      if constexpr (Cell::kHasC) d_c[i] = a.d_c[state_at(j, u)];
    });
  }

  // Loads the values that the reserve has of the step, and d_y. No other block writes them, so this
  // comes before the wait.
  __device__ __forceinline__ void load_reserve(const Step& step) {
    const int d = place.d;
    const int64_t H = a.H;
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t row = step.row + j, unit = place.first_u + opaque(u);
      const Stored* saved_of_row = a.saved[d] + row * Cell::kSaved * H;
      if (Cell::kSavesH && !a.drops[d])
        saved_of_row =
            j < pending ? a.h_in[d] + (pending_row + j) * H : a.saved[d] + (place.first_j + j) * H;
      for (int k = 0; k < Cell::kSaved; ++k) saved[i][k] = real(saved_of_row[k * H + unit]);
      if constexpr (Cell::kReadsH) state[i].h = real(a.h_in[d][row * H + unit]);
      if constexpr (Cell::kHasC) state[i].c = a.c_in[d][row * H + unit];
      const int64_t y_at = row * a.d_y_ld + d * H + unit;
      d_y[i] = a.d_y ? real(a.d_y[y_at]) : V(0);
      dropped[i] = a.drops[d] && a.drops[d][row];
      if constexpr (Cell::kHasC) {
        if (dropped[i]) d_c[i] = V(0);
        if (a.d_y_c) d_c[i] += real(a.d_y_c[y_at]);
      }
    });
  }

  // Completes d_h of the pending sequences with the product of their deltas.
  __device__ __forceinline__ void add_product() {
    if (pending == 0) return;
    barrier.wait();
    product.template multiply<0>(source_of<Product>(a, place, 0, turn ^ 1, number - 1, kernel),
                                 pending);
    for_pairs(a, place, pending, [&](int i, int j, int u) {
      const V sum = memory.sum_of_product(0, j, u);
      d_h[i] = Cell::kCarriesH ? d_h[i] + sum : sum;
    });
  }

  template <int s>
  __device__ __forceinline__ void run_stage(const Step& step) {
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      run_cell<s>(i, j, u, step.row + j);
      hand_on<s>(i, j, u);
    });
    barrier.arrive();
  }

  template <int s>
  __device__ __forceinline__ void run_cell(int i, int j, int u, int64_t row) {
    Inputs<Cell, V> inputs;
    inputs.load_params(memory.params(), place.units, opaque(u));
    V d_emit;
    Carry<V> carry;
    if constexpr (s == kLast) {
      d_emit = unless(dropped[i], d_h[i]) + d_y[i];
      carry.d_h = V(0);
    } else {
      d_emit = memory.sum_of_product(s + 1, j, u);
      carry.d_h = d_h[i];
    }
    if constexpr (Cell::kHasC) carry.d_c = d_c[i];
    Delta<V> delta = {delta_h[i], delta_x[i], delta_params[i]};
    Cell::template backward<s>(d_emit, saved[i], inputs.of_row(a.row_input, row), state[i], carry,
                               delta);
    if constexpr (Cell::kHasC) d_c[i] = carry.d_c;
    if constexpr (Cell::kCarriesH) d_h[i] = carry.d_h;
  }

  // Writes the stage's deltas to the exchange, for the blocks that multiply them.
  template <int s>
  __device__ __forceinline__ void hand_on(int i, int j, int u) {
    constexpr Stage kStage = Cell::stage(s);
    for (int g = 0; g < kStage.gates; ++g)
      put<Product>(a, place, {s, turn, j, g * a.H + place.first_u + opaque(u)},
                   delta_h[i][kStage.first_gate + g], number);
  }

  // Stores the deltas, from which the gradients of x and of the parameters are computed after this
  // kernel. No other block waits for them.
  __device__ __forceinline__ void store_deltas(const Step& step) {
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t at = ((step.row + j) * Cell::kGates + g) * a.H + place.first_u + u;
        a.delta[place.d][at] = stored<Stored>(delta_h[i][g]);
        if constexpr (Cell::kSeparateDeltas) a.delta_x[place.d][at] = stored<Stored>(delta_x[i][g]);
      }
      for (int k = 0; k < Cell::kParams; ++k) {
        const int64_t at = ((step.row + j) * Cell::kParams + k) * a.H + place.first_u + u;
        a.delta_params[place.d][at] = stored<Stored>(delta_params[i][k]);
      }
    });
  }

  __device__ __forceinline__ void store_gradients() {
    for_pairs(a, place, place.rows, [&](int i, int j, int u) {
      a.d_h[state_at(j, u)] = d_h[i];
      if constexpr (Cell::kHasC) a.d_c[state_at(j, u)] = d_c[i];
    });
  }

  __device__ __forceinline__ int64_t state_at(int j, int u) const {
    return (place.d * a.N + place.first_j + j) * a.H + place.first_u + u;
  }

  const Args& a;
  const Place<Args> place;
  const typename Product::Memory memory;
  Product product;
  BarrierOf<Product> barrier;
  // The values of this thread's pairs. d_h is the gradient of h_t from later steps. Until
  // add_product it lacks the product of the deltas in the exchange.
  V d_h[kPairs], d_c[kPairs], d_y[kPairs];
  V saved[kPairs][Cell::kSaved];
  State<V> state[kPairs];
  V delta_h[kPairs][Cell::kGates], delta_x[kPairs][Cell::kGates];
  V delta_params[kPairs][Cell::kParams > 0 ? Cell::kParams : 1];
  bool dropped[kPairs];  // whether d_h is dropped, because another sequence begins behind
  const char* const kernel;
  unsigned number = 1;      // of the words that this position writes
  int turn = 0;             // the buffer of the exchange that receives the deltas of this position
  int pending = 0;          // how many sequences have deltas of the position before in the exchange
  int64_t pending_row = 0;  // packed row of the first of these sequences at that position
};

}  // namespace fusedrnn::cuda
