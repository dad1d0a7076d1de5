// The resident regime: one launch for a whole sequence, both directions. A block owns some hidden
// units of some sequences, with all their gates. Its rows of the recurrent weights stay in
// registers and shared memory; h, or backward the deltas, goes from block to block through two
// buffers in global memory that take turns, with one barrier a stage. States stay in registers.
//
// Between arriving at a barrier and waiting for it a block writes what no other block reads, and
// loads what the next step needs.
//
// `Product` (product_fma.cuh, product_mma.cuh) multiplies a block's rows with the source, in slices
// of K whose sums lie in shared memory.
#pragma once

#include "barrier.cuh"
#include "storage.cuh"

namespace fusedrnn::cuda {

// Where this block is.
template <class Args>
struct Place {
  int d;            // direction
  int first_u;      // its units are [first_u, first_u + units)
  int units;        // of a whole block
  int64_t first_j;  // and its sequences [first_j, first_j + rows)
  int rows;

  __device__ __forceinline__ explicit Place(const Args& a) {
    d = blockIdx.z;
    units = a.shape.units;
    first_u = blockIdx.x * units;
    first_j = int64_t(blockIdx.y) * a.shape.rows;
    rows = static_cast<int>(min(int64_t(a.shape.rows), a.N - first_j));
  }
};

// A step of the packed rows, as a block sees it.
struct Step {
  int64_t row;  // packed row of the block's first sequence
  int n;        // sequences of the block that are alive
};

template <class Args>
__device__ __forceinline__ Step step_of(const Args& a, const Place<Args>& place, int64_t t) {
  if (!a.row_offset) return {t * a.N + place.first_j, place.rows};
  const int64_t row = a.row_offset[t], alive = a.row_offset[t + 1] - row;
  return {row + place.first_j,
          static_cast<int>(max(int64_t(0), min(int64_t(place.rows), alive - place.first_j)))};
}

// Calls body(i, j, u) for this thread's pairs: sequence first_j + j and unit first_u + u.
template <class Args, class Body>
__device__ __forceinline__ void for_pairs(const Args& a, const Place<Args>& place, int n,
                                          const Body& body) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int q = i * kThreads + threadIdx.x;
    const int j = q / place.units, u = q - j * place.units;
    if (j < n && place.first_u + u < a.H) body(i, j, u);
  }
}

// The block's sequences in one of the two buffers of a stage's exchange.
template <class Args>
__device__ __forceinline__ auto exchange_rows(const Args& a, const Place<Args>& place, int s,
                                              int buffer) {
  const int64_t block_row = (int64_t(buffer) * a.D + place.d) * gridDim.y * a.shape.rows_pad +
                            blockIdx.y * a.shape.rows_pad;
  return a.exchange[s] + block_row * a.shape.tile[s].K_pad;
}

// Σ over the slices of sequence j's product with row r.
__device__ __forceinline__ float sum_slices(const ResidentShape& shape, const ResidentTile& tile,
                                            const char* shared, int j, int r) {
  const float* partial = reinterpret_cast<const float*>(shared + shape.partials) + j * tile.ld + r;
  float sum = 0;
  for (int slice = 0; slice < tile.slices; ++slice)
    sum += partial[slice * shape.rows_pad * tile.ld];
  return sum;
}

