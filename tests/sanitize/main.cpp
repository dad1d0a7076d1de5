// Runs whole layers, forward and backward, under the sanitizers: every cell, dtype and instruction
// set at odd sizes, on buffers of exactly the documented size. Buffers that the engine must write
// hold NaN before, so that a value that it does not write, or reads too early, shows in a result.
//
// Each case runs twice: on heap buffers, whose ends AddressSanitizer watches, and on buffers that
// end at an inaccessible page. The latter finds masked loads and stores too, which are not
// instrumented.
#include <sys/mman.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/layer.h"
#include "cpu/plan.h"
#include "layer/reserve.h"

namespace {

using namespace fusedrnn;
using namespace fusedrnn::cpu;

enum class Place { kHeap, kBeforeForbiddenPage };

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return {static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16)};
  } else {
    return static_cast<T>(value);
  }
}
double to_double(double value) { return value; }
double to_double(Bf16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

// The memory of one case.
class Pool {
 public:
  explicit Pool(Place place) : place_(place) {}
  Pool(const Pool&) = delete;
  ~Pool() {
    for (const Piece& piece : pieces_) {
      if (place_ == Place::kHeap) {
        std::free(piece.base);
      } else {
        munmap(piece.base, piece.bytes);
      }
    }
  }

  // The memory is aligned to 64 bytes if `bytes` is a multiple of 64.
  void* take(size_t bytes) {
    if (place_ == Place::kHeap) {
      void* base = bytes % 64 == 0 ? std::aligned_alloc(64, bytes) : std::malloc(bytes);
      pieces_.push_back({base, bytes});
      return base;
    }
    constexpr size_t kPage = 4096;
    const size_t usable = (bytes + kPage - 1) / kPage * kPage;
    void* base =
        mmap(nullptr, usable + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) std::abort();
    pieces_.push_back({base, usable + kPage});
    char* end = static_cast<char*>(base) + usable;
    if (mprotect(end, kPage, PROT_NONE) != 0) std::abort();
    return end - bytes;
  }

  template <class T>
  T* poisoned(int64_t values) {
    T* p = static_cast<T*>(take(static_cast<size_t>(values) * sizeof(T)));
    std::fill(p, p + values, from_double<T>(std::numeric_limits<double>::quiet_NaN()));
    return p;
  }

  template <class T>
  T* random(int64_t values, double bound) {
    // bfloat16 may begin at an odd multiple of 2 bytes, in a view of a larger tensor.
    constexpr int64_t kShift = std::is_same_v<T, Bf16>;
    T* p = static_cast<T*>(take(static_cast<size_t>(values + kShift) * sizeof(T))) + kShift;
    std::uniform_real_distribution<double> uniform(-bound, bound);
    for (int64_t i = 0; i < values; ++i) p[i] = from_double<T>(uniform(generator_));
    return p;
  }

 private:
  struct Piece {
    void* base;
    size_t bytes;
  };
  Place place_;
  std::vector<Piece> pieces_;
  std::mt19937 generator_{0};
};

class PlainRuntime final : public Runtime {
 public:
  PlainRuntime(Pool& pool, int64_t threads) : pool_(pool), threads_(threads) {}

  int64_t threads() const override { return threads_; }
  void parallel(int64_t n, const std::function<void(int64_t)>& body) override {
    for (int64_t i = n - 1; i >= 0; --i) body(i);
  }
  void* scratch(size_t bytes) override {
    void* p = pool_.take(bytes);
    std::fill_n(static_cast<unsigned char*>(p), bytes, 0xff);  // NaN in every dtype
    return p;
  }

 private:
  Pool& pool_;
  int64_t threads_;
};

struct Case {
  CellKind cell;
  int64_t N, I, H, P, D;
  std::vector<int64_t> batch_sizes;
  int64_t threads;
  bool bias;
  bool all_gradients;  // otherwise those of y, x, and the weights are absent
};

template <class T>
void expect_finite(const Case& c, const char* isa, const char* what, const T* p, int64_t values) {
  for (int64_t i = 0; p && i < values; ++i) {
    if (std::isfinite(to_double(p[i]))) continue;
    std::printf("%s, %s, %zu bytes: N=%lld I=%lld H=%lld P=%lld D=%lld T=%zu: %s[%lld] is %g\n",
                info_of(c.cell).name, isa, sizeof(T), static_cast<long long>(c.N),
                static_cast<long long>(c.I), static_cast<long long>(c.H),
                static_cast<long long>(c.P), static_cast<long long>(c.D), c.batch_sizes.size(),
                what, static_cast<long long>(i), to_double(p[i]));
    std::exit(1);
  }
}

template <class Stored>
void run(const Case& c, const KernelTable& table, Place place) {
  using Scalar = Real<Stored>;
  Pool pool(place);
  PlainRuntime runtime(pool, c.threads);
  const Sequences sequences = from_batch_sizes(c.batch_sizes, c.N);
  const CellInfo& info = info_of(c.cell);
  const bool odd = c.N % 2 == 1;
  const Layer layer = {c.cell, c.I, c.H, c.P, c.D, sequences, odd, odd && info.has_c};
  const int64_t S = sequences.rows();
  const int64_t h_size = c.D * c.N * c.P, c_size = c.D * c.N * c.H, y_size = S * layer.y_width();
  const double bound = 1 / std::sqrt(static_cast<double>(c.H));

  Parameters<const Stored> w[2] = {};
  Parameters<Scalar> d_w[2] = {};
  const ParameterSizes sizes = layer.parameter_sizes();
  for (int64_t d = 0; d < c.D; ++d) {
    for (const Parameter p : parameters_of(info, c.bias)) {
      w[d][p] = pool.random<Stored>(shape_of(p, sizes).values(), bound);
      if (c.all_gradients) d_w[d][p] = pool.poisoned<Scalar>(shape_of(p, sizes).values());
    }
  }
  const Stored* x = pool.random<Stored>(S * c.I, 1);
  Scalar* reserve =
      pool.poisoned<Scalar>(static_cast<int64_t>(reserve_bytes<Stored>(layer, S) / sizeof(Scalar)));

  for (Scalar* keep : {static_cast<Scalar*>(nullptr), reserve}) {
    Stored* h = pool.random<Stored>(h_size, 1);
    Scalar* state = info.has_c ? pool.random<Scalar>(c_size, 1) : nullptr;
    Stored* y = pool.poisoned<Stored>(y_size);
    layer_forward<Stored>(layer, table, runtime,
                          {.x = x, .w = {w[0], w[1]}, .h = h, .c = state, .y = y, .reserve = keep});
    expect_finite(c, table.isa, "h", h, h_size);
    expect_finite(c, table.isa, "c", state, c_size);
    expect_finite(c, table.isa, "y", y, y_size);
  }

  Scalar* d_h = pool.random<Scalar>(h_size, 1);
  Scalar* d_c = info.has_c ? pool.random<Scalar>(c_size, 1) : nullptr;
  const Stored* d_y = c.all_gradients ? pool.random<Stored>(y_size, 1) : nullptr;
  Scalar* d_x = c.all_gradients ? pool.poisoned<Scalar>(S * c.I) : nullptr;
  layer_backward<Stored>(layer, table, runtime,
                         {.x = x,
                          .w = {w[0], w[1]},
                          .reserve = reserve,
                          .d_y = d_y,
                          .d_h = d_h,
                          .d_c = d_c,
                          .d_x = d_x,
                          .d_w = {d_w[0], d_w[1]}});
  expect_finite(c, table.isa, "d_h", d_h, h_size);
  expect_finite(c, table.isa, "d_c", d_c, c_size);
  expect_finite(c, table.isa, "d_x", d_x, S * c.I);
  for (int64_t d = 0; d < c.D; ++d)
    for (const Parameter p : parameters_of(info, true))
      expect_finite(c, table.isa, info_of(p).name, d_w[d][p], shape_of(p, sizes).values());
}

bool in_pairs(const Case& c) { return (c.I | c.H | c.P) % kTerms<Bf16> == 0; }

std::vector<Case> make_cases() {
  struct Batch {
    int64_t N;
    std::vector<int64_t> sizes;
  };
  const std::vector<Batch> batches = {
      {1, {1}},
      {1, {1, 1, 1, 1, 1}},
      {2, {2, 2, 2}},
      {5, {5, 5, 3, 1}},
      {9, {7, 4, 4, 2, 2, 1}},  // two sequences of length 0
      {19, {19, 18, 13, 13, 8, 7, 5, 1}},
      {3, {}},         // every sequence of length 0
      {0, {0, 0, 0}},  // no sequence
  };
  std::vector<Case> cases;
  const auto add = [&](CellKind cell, int64_t I, int64_t H, int64_t D, const Batch& batch) {
    // The other options take all their combinations, one after another.
    const size_t i = cases.size();
    const bool projects = info_of(cell).projects;
    cases.push_back({.cell = cell,
                     .N = batch.N,
                     .I = I,
                     .H = H,
                     .P = projects ? H / 2 + 1 : H,
                     .D = D,
                     .batch_sizes = batch.sizes,
                     .threads = 1 + static_cast<int64_t>(i % 3),
                     .bias = i % 5 != 0,
                     .all_gradients = i % 7 != 0});
  };
  for (int kind = 0; kind < kCellCount; ++kind) {
    const auto cell = static_cast<CellKind>(kind);
    for (int64_t H : {1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 34, 50, 67})
      for (const Batch& batch : batches)
        for (int64_t D : {1, 2}) add(cell, 1 + (H * 7 + batch.N) % 13, H, D, batch);
  }
  return cases;
}

// Cases that take other paths through the engine: many rows, which forward and backward cut into
// chunks, and large matrices, with which threads share the steps of few sequences.
std::vector<Case> make_large_cases() {
  std::vector<Case> cases;
  const auto add = [&](int kind, int64_t N, int64_t H, int64_t D, int64_t T) {
    const CellInfo& info = kCellInfo[kind];
    cases.push_back({.cell = static_cast<CellKind>(kind),
                     .N = N,
                     .I = 2,
                     .H = H,
                     .P = info.projects ? H / 2 + 1 : H,
                     .D = D,
                     .batch_sizes = std::vector<int64_t>(T, N),
                     .threads = 3,
                     .bias = true,
                     .all_gradients = true});
    const Case& c = cases.back();
    const Sequences sequences = from_batch_sizes(c.batch_sizes, N);
    const Plan plan = make_plan({.sequences = sequences,
                                 .columns = info.gates * H,
                                 .inner = c.P,
                                 .input = 0,
                                 .directions = D,
                                 .threads = c.threads,
                                 .chunk_values = kBackwardChunkValues});
    if (plan.by_units == (plan.chunk_steps < T)) {
      std::printf("a large case of %s takes no other way\n", info.name);
      std::exit(1);
    }
  };
  for (int kind = 0; kind < kCellCount; ++kind) {
    const int64_t gates = kCellInfo[kind].gates;
    for (int64_t D : {1, 2}) {
      add(kind, 97, 3, D, kBackwardChunkValues / (97 * 3 * gates) * 5 / 4);
      const double side = std::sqrt(2.0 * static_cast<double>(kByUnits[0].values / gates));
      add(kind, 3 - D, static_cast<int64_t>(side) + 1, D, 3);
    }
  }
  return cases;
}

}  // namespace

int main() {
  const std::vector<Case> cases = make_cases(), large_cases = make_large_cases();
  for (const IsaInfo& isa : instruction_sets()) {
    if (!isa.supported) {
      std::printf("%s: not run, this processor lacks one of %s\n", isa.name, isa.needs);
      continue;
    }
    // A kernel table of an instruction set that only adds bfloat16 has the kernels of another one
    // for the other dtypes.
    const bool bf16 = isa.table->bf16;
    size_t layers = 0;
    for (const Case& c : cases) {
      if (bf16 && !in_pairs(c)) continue;
      for (Place place : {Place::kHeap, Place::kBeforeForbiddenPage}) {
        if (bf16) {
          run<Bf16>(c, *isa.table, place);
        } else {
          run<float>(c, *isa.table, place);
          run<double>(c, *isa.table, place);
        }
      }
      ++layers;
    }
    for (const Case& c : large_cases) {
      if (bf16 && !in_pairs(c)) continue;
      bf16 ? run<Bf16>(c, *isa.table, Place::kHeap) : run<float>(c, *isa.table, Place::kHeap);
      ++layers;
    }
    std::printf("%s: %zu layers, no error\n", isa.name, layers);
    std::fflush(stdout);
  }
}
