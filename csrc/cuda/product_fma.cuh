// A block's product on the ordinary cores, for few sequences. A thread owns one weight row and one
// slice of K, and sums their products for all sequences. The slices take
// turns of four values of K, so threads of neighbouring slices read neighbouring addresses of
// shared memory.
#pragma once

#include "cluster.cuh"
#include "shared_memory.cuh"
#include "storage.cuh"
#include "weight_stream.cuh"
#include "words.cuh"

namespace fusedrnn::cuda {

// Four values of the compute type.
template <class V>
struct alignas(16) Four {
  V x, y, z, w;
};

// Four stored values in words of 32 bits, which one load (two of float64) fetches and registers
// hold.
template <class Stored>
struct alignas(sizeof(Stored) == 2 ? 8 : 16) Packed {
  unsigned word[sizeof(Stored)];
};

__device__ __forceinline__ Four<double> unpack(const Packed<double>& p) {
  const auto value = [&](int v) {
    return __hiloint2double(static_cast<int>(p.word[2 * v + 1]), static_cast<int>(p.word[2 * v]));
  };
  return {value(0), value(1), value(2), value(3)};
}
__device__ __forceinline__ Four<float> unpack(Packed<float> p) {
  return {__uint_as_float(p.word[0]), __uint_as_float(p.word[1]), __uint_as_float(p.word[2]),
          __uint_as_float(p.word[3])};
}
__device__ __forceinline__ Four<float> unpack(Packed<Half> p) {
  return {real(Half(p.word[0] & 0xffff)), real(Half(p.word[0] >> 16)),
          real(Half(p.word[1] & 0xffff)), real(Half(p.word[1] >> 16))};
}
__device__ __forceinline__ Four<float> unpack(Packed<Bf16> p) {
  return {__uint_as_float(p.word[0] << 16), __uint_as_float(p.word[0] & 0xffff0000),
          __uint_as_float(p.word[1] << 16), __uint_as_float(p.word[1] & 0xffff0000)};
}

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned bits_of(Half x) { return x.bits; }
__device__ __forceinline__ unsigned bits_of(Bf16 x) { return x.bits; }

// kStreams: whether a part of the weights may be streamed. kClustered: whether blocks are in
// clusters.
template <class StoredType, bool kStreams = false, bool kClustered = false>
class FmaProduct {
 public:
  using Stored = StoredType;
  using V = Real<Stored>;
  using Memory = std::conditional_t<kClustered, ClusterMemory, SharedMemory<V>>;
  static constexpr bool kTensorCores = false;
  static constexpr bool kClusters = kClustered;
  // Whether the source may be words.
  static constexpr bool kTakesWords = !kStreams && !kClusters && sizeof(Stored) <= 4;

  __device__ __forceinline__ explicit FmaProduct(Memory shared)
      : shape_(shared.shape), shared_(shared) {}

  // A value in the form in which it goes into the exchange.
  static __device__ __forceinline__ Stored exchanged(V x) { return stored<Stored>(x); }

