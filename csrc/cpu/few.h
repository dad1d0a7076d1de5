// Products with weights as torch stores them, for so few rows that packing would cost more than it
// saves. Compiled once per instruction set, see kernels.inl.
#pragma once

#include "tile.h"

namespace fusedrnn {
namespace {

// Rows of a weight whose dot products with so many source rows run side by side: eight sums fill
// two units of four cycles, more sums make better use of what is loaded, as far as there are
// registers.
template <class T>
constexpr int dots_at_once(int rows) {
  int dots = Vec<T>::kLanes < 8 ? Vec<T>::kLanes : 8;
  while (dots > 1 && rows * dots > FUSEDRNN_REGISTERS - rows - 1) dots /= 2;
  return dots;
}

// sums[r][i] += the products of source row r and weight row i, lane by lane, over k < K.
template <class F, int kRows, int kDots>
FUSEDRNN_INLINE void add_dots(const F* source, int64_t ld, const F* weight, int64_t K,
                              Vec<Sum<F>> (&sums)[kRows][kDots]) {
  using V = Vec<Sum<F>>;
  constexpr int kLanes = V::kLanes * kTerms<F>;  // factors of a vector
  const int64_t whole = K - K % kLanes;
  const F* rows[kDots];
#pragma GCC unroll 8
  for (int i = 0; i < kDots; ++i) rows[i] = weight + i * K;
  for (int64_t k = 0; k < whole; k += kLanes) {
    V x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = load_factors(source + r * ld + k);
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i) {
      const V w = load_factors(rows[i] + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][i] = multiply_add<F>(w, x[r], sums[r][i]);
    }
  }
  if (whole == K) return;
  const int rest = static_cast<int>(K - whole);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const V x = load_factors(source + r * ld + whole, rest);
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i)
      sums[r][i] = multiply_add<F>(load_factors(rows[i] + whole, rest), x, sums[r][i]);
  }
}

// out[r * out_ld + i] = source row r · weight row i, for kRows rows and a vector's width of weight
// rows, of which `inside` exist; the others give 0.
template <class F, int kRows>
void dots(const F* source, int64_t ld, const F* weight, int inside, int64_t K, Sum<F>* out,
          int64_t out_ld) {
  using T = Sum<F>;
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes * kTerms<F>;  // factors of a vector
  constexpr int kDots = dots_at_once<T>(kRows);
  V lanes[kRows][V::kLanes];
  for (int i0 = 0; i0 < V::kLanes; i0 += kDots) {
    V sums[kRows][kDots];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kDots; ++i) sums[r][i] = V::zero();
    if (i0 + kDots <= inside) {
      add_dots<F>(source, ld, weight + i0 * K, K, sums);
    } else {
      // One after another, as far as there are any.
      for (int i = 0; i < kDots && i0 + i < inside; ++i)
        for (int r = 0; r < kRows; ++r)
          for (int64_t k = 0; k < K; k += kLanes) {
            const int n = static_cast<int>(min64(kLanes, K - k));
            sums[r][i] = multiply_add<F>(load_factors(weight + (i0 + i) * K + k, n),
                                         load_factors(source + r * ld + k, n), sums[r][i]);
          }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kDots; ++i) lanes[r][i0 + i] = sums[r][i];
  }
  for (int r = 0; r < kRows; ++r) sums_of_rows(lanes[r]).store(out + r * out_ld);
}

// What `products` of tile.h does, for at most kFewRows rows and weights as torch stores them,
// [gates * width, K]; starts as there.
template <class F, int kGates, int kRows = kFewRows, class Body>
FUSEDRNN_INLINE void products_as_stored(int64_t begin, int64_t end, const F* source, int64_t ld,
                                        int64_t K, const F* weight, int64_t width, Blocks blocks,
                                        const Sum<F>* starts, int64_t start_ld, const Body& body) {
  if constexpr (kRows > 0) {
    if (end - begin < kRows) {
      return products_as_stored<F, kGates, kRows - 1>(begin, end, source, ld, K, weight, width,
                                                      blocks, starts, start_ld, body);
    }
    using T = Sum<F>;
    using V = Vec<T>;
    constexpr int kBlocks = blocks_of(kGates);
    constexpr int kWidth = kGates * kBlocks * V::kLanes;
    alignas(64) T tile[kRows * kWidth];
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const int64_t block = blocks.from_last ? blocks.begin + blocks.end - 1 - i : i;
      for (int v = 0; v < kGates * kBlocks; ++v) {
        const int64_t u = (block * kBlocks + v % kBlocks) * V::kLanes;
        const int64_t inside = max64(0, min64(V::kLanes, width - u));
        T* out = tile + v * V::kLanes;
        dots<F, kRows>(source + begin * ld, ld, weight + (inside ? v / kBlocks * width + u : 0) * K,
                       static_cast<int>(inside), K, out, kWidth);
        const V start = V::load(starts + block * start_ld + v * V::kLanes);
        for (int r = 0; r < kRows; ++r) (V::load(out + r * kWidth) + start).store(out + r * kWidth);
      }
      body(block, begin, int64_t{kRows}, tile);
    }
  }
}

