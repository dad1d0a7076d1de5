// The kernels outside the time loop: packing of weights into panels, matrix products over all rows,
// and sums over rows. Compiled once per instruction set, see kernels.inl.
#pragma once

#include "kernel_table.h"
#include "tile.h"

namespace fusedrnn::cpu {
namespace {

template <class Scalar>
int64_t units_of_gates_panel(int64_t gates) {
  return vectors_per_gate(static_cast<int>(gates)) * Vec<Scalar>::kLanes;
}

template <class Scalar>
int64_t units_of_columns_panel() {
  return kColumnVectors * Vec<Scalar>::kLanes;
}

// to[k][i] = from[i][k] for kLanes values of i. Only the first `inside` rows of `from` exist; the
// rest become zero.
template <class Scalar>
FUSEDRNN_INLINE void transpose(const Scalar* from, int64_t from_ld, int inside, int64_t K,
                               Scalar* to, int64_t to_ld) {
  using V = Vec<Scalar>;
  for (int64_t k = 0; k < K; k += V::kLanes) {
    const int terms = lanes_at<Scalar>(k, K);
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

template <class Stored>
void pack_gates(const PackGatesArgs<Stored>& a) {
  using Scalar = Real<Stored>;
  constexpr int kLanes = Vec<Scalar>::kLanes;
  const int64_t units = units_of_gates_panel<Scalar>(a.gates);
  const int64_t columns = a.gates * units;
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    Stored* panel = a.panels + index * a.K * columns;
    Scalar* bias = a.bias ? a.bias + index * 2 * columns : nullptr;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t u = index * units + column % units;
      const int64_t row = column / units * a.width + u;
      const int inside = static_cast<int>(max64(0, min64(kLanes, a.width - u)));
      // A group of terms is moved as one value.
      if (a.panels)
        transpose(reinterpret_cast<const Scalar*>(a.weight + (inside ? row * a.K : 0)),
                  a.K / kTerms<Stored>, inside, a.K / kTerms<Stored>,
                  reinterpret_cast<Scalar*>(panel + column * kTerms<Stored>), columns);
      if (!bias) continue;
      for (int i = 0; i < kLanes; ++i) {
        bias[column + i] = i < inside && a.bias_x ? value(a.bias_x[row + i]) : Scalar(0);
        bias[columns + column + i] = i < inside && a.bias_h ? value(a.bias_h[row + i]) : Scalar(0);
      }
    }
  }
}

template <class Stored>
void pack_columns(const PackColumnsArgs<Stored>& a) {
  using V = Vec<Real<Stored>>;
  const int64_t units = units_of_columns_panel<Real<Stored>>();
  for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
    const int64_t first = index * units;
    const int64_t inside = min64(units, a.N - first);
    Stored* panel = a.panels + index * whole_terms<Stored>(a.K) * units;
    for (int64_t k = 0; k < a.K; k += kTerms<Stored>, panel += units * kTerms<Stored>) {
      const Stored* from = a.matrix + k * a.ld + first;
      for (int64_t i = 0; i < units; i += V::kLanes) {
        const int lanes = static_cast<int>(max64(0, min64(V::kLanes, inside - i)));
        load_rows(from + i, a.ld, a.K - k, lanes)
            .store(reinterpret_cast<Real<Stored>*>(panel + i * kTerms<Stored>));
      }
    }
  }
}

// The number of rows that share one part of a panel, which is kTermsNear terms long. With AVX-512
// the rows take 512 KiB and the part 256 KiB, which L2 holds together. With fewer terms c would go
// through memory more often.
constexpr int64_t kGemmRows = 128;

// The number of terms of a part of a panel if a is transposed, and so is copied. With AVX-512 the
// part takes 128 KiB and the copy of a 96 KiB.
template <class Stored>
constexpr int64_t kTransposedTerms = 2048 / int64_t{sizeof(Real<Stored>)} * kTerms<Stored>;
constexpr int64_t kTransposedRows = 48;

// The number of terms that are summed before the sums are summed. A gradient of weights is a sum
// over all T*N rows, and the error of a sum grows with its length. The error is least for sums of
// about √K of the K terms, but more than 32 sums in a row of tiles would cost more than a tenth of
// the time. (Factors of 16 bits are rounded by far more than a float's sum.)
template <class Stored>
FUSEDRNN_INLINE int64_t sum_terms(int64_t K) {
  return sizeof(Stored) < sizeof(float) ? 256 * kTerms<Stored> : K <= 64 ? 8 : K <= 256 ? 16 : 32;
}

// c[r, :] = tile[r][:], or c[r, :] += tile[r][:] if accumulate, for the first `columns` columns of
// a tile.
template <class Scalar>
FUSEDRNN_INLINE void store_tile(const Scalar* tile, int64_t rows, int64_t columns, Scalar* c,
                                int64_t c_ld, bool accumulate) {
  using V = Vec<Scalar>;
  for (int64_t r = 0; r < rows; ++r, tile += kColumnVectors * V::kLanes) {
    for (int64_t u = 0; u < columns; u += V::kLanes) {
      const int lanes = lanes_at<Scalar>(u, columns);
      V sum = V::load(tile + u);
      if (accumulate) sum += load(c + r * c_ld + u, lanes);
      store(sum, c + r * c_ld + u, lanes);
    }
  }
}

// Fetches the part of c to which a tile will be stored into L1, while the tile is summed.
template <class Scalar>
FUSEDRNN_INLINE void prefetch_tile(int64_t rows, int64_t columns, const Scalar* c, int64_t c_ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t u = 0; u < columns; u += kCacheLine / sizeof(Scalar))
      __builtin_prefetch(c + r * c_ld + u, 1);
}

