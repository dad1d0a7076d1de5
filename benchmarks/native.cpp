// The two limits of a processor that no library shows plainly: how fast it multiplies and adds in
// registers, and how fast it reads an array again and again from the cache that holds it.
// floors.py compiles this with the flags of the instruction set that fusedrnn runs on.
#include <algorithm>
#include <chrono>
#include <cstddef>

namespace {

typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
constexpr size_t kLanes = VECTOR_BYTES / sizeof(float);

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// Floating-point operations a second of one thread, a multiply-add counted as two.
extern "C" double multiply_add_rate(double seconds) {
  // Two units with four or five cycles of latency are busy with ten independent sums.
  constexpr int kSums = 12;
  constexpr long kSteps = 10000;
  Vec sums[kSums] = {};
  Vec a = {}, b = {};
  a += 0.999f;
  b += 0.001f;
  long steps = 0;
  const double start = now();
  double elapsed;
  do {
    for (long i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int k = 0; k < kSums; ++k) {
        sums[k] = sums[k] * a + b;
        asm volatile("" : "+v"(sums[k]));  // or the loop would be summed up in advance
      }
    }
    steps += kSteps;
    elapsed = now() - start;
  } while (elapsed < seconds);
  return 2.0 * kLanes * kSums * steps / elapsed;
}

// Bytes a second that one thread reads from data[0 .. bytes), pass after pass; bytes is a multiple
// of 8 vectors and data aligned to one.
extern "C" double read_rate(const char* data, size_t bytes, double seconds) {
  const Vec* vectors = reinterpret_cast<const Vec*>(data);
  const size_t n = bytes / sizeof(Vec);
  const auto pass = [&] {
    for (size_t i = 0; i < n; i += 8) {
#pragma GCC unroll 8
      for (size_t k = 0; k < 8; ++k) asm volatile("" : : "v"(vectors[i + k]));
    }
  };
  // Between two looks at the clock at least a megabyte is read.
  const size_t passes = std::max<size_t>(1, (size_t{1} << 20) / bytes);
  pass();
  double read = 0, elapsed;
  const double start = now();
  do {
    for (size_t i = 0; i < passes; ++i) pass();
    read += static_cast<double>(passes) * bytes;
    elapsed = now() - start;
  } while (elapsed < seconds);
  return read / elapsed;
}
