// A block's product on the tensor cores (from sm_80 on). The 16 rows of mma.sync are weight rows,
// its 8 columns are sequences. Each of the eight warps sums all rows and sequences over its own
// groups of K, so no two warps of a block load the same part of the source. The sums of the warps
// are added in shared memory.
//
// K may be summed in any order, as long as both operands have the same one. The order of the
// instruction would have a thread load 4 bytes in several places. Instead a thread loads 16
// consecutive bytes of a row, which serve two instructions. A group is 64 bytes of K: 16 from each
// of the four threads that share a row.
#pragma once

#include "cluster.cuh"
#include "shared_memory.cuh"
#include "storage.cuh"
#include "weight_stream.cuh"
#include "words.cuh"

namespace fusedrnn::cuda {

// x rounded to the 10 bits of mantissa that tensor cores read of a float32.
__device__ __forceinline__ float round_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
}

// d += a b for one thread's fragments of a [16, K], b [K, 8] and d [16, 8], in the order that the
// instruction prescribes. Code for GPUs before sm_80 has no product on the tensor cores.
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
FUSEDRNN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
FUSEDRNN_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FUSEDRNN_MMA(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
#undef FUSEDRNN_MMA
#endif

// kStreams: whether a part of the weights may be streamed. kClustered: whether blocks are in
// clusters.
template <class StoredType, bool kStreams = false, bool kClustered = false>
class MmaProduct {
 public:
  using Stored = StoredType;
  using Memory = std::conditional_t<kClustered, ClusterMemory, SharedMemory<float>>;
  static constexpr bool kTensorCores = true;
  static constexpr bool kClusters = kClustered;
  // Whether the source may be words.
  static constexpr bool kTakesWords = false;

  __device__ __forceinline__ explicit MmaProduct(Memory shared)
      : shape_(shared.shape), shared_(shared) {}

  // A value in the form in which it goes into the exchange.
  static __device__ __forceinline__ Stored exchanged(float x) {
    if constexpr (sizeof(Stored) == 4) {
      return round_tf32(x);
    } else {
      return stored<Stored>(x);
    }
  }

  // weight(r, k) is element k of weight row r of the stage, and zero outside of the weights.
  // `streamed` is the block's memory for streamed weights.
  template <int s, class Weight>
  __device__ __forceinline__ void load_weights(const Weight& weight, char* streamed = nullptr) {
    const ProductTile& tile = shape_.tile[s];
    constexpr int held = s == 0 ? kHeld : 0;
    const int row_tiles = tiles<s>();
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      const int k = (i * kWarps + warp()) * kGroup + quad_lane() * kVector;
#pragma unroll 1
      for (int rt = 0; rt < row_tiles; ++rt) {
        Fragment f;
        f.low = packed(weight, rt * 16 + quad(), k);
        f.high = packed(weight, rt * 16 + quad() + 8, k);
        if (kStreams && i >= tile.on_chip) {
          store(streamed_weights<s>(streamed) +
                    ((i - tile.on_chip) * row_tiles + rt) * kFragmentVectors,
                f);
        } else if (i >= held) {
          store(weights<s>() + ((i - held) * kWarps * row_tiles + rt) * kFragmentVectors, f);
        } else {
          // Registers cannot be indexed at run time. So every register is written, and all but
          // those of this fragment get the value that they have.
#pragma unroll
          for (int j = 0; j < kHeld * kMmaTiles; ++j) {
            const bool here = i * kMmaTiles + rt == j;
            held_[j].low = select(here, f.low, held_[j].low);
            held_[j].high = select(here, f.high, held_[j].high);
          }
        }
      }
    }
  }

  // Begins to stream, after load_weights of the stage.
  template <int s>
  __device__ __forceinline__ void begin(char* streamed) {
    const ProductTile& tile = shape_.tile[s];
    uint4* ring =
        shared_.template at<uint4>(tile.ring) + warp() * Stream::kSlots * kFragmentVectors + lane();
    // In the last iteration, some warps may have no group of K.
    const int steps = (tile.K_pad / kGroup - warp() + kWarps - 1) / kWarps;
    stream_[s].begin(reinterpret_cast<const char*>(streamed_weights<s>(streamed)),
                     reinterpret_cast<char*>(ring), max(0, steps - tile.on_chip) * tiles<s>());
  }

  // Writes the partial sums of source [n, K_part], whose rows are K_pad values apart, times the
  // stage's weight rows to shared memory.
  // Counted from the first of them, rows of the source must be readable up to a multiple of 8.
  template <int s>
  __device__ __forceinline__ void multiply(const Source<Stored>& source, int n) {
    for (int begin = 0; begin < n; begin += kMmaRows) sum<s>(source.values, begin, n);
    shared_.wait_for_sums(s, n);
  }

 private:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kVector = 16 / sizeof(Stored);  // values of a load of 16 bytes
  static constexpr int kGroup = 4 * kVector;
  static constexpr int kColumnTiles = kMmaRows / 8;
  static constexpr int kAhead = 4;
  static constexpr int kHeld = kStreams ? kMmaHeldStreamed : kMmaHeld;
  static_assert(kHeld <= kAhead);
  // The fragments of a warp's 32 threads take this many vectors of 16 bytes.
  static constexpr int kFragmentVectors = 64;

  using Stream =
      std::conditional_t<kStreams, WeightStream<16, 2, 512, 16 * kFragmentVectors>, NoStream>;

  // 16 bytes each of two weight rows, 8 rows apart, which one thread holds.
  struct Fragment {
    uint4 low, high;
  };

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // The instruction numbers the threads of a warp in groups of four.
  static __device__ __forceinline__ int quad() { return lane() / 4; }
  static __device__ __forceinline__ int quad_lane() { return lane() % 4; }

  template <int s>
  __device__ __forceinline__ int tiles() const {
    return (shape_.tile[s].R + 15) / 16;
  }

  // The address in shared memory of this thread's part of its warp's first fragment of a stage.
  template <int s>
  __device__ __forceinline__ uint4* weights() const {
    return shared_.template weights<uint4>(s) + warp() * tiles<s>() * kFragmentVectors + lane();
  }

  // The address of this thread's part of its warp's first streamed fragment. A warp's fragments lie
  // together.
  template <int s>
  __device__ __forceinline__ uint4* streamed_weights(char* streamed) const {
    const ProductTile& tile = shape_.tile[s];
    return reinterpret_cast<uint4*>(streamed + tile.streamed) +
           warp() * (tile.steps - tile.on_chip) * tiles<s>() * kFragmentVectors + lane();
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

  // Sums over this warp's groups of K, for the sequences [begin, min(n, begin + kMmaRows)).
  template <int s>
  __device__ __forceinline__ void sum(const Stored* source, int begin, int n) {
    const ProductTile& tile = shape_.tile[s];
    const int row_tiles = tiles<s>();
    // Without clusters both are the same, and K_pad is in a register already.
    const int groups = (kClusters ? tile.K_part : tile.K_pad) / kGroup;
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

    // The source of kAhead iterations is loaded ahead, because a load takes longer than an
    // iteration.
    uint4 b[kAhead][kColumnTiles] = {};
#pragma unroll
    for (int q = 0; q < kAhead; ++q) load_source(q, b[q]);
    constexpr int held = s == 0 ? kHeld : 0;
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
              add(rt, held_[q % kHeld * kMmaTiles + rt], b[q]);
              continue;
            }
          }
          if constexpr (kStreams) {
            const bool streamed = i + q >= tile.on_chip;
            const uint4* from = at + rt * kFragmentVectors;
            if (streamed) from = reinterpret_cast<const uint4*>(stream_[s].take());
            add(rt, load(from), b[q]);
            if (streamed) stream_[s].next();
          } else {
            add(rt, load(at + rt * kFragmentVectors), b[q]);
          }
        }
        load_source(i + q + kAhead, b[q]);
      }
    };
    add_steps(0, Constant<held>());
#pragma unroll 1
    for (int i = kAhead; i < tile.steps; i += kAhead) add_steps(i, Constant<0>());

    float* out = shared_.partials() +
                 (warp() * shape_.partial_rows + begin + 2 * quad_lane()) * tile.ld + quad();
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

  const BlockShape& shape_;
  const Memory shared_;
  Fragment held_[kHeld * kMmaTiles] = {};
  Stream stream_[kMaxStages];
};

}  // namespace fusedrnn::cuda
