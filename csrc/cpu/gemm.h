// Everything outside the time loop: packing weights into panels, matrix products over all rows, and
// sums over rows. Compiled once per instruction set, see kernels.inl.
#pragma once

#include "../kernel_api.h"
#include "tile.h"

namespace fusedrnn {
namespace {

template <class T>
int64_t gates_block(int64_t gates) {
  return blocks_of(static_cast<int>(gates)) * Vec<T>::kLanes;
}

template <class T>
int64_t columns_block() {
  return kColumnBlocks * Vec<T>::kLanes;
}

// to[k][i] = from[i][k] for a vector's width of i, of which `inside` exist and the rest are zero.
template <class T>
FUSEDRNN_INLINE void transpose(const T* from, int64_t from_ld, int inside, int64_t K, T* to,
                               int64_t to_ld) {
  using V = Vec<T>;
  for (int64_t k = 0; k < K; k += V::kLanes) {
    const int terms = lanes_at<T>(k, K);
    V square[V::kLanes];
    if (inside == V::kLanes && terms == V::kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(from + i * from_ld + k);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i)
        square[i] = i < inside ? V::load_partial(from + i * from_ld + k, terms) : V::zero();
    }
    transpose_square(square);
    if (terms == V::kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i) square[i].store(to + (k + i) * to_ld);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i)
        if (i < terms) square[i].store(to + (k + i) * to_ld);
    }
  }
}

template <class F>
void pack_gates(const PackGatesArgs<F>& a) {
  using T = Sum<F>;
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t units = gates_block<T>(a.gates);
  const int64_t columns = a.gates * units;
  for (int64_t block = a.block_begin; block < a.block_end; ++block) {
    F* panel = a.panels + block * a.K * columns;
    T* bias = a.bias ? a.bias + block * 2 * columns : nullptr;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t u = block * units + column % units;
      const int64_t row = column / units * a.width + u;
      const int inside = static_cast<int>(max64(0, min64(kLanes, a.width - u)));
      // A group of terms moves as one.
      if (a.panels)
        transpose(reinterpret_cast<const T*>(a.weight + (inside ? row * a.K : 0)), a.K / kTerms<F>,
                  inside, a.K / kTerms<F>, reinterpret_cast<T*>(panel + column * kTerms<F>),
                  columns);
      if (!bias) continue;
      for (int i = 0; i < kLanes; ++i) {
        bias[column + i] = i < inside && a.bias_x ? value(a.bias_x[row + i]) : T(0);
        bias[columns + column + i] = i < inside && a.bias_h ? value(a.bias_h[row + i]) : T(0);
      }
    }
  }
}

template <class F>
void pack_columns(const PackColumnsArgs<F>& a) {
  using V = Vec<Sum<F>>;
  const int64_t units = columns_block<Sum<F>>();
  for (int64_t block = a.block_begin; block < a.block_end; ++block) {
    const int64_t first = block * units;
    const int64_t inside = min64(units, a.N - first);
    F* panel = a.panels + block * whole_terms<F>(a.K) * units;
    for (int64_t k = 0; k < a.K; k += kTerms<F>, panel += units * kTerms<F>) {
      const F* from = a.matrix + k * a.ld + first;
      for (int64_t i = 0; i < units; i += V::kLanes) {
        const int lanes = static_cast<int>(max64(0, min64(V::kLanes, inside - i)));
        load_rows(from + i, a.ld, a.K - k, lanes)
            .store(reinterpret_cast<Sum<F>*>(panel + i * kTerms<F>));
      }
    }
  }
}

// Rows that share one part of a panel, kTermsNear terms: with AVX-512 512 KiB of rows beside 256
// KiB of panel, which L2 holds together. Fewer terms would send c through memory more often.
constexpr int64_t kGemmRows = 128;

// The same where a is transposed, and so copied: with AVX-512 128 KiB of panel beside 96 KiB of a.
template <class F>
constexpr int64_t kTransposedTerms = 2048 / int64_t{sizeof(Sum<F>)} * kTerms<F>;
constexpr int64_t kTransposedRows = 48;

// A gradient of weights sums over all T*N rows, and the error of a sum grows with its length: so
// many terms are summed, then the sums. Sums of about √K of K terms make the least error; more than
// 32 sums in a row of tiles would cost more than a tenth of the time. (Factors of 16 bits are
// rounded by far more than a float's sum.)
template <class F>
FUSEDRNN_INLINE int64_t sum_terms(int64_t K) {
  return sizeof(F) < sizeof(float) ? 256 * kTerms<F> : K <= 64 ? 8 : K <= 256 ? 16 : 32;
}

