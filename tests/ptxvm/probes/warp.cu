// Probes of the instructions that the lanes of a warp execute together.
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>

// out [9, 32]
extern "C" __global__ void shuffles(const int* x, int* out) {
  const int lane = threadIdx.x, v = x[lane];
  out[lane] = __shfl_xor_sync(~0u, v, 5);
  out[32 + lane] = __shfl_down_sync(~0u, v, 3);
  out[64 + lane] = __shfl_up_sync(~0u, v, 2, 8);
  out[96 + lane] = __shfl_sync(~0u, v, lane * 7, 16);
  out[128 + lane] = __ballot_sync(~0u, v & 1);
  out[160 + lane] = __reduce_add_sync(~0u, v) + __reduce_min_sync(~0u, v);
  out[192 + lane] = __any_sync(~0u, v == 5) + 2 * __all_sync(~0u, v > -100);
  out[224 + lane] = __match_any_sync(~0u, v & 3);
  // These two involve a part of the warp each.
  if (lane < 12) out[256 + lane] = __shfl_xor_sync(0xfff, v, 1);
  if (lane >= 12) out[256 + lane] = __ballot_sync(~0xfffu, v & 2);
}

// Names for the operands of one lane in d = a b + c: a [16, K]; b [K, 8], stored as [8, K]; c and d
// [16, 8]. A lane holds kPerLane adjacent numbers in each register of a and b.
#define FRAGMENTS(K, kPerLane)                                                                    \
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;                                             \
  const auto a_at = [&](int row, int column) {                                                    \
    return *reinterpret_cast<const unsigned*>(a + row * K + column);                              \
  };                                                                                              \
  const auto b_at = [&](int row) { return *reinterpret_cast<const unsigned*>(b + g * K + row); }; \
  const int at = kPerLane * q;

extern "C" __global__ void mma_tf32_k8(const float* a, const float* b, const float* c, float* d) {
  FRAGMENTS(8, 1)
  const float* from = c + g * 8 + 2 * q;
  float* to = d + g * 8 + 2 * q;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[64]), "=f"(to[65])
      : "r"(a_at(g, at)), "r"(a_at(g + 8, at)), "r"(a_at(g, at + 4)), "r"(a_at(g + 8, at + 4)),
        "r"(b_at(at)), "r"(b_at(at + 4)), "f"(from[0]), "f"(from[1]), "f"(from[64]), "f"(from[65]));
}
extern "C" __global__ void mma_tf32_k4(const float* a, const float* b, const float* c, float* d) {
  FRAGMENTS(4, 1)
  const float* from = c + g * 8 + 2 * q;
  float* to = d + g * 8 + 2 * q;
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%7,%8,%9,%10};"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[64]), "=f"(to[65])
      : "r"(a_at(g, at)), "r"(a_at(g + 8, at)), "r"(b_at(at)), "f"(from[0]), "f"(from[1]),
        "f"(from[64]), "f"(from[65]));
}
#define MMA_K16(name, type)                                                                  \
  extern "C" __global__ void name(const uint16_t* a, const uint16_t* b, const float* c,      \
                                  float* d) {                                                \
    FRAGMENTS(16, 2)                                                                         \
    const float* from = c + g * 8 + 2 * q;                                                   \
    float* to = d + g * 8 + 2 * q;                                                           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                      \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"            \
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[64]), "=f"(to[65])                      \
                 : "r"(a_at(g, at)), "r"(a_at(g + 8, at)), "r"(a_at(g, at + 8)),             \
                   "r"(a_at(g + 8, at + 8)), "r"(b_at(at)), "r"(b_at(at + 8)), "f"(from[0]), \
                   "f"(from[1]), "f"(from[64]), "f"(from[65]));                              \
  }
#define MMA_K8(name, type)                                                              \
  extern "C" __global__ void name(const uint16_t* a, const uint16_t* b, const float* c, \
                                  float* d) {                                           \
    FRAGMENTS(8, 2)                                                                     \
    const float* from = c + g * 8 + 2 * q;                                              \
    float* to = d + g * 8 + 2 * q;                                                      \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                  \
                 ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                   \
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[64]), "=f"(to[65])                 \
                 : "r"(a_at(g, at)), "r"(a_at(g + 8, at)), "r"(b_at(at)), "f"(from[0]), \
                   "f"(from[1]), "f"(from[64]), "f"(from[65]));                         \
  }
MMA_K16(mma_f16_k16, "f16")
MMA_K16(mma_bf16_k16, "bf16")
MMA_K8(mma_f16_k8, "f16")
MMA_K8(mma_bf16_k8, "bf16")

