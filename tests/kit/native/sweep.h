// Compares functions on float with libm's on double, and functions on double with libm's on long
// double, for arguments in rising order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedrnn_test {

template <class T>
struct Wide;
template <>
struct Wide<float> {
  using Type = double;
  using Bits = uint32_t;
};
template <>
struct Wide<double> {
  using Type = long double;
  using Bits = uint64_t;
};

// Without a type wider than double there is no reference for double.
template <class T>
constexpr bool kHasReference =
    std::numeric_limits<typename Wide<T>::Type>::digits >= std::numeric_limits<T>::digits + 10;

template <class T>
using Reference = typename Wide<T>::Type (*)(typename Wide<T>::Type);

template <class T>
Reference<T> reference(const std::string& function) {
  using W = typename Wide<T>::Type;
  if (function == "exp") return [](W x) { return std::exp(x); };
  if (function == "tanh") return [](W x) { return std::tanh(x); };
  if (function == "relu") return [](W x) { return x <= 0 ? W(0) : x; };
  if (function == "sigmoid")
    return [](W x) {
      const W e = std::exp(-std::fabs(x));
      return (x < 0 ? e : W(1)) / (1 + e);
    };
  throw std::invalid_argument("function must be exp, sigmoid, tanh or relu, got " + function);
}

// The distance between neighbouring numbers of type T around x, at least that of subnormals.
template <class T>
typename Wide<T>::Type spacing(typename Wide<T>::Type x) {
  using Limits = std::numeric_limits<T>;
  int exponent = Limits::min_exponent;  // x = m 2^exponent, 0.5 <= m < 1
  if (x != 0) {
    std::frexp(x, &exponent);
    if (exponent < Limits::min_exponent) exponent = Limits::min_exponent;
    if (exponent > Limits::max_exponent) exponent = Limits::max_exponent;
  }
  return std::ldexp(typename Wide<T>::Type(1), exponent - Limits::digits);
}

// The error in units in the last place, |got - wanted| / spacing(wanted).
template <class T>
double error_in_ulps(T got, typename Wide<T>::Type wanted) {
  using W = typename Wide<T>::Type;
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  if (std::isnan(wanted) || std::isnan(got))
    return std::isnan(wanted) && std::isnan(got) ? 0.0 : kInfinite;
  // Infinity counts as the number that would follow the largest one.
  const W beyond = std::ldexp(W(1), std::numeric_limits<T>::max_exponent);
  const auto clamped = [&](W x) { return x > beyond ? beyond : x < -beyond ? -beyond : x; };
  return static_cast<double>(std::fabs(clamped(got) - clamped(wanted)) / spacing<T>(wanted));
}

template <class T>
struct Findings {
  double worst_ulps = 0;
  T worst_at = 0;
  double worst_step_back = 0;  // the largest decrease to the next argument, in ulps
  T step_back_at = 0;
  int64_t count = 0;

  T previous = -std::numeric_limits<T>::infinity();

  // x: arguments in rising order, also from call to call. y: the function's results.
  void judge(Reference<T> wanted, const T* x, const T* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double error = error_in_ulps<T>(y[i], wanted(x[i]));
      if (error > worst_ulps) {
        worst_ulps = error;
        worst_at = x[i];
      }
      if (y[i] < previous) {
        const double back = error_in_ulps<T>(y[i], previous);
        if (back > worst_step_back) {
          worst_step_back = back;
          step_back_at = x[i];
        }
      }
      previous = y[i];
    }
    count += n;
  }
};

// The position of x among all numbers of type T in rising order, from minus infinity. -0 comes
// before +0.
template <class T>
typename Wide<T>::Bits rank_of(T x) {
  using Bits = typename Wide<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  Bits bits;
  std::memcpy(&bits, &x, sizeof(T));
  return bits & kSign ? ~bits : bits | kSign;
}

template <class T>
T of_rank(typename Wide<T>::Bits rank) {
  using Bits = typename Wide<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  const Bits bits = rank & kSign ? rank & ~kSign : ~rank;
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// Visits numbers from lowest to highest in groups of neighbours. One group of every `stride` is
// visited, at a random place. Stride 1 visits every number.
template <class T, class Function>
Findings<T> sweep(Function function, Reference<T> wanted, T lowest, T highest, uint64_t stride) {
  constexpr uint64_t kBlock = 256;
  const uint64_t end = rank_of(highest);
  uint64_t random = 1;
  Findings<T> findings;
  std::vector<T> x(kBlock), y(kBlock);
  for (uint64_t first = rank_of(lowest);;) {
    // The top bits of Knuth's linear congruential generator.
    random = random * 6364136223846793005u + 1442695040888963407u;
    const uint64_t start = first + (random >> 33) % stride * kBlock;
    uint64_t n = 0;
    while (n < kBlock && start <= end && n <= end - start) {
      x[n] = of_rank<T>(static_cast<typename Wide<T>::Bits>(start + n));
      ++n;
    }
    function(x.data(), y.data(), static_cast<int64_t>(n));
    findings.judge(wanted, x.data(), y.data(), static_cast<int64_t>(n));
    if (end - first < stride * kBlock) return findings;
    first += stride * kBlock;
  }
}

}  // namespace fusedrnn_test
