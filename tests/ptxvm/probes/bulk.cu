// Probes of bulk copies: between global and shared memory, to several blocks of a cluster, between
// their shared memories, and of registers (st.async). Each faulty kernel stands beside the correct
// kernel that it was made from.
#include <cstdint>

namespace {

__device__ unsigned rank_of_block() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ unsigned address(const void* p) { return __cvta_generic_to_shared(p); }
__device__ unsigned mapped(const void* p, unsigned rank) {
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address(p)), "r"(rank));
  return to;
}
__device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
}
__device__ void init(uint64_t* o, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(o)), "r"(count) : "memory");
}
__device__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ void fence_proxy_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ void fence_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ void none() {}
__device__ void arrive(uint64_t* o) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(o)) : "memory");
}
__device__ void expect(uint64_t* o, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(o)),
               "r"(bytes)
               : "memory");
}
__device__ void wait(uint64_t* o, unsigned parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again; }" ::"r"(address(o)),
      "r"(parity)
      : "memory");
}
__device__ void load(void* to, const void* from, unsigned bytes, uint64_t* o) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address(to)),
      "l"(from), "r"(bytes), "r"(address(o))
      : "memory");
}
__device__ void store(void* to, const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(address(from)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ void wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ void wait_group_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ void wait_group_but_one() {
  asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
}

}  // namespace

// Thread 0 copies x [steps, 64] to two stages; all threads read each stage once it is full. A stage
// is filled again once all threads have arrived at its `empty`. `bytes` is the number expected for
// each stage, of 256.
template <void (*kFence)(), bool kWait, bool kEmpty>
__device__ void stages(const int* x, int* out, int steps, int bytes) {
  __shared__ __align__(128) int tile[2][64];
  __shared__ uint64_t full[2], empty[2];
  const int t = threadIdx.x;
  if (t == 0) {
    for (int k = 0; k < 2; ++k) {
      init(full + k, 1);
      init(empty + k, blockDim.x);
    }
    kFence();
  }
  __syncthreads();
  const auto fill = [&](int s) {
    if (kEmpty && s >= 2) wait(empty + s % 2, (s / 2 & 1) ^ 1);
    expect(full + s % 2, bytes);
    load(tile[s % 2], x + s * 64, 128, full + s % 2);
    load(tile[s % 2] + 32, x + s * 64 + 32, 128, full + s % 2);
  };
  if (t == 0) fill(0);
  for (int s = 0; s < steps; ++s) {
    if (t == 0 && s + 1 < steps) fill(s + 1);
    if (kWait) wait(full + s % 2, s / 2 & 1);
    out[s * 64 + t] = tile[s % 2][63 - t];
    arrive(empty + s % 2);
  }
}
#define STAGES(name, ...)                                                                  \
  extern "C" __global__ void stages_##name(const int* x, int* out, int steps, int bytes) { \
    stages<__VA_ARGS__>(x, out, steps, bytes);                                             \
  }
STAGES(right, fence_init, true, true)
STAGES(proxy, fence_proxy_shared, true, true)
STAGES(unfenced, none, true, true)
STAGES(fenced_elsewhere, fence_proxy_global, true, true)
STAGES(not_waited, fence_init, false, true)
STAGES(not_empty, fence_init, true, false)

// Copies x to a tile that the threads wrote before, and back from it: out [64].
template <void (*kEach)(), void (*kFirst)(), bool kBarrier>
__device__ void overwrite(const int* x, int* out) {
  __shared__ __align__(128) int tile[64];
  __shared__ uint64_t full;
  const int t = threadIdx.x;
  if (t == 0) {
    init(&full, 1);
    fence_init();
  }
  tile[t] = t;
  kEach();
  if (kBarrier) __syncthreads();
  if (t == 0) {
    kFirst();
    expect(&full, 128);
    load(tile, x, 128, &full);
  }
  if (!kBarrier) __syncthreads();
  wait(&full, 0);
  out[t] = tile[t];
}
#define OVERWRITE(name, ...)                                            \
  extern "C" __global__ void overwrite_##name(const int* x, int* out) { \
    overwrite<__VA_ARGS__>(x, out);                                     \
  }
OVERWRITE(right, fence_proxy, none, true)
OVERWRITE(fenced_later, none, fence_proxy_shared, true)
OVERWRITE(unfenced, none, none, true)
OVERWRITE(fenced_elsewhere, fence_proxy_global, none, true)
OVERWRITE(no_barrier, fence_proxy, none, false)

// One block writes numbers to global memory, and another one copies them from there.
template <void (*kFence)()>
__device__ void through_global(int* work, unsigned* flag, int* out) {
  __shared__ __align__(128) int tile[64];
  __shared__ uint64_t full;
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    work[t] = t;
    kFence();
    __syncthreads();
    if (t == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
  } else {
    if (t == 0) {
      init(&full, 1);
      fence_init();
      unsigned v;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
      } while (v == 0);
      expect(&full, 256);
      load(tile, work, 256, &full);
    }
    __syncthreads();
    wait(&full, 0);
    out[t] = tile[63 - t];
  }
}
extern "C" __global__ void global_right(int* work, unsigned* flag, int* out) {
  through_global<fence_proxy_global>(work, flag, out);
}
extern "C" __global__ void global_unfenced(int* work, unsigned* flag, int* out) {
  through_global<none>(work, flag, out);
}