template <class Product, class Cell>
__device__ __forceinline__ void resident_forward(
    const ResidentForwardArgs<typename Product::Stored>& a, char* shared, const char* kernel) {
  using S = typename Product::Stored;
  using V = Real<S>;
  using Args = ResidentForwardArgs<S>;
  constexpr int kLast = Cell::kStages - 1;
  const Place<Args> place(a);
  const int d = place.d, units = place.units;
  const int64_t H = a.H, GH = Cell::kGates * H;
  Product product(a.shape, shared);
  Barrier barrier(a.arrivals + (d * gridDim.y + blockIdx.y) * kArrivalStride, gridDim.x,
                  a.spin_limit, kernel);
  V* bias = reinterpret_cast<V*>(shared + a.shape.bias);

  const auto load_weights = [&](auto stage_constant) {
    constexpr int s = decltype(stage_constant)::value;
    product.template load_weights<s>([&](int r, int k) -> S {
      constexpr Stage kStage = Cell::stage(s);
      const int g = r / units, u = place.first_u + r % units;
      if (g >= kStage.gates || u >= H || k >= H) return S{};
      return a.w_hh[d][((kStage.first_gate + g) * H + u) * H + k];
    });
  };
  load_weights(Constant<0>());
  if constexpr (kLast > 0) load_weights(Constant<kLast>());
  for (int i = threadIdx.x; i < Cell::kGates * units; i += kThreads) {
    const int g = i / units, u = place.first_u + i % units;
    if (u >= H) continue;
    bias[i] = a.b_ih[d] ? real(a.b_ih[d][g * H + u]) : V(0);
    bias[i + Cell::kGates * units] = a.b_hh[d] ? real(a.b_hh[d][g * H + u]) : V(0);
  }

  V h[kPairs], c[kPairs], x[kPairs][Cell::kGates], saved[kPairs][Cell::kSaved];
  S* states = exchange_rows(a, place, 0, 0);
  for_pairs(a, place, place.rows, [&](int i, int j, int u) {
    const int64_t at = (d * a.N + place.first_j + j) * H + place.first_u + u;
    h[i] = a.h[at];
    if constexpr (Cell::kHasC) c[i] = a.c[at];
    states[int64_t(j) * a.shape.tile[0].K_pad + place.first_u + u] = Product::exchanged(h[i]);
  });
  barrier.arrive();

  int turn = 0;
  for (int64_t p = a.begin; p < a.end; ++p) {
    const Step step = step_of(a, place, d == 1 ? a.T - 1 - p : p);
    if (step.n == 0) continue;
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t row = step.row + j, unit = place.first_u + u;
      for (int g = 0; g < Cell::kGates; ++g)
        x[i][g] = a.gates_x[d][(row - a.first_row[d]) * GH + g * H + unit];
      if (a.h_in[d]) a.h_in[d][row * H + unit] = stored<S>(h[i]);
      if constexpr (Cell::kHasC) {
        if (a.c_in[d]) a.c_in[d][row * H + unit] = c[i];
      }
    });

    const auto run_stage = [&](auto stage_constant) {
      constexpr int s = decltype(stage_constant)::value;
      barrier.wait();
      product.template multiply<s>(exchange_rows(a, place, s, turn), step.n);
      constexpr int kTo = s == kLast ? 0 : s + 1;  // the stage that reads what this one emits
      S* next = exchange_rows(a, place, kTo, s == kLast ? turn ^ 1 : turn);
      V emit[kPairs];
      for_pairs(a, place, step.n, [&](int i, int j, int u) {
        constexpr Stage kStage = Cell::stage(s);
        V gates_x[kStage.gates], acc[kStage.gates];
        for (int g = 0; g < kStage.gates; ++g) {
          const int column = (kStage.first_gate + g) * units + u;
          acc[g] = sum_slices(a.shape, a.shape.tile[s], shared, j, g * units + u) +
                   bias[Cell::kGates * units + column];
          gates_x[g] = x[i][kStage.first_gate + g] + bias[column];
        }
        State<V> state;
        state.h = h[i];
        if constexpr (Cell::kHasC) state.c = c[i];
        emit[i] = Cell::template forward<s>(gates_x, acc, state, saved[i]);
        if constexpr (Cell::kHasC) c[i] = state.c;
        if constexpr (s == kLast) h[i] = emit[i];
      });
      // Sequences that are not alive hand on the state with which they begin or ended.
      for_pairs(a, place, s == kLast ? place.rows : step.n, [&](int i, int j, int u) {
        const V value = s == kLast ? h[i] : emit[i];
        next[int64_t(j) * a.shape.tile[kTo].K_pad + place.first_u + u] = Product::exchanged(value);
      });
      barrier.arrive();
      if constexpr (s != kLast) {
        if (a.emit[d]) {
          for_pairs(a, place, step.n, [&](int i, int j, int u) {
            a.emit[d][(step.row + j) * H + place.first_u + u] = stored<S>(emit[i]);
          });
        }
      }
    };
    run_stage(Constant<0>());
    if constexpr (kLast > 0) run_stage(Constant<kLast>());
    turn ^= 1;

    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t row = step.row + j, unit = place.first_u + u;
      a.y[row * a.D * H + d * H + unit] = stored<S>(h[i]);
      if (a.saved[d]) {
        const int64_t saved_row = Cell::kSavesH ? place.first_j + j : row;
        for (int k = 0; k < Cell::kSaved; ++k)
          a.saved[d][(saved_row * Cell::kSaved + k) * H + unit] = stored<S>(saved[i][k]);
      }
    });
  }

  for_pairs(a, place, place.rows, [&](int i, int j, int u) {
    const int64_t at = (d * a.N + place.first_j + j) * H + place.first_u + u;
    a.h[at] = h[i];
    if constexpr (Cell::kHasC) a.c[at] = c[i];
  });
}

