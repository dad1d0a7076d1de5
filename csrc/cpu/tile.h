// The product tile: a few rows of a source times panels of packed weights, summed in registers and
// handed to whoever asked while they are in L1. Compiled once per instruction set, see kernels.inl.
#pragma once

#include "../kernel_api.h"
#include "factors.h"
#include "vecmath.h"

namespace fusedrnn {
namespace {

// Vectors in a tile's width. Four give a broadcast enough products to hide behind; fewer gates
// than that take several vectors of units each.
constexpr int blocks_of(int gates) { return gates >= 3 ? 1 : 4 / gates; }

// Of those, how many a tile sums at once: with sixteen registers, half of four, for two rows of
// four sums would neither hide a product's latency nor make good use of what is loaded.
constexpr int vectors_at_once(int vectors) {
  return FUSEDRNN_REGISTERS < 32 && vectors == 4 ? 2 : vectors;
}

// Rows of a tile: accumulators, one row of panel vectors and a temporary fill the registers.
constexpr int tile_rows(int vectors) {
  const int at_once = vectors_at_once(vectors);
  return (FUSEDRNN_REGISTERS - at_once - 1) / at_once;
}

// Vectors in the width of a panel of pack_columns.
constexpr int kColumnBlocks = 4;

// pack_gates of one gate makes the panels of pack_columns.
static_assert(blocks_of(1) == kColumnBlocks);
// The stages are called by number, 0 and 1.
static_assert(kMaxStages == 2);

FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDRNN_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// End of the sequences of this task that are alive at position p of the chunk, n_begin if none.
FUSEDRNN_INLINE int64_t alive_at(const Steps& s, int64_t p) {
  if (p < s.begin || p >= s.end) return s.n_begin;
  return max64(s.n_begin, min64(s.n_end, s.batch_sizes[step_at(s, p)]));
}

// Lanes of a vector at unit u of `width`.
template <class T>
FUSEDRNN_INLINE int lanes_at(int64_t u, int64_t width) {
  return static_cast<int>(min64(Vec<T>::kLanes, width - u));
}

template <class F>
FUSEDRNN_INLINE Vec<Sum<F>> load(const F* p, int lanes) {
  return lanes == Vec<Sum<F>>::kLanes ? load_values(p) : load_values(p, lanes);
}

template <class T>
FUSEDRNN_INLINE void store(Vec<T> v, T* p, int lanes) {
  if (lanes == Vec<T>::kLanes) {
    v.store(p);
  } else {
    v.store_partial(p, lanes);
  }
}

// How to reach a vector of units in memory: all of its lanes exist, or only the first few do.
struct AllLanes {
  template <class F>
  FUSEDRNN_INLINE Vec<Sum<F>> load(const F* p) const {
    return load_values(p);
  }
  template <class F>
  FUSEDRNN_INLINE void store(Vec<Sum<F>> v, F* p) const {
    store_values(v, p);
  }
};
struct FirstLanes {
  int count;
  template <class F>
  FUSEDRNN_INLINE Vec<Sum<F>> load(const F* p) const {
    return load_values(p, count);
  }
  template <class F>
  FUSEDRNN_INLINE void store(Vec<Sum<F>> v, F* p) const {
    store_values(v, p, count);
  }
};

// Calls body(units, u, b) for each vector b of the block of units that begins at `begin`, of a
// width; units says how to reach it.
template <class T, int kBlocks, class Body>
FUSEDRNN_INLINE void for_units(int64_t begin, int64_t width, const Body& body) {
  constexpr int kLanes = Vec<T>::kLanes;
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t u = begin + b * kLanes;
    if (u + kLanes <= width) {
      body(AllLanes(), u, b);
    } else if (u < width) {
      body(FirstLanes{static_cast<int>(width - u)}, u, b);
    }
  }
}

// Calls body(units, u) for each vector of units of [begin, end).
template <class T, class Body>
FUSEDRNN_INLINE void for_units_of(int64_t begin, int64_t end, const Body& body) {
  int64_t u = begin;
  for (; u + Vec<T>::kLanes <= end; u += Vec<T>::kLanes) body(AllLanes(), u);
  if (u < end) body(FirstLanes{static_cast<int>(end - u)}, u);
}

template <class T>
FUSEDRNN_INLINE void copy(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Where the sums of a tile begin: at p[panel * panel_ld + row * row_ld + column], or at zero.
template <class T>
struct Start {
  const T* p = nullptr;
  int64_t panel_ld = 0;
  int64_t row_ld = 0;
};

// Memory to fetch into L2, line by line, while products run: the panel that comes after theirs.
struct Ahead {
  const char* line = nullptr;
  const char* end = nullptr;

  Ahead() = default;
  template <class F>
  Ahead(const F* p, int64_t count)
      : line(reinterpret_cast<const char*>(p)), end(reinterpret_cast<const char*>(p + count)) {}
};
constexpr int kCacheLine = 64;

// Panels of fewer bytes than this in all are in L2 anyway.
constexpr int64_t kBytesNear = 512 << 10;

// out[p][r][v] = start[p][r][v] + Σ_k source[r, k] panel_p[k][v], for kRows rows, kPanels panels
// that lie panel_ld apart and kVectors vectors of each. The source is row-major, or [K][ld] in
// groups of kTerms<F> of K if kTransposed. Every sum runs over k in order, whatever the tile:
// results do not depend on how rows are shared out. With kAdd the sums are added to out. A panel's
// rows, and out's, are kWidth vectors wide. For every k a line of `ahead` is fetched, as long as
// there are any.
template <class F, int kRows, int kPanels, int kVectors, bool kTransposed, bool kAdd = false,
          int kWidth = kVectors>
void product_rows(const F* source, int64_t ld, int64_t K, const F* panel, int64_t panel_ld,
                  Start<Sum<F>> start, Sum<F>* out, Ahead& ahead) {
  using T = Sum<F>;
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes * kTerms<F>;  // factors of a vector
  const char* line = ahead.line;
  V acc[kPanels][kRows][kVectors];
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        acc[p][r][v] =
            start.p ? V::load(start.p + p * start.panel_ld + r * start.row_ld + v * V::kLanes)
                    : V::zero();
  const auto factors_at = [&](int64_t k, int r) FUSEDRNN_INLINE_LAMBDA {
    return broadcast_factors(kTransposed ? source + k * ld + r * kTerms<F> : source + r * ld + k);
  };
  for (int64_t k = 0; k < K; k += kTerms<F>, panel += kWidth * kLanes) {
    if (line < ahead.end) {
      __builtin_prefetch(line, 0, 2);
      line += kCacheLine;
    }
    V a[kRows];
    if constexpr (kPanels > 1) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) a[r] = factors_at(k, r);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      V b[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) b[v] = load_factors(panel + p * panel_ld + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kPanels == 1) a[r] = factors_at(k, r);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[p][r][v] = multiply_add<F>(a[r], b[v], acc[p][r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        T* to = out + ((p * kRows + r) * kWidth + v) * V::kLanes;
        (kAdd ? V::load(to) + acc[p][r][v] : acc[p][r][v]).store(to);
      }
  ahead.line = line;
}

// One panel and a number of rows known only at run time, at most tile_rows(kVectors).
template <class F, int kVectors, bool kTransposed = false, bool kAdd = false,
          int kRows = tile_rows(kVectors)>
FUSEDRNN_INLINE void product(int64_t rows, const F* source, int64_t ld, int64_t K, const F* panel,
                             Start<Sum<F>> start, Sum<F>* out, Ahead& ahead) {
  using V = Vec<Sum<F>>;
  constexpr int kAtOnce = vectors_at_once(kVectors);
  if (rows == kRows) {
    for (int v = 0; v < kVectors; v += kAtOnce) {
      product_rows<F, kRows, 1, kAtOnce, kTransposed, kAdd, kVectors>(
          source, ld, K, panel + v * V::kLanes * kTerms<F>, 0, start, out + v * V::kLanes, ahead);
      if (start.p) start.p += kAtOnce * V::kLanes;
    }
  } else if constexpr (kRows > 1) {
    product<F, kVectors, kTransposed, kAdd, kRows - 1>(rows, source, ld, K, panel, start, out,
                                                       ahead);
  }
}

// Panels that so few rows take at once: the sums of one panel would wait for each other. Two, for
// eight sums fill two units of four cycles, and fewer panels at once leave more of them near for
// the next step: LSTM (100,1,64,64) forward took 65 us with four, 54 with two.
constexpr int panels_at_once(int rows, int vectors) {
  const int fit = (FUSEDRNN_REGISTERS - 6) / (rows * vectors);
  return fit < 1 ? 1 : fit > 2 ? 2 : fit;
}

template <class F, int kVectors, int kRows, int kPanels = panels_at_once(kRows, kVectors)>
FUSEDRNN_INLINE void product_panels(int64_t panels, const F* source, int64_t ld, int64_t K,
                                    const F* panel, int64_t panel_ld, Start<Sum<F>> start,
                                    Sum<F>* out) {
  if (panels >= kPanels) {
    Ahead nothing;
    product_rows<F, kRows, kPanels, kVectors, false>(source, ld, K, panel, panel_ld, start, out,
                                                     nothing);
  } else if constexpr (kPanels > 1) {
    product_panels<F, kVectors, kRows, kPanels - 1>(panels, source, ld, K, panel, panel_ld, start,
                                                    out);
  }
}

// Calls body(first, count) for the rows [begin, end) in tiles of nearly equal height, at most
// `most`.
template <class Body>
FUSEDRNN_INLINE void for_tiles(int64_t most, int64_t begin, int64_t end, const Body& body) {
  const int64_t n = end - begin;
  if (n <= 0) return;
  const int64_t tiles = ceil_div(n, most);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = begin + n * i / tiles;
    body(first, begin + n * (i + 1) / tiles - first);
  }
}

// Terms of a sum over which a panel is read for all rows before the next part of it: 256 KiB with
// AVX-512, which stays in L2 beside the rows. That many rows share a part; their sums stay in L1.
template <class F>
constexpr int64_t kTermsNear = 1024 * kTerms<F>;
constexpr int64_t kRowsNear = 96;

// Products of the rows [begin, end) of a source with the panels of some blocks,
// [block][K][kVectors]. Calls body(block, first, rows, sums [rows, kVectors * lanes]) for some rows
// of a block while their sums are in L1, until all are done. starts: [block][kVectors * lanes],
// start_ld apart, or null.
template <class F, int kVectors, int kRows = 0, class Body>
FUSEDRNN_INLINE void for_products(int64_t begin, int64_t end, const F* source, int64_t ld,
                                  int64_t K, const F* panels, Blocks blocks, const Sum<F>* starts,
                                  int64_t start_ld, const Body& body) {
  using T = Sum<F>;
  constexpr int kWidth = kVectors * Vec<T>::kLanes;
  const int64_t panel_ld = K * kWidth;
  if constexpr (kRows > 0) {  // exactly so many rows
    constexpr int kPanels = panels_at_once(kRows, kVectors);
    alignas(64) T tile[kPanels * kRows * kWidth];
    const int64_t groups = ceil_div(blocks.end - blocks.begin, kPanels);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t block = blocks.begin + kPanels * (blocks.from_last ? groups - 1 - i : i);
      const int64_t count = min64(kPanels, blocks.end - block);
      product_panels<F, kVectors, kRows>(
          count, source + begin * ld, ld, K, panels + block * panel_ld, panel_ld,
          {starts ? starts + block * start_ld : nullptr, start_ld, 0}, tile);
      for (int64_t p = 0; p < count; ++p) body(block + p, begin, kRows, tile + p * kRows * kWidth);
    }
  } else {
    constexpr int kMaxRows = tile_rows(kVectors);
    alignas(64) T tiles[max64(kRowsNear, kMaxRows) * kWidth];
    const int64_t rows_near = K > kTermsNear<F> ? kRowsNear : kMaxRows;
    const bool far = (blocks.end - blocks.begin) * panel_ld * int64_t{sizeof(F)} > kBytesNear;
    for (int64_t i = blocks.begin; i < blocks.end; ++i) {
      const int64_t block = blocks.from_last ? blocks.begin + blocks.end - 1 - i : i;
      const int64_t next_block = blocks.from_last ? block - 1 : block + 1;
      const T* start = starts ? starts + block * start_ld : nullptr;
      for_tiles(rows_near, begin, end, [&](int64_t first, int64_t rows) {
        for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kTermsNear<F>) {
          const int64_t terms = min64(kTermsNear<F>, K - k0);
          const F* panel = panels + block * panel_ld + k0 * kWidth;
          Ahead ahead;
          if (far && k0 + terms < K) {
            ahead = Ahead(panel + terms * kWidth, min64(kTermsNear<F>, K - k0 - terms) * kWidth);
          } else if (far && first + rows == end && i + 1 < blocks.end) {
            ahead = Ahead(panels + next_block * panel_ld, min64(kTermsNear<F>, K) * kWidth);
          }
          for_tiles(kMaxRows, 0, rows, [&](int64_t r, int64_t count) {
            T* tile = tiles + r * kWidth;
            product<F, kVectors>(count, source + (first + r) * ld + k0, ld, terms, panel,
                                 k0 ? Start<T>{tile, 0, kWidth} : Start<T>{start}, tile, ahead);
          });
        }
        body(block, first, rows, tiles);
      });
    }
  }
}

template <class F, int kVectors, class Body>
void products(int64_t begin, int64_t end, const F* source, int64_t ld, int64_t K, const F* panels,
              Blocks blocks, const Sum<F>* starts, int64_t start_ld, const Body& body) {
  switch (end - begin) {
    case 1:
      return for_products<F, kVectors, 1>(begin, end, source, ld, K, panels, blocks, starts,
                                          start_ld, body);
    case 2:
      return for_products<F, kVectors, 2>(begin, end, source, ld, K, panels, blocks, starts,
                                          start_ld, body);
    case 3:
      return for_products<F, kVectors, 3>(begin, end, source, ld, K, panels, blocks, starts,
                                          start_ld, body);
    default:
      return for_products<F, kVectors>(begin, end, source, ld, K, panels, blocks, starts, start_ld,
                                       body);
  }
}

}  // namespace
}  // namespace fusedrnn
