// Products with weights as torch stores them. They serve layers of few rows, for which packing
// would cost more than it saves. Compiled once per instruction set, see kernels.inl.
#pragma once

#include "tile.h"

namespace fusedrnn::cpu {
namespace {

// How many weight rows are processed together, for a number of source rows. An FMA takes four
// cycles and there are two FMA units, so at least eight independent sums are needed. With more
// weight rows each loaded source vector is used more often. The registers must hold rows * dots
// sums, one vector of each source row and one more vector.
template <class Scalar>
constexpr int dots_at_once(int rows) {
  int dots = Vec<Scalar>::kLanes < 8 ? Vec<Scalar>::kLanes : 8;
  while (dots > 1 && rows * dots > FUSEDRNN_REGISTERS - rows - 1) dots /= 2;
  return dots;
}

// sums[r][i] += the products of source row r and weight row i, lane by lane, over k < K.
template <class Stored, int kRows, int kDots>
FUSEDRNN_INLINE void add_dots(Rows<const Stored> source, const Stored* weight, int64_t K,
                              Vec<Real<Stored>> (&sums)[kRows][kDots]) {
  using V = Vec<Real<Stored>>;
  constexpr int kLanes = V::kLanes * kTerms<Stored>;  // factors of a vector
  const int64_t whole = K - K % kLanes;
  const Stored* rows[kDots];
#pragma GCC unroll 8
  for (int i = 0; i < kDots; ++i) rows[i] = weight + i * K;
  for (int64_t k = 0; k < whole; k += kLanes) {
    V x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = load_factors(source[r] + k);
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i) {
      const V w = load_factors(rows[i] + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][i] = multiply_add<Stored>(w, x[r], sums[r][i]);
    }
  }
  if (whole == K) return;
  const int rest = static_cast<int>(K - whole);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const V x = load_factors(source[r] + whole, rest);
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i)
      sums[r][i] = multiply_add<Stored>(load_factors(rows[i] + whole, rest), x, sums[r][i]);
  }
}

// out[r][i] = source row r · weight row i, for kRows source rows and kLanes weight rows. Only the
// first `inside` weight rows exist; the results of the rest are 0. weight: [., K].
template <class Stored, int kRows>
void dots(Rows<const Stored> source, const Stored* weight, int inside, int64_t K,
          Rows<Real<Stored>> out) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  constexpr int kLanes = V::kLanes * kTerms<Stored>;  // factors of a vector
  constexpr int kDots = dots_at_once<Scalar>(kRows);
  V lanes[kRows][V::kLanes];
  for (int i0 = 0; i0 < V::kLanes; i0 += kDots) {
    V sums[kRows][kDots];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kDots; ++i) sums[r][i] = V::zero();
    if (i0 + kDots <= inside) {
      add_dots<Stored>(source, weight + i0 * K, K, sums);
    } else {
      // Some of the rows do not exist: one dot product after another.
      for (int i = 0; i < kDots && i0 + i < inside; ++i)
        for (int r = 0; r < kRows; ++r)
          for (int64_t k = 0; k < K; k += kLanes) {
            const int n = static_cast<int>(min64(kLanes, K - k));
            sums[r][i] = multiply_add<Stored>(load_factors(weight + (i0 + i) * K + k, n),
                                              load_factors(source[r] + k, n), sums[r][i]);
          }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kDots; ++i) lanes[r][i0 + i] = sums[r][i];
  }
  for (int r = 0; r < kRows; ++r) sums_of_rows(lanes[r]).store(out[r]);
}

// Does the same as `products` of tile.h, for at most kFewRows rows and weights as torch stores
// them. Each call of body gets the sums of the units that a panel would have.
template <class Stored, int kGates, int kRows = kFewRows, class Body>
FUSEDRNN_INLINE void products_as_stored(const StageProduct<Stored>& p, const Body& body) {
  if constexpr (kRows > 0) {
    if (p.end - p.begin < kRows) return products_as_stored<Stored, kGates, kRows - 1>(p, body);
    using Scalar = Real<Stored>;
    using V = Vec<Scalar>;
    constexpr int kVectors = vectors_per_gate(kGates);
    constexpr int kWidth = kGates * kVectors * V::kLanes;
    alignas(64) Scalar tile[kRows * kWidth];
    const auto [begin, end, from_last] = p.range;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = from_last ? begin + end - 1 - i : i;
      for (int v = 0; v < kGates * kVectors; ++v) {
        const int64_t u = (index * kVectors + v % kVectors) * V::kLanes;
        const int64_t inside = max64(0, min64(V::kLanes, p.width - u));
        const Rows<Scalar> out = {tile + v * V::kLanes, kWidth};
        dots<Stored, kRows>(p.source.from(p.begin),
                            p.as_stored + (inside ? v / kVectors * p.width + u : 0) * p.K,
                            static_cast<int>(inside), p.K, out);
        const V start = V::load(p.starts[index] + v * V::kLanes);
        for (int r = 0; r < kRows; ++r) (V::load(out[r]) + start).store(out[r]);
      }
      body(index, p.begin, int64_t{kRows}, tile);
    }
  }
}