// out[r][v] = Σ_k source[k][r] panel[k][v]. Sums of `terms` terms are made first and then added up.
template <class Stored, int kVectors>
FUSEDRNN_INLINE void product_in_sums(int64_t rows, const Stored* source, int64_t K,
                                     const Stored* panel, int64_t terms, Real<Stored>* out) {
  constexpr int kWidth = kVectors * Vec<Real<Stored>>::kLanes;
  constexpr int64_t kLd = kTransposedRows;
  const auto tiles_at = [=](int64_t k0) FUSEDRNN_INLINE_LAMBDA -> Tiles<Stored> {
    return {.source = {source + k0 * kLd, kLd},
            .K = min64(terms, K - k0),
            .panel = panel + k0 * kWidth,
            .panel_ld = 0,
            .start = {}};
  };
  Ahead nothing;
  product<Stored, kVectors, true>(rows, tiles_at(0), out, nothing);
  for (int64_t k0 = terms; k0 < K; k0 += terms)
    product<Stored, kVectors, true, true>(rows, tiles_at(k0), out, nothing);
}

struct RowTile {
  int64_t first, count;
};

// c (+)= a b for some tiles of rows of an a that is not transposed.
template <class Stored>
FUSEDRNN_INLINE void gemm_tiles(const GemmArgs<Stored>& a, const RowTile* tiles, int64_t n) {
  constexpr int kVectors = kColumnVectors;
  constexpr int kUnits = kVectors * Vec<Real<Stored>>::kLanes;
  const bool far =
      (a.panel_end - a.panel_begin) * a.K * kUnits * int64_t{sizeof(Stored)} > kBytesNear;
  alignas(64) Real<Stored> tile[tile_rows(kVectors) * kUnits];
  for (int64_t k0 = 0; k0 < a.K; k0 += kTermsNear<Stored>) {
    const int64_t terms = min64(kTermsNear<Stored>, a.K - k0);
    for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
      const int64_t u = index * kUnits;
      const Stored* panel = a.panels + (index * a.K + k0) * kUnits;
      Ahead ahead;
      if (far && index + 1 < a.panel_end) ahead = Ahead(panel + a.K * kUnits, terms * kUnits);
      for (int64_t i = 0; i < n; ++i) {
        const auto [first, count] = tiles[i];
        prefetch_tile(count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld);
        product<Stored, kVectors>(count,
                                  {.source = {a.a + first * a.a_ld + k0, a.a_ld},
                                   .K = terms,
                                   .panel = panel,
                                   .panel_ld = 0,
                                   .start = {}},
                                  tile, ahead);
        store_tile(tile, count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld,
                   a.accumulate || k0 > 0);
      }
    }
  }
}