// Rows of a that share what is read of b: as many as still leave four dot products at once.
template <class T>
constexpr int shared_rows() {
  int rows = 1;
  while (rows < 6 && dots_at_once<T>(rows + 1) >= 4) ++rows;
  return rows;
}

// dots for so many rows, at most kRows.
template <class F, int kRows>
FUSEDRNN_INLINE void dots_of(int64_t rows, const F* source, int64_t ld, const F* weight, int inside,
                             int64_t K, Sum<F>* out, int64_t out_ld) {
  if (rows == kRows) {
    dots<F, kRows>(source, ld, weight, inside, K, out, out_ld);
  } else if constexpr (kRows > 1) {
    dots_of<F, kRows - 1>(rows, source, ld, weight, inside, K, out, out_ld);
  }
}

// Blocks of columns of c = a b^T.
template <class F>
void gemm_as_stored(const GemmAsStoredArgs<F>& a) {
  using T = Sum<F>;
  using V = Vec<T>;
  const int64_t end = min64(a.N, a.block_end * kColumnBlocks * V::kLanes);
  constexpr int kRows = shared_rows<T>();
  alignas(64) T sums[kRows * V::kLanes];
  for (int64_t u = a.block_begin * kColumnBlocks * V::kLanes; u < end; u += V::kLanes) {
    const int inside = lanes_at<T>(u, a.N);
    for_tiles(kRows, 0, a.M, [&](int64_t m, int64_t rows) {
      dots_of<F, kRows>(rows, a.a + m * a.K, a.K, a.b + u * a.K, inside, a.K, sums, V::kLanes);
      for (int64_t r = 0; r < rows; ++r)
        store(V::load(sums + r * V::kLanes), a.c + (m + r) * a.N + u, inside);
    });
  }
}

// Rows of a weight that are added up in one pass over the sums.
constexpr int kAddends = 8;

// sums[u] (+)= Σ_i delta[i] weight[i * ld + u] for kCount rows i and the columns [begin, end).
template <class F, int kCount>
FUSEDRNN_INLINE void add_rows(const F* delta, const F* weight, int64_t ld, int64_t begin,
                              int64_t end, bool first, Sum<F>* sums) {
  using T = Sum<F>;
  using V = Vec<T>;
  V factor[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) factor[i] = V::broadcast(value(delta[i]));
  for_units_of<T>(begin, end, [&](auto units, int64_t u) FUSEDRNN_INLINE_LAMBDA {
    V sum = first ? V::zero() : V::load(sums + u);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sum = fma(factor[i], units.load(weight + i * ld + u), sum);
    sum.store(sums + u);
  });
}

// sums[r, u] = Σ_k delta[begin + r, k] weight[k, u] for the rows [begin, end), at most kFewRows,
// and the columns [first, last). weight: [K, ld].
template <class F>
void sum_as_stored(int64_t begin, int64_t end, const F* delta, int64_t delta_ld, int64_t K,
                   const F* weight, int64_t ld, int64_t first, int64_t last, Sum<F>* sums,
                   int64_t sums_ld) {
  int64_t k = 0;
  for (; k + kAddends <= K; k += kAddends)
    for (int64_t r = 0; r < end - begin; ++r)
      add_rows<F, kAddends>(delta + (begin + r) * delta_ld + k, weight + k * ld, ld, first, last,
                            k == 0, sums + r * sums_ld);
  for (; k < K; ++k)
    for (int64_t r = 0; r < end - begin; ++r)
      add_rows<F, 1>(delta + (begin + r) * delta_ld + k, weight + k * ld, ld, first, last, k == 0,
                     sums + r * sums_ld);
}

}  // namespace
}  // namespace fusedrnn
