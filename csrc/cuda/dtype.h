// The types in which tensors are stored on a GPU, and the one in which each is computed. The 16-bit
// ones are bits to the host; storage.cuh turns them into float on the device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedrnn::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

template <class S>
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
struct DtypeOf<BFloat16> {
  using Real = float;
  static constexpr Dtype kDtype = Dtype::kBFloat16;
};

// What values stored as S are computed and summed in; c, and h between steps, are kept in it.
template <class S>
using Real = typename DtypeOf<S>::Real;

// Whether a state in the compute type is not yet what a product reads.
template <class S>
constexpr bool kRounds = sizeof(S) != sizeof(Real<S>);

inline size_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// As in the names of kernels.
inline const char* name_of(Dtype dtype) {
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

}  // namespace fusedrnn::cuda
