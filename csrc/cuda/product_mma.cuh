// A block's product on the tensor cores (sm_80 on): mma.sync with rows of weights as its 16 rows
// and sequences as its 8 columns. A warp sums all rows and sequences over its own groups of K, so
// that no two warps of a block load the same part of the source; the eight sums meet in shared
// memory.
//
// In which order K is summed is free as long as both operands agree. A thread therefore takes 16
// bytes of a row that lie beside each other, for two instructions, where the instruction's own
// order would have it load 4 bytes here and there: a group is 64 bytes of K, 16 from each of the
// four threads that share a row.
#pragma once

#include "shared_memory.cuh"
#include "storage.cuh"

namespace fusedrnn::cuda {

// float32 rounded to the 10 bits of mantissa that tensor cores read.
__device__ __forceinline__ float round_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
}

// d += a b for fragments of a [16, K], b [K, 8] and d [16, 8] in the instruction's order. The plan
// uses no tensor cores before sm_80; compiled for less, the kernels stop.
template <class Stored>
__device__ __forceinline__ void mma(float (&d)[4], uint4 a, uint2 b);

#if __CUDA_ARCH__ >= 800
#define FUSEDRNN_MMA(Stored, instruction)                                        \
  template <>                                                                    \
  __device__ __forceinline__ void mma<Stored>(float (&d)[4], uint4 a, uint2 b) { \
    asm("mma.sync.aligned." instruction                                          \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));           \
  }
#else
#define FUSEDRNN_MMA(Stored, instruction)                                   \
  template <>                                                               \
  __device__ __forceinline__ void mma<Stored>(float (&)[4], uint4, uint2) { \
    __trap();                                                               \
  }