// c[r, :] (+)= tile[r][:] for a tile of columns of which `columns` exist.
template <class T>
FUSEDRNN_INLINE void store_tile(const T* tile, int64_t rows, int64_t columns, T* c, int64_t c_ld,
                                bool accumulate) {
  using V = Vec<T>;
  for (int64_t r = 0; r < rows; ++r, tile += kColumnBlocks * V::kLanes) {
    for (int64_t u = 0; u < columns; u += V::kLanes) {
      const int lanes = lanes_at<T>(u, columns);
      V sum = V::load(tile + u);
      if (accumulate) sum += load(c + r * c_ld + u, lanes);
      store(sum, c + r * c_ld + u, lanes);
    }
  }
}

// Brings the part of c that a tile goes to into L1 while the tile is summed.
template <class T>
FUSEDRNN_INLINE void prefetch_tile(int64_t rows, int64_t columns, const T* c, int64_t c_ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t u = 0; u < columns; u += kCacheLine / sizeof(T))
      __builtin_prefetch(c + r * c_ld + u, 1);
}

// out[r][v] = Σ_k source[k][r] panel[k][v], in sums of so many terms.
template <class F, int kVectors>
FUSEDRNN_INLINE void product_in_sums(int64_t rows, const F* source, int64_t K, const F* panel,
                                     int64_t terms, Sum<F>* out) {
  constexpr int kWidth = kVectors * Vec<Sum<F>>::kLanes;
  constexpr int64_t kLd = kTransposedRows;
  Ahead nothing;
  product<F, kVectors, true>(rows, source, kLd, min64(terms, K), panel, {}, out, nothing);
  for (int64_t k0 = terms; k0 < K; k0 += terms)
    product<F, kVectors, true, true>(rows, source + k0 * kLd, kLd, min64(terms, K - k0),
                                     panel + k0 * kWidth, {}, out, nothing);
}

struct RowTile {
  int64_t first, count;
};

// c (+)= a b for some tiles of rows of a as they lie.
template <class F>
FUSEDRNN_INLINE void gemm_tiles(const GemmArgs<F>& a, const RowTile* tiles, int64_t n) {
  constexpr int kVectors = kColumnBlocks;
  constexpr int kUnits = kVectors * Vec<Sum<F>>::kLanes;
  const bool far = (a.block_end - a.block_begin) * a.K * kUnits * int64_t{sizeof(F)} > kBytesNear;
  alignas(64) Sum<F> tile[tile_rows(kVectors) * kUnits];
  for (int64_t k0 = 0; k0 < a.K; k0 += kTermsNear<F>) {
    const int64_t terms = min64(kTermsNear<F>, a.K - k0);
    for (int64_t block = a.block_begin; block < a.block_end; ++block) {
      const int64_t u = block * kUnits;
      const F* panel = a.panels + (block * a.K + k0) * kUnits;
      Ahead ahead;
      if (far && block + 1 < a.block_end) ahead = Ahead(panel + a.K * kUnits, terms * kUnits);
      for (int64_t i = 0; i < n; ++i) {
        const auto [first, count] = tiles[i];
        prefetch_tile(count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld);
        product<F, kVectors>(count, a.a + first * a.a_ld + k0, a.a_ld, terms, panel, {}, tile,
                             ahead);
        store_tile(tile, count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld,
                   a.accumulate || k0 > 0);
      }
    }
  }
}

// c (+)= a b, a as it lies.
template <class F>
void gemm_rows(const GemmArgs<F>& a) {
  constexpr int64_t kMaxRows = tile_rows(kColumnBlocks);
  RowTile tiles[kGemmRows];
  int64_t n = 0, rows = 0;
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t m0 = begin; m0 < end; m0 += kGemmRows) {
      const int64_t m1 = min64(end, m0 + kGemmRows);
      if (rows + m1 - m0 > kGemmRows) {
        gemm_tiles(a, tiles, n);
        n = rows = 0;
      }
      for_tiles(kMaxRows, m0, m1,
                [&](int64_t first, int64_t count) { tiles[n++] = {first, count}; });
      rows += m1 - m0;
    }
  };
  if (a.steps) {
    for (int64_t p = a.steps->begin; p < a.steps->end; ++p) {
      const int64_t first = a.steps->row_offset[step_at(*a.steps, p)] - a.steps->first_row;
      add(first + a.steps->n_begin, first + alive_at(*a.steps, p));
    }
  } else {
    add(a.m_begin, a.m_end);
  }
  gemm_tiles(a, tiles, n);
}

