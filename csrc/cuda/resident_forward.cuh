// The resident kernel of forward.
#pragma once

#include "resident.cuh"

namespace fusedrnn::cuda {

template <BlockProduct Product, class Cell>
class ResidentForward {
  using Stored = typename Product::Stored;
  using V = Real<Stored>;
  using Args = ResidentForwardArgs<Stored>;
  static constexpr int kLast = Cell::kStages - 1;

 public:
  __device__ __forceinline__ ResidentForward(const Args& args, char* shared, const char* kernel)
      : a(args),
        place(args),
        memory{args.shape, shared},
        product(memory),
        barrier(barrier_of<Product>(args, place, kernel)),
        kernel(kernel),
        number(static_cast<unsigned>(args.begin) + 1) {}

  __device__ __forceinline__ void run() {
    load_weights<0>();
    if constexpr (kLast > 0) load_weights<kLast>();
    load_biases();
    load_params<Cell>(a, place, memory);
    load_states();
    for (int p = static_cast<int>(a.begin); p < a.end; ++p) {  // make_plan ensures T fits an int
      const Step step = step_of(a, place, place.d == 1 ? a.T - 1 - p : p);
      if (step.n == 0) continue;
      if constexpr (Product::kTakesWords) {
        if (a.words && !begun) hand_on_states(step.n);
        begun = true;
        next_n = p + 1 < a.end ? step_of(a, place, place.d == 1 ? a.T - 2 - p : p + 1).n : 0;
      }
      load_inputs(step);
      load_drops(step);
      keep_states(step);
      run_stage<0>(step);
      if constexpr (kLast > 0) run_stage<kLast>(step);
      turn ^= 1;
      ++number;
      store_outputs(step);
      drop_states();
    }
    store_states();
    barrier.leave();
  }

 private:
  // Row r of the product belongs to gate r / units of the block's unit r % units.
  template <int s>
  __device__ __forceinline__ void load_weights() {
    const int k_0 = first_k<Product>(a, s);
    product.template load_weights<s>([&](int row, int k_of_part) -> Stored {
      constexpr Stage kStage = Cell::stage(s);
      const auto [first_u, r] = owner_of<Product>(a, place, row, kStage.gates * place.units);
      const int g = r / place.units, u = first_u + r % place.units, k = k_0 + k_of_part;
      if (g >= kStage.gates || u >= a.H || k >= a.H) return Stored{};
      return a.w_hh[place.d][((kStage.first_gate + g) * a.H + u) * a.H + k];
    });
  }

  __device__ __forceinline__ void load_biases() {
    V* bias = memory.bias();
    const Stored *b_ih = a.b_ih[place.d], *b_hh = a.b_hh[place.d];
    for (int i = threadIdx.x; i < Cell::kGates * place.units; i += kThreads) {
      const int g = i / place.units, u = place.first_u + i % place.units;
      if (u >= a.H) continue;
      bias[i] = b_ih ? real(b_ih[g * a.H + u]) : V(0);
      bias[i + Cell::kGates * place.units] = b_hh ? real(b_hh[g * a.H + u]) : V(0);
    }
  }

  // Loads h and c, with which the first position of the launch begins, into registers. Values
  // of h go into the exchange for the other blocks; words follow when the first step is known.
  __device__ __forceinline__ void load_states() {
    for_pairs(a, place, place.rows, [&](int i, int j, int u) {
      const int64_t at = state_at(j, u);
      h[i] = a.h[at];
      if constexpr (Cell::kHasC) c[i] = a.c[at];
    });
    if (!Product::kTakesWords || !a.words) hand_on_states(place.rows);
    barrier.arrive();
  }

  // Puts h of the first `rows` sequences into the exchange, for the first position.
  __device__ __forceinline__ void hand_on_states(int rows) {
    for_pairs(a, place, rows, [&](int i, int j, int u) {
      put<Product>(a, place, {0, turn, j, place.first_u + u}, h[i], number);
    });
  }