#endif
FUSEDRNN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
FUSEDRNN_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FUSEDRNN_MMA(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
#undef FUSEDRNN_MMA

template <class StoredType>
class MmaProduct {
 public:
  using Stored = StoredType;

  __device__ __forceinline__ explicit MmaProduct(SharedMemory shared)
      : shape_(shared.shape), shared_(shared) {}

  // As the other blocks are to read it.
  static __device__ __forceinline__ Stored exchanged(float x) {
    if constexpr (sizeof(Stored) == 4) {
      return round_tf32(x);
    } else {
      return stored<Stored>(x);
    }
  }

  // weight(r, k): an element of the stage's rows, zero outside of them.
  template <int s, class Weight>
  __device__ __forceinline__ void load_weights(const Weight& weight) {
    const ResidentTile& tile = shape_.tile[s];
    constexpr int held = s == 0 ? kMmaHeld : 0;
    const int row_tiles = tiles<s>();
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      const int k = (i * kWarps + warp()) * kGroup + quad_lane() * kVector;
#pragma unroll 1
      for (int rt = 0; rt < row_tiles; ++rt) {
        Fragment f;
        f.low = packed(weight, rt * 16 + quad(), k);
        f.high = packed(weight, rt * 16 + quad() + 8, k);
        if (i >= held) {
          store(weights<s>() + ((i - held) * kWarps * row_tiles + rt) * kFragmentVectors, f);
        } else {
          // Registers have no index, so all of them are written, all but one with what they hold.
#pragma unroll
          for (int j = 0; j < kMmaHeld * kMmaTiles; ++j) {
            const bool here = i * kMmaTiles + rt == j;
            held_[j].low = select(here, f.low, held_[j].low);
            held_[j].high = select(here, f.high, held_[j].high);
          }
        }
      }
    }
  }

  // Partial sums of source [n, K_pad] with the stage's rows; its rows go on to a multiple of 8.
  template <int s>
  __device__ __forceinline__ void multiply(const Stored* source, int n) {
    for (int begin = 0; begin < n; begin += kMmaRows) sum<s>(source, begin, n);
    __syncthreads();
  }

 private:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kVector = 16 / sizeof(Stored);  // values that a thread loads at once
  static constexpr int kGroup = 4 * kVector;
  static constexpr int kColumnTiles = kMmaRows / 8;
  static constexpr int kAhead = 4;
  static_assert(kMmaHeld <= kAhead);
  static constexpr int kFragmentVectors = 64;  // vectors of 16 bytes, of all threads of a warp

  // A thread's 16 bytes of two rows of weights, 8 apart.
  struct Fragment {
    uint4 low, high;
  };

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // Threads are the instruction's groups of four.
  static __device__ __forceinline__ int quad() { return lane() / 4; }
  static __device__ __forceinline__ int quad_lane() { return lane() % 4; }

  template <int s>
  __device__ __forceinline__ int tiles() const {
    return (shape_.tile[s].R + 15) / 16;
  }

  // This thread's vectors of a stage's first fragment of its warp in shared memory.
  template <int s>
  __device__ __forceinline__ uint4* weights() const {
    return shared_.weights<uint4>(s) + warp() * tiles<s>() * kFragmentVectors + lane();
  }

  static __device__ __forceinline__ uint4 select(bool first, uint4 a, uint4 b) {
    return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
  }
  static __device__ __forceinline__ void store(uint4* to, const Fragment& f) {
    to[0] = f.low;
    to[32] = f.high;
  }
  static __device__ __forceinline__ Fragment load(const uint4* from) { return {from[0], from[32]}; }

  template <class Weight>
  static __device__ __forceinline__ uint4 packed(const Weight& weight, int row, int k) {
    unsigned word[4] = {};
    for (int v = 0; v < kVector; ++v) {
      if constexpr (sizeof(Stored) == 4) {
        word[v] = __float_as_uint(round_tf32(weight(row, k + v)));
      } else {
        word[v / 2] |= unsigned(weight(row, k + v).bits) << (v % 2 * 16);
      }
    }
    return {word[0], word[1], word[2], word[3]};
  }

  // Sequences [begin, begin + kMmaRows) of the n, over this warp's groups.
  template <int s>
  __device__ __forceinline__ void sum(const Stored* source, int begin, int n) {
    const ResidentTile& tile = shape_.tile[s];
    const int row_tiles = tiles<s>(), groups = tile.K_pad / kGroup;
    const int column_tiles = min(kColumnTiles, (n - begin + 7) / 8);
    const Stored* from =
        source + int64_t(begin + quad()) * tile.K_pad + warp() * kGroup + quad_lane() * kVector;
    float sums[kMmaTiles][kColumnTiles][4] = {};

    const auto load_source = [&](int i, uint4(&b)[kColumnTiles]) {
      if (i * kWarps + warp() >= groups) return;
#pragma unroll
      for (int ct = 0; ct < kColumnTiles; ++ct) {
        if (ct < column_tiles)
          b[ct] = *reinterpret_cast<const uint4*>(from + int64_t(ct * 8) * tile.K_pad +
                                                  i * kWarps * kGroup);
      }
    };
    const auto add = [&](int rt, const Fragment& f, const uint4(&b)[kColumnTiles]) {
#pragma unroll
      for (int ct = 0; ct < kColumnTiles; ++ct) {
        if (ct >= column_tiles) break;
        mma<Stored>(sums[rt][ct], {f.low.x, f.high.x, f.low.y, f.high.y}, {b[ct].x, b[ct].y});
        mma<Stored>(sums[rt][ct], {f.low.z, f.high.z, f.low.w, f.high.w}, {b[ct].z, b[ct].w});
      }
    };

    // Some steps' sources are on their way at any time: a load takes longer than a step.
    uint4 b[kAhead][kColumnTiles] = {};
#pragma unroll
    for (int q = 0; q < kAhead; ++q) load_source(q, b[q]);
    constexpr int held = s == 0 ? kMmaHeld : 0;
    const auto add_steps = [&](int i, auto held_constant) {
#pragma unroll
      for (int q = 0; q < kAhead; ++q) {
        if ((i + q) * kWarps + warp() >= groups) continue;
        const uint4* at = weights<s>() + (i + q - held) * kWarps * row_tiles * kFragmentVectors;
#pragma unroll
        for (int rt = 0; rt < kMmaTiles; ++rt) {
          if (rt >= row_tiles) continue;
          if constexpr (decltype(held_constant)::value > 0) {
            if (q < held) {
              add(rt, held_[q % kMmaHeld * kMmaTiles + rt], b[q]);
              continue;
            }
          }
          add(rt, load(at + rt * kFragmentVectors), b[q]);
        }
        load_source(i + q + kAhead, b[q]);
      }
    };
    add_steps(0, Constant<held>());
#pragma unroll 1
    for (int i = kAhead; i < tile.steps; i += kAhead) add_steps(i, Constant<0>());

    float* out = shared_.partials() +
                 (warp() * shape_.rows_pad + begin + 2 * quad_lane()) * tile.ld + quad();
#pragma unroll
    for (int rt = 0; rt < kMmaTiles; ++rt) {
#pragma unroll
      for (int ct = 0; ct < kColumnTiles; ++ct) {
        if (rt >= row_tiles || ct >= column_tiles) continue;
        float* corner = out + ct * 8 * tile.ld + rt * 16;
        corner[0] = sums[rt][ct][0];
        corner[tile.ld] = sums[rt][ct][1];
        corner[8] = sums[rt][ct][2];
        corner[tile.ld + 8] = sums[rt][ct][3];
      }
    }
  }

  const ResidentShape& shape_;
  const SharedMemory shared_;
  Fragment held_[kMmaHeld * kMmaTiles] = {};
};

}  // namespace fusedrnn::cuda
