// Kernels that compute the same functions for each element of their inputs, one thread for each
// element. They cover the arithmetic instructions that nvcc emits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {
__device__ int element() { return blockIdx.x * blockDim.x + threadIdx.x; }
}  // namespace

// out [24, n]
extern "C" __global__ void integers(const int* a, const int* b, int* out, int n) {
  const int k = element();
  if (k >= n) return;
  const int x = a[k], y = b[k];
  const unsigned ux = x, uy = y;
  const int s = y & 31;
  int at = k;
  const auto put = [&](int v) {
    out[at] = v;
    at += n;
  };
  put(x + y);
  put(x - y);
  put(x * y);
  put(__mulhi(x, y));
  put(__umulhi(ux, uy));
  put(x / (y | 1));
  put(x % (y | 1));
  put(ux / (uy | 1));
  put(min(x, y));
  put(max(ux, uy));
  put(x << s);
  put(x >> s);
  put(ux >> s);
  put((x & y) ^ (x | ~y));
  put(__popc(ux));
  put(__clz(x));
  put(__brev(ux));
  put(__ffs(x));
  put(__byte_perm(ux, uy, 0x3614));
  put(__funnelshift_l(ux, uy, s));
  put(abs(x));
  int field;
  asm("bfe.s32 %0, %1, %2, 7;" : "=r"(field) : "r"(x), "r"(s));
  put(field);
  asm("bfi.b32 %0, %1, %2, %3, 9;" : "=r"(field) : "r"(x), "r"(y), "r"(s));
  put(field);
  put(static_cast<int8_t>(x) + static_cast<uint16_t>(y));
}

// out [6, n]
extern "C" __global__ void long_integers(const long long* a, const long long* b, long long* out,
                                         int n) {
  const int k = element();
  if (k >= n) return;
  const long long x = a[k], y = b[k];
  out[k] = x * y + x;
  out[n + k] = __mul64hi(x, y);
  out[2 * n + k] = x / (y | 1);
  out[3 * n + k] = static_cast<unsigned long long>(x) % (static_cast<unsigned long long>(y) | 1);
  out[4 * n + k] = x >> (y & 63);
  out[5 * n + k] = __clzll(x) + __popcll(y);
}

// out [16, n]; rows 5 to 9 are rounded in given directions.
extern "C" __global__ void floats(const float* a, const float* b, float* out, int n) {
  const int k = element();
  if (k >= n) return;
  const float x = a[k], y = b[k];
  int at = k;
  const auto put = [&](float v) {
    out[at] = v;
    at += n;
  };
  put(x + y);
  put(x * y);
  put(fmaf(x, y, 1.f));
  put(x / y);
  put(sqrtf(fabsf(x)));
  put(__fadd_rd(x, y));
  put(__fadd_ru(x, y));
  put(__fmul_rz(x, y));
  put(__fmaf_rd(x, y, 1.f));
  put(__fdiv_ru(x, y));
  put(fminf(x, y));
  put(fmaxf(x, y));
  put(floorf(x * 10));
  put(rintf(y * 10));
  put(__saturatef(x));
  put(copysignf(x, y));
}

// out [6, n]
extern "C" __global__ void functions(const float* a, float* out, int n) {
  const int k = element();
  if (k >= n) return;
  const float x = a[k];
  out[k] = expf(x);
  out[n + k] = tanhf(x);
  out[2 * n + k] = logf(fabsf(x) + 1e-3f);
  out[3 * n + k] = 1.f / (1.f + __expf(-x));
  out[4 * n + k] = sinf(x);
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x));
  out[5 * n + k] = t;
}

// out [5, n]
extern "C" __global__ void doubles(const double* a, const double* b, double* out, int n) {
  const int k = element();
  if (k >= n) return;
  const double x = a[k], y = b[k];
  out[k] = fma(x, y, x / y);
  out[n + k] = exp(x);
  out[2 * n + k] = tanh(x);
  out[3 * n + k] = __dadd_rd(x, y);
  out[4 * n + k] = sqrt(fabs(x)) + log(fabs(y) + 1e-3);
}

// to_floats converts every 16-bit number to float32; from_floats rounds n floats to 16 bits, to
// nearest.
extern "C" __global__ void to_floats(float* halves, float* bfloats) {
  const int k = element();
  halves[k] = __half2float(__ushort_as_half(k));
  bfloats[k] = __bfloat162float(__ushort_as_bfloat16(k));
}
extern "C" __global__ void from_floats(const float* x, uint16_t* halves, uint16_t* bfloats,
                                       unsigned* tf32, int n) {
  const int k = element();
  if (k >= n) return;
  halves[k] = __half_as_ushort(__float2half_rn(x[k]));
  bfloats[k] = __bfloat16_as_ushort(__float2bfloat16_rn(x[k]));
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32[k]) : "f"(x[k]));
#endif
}

// Products and sums of pairs of 16-bit numbers; [2 n] numbers of each type.
extern "C" __global__ void pairs(const __half2* a, const __half2* b, __half2* half_out,
                                 const __nv_bfloat162* c, const __nv_bfloat162* d,
                                 __nv_bfloat162* bfloat_out, int n) {
  const int k = element();
  if (k >= n) return;
  half_out[k] = __hfma2(a[k], b[k], __hadd2(a[k], b[k]));
#if __CUDA_ARCH__ >= 800
  bfloat_out[k] = __hfma2(c[k], d[k], __hmul2(c[k], d[k]));
#endif
}

// out [5, n]
extern "C" __global__ void conversions(const float* a, int* out, int n) {
  const int k = element();
  if (k >= n) return;
  const float x = a[k];
  out[k] = static_cast<int>(x);
  out[n + k] = __float2int_rn(x);
  out[2 * n + k] = static_cast<int>(static_cast<unsigned>(fabsf(x)));
  out[3 * n + k] = static_cast<int8_t>(static_cast<int>(x));
  out[4 * n + k] = static_cast<int>(static_cast<long long>(x * 1e6f) >> 3);
}

// A kernel with a jump table, a loop over a local array, and 128-bit arithmetic.
extern "C" __global__ void branches(const int* a, int* out, int n) {
  const int k = element();
  if (k >= n) return;
  int history[8];
  for (int i = 0; i < 8; ++i) history[i] = a[k] * i;
  int v = history[a[k] & 7];
  switch (a[k] & 7) {
    case 0:
      v += 11;
      break;
    case 1:
      v *= 3;
      break;
    case 2:
      v -= a[(k + 1) % n];
      break;
    case 3:
      v ^= 0x55;
      break;
    case 4:
      v = -v;
      break;
    case 5:
      v <<= 2;
      break;
    case 6:
      v = v * v + 1;
      break;
    default:
      v = 7;
  }
  const __int128 wide = static_cast<__int128>(v) * 0x123456789abcdefll + a[k];
  out[k] = static_cast<int>(wide >> 50) + v;
}