template <class Product, class Cell>
__device__ __forceinline__ void resident_backward(
    const ResidentBackwardArgs<typename Product::Stored>& a, char* shared, const char* kernel) {
  using S = typename Product::Stored;
  using V = Real<S>;
  using Args = ResidentBackwardArgs<S>;
  constexpr int kLast = Cell::kStages - 1;
  const Place<Args> place(a);
  const int d = place.d;
  const int64_t H = a.H;
  Product product(a.shape, shared);
  Barrier barrier(a.arrivals + (d * gridDim.y + blockIdx.y) * kArrivalStride, gridDim.x,
                  a.spin_limit, kernel);

  // Row r of the product is unit first_u + r of h; k counts the stage's gates of all units.
  const auto load_weights = [&](auto stage_constant) {
    constexpr int s = decltype(stage_constant)::value;
    product.template load_weights<s>([&](int r, int k) -> S {
      constexpr Stage kStage = Cell::stage(s);
      const int u = place.first_u + r;
      if (r >= place.units || u >= H || k >= kStage.gates * H) return S{};
      return a.w_hh[d][(kStage.first_gate * H + k) * H + u];
    });
  };
  load_weights(Constant<0>());
  if constexpr (kLast > 0) load_weights(Constant<kLast>());

  // d_h: of h_t from later steps, without what still is in the exchange.
  V d_h[kPairs], d_c[kPairs];
  for_pairs(a, place, place.rows, [&](int i, int j, int u) {
    const int64_t at = (d * a.N + place.first_j + j) * H + place.first_u + u;
    d_h[i] = a.d_h[at];
    if constexpr (Cell::kHasC) d_c[i] = a.d_c[at];
  });

  int turn = 0;
  int pending = 0;          // sequences whose deltas of the step before are in the exchange
  int64_t pending_row = 0;  // packed row of the first of them there
  const auto add_product = [&] {
    if (pending == 0) return;
    barrier.wait();
    product.template multiply<0>(exchange_rows(a, place, 0, turn ^ 1), pending);
    for_pairs(a, place, pending, [&](int i, int j, int u) {
      const V sum = sum_slices(a.shape, a.shape.tile[0], shared, j, u);
      d_h[i] = Cell::kCarriesH ? d_h[i] + sum : sum;
    });
  };

  for (int64_t p = 0; p < a.T; ++p) {
    const Step step = step_of(a, place, d == 1 ? p : a.T - 1 - p);
    if (step.n == 0) continue;
    V saved[kPairs][Cell::kSaved], d_y[kPairs], d_emit[kPairs];
    State<V> state[kPairs];
    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      const int64_t row = step.row + j, unit = place.first_u + u;
      const S* kept = a.saved[d] + row * Cell::kSaved * H;
      if constexpr (Cell::kSavesH)
        kept =
            j < pending ? a.h_in[d] + (pending_row + j) * H : a.saved[d] + (place.first_j + j) * H;
      for (int k = 0; k < Cell::kSaved; ++k) saved[i][k] = real(kept[k * H + unit]);
      if constexpr (Cell::kReadsH) state[i].h = real(a.h_in[d][row * H + unit]);
      if constexpr (Cell::kHasC) state[i].c = a.c_in[d][row * H + unit];
      d_y[i] = a.d_y ? real(a.d_y[row * a.D * H + d * H + unit]) : V(0);
    });
    add_product();

    V delta[kPairs][Cell::kGates], delta_x[kPairs][Cell::kGates];
    const auto run_stage = [&](auto stage_constant) {
      constexpr int s = decltype(stage_constant)::value;
      S* next = exchange_rows(a, place, s, turn);
      for_pairs(a, place, step.n, [&](int i, int j, int u) {
        constexpr Stage kStage = Cell::stage(s);
        Carry<V> carry;
        if constexpr (s == kLast) {
          d_emit[i] = d_h[i] + d_y[i];
          carry.d_h = V(0);
        } else {
          d_emit[i] = sum_slices(a.shape, a.shape.tile[s + 1], shared, j, u);
          carry.d_h = d_h[i];
        }
        if constexpr (Cell::kHasC) carry.d_c = d_c[i];
        Cell::template backward<s>(d_emit[i], saved[i], state[i], carry, delta[i], delta_x[i]);
        if constexpr (Cell::kHasC) d_c[i] = carry.d_c;
        if constexpr (Cell::kCarriesH) d_h[i] = carry.d_h;
        for (int g = 0; g < kStage.gates; ++g)
          next[int64_t(j) * a.shape.tile[s].K_pad + g * H + place.first_u + u] =
              Product::exchanged(delta[i][kStage.first_gate + g]);
      });
      barrier.arrive();
    };
    if constexpr (kLast > 0) {
      run_stage(Constant<kLast>());
      barrier.wait();
      product.template multiply<kLast>(exchange_rows(a, place, kLast, turn), step.n);
    }
    run_stage(Constant<0>());
    turn ^= 1;
    pending = step.n;
    pending_row = step.row;

    for_pairs(a, place, step.n, [&](int i, int j, int u) {
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t at = ((step.row + j) * Cell::kGates + g) * H + place.first_u + u;
        a.delta[d][at] = stored<S>(delta[i][g]);
        if constexpr (Cell::kSeparateDeltas) a.delta_x[d][at] = stored<S>(delta_x[i][g]);
      }
    });
  }
  add_product();

  for_pairs(a, place, place.rows, [&](int i, int j, int u) {
    const int64_t at = (d * a.N + place.first_j + j) * H + place.first_u + u;
    a.d_h[at] = d_h[i];
    if constexpr (Cell::kHasC) a.d_c[at] = d_c[i];
  });
}