// Copies numbers from shared to global memory in `steps` groups through one tile: out [steps, 64].
// The first thread reads the last number of `out` back into `sum`.
template <void (*kFence)(), void (*kReuse)(), void (*kLast)(), bool kReadsBack>
__device__ void drain(int* out, int* sum, int steps) {
  __shared__ __align__(128) int tile[64];
  const int t = threadIdx.x;
  for (int s = 0; s < steps; ++s) {
    tile[t] = s * 64 + t;
    kFence();
    __syncthreads();
    if (t == 0) {
      store(out + s * 64, tile, 256);
      if (s + 1 < steps) kReuse();
    }
    __syncthreads();
  }
  if (t == 0) {
    kLast();
    if (kReadsBack) *sum = out[steps * 64 - 1];
  }
}
#define DRAIN(name, ...)                                                   \
  extern "C" __global__ void drain_##name(int* out, int* sum, int steps) { \
    drain<__VA_ARGS__>(out, sum, steps);                                   \
  }
DRAIN(right, fence_proxy, wait_group_read, wait_group, true)
DRAIN(reads, fence_proxy, wait_group_read, wait_group_read, false)
DRAIN(unfenced, none, wait_group_read, wait_group, true)
DRAIN(not_waited, fence_proxy, none, wait_group, true)
DRAIN(waits_for_fewer, fence_proxy, wait_group_but_one, wait_group, true)
DRAIN(read_back_early, fence_proxy, wait_group_read, wait_group_read, true)
DRAIN(exits_early, fence_proxy, wait_group_read, none, false)

// Every block of a cluster of two copies its half of x [2, 32] to all blocks of the mask.
extern "C" __global__ void multicast(const int* x, int* out, int mask) {
  __shared__ __align__(128) int tile[64];
  __shared__ uint64_t full;
  const int t = threadIdx.x;
  const unsigned rank = rank_of_block();
  if (t == 0) {
    init(&full, 1);
    fence_init();
    expect(&full, 256);
  }
  cluster_barrier();
  if (t == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], 128, [%2], %3;" ::"r"(address(tile + 32 * rank)),
        "l"(x + 32 * rank), "r"(address(&full)), "h"(static_cast<short>(mask))
        : "memory");
  wait(&full, 0);
  out[blockIdx.x * 64 + t] = tile[63 - t];
}

// Each block copies its numbers into the other block's shared memory. Without the last barrier a
// block may exit while its numbers are copied.
template <bool kLast, bool kOtherObject>
__device__ void give(const int* x, int* out) {
  __shared__ __align__(128) int mine[64], theirs[64];
  __shared__ uint64_t full;
  const int t = threadIdx.x;
  const unsigned to = rank_of_block() ^ 1;
  if (t == 0) {
    init(&full, 1);
    fence_init();
    expect(&full, 256);
  }
  mine[t] = x[blockIdx.x * 64 + t];
  fence_proxy();
  cluster_barrier();
  if (t == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, "
        "[%2];" ::"r"(mapped(theirs, to)),
        "r"(address(mine)), "r"(kOtherObject ? address(&full) : mapped(&full, to))
        : "memory");
  wait(&full, 0);
  out[blockIdx.x * 64 + t] = theirs[63 - t];
  if (kLast) cluster_barrier();
}
extern "C" __global__ void give_right(const int* x, int* out) { give<true, false>(x, out); }
extern "C" __global__ void give_and_exit(const int* x, int* out) { give<false, false>(x, out); }
extern "C" __global__ void give_other_object(const int* x, int* out) { give<true, true>(x, out); }

// Each thread stores a word and a pair into the next block's shared memory with st.async: x [64].
template <bool kWait>
__device__ void send(const int* x, int* out) {
  __shared__ __align__(16) int words[64];
  __shared__ __align__(16) int2 pairs[64];
  __shared__ uint64_t full;
  const int t = threadIdx.x, k = blockIdx.x * 64 + t;
  const unsigned to = rank_of_block() ^ 1;
  if (t == 0) {
    init(&full, 1);
    expect(&full, 64 * 12);
  }
  cluster_barrier();
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          mapped(words + t, to)),
      "r"(x[k]), "r"(mapped(&full, to))
      : "memory");
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
          "r"(mapped(pairs + t, to)),
      "r"(x[k] + 1), "r"(x[k] + 2), "r"(mapped(&full, to))
      : "memory");
  if (kWait) wait(&full, 0);
  out[k] = words[63 - t] + 1000 * pairs[63 - t].x + 1000000 * pairs[63 - t].y;
}
extern "C" __global__ void send_right(const int* x, int* out) { send<true>(x, out); }
extern "C" __global__ void send_not_waited(const int* x, int* out) { send<false>(x, out); }

// A copy with addresses and a size that may be wrong.
extern "C" __global__ void copies(const int* x, int* out, int from, int to, int bytes) {
  __shared__ __align__(128) int tile[64];
  __shared__ uint64_t full;
  init(&full, 1);
  fence_init();
  expect(&full, bytes);
  load(reinterpret_cast<char*>(tile) + to, reinterpret_cast<const char*>(x) + from, bytes, &full);
  wait(&full, 0);
  out[0] = tile[to / 4];
}