  // weight(r, k) is element k of weight row r of the stage, and zero outside of the weights.
  // `streamed` is the block's memory for streamed weights.
  template <int s, class Weight>
  __device__ __forceinline__ void load_weights(const Weight& weight, char* streamed = nullptr) {
    const ProductTile& tile = shape_.tile[s];
    const int row = threadIdx.x % tile.R, slice = threadIdx.x / tile.R;
    const auto packed = [&](int i) {
      Packed<Stored> p = {};
      const int k = 4 * (i * tile.slices + slice);
      for (int v = 0; v < 4; ++v) {
        const Stored w = weight(row, k + v);
        if constexpr (sizeof(Stored) == 8) {
          p.word[2 * v] = static_cast<unsigned>(__double2loint(w));
          p.word[2 * v + 1] = static_cast<unsigned>(__double2hiint(w));
        } else if constexpr (sizeof(Stored) == 4) {
          p.word[v] = bits_of(w);
        } else {
          p.word[v / 2] |= bits_of(w) << (v % 2 * 16);
        }
      }
      return p;
    };
    if (slice >= tile.slices) return;
    constexpr int held = s == 0 ? kHeld : 0;
    Packed<Stored>* rest = weights<s>();
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      const Packed<Stored> p = packed(i);
      if (kStreams && i >= tile.on_chip) {
        streamed_weights<s>(streamed)[(i - tile.on_chip) * kThreads] = p;
      } else if (i >= held) {
        rest[(i - held) * kThreads] = p;
      } else {
        // Registers cannot be indexed at run time. So every register is written, and all but those
        // of index i get the value that they have.
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
#pragma unroll
          for (int v = 0; v < int(sizeof(Stored)); ++v)
            held_[j].word[v] = i == j ? p.word[v] : held_[j].word[v];
        }
      }
    }
  }

  // Begins to stream, after load_weights of the stage.
  template <int s>
  __device__ __forceinline__ void begin(char* streamed) {
    const ProductTile& tile = shape_.tile[s];
    if (threadIdx.x / tile.R >= tile.slices) return;
    const auto* from = reinterpret_cast<const char*>(streamed_weights<s>(streamed));
    char* ring = shared_.template at<char>(tile.ring) + threadIdx.x * sizeof(Packed<Stored>);
    stream_[s].begin(from, ring, tile.steps - tile.on_chip);
  }

  // Writes the partial sums of source [n, K_part], whose rows are K_pad values apart, times the
  // stage's weight rows to shared memory.
  template <int s>
  __device__ __forceinline__ void multiply(const Source<Stored>& source, int n) {
    for (int begin = 0; begin < n; begin += kFmaRows) {
      const int count = min(kFmaRows, n - begin);
      stage<s>(source.from_row(begin, shape_.tile[s].K_pad), count);
      __syncthreads();
      sum<s>(begin, count);
      __syncthreads();
    }
    if constexpr (kClusters) shared_.wait_for_sums(s, n);
  }

 private:
  static constexpr int kHeld = sizeof(Stored) == 8 ? kFmaHeldDouble : kFmaHeld;
  static constexpr int kPart = sizeof(Stored) == 2 ? 8 : 16;
  static constexpr int kBytes = sizeof(Packed<Stored>);
  using Stream =
      std::conditional_t<kStreams, WeightStream<kPart, kBytes / kPart, kPart, kThreads * kBytes>,
                         NoStream>;

  // How many values of a row of the source this block multiplies. Without clusters these are all,
  // and K_pad is in a register already.
  template <int s>
  __device__ __forceinline__ int part() const {
    return kClusters ? shape_.tile[s].K_part : shape_.tile[s].K_pad;
  }

  // This thread's weights of a stage in shared memory.
  template <int s>
  __device__ __forceinline__ Packed<Stored>* weights() const {
    return shared_.template weights<Packed<Stored>>(s) + threadIdx.x;
  }

  // This thread's streamed weights of a stage.
  template <int s>
  __device__ __forceinline__ Packed<Stored>* streamed_weights(char* streamed) const {
    return reinterpret_cast<Packed<Stored>*>(streamed + shape_.tile[s].streamed) + threadIdx.x;
  }

  // Copies rows of the source to shared memory, in the compute type.
  template <int s>
  __device__ __forceinline__ void stage(const Source<Stored>& source, int count) {
    const int vectors = part<s>() / 4;
    auto* to = shared_.template staged<Four<V>>();
    if constexpr (kTakesWords) {
      if (source.words) {
        const int K = shape_.tile[s].K;
#pragma unroll 1
        for (int i = threadIdx.x; i < count * vectors; i += kThreads) {
          const int j = i / vectors, k = 4 * (i - j * vectors);
          V value[4];
          for (int v = 0; v < 4; ++v)
            value[v] = k + v < K ? take_word(source, 4 * int64_t(i) + v) : V(0);
          to[i] = {value[0], value[1], value[2], value[3]};
        }
        return;
      }
    }
    const auto* from = reinterpret_cast<const Packed<Stored>*>(source.values);
#pragma unroll 4
    for (int i = threadIdx.x; i < count * vectors; i += kThreads) {
      // The parts of K of a row that other blocks multiply lie between two rows here.
      const int others = kClusters ? i / vectors * (shape_.tile[s].K_pad / 4 - vectors) : 0;
      to[i] = unpack(from[i + others]);
    }
  }

  template <int s>
  __device__ __forceinline__ void sum(int begin, int count) {
    const ProductTile& tile = shape_.tile[s];
    const int row = threadIdx.x % tile.R, slice = threadIdx.x / tile.R;
    if (slice >= tile.slices) return;
    const int vectors = part<s>() / 4;
    const auto* staged = shared_.template staged<Four<V>>();
    V sums[kFmaRows] = {};
    const auto add = [&](int i, Packed<Stored> packed) {
      const int k = i * tile.slices + slice;
      if (k >= vectors) return;
      const Four<V> w = unpack(packed);
#pragma unroll
      for (int j = 0; j < kFmaRows; ++j) {
        if (j == count) break;
        const Four<V> x = staged[j * vectors + k];
        sums[j] = fma(w.x, x.x, fma(w.y, x.y, fma(w.z, x.z, fma(w.w, x.w, sums[j]))));
      }
    };
    int first = 0;
    if constexpr (s == 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (i < tile.steps) add(i, held_[i]);
      first = kHeld;
    }
    const Packed<Stored>* rest = weights<s>();
#pragma unroll 2
    for (int i = first; i < tile.on_chip; ++i) add(i, rest[(i - first) * kThreads]);
    if constexpr (kStreams) {
#pragma unroll 2
      for (int i = tile.on_chip; i < tile.steps; ++i) {
        add(i, *reinterpret_cast<const Packed<Stored>*>(stream_[s].take()));
        stream_[s].next();
      }
    }
    V* out = shared_.partials() + (slice * shape_.partial_rows + begin) * tile.ld + row;
#pragma unroll
    for (int j = 0; j < kFmaRows; ++j)
      if (j < count) out[j * tile.ld] = sums[j];
  }

  const BlockShape& shape_;
  const Memory shared_;
  Packed<Stored> held_[kHeld] = {};
  Stream stream_[kMaxStages];
};

}  // namespace fusedrnn::cuda
