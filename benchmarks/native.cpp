// Measures two limits of a processor: how fast it multiplies and adds in registers, and how fast it
// reads an array again and again from the cache that holds the array. floors.py compiles this file
// with the flags of the instruction set that fusedrnn uses.
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

// Returns the floating-point operations per second of one thread; a multiply-add counts as two.
extern "C" double multiply_add_rate(double seconds) {
  // Ten independent sums keep two units with four or five cycles of latency busy.
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
        asm volatile("" : "+v"(sums[k]));  // so that the compiler keeps the loop
      }
    }
    steps += kSteps;
    elapsed = now() - start;
  } while (elapsed < seconds);
  return 2.0 * kLanes * kSums * steps / elapsed;
}

// Returns the bytes per second that one thread reads from data[0 .. bytes), pass after pass. bytes
// is a multiple of the size of 8 vectors, and data is aligned to a vector.
extern "C" double read_rate(const char* data, size_t bytes, double seconds) {
  const Vec* vectors = reinterpret_cast<const Vec*>(data);
  const size_t n = bytes / sizeof(Vec);
  const auto pass = [&] {
    for (size_t i = 0; i < n; i += 8) {
#pragma GCC unroll 8
      for (size_t k = 0; k < 8; ++k) asm volatile("" : : "v"(vectors[i + k]));
    }
  };
  // At least a megabyte is read each time before the clock is read.
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
