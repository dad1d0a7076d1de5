// The stored types of tensors, and the compute type of each. The host code sees a 16-bit type only
// as bits; csrc/cpu/factors.h and csrc/cuda/storage.cuh convert it to float.
//
// This header is included by files that are compiled for one instruction set. A function here must
// therefore be inlined wherever it is called: otherwise the linker could keep the copy that was
// compiled for AVX-512, and a processor without AVX-512 would run it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cells/math.h"

namespace fusedrnn {

// A bfloat16 in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// An IEEE half-precision number in memory.
struct Half {
  uint16_t bits;
};

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

template <class Stored>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  using Real = float;
  static constexpr Dtype kDtype = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
  using Real = double;
  static constexpr Dtype kDtype = Dtype::kFloat64;
};
template <>
struct DtypeOf<Half> {
  using Real = float;
  static constexpr Dtype kDtype = Dtype::kFloat16;
};
template <>
struct DtypeOf<Bf16> {
  using Real = float;
  static constexpr Dtype kDtype = Dtype::kBFloat16;
};

// The compute type of a stored type: the type of sums and of c.
template <class Stored>
using Real = typename DtypeOf<Stored>::Real;

// Whether storing a computed value rounds it.
template <class Stored>
constexpr bool kRounds = sizeof(Stored) != sizeof(Real<Stored>);

FUSEDRNN_HD size_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// The short name of a dtype, which is also the end of a kernel's name.
FUSEDRNN_HD const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "f32";
    case Dtype::kFloat64:
      return "f64";
    case Dtype::kFloat16:
      return "f16";
    default:
      return "bf16";
  }
}

}  // namespace fusedrnn
