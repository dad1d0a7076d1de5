// A block's product on the ordinary cores, for few sequences. A thread owns one weight row and one
// slice of K, and sums their products for all sequences. The slices take
// turns of four values of K, so threads of neighbouring slices read neighbouring addresses of
// shared memory.
#pragma once

#include "shared_memory.cuh"
#include "storage.cuh"

namespace fusedrnn::cuda {

// Four stored values in words of 32 bits, which one load fetches and registers hold.
template <class Stored>
struct alignas(4 * sizeof(Stored)) Packed {
  unsigned word[sizeof(Stored)];
};

__device__ __forceinline__ float4 unpack(Packed<float> p) {
  return {__uint_as_float(p.word[0]), __uint_as_float(p.word[1]), __uint_as_float(p.word[2]),
          __uint_as_float(p.word[3])};
}
__device__ __forceinline__ float4 unpack(Packed<Half> p) {
  return {real(Half(p.word[0] & 0xffff)), real(Half(p.word[0] >> 16)),
          real(Half(p.word[1] & 0xffff)), real(Half(p.word[1] >> 16))};
}
__device__ __forceinline__ float4 unpack(Packed<Bf16> p) {
  return {__uint_as_float(p.word[0] << 16), __uint_as_float(p.word[0] & 0xffff0000),
          __uint_as_float(p.word[1] << 16), __uint_as_float(p.word[1] & 0xffff0000)};
}

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned bits_of(Half x) { return x.bits; }
__device__ __forceinline__ unsigned bits_of(Bf16 x) { return x.bits; }

template <class StoredType>
class FmaProduct {
 public:
  using Stored = StoredType;

  __device__ __forceinline__ explicit FmaProduct(SharedMemory shared)
      : shape_(shared.shape), shared_(shared) {}

  // A value in the form in which it goes into the exchange.
  static __device__ __forceinline__ Stored exchanged(float x) { return stored<Stored>(x); }

  // weight(r, k) is element k of weight row r of the stage, and zero outside of the weights.
  template <int s, class Weight>
  __device__ __forceinline__ void load_weights(const Weight& weight) {
    const ResidentTile& tile = shape_.tile[s];
    const int row = threadIdx.x % tile.R, slice = threadIdx.x / tile.R;
    const auto packed = [&](int i) {
      Packed<Stored> p = {};
      const int k = 4 * (i * tile.slices + slice);
      for (int v = 0; v < 4; ++v) {
        const unsigned bits = bits_of(weight(row, k + v));
        if constexpr (sizeof(Stored) == 4) {
          p.word[v] = bits;
        } else {
          p.word[v / 2] |= bits << (v % 2 * 16);
        }
      }
      return p;
    };
    if (slice >= tile.slices) return;
    constexpr int held = s == 0 ? kFmaHeld : 0;
    Packed<Stored>* rest = weights<s>();
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      const Packed<Stored> p = packed(i);
      if (i >= held) {
        rest[(i - held) * kThreads] = p;
      } else {
        // Registers cannot be indexed at run time. So every register is written, and all but those
        // of index i get the value that they have.
#pragma unroll
        for (int j = 0; j < kFmaHeld; ++j) {
#pragma unroll
          for (int v = 0; v < int(sizeof(Stored)); ++v)
            held_[j].word[v] = i == j ? p.word[v] : held_[j].word[v];
        }
      }
    }
  }

  // Writes the partial sums of source [n, K_pad] times the stage's weight rows to shared memory.
  template <int s>
  __device__ __forceinline__ void multiply(const Stored* source, int n) {
    for (int begin = 0; begin < n; begin += kFmaRows) {
      const int count = min(kFmaRows, n - begin);
      stage<s>(source + int64_t(begin) * shape_.tile[s].K_pad, count);
      __syncthreads();
      sum<s>(begin, count);
      __syncthreads();
    }
  }

 private:
  // This thread's weights of a stage in shared memory.
  template <int s>
  __device__ __forceinline__ Packed<Stored>* weights() const {
    return shared_.weights<Packed<Stored>>(s) + threadIdx.x;
  }

  // Copies rows of the source to shared memory, as floats.
  template <int s>
  __device__ __forceinline__ void stage(const Stored* source, int count) {
    const int vectors = shape_.tile[s].K_pad / 4;
    const auto* from = reinterpret_cast<const Packed<Stored>*>(source);
    float4* to = shared_.staged();
#pragma unroll 4
    for (int i = threadIdx.x; i < count * vectors; i += kThreads) to[i] = unpack(from[i]);
  }

  template <int s>
  __device__ __forceinline__ void sum(int begin, int count) const {
    const ResidentTile& tile = shape_.tile[s];
    const int row = threadIdx.x % tile.R, slice = threadIdx.x / tile.R;
    if (slice >= tile.slices) return;
    const int vectors = tile.K_pad / 4;
    const float4* staged = shared_.staged();
    float sums[kFmaRows] = {};
    const auto add = [&](int i, Packed<Stored> packed) {
      const int k = i * tile.slices + slice;
      if (k >= vectors) return;
      const float4 w = unpack(packed);
#pragma unroll
      for (int j = 0; j < kFmaRows; ++j) {
        if (j == count) break;
        const float4 x = staged[j * vectors + k];
        sums[j] = fma(w.x, x.x, fma(w.y, x.y, fma(w.z, x.z, fma(w.w, x.w, sums[j]))));
      }
    };
    int first = 0;
    if constexpr (s == 0) {
#pragma unroll
      for (int i = 0; i < kFmaHeld; ++i)
        if (i < tile.steps) add(i, held_[i]);
      first = kFmaHeld;
    }
    const Packed<Stored>* rest = weights<s>();
#pragma unroll 2
    for (int i = first; i < tile.steps; ++i) add(i, rest[(i - first) * kThreads]);
    float* out = shared_.partials() + (slice * shape_.rows_pad + begin) * tile.ld + row;
#pragma unroll
    for (int j = 0; j < kFmaRows; ++j)
      if (j < count) out[j * tile.ld] = sums[j];
  }

  const ResidentShape& shape_;
  const SharedMemory shared_;
  Packed<Stored> held_[kFmaHeld] = {};
};

}  // namespace fusedrnn::cuda