  // Loads x W of the step. No other block writes it, so this comes before the wait.
  __device__ __forceinline__ void load_inputs(const Step& step) {
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t row = step.row + j - a.first_row[place.d];
      for (int g = 0; g < Cell::kGates; ++g)
        x[i][g] = a.gates_x[place.d][(row * Cell::kGates + g) * a.H + place.first_u + u];
    });
  }

  // Loads whether the states after this position are dropped, because another sequence begins
  // behind it.
  __device__ __forceinline__ void load_drops(const Step& step) {
    dropped = 0;
    if (!a.drops[place.d]) return;
    for_pairs(a, place, step.n, [&](int i, int j, int) {
      if (a.drops[place.d][step.row + j]) dropped |= 1u << i;
    });
  }

  // Zeroes the states that are dropped, once y has them.
  __device__ __forceinline__ void drop_states() {
    for (int i = 0; i < kPairs; ++i) {
      if (!(dropped >> i & 1)) continue;
      h[i] = V(0);
      if constexpr (Cell::kHasC) c[i] = V(0);
    }
  }

  __device__ __forceinline__ void keep_states(const Step& step) {
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t at = (step.row + j) * a.H + place.first_u + u;
      if (a.h_in[place.d]) a.h_in[place.d][at] = stored<Stored>(h[i]);
      if constexpr (Cell::kHasC) {
        if (a.c_in[place.d]) a.c_in[place.d][at] = c[i];
      }
    });
  }

  template <int s>
  __device__ __forceinline__ void run_stage(const Step& step) {
    barrier.wait();
    product.template multiply<s>(source_of<Product>(a, place, s, turn, number, kernel), step.n);
    V emit[kPairs];
    run_cell<s>(step, emit);
    hand_on<s>(step, emit);
    barrier.arrive();
    if constexpr (s != kLast) keep_emit(step, emit);
  }

  template <int s>
  __device__ __forceinline__ void run_cell(const Step& step, V (&emit)[kPairs]) {
    const V* b_ih = memory.bias();
    const V* b_hh = b_ih + Cell::kGates * place.units;
    // The same as memory.params(): make_shape puts the parameters right behind the biases.
    const V* params = b_hh + Cell::kGates * place.units;
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      constexpr Stage kStage = Cell::stage(s);
      u = opaque(u);
      V gates_x[kStage.gates], acc[kStage.gates];
      for (int g = 0; g < kStage.gates; ++g) {
        const int column = (kStage.first_gate + g) * place.units + u;
        acc[g] = memory.sum_of_product(s, j, g * place.units + u) + b_hh[column];
        gates_x[g] = x[i][kStage.first_gate + g] + b_ih[column];
      }
      Inputs<Cell, V> inputs;
      inputs.load_params(params, place.units, u);
      State<V> state;
      state.h = h[i];
      if constexpr (Cell::kHasC) state.c = c[i];
      emit[i] = Cell::template forward<s>(gates_x, acc, inputs.of_row(a.row_input, step.row + j),
                                          state, saved[i]);
      if constexpr (Cell::kHasC) c[i] = state.c;
      if constexpr (s == kLast) h[i] = emit[i];
    });
  }

  // Writes the stage's emit to the exchange for the blocks that multiply it: in the next stage, or,
  // if it is h_t, at the next position. In the last stage, sequences that are not alive hand on
  // their state too, so that it is in the buffer that is read when they enter. Words are handed on
  // only for sequences that are alive at the next position (words.cuh says why).
  template <int s>
  __device__ __forceinline__ void hand_on(const Step& step, const V (&emit)[kPairs]) {
    constexpr int kTo = s == kLast ? 0 : s + 1;
    int rows = s == kLast ? place.rows : step.n;
    if (Product::kTakesWords && s == kLast && a.words) rows = next_n;
    for_pairs(a, place, rows, [&](int i, int j, int u) {
      const V value = s == kLast ? unless(dropped >> i & 1, h[i]) : emit[i];
      put<Product>(a, place, {kTo, s == kLast ? turn ^ 1 : turn, j, place.first_u + u}, value,
                   s == kLast ? number + 1 : number);
    });
  }

  __device__ __forceinline__ void keep_emit(const Step& step, const V (&emit)[kPairs]) {
    if (!a.emit[place.d]) return;
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      a.emit[place.d][(step.row + j) * a.H + place.first_u + u] = stored<Stored>(emit[i]);
    });
  }

  // Stores y and the saved values, for which no other block waits.
  __device__ __forceinline__ void store_outputs(const Step& step) {
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t row = step.row + j, unit = place.first_u + u;
      const int64_t at = row * a.y_ld + place.d * a.H + unit;
      a.y[at] = stored<Stored>(h[i]);
      if constexpr (Cell::kHasC) {
        if (a.y_c) a.y_c[at] = stored<Stored>(c[i]);
      }
      if (!a.saved[place.d]) return;
      const int64_t saved_row = Cell::kSavesH && !a.drops[place.d] ? place.first_j + j : row;
      for (int k = 0; k < Cell::kSaved; ++k)
        a.saved[place.d][(saved_row * Cell::kSaved + k) * a.H + unit] = stored<Stored>(saved[i][k]);
    });
  }

  __device__ __forceinline__ void store_states() {
    for_pairs(a, place, place.rows, [&](int i, int j, int u) {
      a.h[state_at(j, u)] = h[i];
      if constexpr (Cell::kHasC) a.c[state_at(j, u)] = c[i];
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
  V h[kPairs], c[kPairs];  // the states of this thread's pairs
  V x[kPairs][Cell::kGates], saved[kPairs][Cell::kSaved];
  const char* const kernel;
  int turn = 0;        // the buffer of the exchange that has h_{t-1}
  unsigned number;     // of the words for this position
  int next_n = 0;      // how many sequences of the block are alive at the next position
  unsigned dropped;    // bit i: whether the state of pair i after this position is dropped
  bool begun = false;  // whether the launch has had a position with sequences
};

}  // namespace fusedrnn::cuda
