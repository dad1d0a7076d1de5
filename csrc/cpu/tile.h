// The product tile: a few rows of a source times panels of packed weights. The sums are made in
// registers and handed to the caller while they are in L1. Compiled once per instruction set, see
// kernels.inl.
#pragma once

#include "factors.h"
#include "kernel_table.h"
#include "vecmath.h"

namespace fusedrnn::cpu {
namespace {

// The number of vectors of units that a panel has for each gate. A tile is three or four vectors
// wide in all, because three or four products hide the time that it takes to broadcast a value. A
// stage of one or two gates therefore has several vectors of units for each gate.
constexpr int vectors_per_gate(int gates) { return gates >= 3 ? 1 : 4 / gates; }

// How many vectors of its width a tile sums at once. With sixteen registers a tile that is four
// vectors wide sums two at once. With all four it would have only two rows, which are too few to
// hide the latency of a product and to use each loaded value often.
constexpr int vectors_at_once(int vectors) {
  return FUSEDRNN_REGISTERS < 32 && vectors == 4 ? 2 : vectors;
}

// The number of rows of a tile. Its sums, one row of panel vectors and a temporary fill the
// registers.
constexpr int tile_rows(int vectors) {
  const int at_once = vectors_at_once(vectors);
  return (FUSEDRNN_REGISTERS - at_once - 1) / at_once;
}

// The width of a panel of pack_columns, in vectors.
constexpr int kColumnVectors = 4;

// With one gate, pack_gates makes panels of the same form as pack_columns.
static_assert(vectors_per_gate(1) == kColumnVectors);

FUSEDRNN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDRNN_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sequences of this task that are alive at position p are [n_begin, alive_at). The result is
// n_begin if there are none, or if p is outside the chunk.
FUSEDRNN_INLINE int64_t alive_at(const Steps& s, int64_t p) {
  if (p < s.begin || p >= s.end) return s.n_begin;
  return max64(s.n_begin, min64(s.n_end, s.batch_sizes[step_at(s, p)]));
}

// The number of lanes that a vector at unit u has below `width`.
template <class Scalar>
FUSEDRNN_INLINE int lanes_at(int64_t u, int64_t width) {
  return static_cast<int>(min64(Vec<Scalar>::kLanes, width - u));
}

template <class Stored>
FUSEDRNN_INLINE Vec<Real<Stored>> load(const Stored* p, int lanes) {
  return lanes == Vec<Real<Stored>>::kLanes ? load_values(p) : load_values(p, lanes);
}

template <class Scalar>
FUSEDRNN_INLINE void store(Vec<Scalar> v, Scalar* p, int lanes) {
  if (lanes == Vec<Scalar>::kLanes) {
    v.store(p);
  } else {
    v.store_partial(p, lanes);
  }
}

// The two ways to load and store a vector of units: all of its lanes exist in memory (AllLanes), or
// only the first `count` do (FirstLanes).
struct AllLanes {
  template <class Stored>
  FUSEDRNN_INLINE Vec<Real<Stored>> load(const Stored* p) const {
    return load_values(p);
  }
  template <class Stored>
  FUSEDRNN_INLINE void store(Vec<Real<Stored>> v, Stored* p) const {
    store_values(v, p);
  }
};
struct FirstLanes {
  int count;
  template <class Stored>
  FUSEDRNN_INLINE Vec<Real<Stored>> load(const Stored* p) const {
    return load_values(p, count);
  }
  template <class Stored>
  FUSEDRNN_INLINE void store(Vec<Real<Stored>> v, Stored* p) const {
    store_values(v, p, count);
  }
};

// Calls body(units, u, v) for each vector v of a panel that has units below `width`. `begin` is the
// panel's first unit and u the vector's. units is AllLanes or FirstLanes.
template <class Scalar, int kVectors, class Body>
FUSEDRNN_INLINE void for_units(int64_t begin, int64_t width, const Body& body) {
  constexpr int kLanes = Vec<Scalar>::kLanes;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t u = begin + v * kLanes;
    if (u + kLanes <= width) {
      body(AllLanes(), u, v);
    } else if (u < width) {
      body(FirstLanes{static_cast<int>(width - u)}, u, v);
    }
  }
}

// Calls body(units, u) for each vector of the units [begin, end), as for_units does.
template <class Scalar, class Body>
FUSEDRNN_INLINE void for_units_of(int64_t begin, int64_t end, const Body& body) {
  int64_t u = begin;
  for (; u + Vec<Scalar>::kLanes <= end; u += Vec<Scalar>::kLanes) body(AllLanes(), u);
  if (u < end) body(FirstLanes{static_cast<int>(end - u)}, u);
}

template <class Scalar>
FUSEDRNN_INLINE void copy(const Scalar* from, Scalar* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// Rows of values that lie ld apart.
template <class Value>
struct Rows {
  Value* data;
  int64_t ld;

  FUSEDRNN_INLINE Value* operator[](int64_t row) const { return data + row * ld; }
  FUSEDRNN_INLINE Rows from(int64_t row) const { return {data + row * ld, ld}; }
};

// The values from which the sums of a tile start: p[panel * panel_ld + row * row_ld + column], or
// zero where p is null.
template <class Scalar>
struct Start {
  const Scalar* p = nullptr;
  int64_t panel_ld = 0;
  int64_t row_ld = 0;
};

// Memory that is fetched into L2, line by line, while products run: the part of a panel, or the
// panel, that the next products read.
struct Ahead {
  const char* line = nullptr;
  const char* end = nullptr;

  Ahead() = default;
  template <class Stored>
  Ahead(const Stored* p, int64_t count)
      : line(reinterpret_cast<const char*>(p)), end(reinterpret_cast<const char*>(p + count)) {}
};
constexpr int kCacheLine = 64;

// Panels that have no more bytes than this in all stay in L2, and are not fetched ahead.
constexpr int64_t kBytesNear = 512 << 10;

// One or more tiles: the product of some rows of a source with panels that lie panel_ld apart.
template <class Stored>
struct Tiles {
  Rows<const Stored> source;  // row-major, or [K][ld] in groups of kTerms<Stored> if transposed
  int64_t K;
  const Stored* panel;
  int64_t panel_ld;
  Start<Real<Stored>> start;
};

// out[p][r][v] = start[p][r][v] + Σ_k source[r, k] panel_p[k][v], for kRows rows, kPanels panels
// and kVectors vectors of each panel. Every sum runs over k in order in every tile, so results do
// not depend on how the rows are cut into tiles. With kAdd the sums are added to out. The rows of a
// panel and of out are kWidth vectors wide. For every k one line of `ahead` is fetched, until none
// is left.
template <class Stored, int kRows, int kPanels, int kVectors, bool kTransposed, bool kAdd = false,
          int kWidth = kVectors>
void product_rows(Tiles<Stored> tiles, Real<Stored>* out, Ahead& ahead) {
  using Scalar = Real<Stored>;
  using V = Vec<Scalar>;
  constexpr int kLanes = V::kLanes * kTerms<Stored>;  // factors of a vector
  // A loop that is not unrolled as a whole would keep its sums in memory.
  static_assert(kRows <= 16 && kVectors <= 16);
  const auto [source, ld] = tiles.source;
  const int64_t K = tiles.K, panel_ld = tiles.panel_ld;
  const Stored* panel = tiles.panel;
  const Start<Scalar> start = tiles.start;
  const char* line = ahead.line;
  V acc[kPanels][kRows][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        acc[p][r][v] =
            start.p ? V::load(start.p + p * start.panel_ld + r * start.row_ld + v * V::kLanes)
                    : V::zero();
  const auto factors_at = [source = source, ld = ld](int64_t k, int r) FUSEDRNN_INLINE_LAMBDA {
    return broadcast_factors(kTransposed ? source + k * ld + r * kTerms<Stored>
                                         : source + r * ld + k);
  };
  for (int64_t k = 0; k < K; k += kTerms<Stored>, panel += kWidth * kLanes) {
    if (line < ahead.end) {
      __builtin_prefetch(line, 0, 2);
      line += kCacheLine;
    }
    V a[kRows];
    if constexpr (kPanels > 1) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) a[r] = factors_at(k, r);
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      V b[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) b[v] = load_factors(panel + p * panel_ld + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kPanels == 1) a[r] = factors_at(k, r);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
          acc[p][r][v] = multiply_add<Stored>(a[r], b[v], acc[p][r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        Scalar* to = out + ((p * kRows + r) * kWidth + v) * V::kLanes;
        (kAdd ? V::load(to) + acc[p][r][v] : acc[p][r][v]).store(to);
      }
  ahead.line = line;
}

// product_rows for one panel and a number of rows that is known only at run time, at most
// tile_rows(kVectors).
template <class Stored, int kVectors, bool kTransposed = false, bool kAdd = false,
          int kRows = tile_rows(kVectors)>
FUSEDRNN_INLINE void product(int64_t rows, Tiles<Stored> tiles, Real<Stored>* out, Ahead& ahead) {
  using V = Vec<Real<Stored>>;
  constexpr int kAtOnce = vectors_at_once(kVectors);
  if (rows == kRows) {
    for (int v = 0; v < kVectors; v += kAtOnce) {
      product_rows<Stored, kRows, 1, kAtOnce, kTransposed, kAdd, kVectors>(
          tiles, out + v * V::kLanes, ahead);
      tiles.panel += kAtOnce * V::kLanes * kTerms<Stored>;
      if (tiles.start.p) tiles.start.p += kAtOnce * V::kLanes;
    }
  } else if constexpr (kRows > 1) {
    product<Stored, kVectors, kTransposed, kAdd, kRows - 1>(rows, tiles, out, ahead);
  }
}

// How many panels are multiplied at once for one to three rows. An FMA takes four cycles and there
// are two FMA units, so at least eight independent sums are needed. With one row, two panels
// of four vectors have eight. More panels at once would leave fewer of them in the nearest cache
// for the next step. (LSTM (100,1,64,64) forward took 65 us with four, 54 with two.)
constexpr int panels_at_once(int rows, int vectors) {
  const int fit = (FUSEDRNN_REGISTERS - 6) / (rows * vectors);
  return fit < 1 ? 1 : fit > 2 ? 2 : fit;
}

template <class Stored, int kVectors, int kRows, int kPanels = panels_at_once(kRows, kVectors)>
FUSEDRNN_INLINE void product_panels(int64_t panels, Tiles<Stored> tiles, Real<Stored>* out) {
  if (panels >= kPanels) {
    Ahead nothing;
    product_rows<Stored, kRows, kPanels, kVectors, false>(tiles, out, nothing);
  } else if constexpr (kPanels > 1) {
    product_panels<Stored, kVectors, kRows, kPanels - 1>(panels, tiles, out);
  }
}

// Cuts the rows [begin, end) into tiles of nearly equal height, at most `most`, and calls
// body(first, count) for each.
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

// A long panel is read in parts of kTermsNear terms, and each part is multiplied with kRowsNear
// rows before the next one is read. With AVX-512 a part has 256 KiB and stays in L2 beside the
// rows. The sums of the rows stay in L1.
template <class Stored>
constexpr int64_t kTermsNear = 1024 * kTerms<Stored>;
constexpr int64_t kRowsNear = 96;

// The product of a stage: the rows [begin, end) of a source times the recurrent weights of some
// panels. The weights are either packed or as torch stores them, [gates * width, K].
template <class Stored>
struct StageProduct {
  int64_t begin, end;
  Rows<const Stored> source;
  int64_t K;
  const Stored* panels;     // [panel][K][a panel's width], or null
  const Stored* as_stored;  // or null
  int64_t width;            // rows of the weight for each gate
  PanelRange range;
  // [panel][a panel's width]: the values from which the sums start, or null for zero
  Rows<const Real<Stored>> starts;
};

// Computes the product p, some rows of one panel at a time, and calls body(panel, first, rows, sums
// [rows, kVectors * lanes]) for them while their sums are in L1. kRows is the number of rows of p,
// or 0 if it is known only at run time.
template <class Stored, int kVectors, int kRows = 0, class Body>
FUSEDRNN_INLINE void for_products(const StageProduct<Stored>& p, const Body& body) {
  using Scalar = Real<Stored>;
  constexpr int kWidth = kVectors * Vec<Scalar>::kLanes;
  const int64_t begin = p.begin, end = p.end, K = p.K;
  const Rows<const Stored> source = p.source;
  const Stored* panels = p.panels;
  const PanelRange range = p.range;
  const Rows<const Scalar> starts = p.starts;
  const int64_t panel_ld = K * kWidth;
  const auto start_of = [starts](int64_t index) FUSEDRNN_INLINE_LAMBDA {
    return starts.data ? starts[index] : nullptr;
  };
  if constexpr (kRows > 0) {
    constexpr int kPanels = panels_at_once(kRows, kVectors);
    alignas(64) Scalar tile[kPanels * kRows * kWidth];
    const int64_t groups = ceil_div(range.end - range.begin, kPanels);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t index = range.begin + kPanels * (range.from_last ? groups - 1 - i : i);
      const int64_t count = min64(kPanels, range.end - index);
      product_panels<Stored, kVectors, kRows>(count,
                                              {.source = source.from(begin),
                                               .K = K,
                                               .panel = panels + index * panel_ld,
                                               .panel_ld = panel_ld,
                                               .start = {start_of(index), starts.ld, 0}},
                                              tile);
      for (int64_t k = 0; k < count; ++k) body(index + k, begin, kRows, tile + k * kRows * kWidth);
    }
  } else {
    constexpr int kMaxRows = tile_rows(kVectors);
    alignas(64) Scalar tiles[max64(kRowsNear, kMaxRows) * kWidth];
    const int64_t rows_near = K > kTermsNear<Stored> ? kRowsNear : kMaxRows;
    const bool far = (range.end - range.begin) * panel_ld * int64_t{sizeof(Stored)} > kBytesNear;
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t index = range.from_last ? range.begin + range.end - 1 - i : i;
      const int64_t next_index = range.from_last ? index - 1 : index + 1;
      const Scalar* start = start_of(index);
      for_tiles(rows_near, begin, end, [&](int64_t first, int64_t rows) {
        for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kTermsNear<Stored>) {
          const int64_t terms = min64(kTermsNear<Stored>, K - k0);
          const Stored* panel = panels + index * panel_ld + k0 * kWidth;
          Ahead ahead;
          if (far && k0 + terms < K) {
            ahead =
                Ahead(panel + terms * kWidth, min64(kTermsNear<Stored>, K - k0 - terms) * kWidth);
          } else if (far && first + rows == end && i + 1 < range.end) {
            ahead = Ahead(panels + next_index * panel_ld, min64(kTermsNear<Stored>, K) * kWidth);
          }
          for_tiles(kMaxRows, 0, rows, [&](int64_t r, int64_t count) {
            Scalar* tile = tiles + r * kWidth;
            product<Stored, kVectors>(
                count,
                {.source = {source[first + r] + k0, source.ld},
                 .K = terms,
                 .panel = panel,
                 .panel_ld = 0,
                 .start = k0 ? Start<Scalar>{tile, 0, kWidth} : Start<Scalar>{start}},
                tile, ahead);
          });
        }
        body(index, first, rows, tiles);
      });
    }
  }
}

template <class Stored, int kVectors, class Body>
void products(const StageProduct<Stored>& p, const Body& body) {
  switch (p.end - p.begin) {
    case 1:
      return for_products<Stored, kVectors, 1>(p, body);
    case 2:
      return for_products<Stored, kVectors, 2>(p, body);
    case 3:
      return for_products<Stored, kVectors, 3>(p, body);
    default:
      return for_products<Stored, kVectors>(p, body);
  }
}

}  // namespace
}  // namespace fusedrnn::cpu