// The sums are float16: c and d [16, 8].
extern "C" __global__ void mma_f16_sums(const uint16_t* a, const uint16_t* b, const uint16_t* c,
                                        uint16_t* d) {
  FRAGMENTS(16, 2)
  const unsigned* from = reinterpret_cast<const unsigned*>(c + g * 8 + 2 * q);
  unsigned* to = reinterpret_cast<unsigned*>(d + g * 8 + 2 * q);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, "
      "{%8,%9};"
      : "=r"(to[0]), "=r"(to[32])
      : "r"(a_at(g, at)), "r"(a_at(g + 8, at)), "r"(a_at(g, at + 8)), "r"(a_at(g + 8, at + 8)),
        "r"(b_at(at)), "r"(b_at(at + 8)), "r"(from[0]), "r"(from[32]));
}

// The four 8x8 matrices in x [16, 16], transposed or not: out [32, 4], each lane's four registers.
template <bool kTransposed>
__device__ void load_matrices(const uint16_t* x, unsigned* out) {
  __shared__ __align__(16) uint16_t tile[256];
  const int lane = threadIdx.x;
  for (int k = lane; k < 256; k += 32) tile[k] = x[k];
  __syncwarp();
  const unsigned at = __cvta_generic_to_shared(&tile[lane % 16 * 16 + lane / 16 * 8]);
  unsigned r[4];
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
  for (int k = 0; k < 4; ++k) out[lane * 4 + k] = r[k];
}
extern "C" __global__ void matrices(const uint16_t* x, unsigned* out) {
  load_matrices<false>(x, out);
}
extern "C" __global__ void matrices_transposed(const uint16_t* x, unsigned* out) {
  load_matrices<true>(x, out);
}

// --- Faulty kernels ------------------------------------------------------------------------------

extern "C" __global__ void shuffle_when_diverged(const int* x, int* out) {
  const int lane = threadIdx.x;
  if (lane < 16)
    out[lane] = __shfl_xor_sync(~0u, x[lane], 1);
  else
    out[lane] = x[lane];
}
extern "C" __global__ void shuffle_beyond_the_mask(const int* x, int* out) {
  const int lane = threadIdx.x;
  if (lane < 16) out[lane] = __shfl_sync(0xffff, x[lane], 20);
}
extern "C" __global__ void no_warp_barrier(const int* x, int* out) {
  __shared__ int tile[32];
  const int lane = threadIdx.x;
  tile[lane] = x[lane];
  out[lane] = tile[31 - lane];
}
extern "C" __global__ void warp_barrier(const int* x, int* out) {
  __shared__ int tile[32];
  const int lane = threadIdx.x;
  tile[lane] = x[lane];
  __syncwarp();
  out[lane] = tile[31 - lane];
}

// --- Asynchronous copies -------------------------------------------------------------------------

// Copies x [2, 64] in two parts; the first part is used while the second is still being copied.
template <int kWaits, bool kBarrier>
__device__ void two_stages(const float4* x, float* out) {
  __shared__ float4 stage[2][64];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(&stage[0][t], x + t, 16);
  __pipeline_commit();
  __pipeline_memcpy_async(&stage[1][t], x + 64 + t, 16);
  __pipeline_commit();
  if (kWaits > 0) __pipeline_wait_prior(1);
  if (kBarrier) __syncthreads();
  const float first = stage[0][(t + 1) % 64].x;
  if (kWaits > 1) __pipeline_wait_prior(0);
  if (kBarrier) __syncthreads();
  out[t] = first + stage[1][(t + 2) % 64].w;
}
extern "C" __global__ void copies(const float4* x, float* out) { two_stages<2, true>(x, out); }
extern "C" __global__ void copies_not_waited_for(const float4* x, float* out) {
  two_stages<0, true>(x, out);
}
extern "C" __global__ void copies_one_not_waited_for(const float4* x, float* out) {
  two_stages<1, true>(x, out);
}
extern "C" __global__ void copies_no_barrier(const float4* x, float* out) {
  two_stages<2, false>(x, out);
}

// Without kBarrier, `stage` is filled again while another warp may still read it: x [2, 64],
// out [2, 64].
template <bool kBarrier>
__device__ void refill(const float* x, float* out) {
  __shared__ float stage[64];
  const int t = threadIdx.x;
  for (int k = 0; k < 2; ++k) {
    __pipeline_memcpy_async(&stage[t], x + k * 64 + t, 4);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    out[k * 64 + t] = stage[63 - t];
    if (kBarrier) __syncthreads();
  }
}
extern "C" __global__ void refilled(const float* x, float* out) { refill<true>(x, out); }
extern "C" __global__ void refilled_too_early(const float* x, float* out) { refill<false>(x, out); }

// Copies x [64]; the numbers from index `valid` on arrive as zeros.
extern "C" __global__ void copies_with_zeros(const float2* x, float2* out, int valid) {
  __shared__ float2 stage[64];
  const int t = threadIdx.x;
  const unsigned to = __cvta_generic_to_shared(&stage[t]);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(x + t),
               "r"(t < valid ? 8 : 0));
  asm volatile("cp.async.wait_all;");
  out[t] = stage[t];
}