// c (+)= a b for an a that is not transposed.
template <class Stored>
void gemm_rows(const GemmArgs<Stored>& a) {
  constexpr int64_t kMaxRows = tile_rows(kColumnVectors);
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
// [terms][kTransposedRows] in groups of kTerms<Stored>. Rows that lie far apart compete for the
// same sets of the caches, and each lies in another page. They are fetched ahead here, because the
// hardware does not fetch across pages.
template <class Stored>
FUSEDRNN_INLINE void copy_columns(const Stored* from, int64_t ld, int64_t terms, int64_t columns,
                                  Stored* to) {
  constexpr int64_t kAhead = 16;
  for (int64_t k = 0; k < terms; k += kTerms<Stored>, from += ld * kTerms<Stored>) {
    for (int64_t m = 0; m < columns * int64_t{sizeof(Stored)}; m += kCacheLine)
      for (int i = 0; i < kTerms<Stored>; ++i)
        __builtin_prefetch(reinterpret_cast<const char*>(from + (kAhead + i) * ld) + m);
    for (int64_t m = 0; m < columns; m += Vec<Real<Stored>>::kLanes)
      load_rows(from + m, ld, terms - k, lanes_at<Real<Stored>>(m, columns))
          .store(reinterpret_cast<Real<Stored>*>(to + k * kTransposedRows + m * kTerms<Stored>));
  }
}

// c (+)= a b for a transposed a. K is done in parts, so that a part of b stays in L2 for all rows.
template <class Stored>
void gemm_columns(const GemmArgs<Stored>& a) {
  constexpr int kVectors = kColumnVectors;
  constexpr int kMaxRows = tile_rows(kVectors);
  constexpr int kUnits = kVectors * Vec<Real<Stored>>::kLanes;
  static_assert(kTransposedRows % Vec<Real<Stored>>::kLanes == 0);
  alignas(64) Real<Stored> tile[kMaxRows * kUnits];
  alignas(64) Stored columns_of_a[kTransposedTerms<Stored> * kTransposedRows];
  const int64_t K = whole_terms<Stored>(a.K);
  for (int64_t k0 = 0; k0 < a.K; k0 += kTransposedTerms<Stored>) {
    const int64_t terms = min64(kTransposedTerms<Stored>, a.K - k0);
    for (int64_t m0 = a.m_begin; m0 < a.m_end; m0 += kTransposedRows) {
      const int64_t m1 = min64(a.m_end, m0 + kTransposedRows);
      copy_columns(a.a + k0 * a.a_ld + m0, a.a_ld, terms, m1 - m0, columns_of_a);
      for (int64_t index = a.panel_begin; index < a.panel_end; ++index) {
        const int64_t u = index * kUnits;
        const Stored* panel = a.panels + (index * K + k0) * kUnits;
        for_tiles(kMaxRows, m0, m1, [&](int64_t first, int64_t count) {
          prefetch_tile(count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld);
          product_in_sums<Stored, kVectors>(count, columns_of_a + (first - m0) * kTerms<Stored>,
                                            whole_terms<Stored>(terms), panel,
                                            sum_terms<Stored>(max64(a.K, a.whole_K)), tile);
          store_tile(tile, count, min64(kUnits, a.N - u), a.c + first * a.c_ld + u, a.c_ld,
                     a.accumulate || k0 > 0);
        });
      }
    }
  }
}

template <class Stored>
void gemm(const GemmArgs<Stored>& a) {
  a.a_transposed ? gemm_columns(a) : gemm_rows(a);
}

// Sums 16 rows at a time, then 16 of these sums at a time, then the results, because short sums
// keep the error small.
template <class Stored>
void sum_rows(const SumRowsArgs<Stored>& a) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  constexpr int64_t kFew = 16, kMany = kFew * kFew;
  const Stored* const m = a.m;
  const int64_t rows = a.rows, ld = a.ld;
  for (int64_t u = a.begin; u < a.end; u += V::kLanes) {
    const int lanes = lanes_at<Scalar>(u, a.end);
    V total = a.accumulate ? load(a.out + u, lanes) : V::zero();
    for (int64_t r0 = 0; r0 < rows; r0 += kMany) {
      V many = V::zero();
      for (int64_t r1 = r0; r1 < min64(rows, r0 + kMany); r1 += kFew) {
        V few = V::zero();
        for (int64_t r = r1; r < min64(rows, r1 + kFew); ++r) few += load(m + r * ld + u, lanes);
        many += few;
      }
      total += many;
    }
    store(total, a.out + u, lanes);
  }
}

}  // namespace
}  // namespace fusedrnn::cpu
