// Arithmetic that rounds down, up or to zero. This file is compiled with -frounding-math.
#include <cfenv>
#include <cmath>

#include "numbers.h"

namespace ptxvm {

namespace {

class Direction {
 public:
  explicit Direction(uint32_t flags) {
    std::fesetround(flags & kRoundDown   ? FE_DOWNWARD
                    : flags & kRoundUp   ? FE_UPWARD
                    : flags & kRoundZero ? FE_TOWARDZERO
                                         : FE_TONEAREST);
  }
  ~Direction() { std::fesetround(FE_TONEAREST); }
};

template <class T>
T compute(Arithmetic op, T x, T y, T z, uint32_t flags) {
  const Direction direction(flags);
  // The operands are volatile, so that the compiler computes nothing before the direction is set or
  // after it is set back.
  const volatile T a = x, b = y, c = z;
  volatile T out = 0;
  switch (op) {
    case Arithmetic::kAdd:
      out = a + b;
      break;
    case Arithmetic::kSub:
      out = a - b;
      break;
    case Arithmetic::kMul:
      out = a * b;
      break;
    case Arithmetic::kDiv:
      out = a / b;
      break;
    case Arithmetic::kFma:
      out = std::fma(a, b, c);
      break;
  }
  return out;
}

}  // namespace

float rounded(Arithmetic op, float a, float b, float c, uint32_t flags) {
  return compute(op, a, b, c, flags);
}
double rounded(Arithmetic op, double a, double b, double c, uint32_t flags) {
  return compute(op, a, b, c, flags);
}
float rounded_to_float(double x, uint32_t flags) {
  const Direction direction(flags);
  const volatile double from = x;
  volatile float out = static_cast<float>(from);
  return out;
}

}  // namespace ptxvm