// The first `columns` columns of a matrix, `terms` rows that lie ld apart, to
// [terms][kTransposedRows] in groups of kTerms<F>: rows far apart share sets of the caches, and
// each its page. They are fetched ahead, which the hardware does not do across pages.
template <class F>
FUSEDRNN_INLINE void copy_columns(const F* from, int64_t ld, int64_t terms, int64_t columns,
                                  F* to) {
  constexpr int64_t kAhead = 16;
  for (int64_t k = 0; k < terms; k += kTerms<F>, from += ld * kTerms<F>) {
    for (int64_t m = 0; m < columns * int64_t{sizeof(F)}; m += kCacheLine)
      for (int i = 0; i < kTerms<F>; ++i)
        __builtin_prefetch(reinterpret_cast<const char*>(from + (kAhead + i) * ld) + m);
    for (int64_t m = 0; m < columns; m += Vec<Sum<F>>::kLanes)
      load_rows(from + m, ld, terms - k, lanes_at<Sum<F>>(m, columns))
          .store(reinterpret_cast<Sum<F>*>(to + k * kTransposedRows + m * kTerms<F>));
  }
}

// c (+)= a b, a transposed. Part by part of K, so that a part of b stays in L2 for all of a.
template <class F>
void gemm_columns(const GemmArgs<F>& a) {
  constexpr int kVectors = kColumnBlocks;
  constexpr int kMaxRows = tile_rows(kVectors);
  constexpr int kUnits = kVectors * Vec<Sum<F>>::kLanes;
  static_assert(kTransposedRows % Vec<Sum<F>>::kLanes == 0);
  alignas(64) Sum<F> tile[kMaxRows * kUnits];
  alignas(64) F columns_of_a[kTransposedTerms<F> * kTransposedRows];
  const int64_t K = whole_terms<F>(a.K);
  for (int64_t k0 = 0; k0 < a.K; k0 += kTransposedTerms<F>) {
    const int64_t terms = min64(kTransposedTerms<F>, a.K - k0);
    for (int64_t m0 = a.m_begin; m0 < a.m_end; m0 += kTransposedRows) {
      const int64_t m1 = min64(a.m_end, m0 + kTransposedRows);
      copy_columns(a.a + k0 * a.a_ld + m0, a.a_ld, terms, m1 - m0, columns_of_a);
      for (int64_t block = a.block_begin; block < a.block_end; ++block) {
        const int64_t u = block * kUnits;
        const F* panel = a.panels + (block * K + k0) * kUnits;
        for_tiles(kMaxRows, m0, m1, [&](int64_t first, int64_t count) {
          prefetch_tile(count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld);
          product_in_sums<F, kVectors>(count, columns_of_a + (first - m0) * kTerms<F>,
                                       whole_terms<F>(terms), panel,
                                       sum_terms<F>(max64(a.K, a.whole_K)), tile);
          store_tile(tile, count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld,
                     a.accumulate || k0 > 0);
        });
      }
    }
  }
}

template <class F>
void gemm(const GemmArgs<F>& a) {
  a.a_transposed ? gemm_columns(a) : gemm_rows(a);
}

// Sixteen rows are summed, then sixteen such sums, then those: short sums keep the error small.
template <class F>
void sum_rows(const F* m, int64_t rows, int64_t ld, int64_t begin, int64_t end, Sum<F>* out,
              bool accumulate) {
  using V = Vec<Sum<F>>;
  constexpr int64_t kFew = 16, kMany = kFew * kFew;
  for (int64_t u = begin; u < end; u += V::kLanes) {
    const int lanes = lanes_at<Sum<F>>(u, end);
    V total = accumulate ? load(out + u, lanes) : V::zero();
    for (int64_t r0 = 0; r0 < rows; r0 += kMany) {
      V many = V::zero();
      for (int64_t r1 = r0; r1 < min64(rows, r0 + kMany); r1 += kFew) {
        V few = V::zero();
        for (int64_t r = r1; r < min64(rows, r1 + kFew); ++r) few += load(m + r * ld + u, lanes);
        many += few;
      }
      total += many;
    }
    store(total, out + u, lanes);
  }
}

}  // namespace
}  // namespace fusedrnn