// How many rows of a share each value of b that is read: as many as leave registers for four dot
// products at once.
template <class Scalar>
constexpr int shared_rows() {
  int rows = 1;
  while (rows < 6 && dots_at_once<Scalar>(rows + 1) >= 4) ++rows;
  return rows;
}

// dots for a number of rows that is known only at run time, at most kRows.
template <class Stored, int kRows>
FUSEDRNN_INLINE void dots_of(int64_t rows, Rows<const Stored> source, const Stored* weight,
                             int inside, int64_t K, Rows<Real<Stored>> out) {
  if (rows == kRows) {
    dots<Stored, kRows>(source, weight, inside, K, out);
  } else if constexpr (kRows > 1) {
    dots_of<Stored, kRows - 1>(rows, source, weight, inside, K, out);
  }
}

template <class Stored>
void gemm_as_stored(const GemmAsStoredArgs<Stored>& a) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  constexpr int kUnits = kColumnVectors * V::kLanes;
  const int64_t end = min64(a.N, a.panel_end * kUnits);
  constexpr int kRows = shared_rows<Scalar>();
  alignas(64) Scalar sums[kRows * V::kLanes];
  for (int64_t u = a.panel_begin * kUnits; u < end; u += V::kLanes) {
    const int inside = lanes_at<Scalar>(u, a.N);
    for_tiles(kRows, 0, a.M, [&](int64_t m, int64_t rows) {
      dots_of<Stored, kRows>(rows, {a.a + m * a.K, a.K}, a.b + u * a.K, inside, a.K,
                             {sums, V::kLanes});
      for (int64_t r = 0; r < rows; ++r)
        store(V::load(sums + r * V::kLanes), a.c + (m + r) * a.N + u, inside);
    });
  }
}

// How many rows of a weight are added to the sums each time the sums are loaded and stored.
constexpr int kAddends = 8;

// Units [begin, end).
struct UnitRange {
  int64_t begin, end;
};

// Adds Σ_i delta[i] weight[i][u] over kCount rows i to sums[u] for the given columns u. If `first`,
// the result replaces sums[u].
template <class Stored, int kCount>
FUSEDRNN_INLINE void add_rows(const Stored* delta, Rows<const Stored> weight, UnitRange columns,
                              bool first, Real<Stored>* sums) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  V factor[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) factor[i] = V::broadcast(value(delta[i]));
  for_units_of<Scalar>(columns.begin, columns.end,
                       [&](auto units, int64_t u) FUSEDRNN_INLINE_LAMBDA {
                         V sum = first ? V::zero() : V::load(sums + u);
#pragma GCC unroll 8
                         for (int i = 0; i < kCount; ++i)
                           sum = fma(factor[i], units.load(weight[i] + u), sum);
                         sum.store(sums + u);
                       });
}

// sums[r][u] = Σ_k source[p.begin + r, k] weight[k, u] for the rows of p, at most kFewRows, and the
// given columns u of p's weight. Here the weight is taken as [K, width].
template <class Stored>
void sum_as_stored(const StageProduct<Stored>& p, UnitRange columns, Rows<Real<Stored>> sums) {
  const Rows<const Stored> weight = {p.as_stored, p.width};
  const int64_t rows = p.end - p.begin;
  int64_t k = 0;
  for (; k + kAddends <= p.K; k += kAddends)
    for (int64_t r = 0; r < rows; ++r)
      add_rows<Stored, kAddends>(p.source[p.begin + r] + k, weight.from(k), columns, k == 0,
                                 sums[r]);
  for (; k < p.K; ++k)
    for (int64_t r = 0; r < rows; ++r)
      add_rows<Stored, 1>(p.source[p.begin + r] + k, weight.from(k), columns, k == 0, sums[r]);
}

}  // namespace
}  // namespace fusedrnn::cpu