// All dynamic shared memory of a block, aligned for the widest load.
extern __shared__ __align__(16) char dynamic_shared[];

template <class Product>
__device__ __forceinline__ void run_resident_forward(
    const ResidentForwardArgs<typename Product::Stored>& a, const char* kernel) {
  with_cell(a.cell, [&](auto cell) {
    // The plan runs projections per step.
    if constexpr (!describe<decltype(cell)>().projects)
      resident_forward<Product, decltype(cell)>(a, dynamic_shared, kernel);
  });
}

template <class Product>
__device__ __forceinline__ void run_resident_backward(
    const ResidentBackwardArgs<typename Product::Stored>& a, const char* kernel) {
  with_cell(a.cell, [&](auto cell) {
    if constexpr (!describe<decltype(cell)>().projects)
      resident_backward<Product, decltype(cell)>(a, dynamic_shared, kernel);
  });
}

}  // namespace fusedrnn::cuda

// The two kernels of a product: one block a multiprocessor, so a thread may have all 255 registers.
#define FUSEDRNN_RESIDENT(name, Product)                                                         \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      resident_forward_##name(                                                                   \
          const __grid_constant__ fusedrnn::cuda::ResidentForwardArgs<typename Product::Stored>  \
              args) {                                                                            \
    fusedrnn::cuda::run_resident_forward<Product>(args, "resident_forward_" #name);              \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(fusedrnn::cuda::kThreads, 1)                      \
      resident_backward_##name(                                                                  \
          const __grid_constant__ fusedrnn::cuda::ResidentBackwardArgs<typename Product::Stored> \
              args) {                                                                            \
    fusedrnn::cuda::run_resident_backward<Product>(args, "resident_backward_" #name);            \
  }
