// Probes of mbarrier objects, within a block and between the blocks of a cluster. Each faulty
// kernel stands beside the correct kernel that it was made from.
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

// Ways to arrive, and to see whether the phase of a parity has ended.
#define ARRIVE(name, form)                                                     \
  __device__ void name(unsigned at) {                                          \
    asm volatile("mbarrier.arrive" form ".b64 _, [%0];" ::"r"(at) : "memory"); \
  }
ARRIVE(arrive, ".shared::cta")
ARRIVE(arrive_relaxed, ".relaxed.cta.shared::cta")
ARRIVE(arrive_far, ".release.cluster.shared::cluster")
ARRIVE(arrive_far_relaxed, ".relaxed.cluster.shared::cluster")
ARRIVE(arrive_far_in_block, ".release.cta.shared::cluster")
__device__ void arrive_far_fenced(unsigned at) {
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
  arrive_far_relaxed(at);
}
#define TEST(name, form, behind)                                                                \
  __device__ bool name(unsigned at, unsigned parity) {                                          \
    unsigned done;                                                                              \
    asm volatile("{ .reg .pred p; mbarrier." form " p, [%1], %2; selp.u32 %0, 1, 0, p; " behind \
                 "}"                                                                            \
                 : "=r"(done)                                                                   \
                 : "r"(at), "r"(parity)                                                         \
                 : "memory");                                                                   \
    return done;                                                                                \
  }
TEST(test, "test_wait.parity.shared::cta.b64", "")
TEST(try_wait, "try_wait.parity.shared.b64", "")
TEST(test_relaxed, "test_wait.parity.relaxed.cta.shared::cta.b64", "")
TEST(test_cluster, "test_wait.parity.acquire.cluster.shared::cta.b64", "")
TEST(test_fenced, "test_wait.parity.relaxed.cluster.shared::cta.b64", "fence.acq_rel.cluster;")

}  // namespace

// Warp 0 passes x [steps, 32] to warp 1 in two buffers; each has an object that says that it is
// full and one that says that it is empty. `kLate` is added to the parity that warp 1 waits for.
template <void (*kArrive)(unsigned), bool (*kTest)(unsigned, unsigned), int kLate, bool kEmpty>
__device__ void produce(const int* x, int* out, int steps, int count) {
  __shared__ int tile[2][32];
  __shared__ uint64_t full[2], empty[2];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2) {
    init(full + threadIdx.x, count);
    init(empty + threadIdx.x, 32);
  }
  __syncthreads();
  for (int s = 0; s < steps; ++s) {
    const int k = s % 2, turn = s / 2;
    if (threadIdx.x < 32) {
      // No phase of `empty` has ended yet at the first turn, and the one before it counts as ended.
      while (kEmpty && !test(address(empty + k), (turn & 1) ^ 1)) {
      }
      tile[k][lane] = x[s * 32 + lane];
      kArrive(address(full + k));
    } else {
      while (!kTest(address(full + k), (turn + kLate) & 1)) {
      }
      out[s * 32 + lane] = tile[k][31 - lane];
      arrive(address(empty + k));
    }
  }
}
#define PRODUCE(name, ...)                                                                  \
  extern "C" __global__ void produce_##name(const int* x, int* out, int steps, int count) { \
    produce<__VA_ARGS__>(x, out, steps, count);                                             \
  }
PRODUCE(right, arrive, test, 0, true)
PRODUCE(trying, arrive, try_wait, 0, true)
PRODUCE(fenced, arrive, test_fenced, 0, true)
PRODUCE(arrive_relaxed, arrive_relaxed, test, 0, true)
PRODUCE(wait_relaxed, arrive, test_relaxed, 0, true)
PRODUCE(wrong_parity, arrive, test, 1, true)
PRODUCE(not_empty, arrive, test, 0, false)

// Each block writes numbers into the shared memory of the next block and arrives at an object
// there, `steps` times with two buffers: x [blocks, threads].
template <void (*kArrive)(unsigned), bool (*kTest)(unsigned, unsigned)>
__device__ void ring(int* x, int steps) {
  __shared__ int tile[2][64];
  __shared__ uint64_t full[2];
  const int t = threadIdx.x, k = blockIdx.x * blockDim.x + t;
  const unsigned to = (rank_of_block() + 1) % 2;
  if (t < 2) init(full + t, blockDim.x);
  cluster_barrier();
  int own = x[k];
  for (int s = 0; s < steps; ++s) {
    int* at = &tile[s % 2][0];
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(mapped(at + t, to)), "r"(own) : "memory");
    kArrive(mapped(full + s % 2, to));
    while (!kTest(address(full + s % 2), s / 2 & 1)) {
    }
    own = at[(t + 1) % blockDim.x] + 1;
    // The other block writes this buffer again only after this block's numbers of the next step
    // came, and those of each thread come after this barrier.
    __syncthreads();
  }
  x[k] = own;
  cluster_barrier();
}
#define RING(name, ...) \
  extern "C" __global__ void ring_##name(int* x, int steps) { ring<__VA_ARGS__>(x, steps); }
RING(right, arrive_far, test_cluster)
RING(fenced, arrive_far_fenced, test_fenced)
RING(arrive_relaxed, arrive_far_relaxed, test_cluster)
RING(arrive_in_block, arrive_far_in_block, test_cluster)
RING(wait_in_block, arrive_far, test)

// How the threads of a cluster come to know an object of another block.
enum Shown { kFenceAndRelaxed, kRelaxed, kNoBarrier };
template <Shown kShown>
__device__ void show(int* out) {
  __shared__ uint64_t o;
  const bool first = threadIdx.x == 0;
  if (first) init(&o, 2);
  if (kShown == kFenceAndRelaxed && first)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  if (kShown != kNoBarrier) {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    asm volatile("barrier.cluster.wait;" ::: "memory");
  }
  if (first) arrive_far(mapped(&o, 0));
  if (first && rank_of_block() == 0) {
    while (!test_cluster(address(&o), 0)) {
    }
    *out = 1;
  }
  cluster_barrier();
}
extern "C" __global__ void shown(int* out) { show<kFenceAndRelaxed>(out); }
extern "C" __global__ void shown_relaxed(int* out) { show<kRelaxed>(out); }
extern "C" __global__ void shown_at_once(int* out) { show<kNoBarrier>(out); }
extern "C" __global__ void shown_in_block(int* out) {
  __shared__ uint64_t o;
  if (threadIdx.x == 0) init(&o, blockDim.x);
  arrive(address(&o));
  *out = 1;
}

// States, counts and bytes of one object, step by step: out [10].
extern "C" __global__ void counts(int* out) {
  __shared__ uint64_t o;
  const unsigned at = address(&o);
  uint64_t s;
  unsigned n;
  init(&o, 5);
  const auto pending = [&] {
    asm("mbarrier.pending_count.b64 %0, %1;" : "=r"(n) : "l"(s));
    return n;
  };
  const auto ended = [&](uint64_t state) {
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(n)
        : "r"(at), "l"(state)
        : "memory");
    return n;
  };
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(s) : "r"(at) : "memory");
  out[0] = pending();  // 5
  asm volatile("mbarrier.arrive.noComplete.shared.b64 %0, [%1], 2;" : "=l"(s) : "r"(at) : "memory");
  out[1] = pending();  // 4
  out[2] = ended(s);   // 0
  asm volatile("mbarrier.arrive_drop.shared.b64 %0, [%1];" : "=l"(s) : "r"(at) : "memory");
  out[3] = pending();  // 2
  asm volatile("mbarrier.arrive.b64 %0, [%1];" : "=l"(s) : "l"(&o) : "memory");
  out[4] = pending();  // 1
  out[5] = ended(s);   // 1
  // The next phase expects 4 arrivals, and bytes.
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1], 3;" : "=l"(s) : "r"(at) : "memory");
  out[6] = pending();  // 4
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], 16;" ::"r"(at) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 %0, [%1], 16;" : "=l"(s) : "r"(at) : "memory");
  out[7] = ended(s);  // 0
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 24;" ::"r"(at) : "memory");
  out[8] = ended(s);  // 0
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 8;" ::"r"(at) : "memory");
  out[9] = ended(s);  // 1
  // The memory of an object serves as any other after mbarrier.inval.
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(at) : "memory");
  o = 7;
  out[10] = static_cast<volatile uint64_t&>(o);
}

// Misuses, by number.
extern "C" __global__ void misuse(int* out, int which, int count) {
  __shared__ uint64_t o[2];
  const unsigned at = address(o);
  const int t = threadIdx.x;
  if (t == 0 && which != 0) init(o, count);
  __syncthreads();
  if (which == 0) arrive(at);                                                     // no object
  if (which == 1 && t == 0) init(o, count);                                       // an object again
  if (which == 2) out[t] = static_cast<volatile int*>(static_cast<void*>(o))[1];  // a plain read
  if (which == 3) o[0] = 0;                                                       // a plain write
  if (which == 4) atomicAdd_block(reinterpret_cast<unsigned*>(o) + 1, 1u);
  if (which == 5) arrive(at);  // one for each thread
  if (which == 6) test(at, 2);
  if (which == 7) arrive(at + 4);
  if (which == 8 || which == 9) {  // mbarrier.inval
    arrive(at);
    if (which == 9) __syncthreads();
    if (t == 0) asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(at) : "memory");
  }
  if (which == 10)
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(1 << 20)
                 : "memory");
  if (which == 11) {  // bytes that never come
    if (t == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 16;" ::"r"(at) : "memory");
    while (!test(at, 0)) {
    }
  }
  if (which == 12)
    asm volatile("{ .reg .pred p; mbarrier.test_wait.shared.b64 p, [%0], %1; }" ::"r"(at), "l"(5ull)
                 : "memory");
  if (which == 13) {  // a state of an old phase
    uint64_t s;
    asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(s) : "r"(at) : "memory");
    arrive(at);
    asm volatile("{ .reg .pred p; mbarrier.test_wait.shared.b64 p, [%0], %1; }" ::"r"(at), "l"(s)
                 : "memory");
  }
  if (which == 14)
    asm volatile("mbarrier.arrive.noComplete.shared.b64 _, [%0], 1;" ::"r"(at) : "memory");
  if (which == 15) asm volatile("mbarrier.arrive.shared.b64 _, [%0], 3;" ::"r"(at) : "memory");
  if (which == 16) {  // an arrival while only bytes are missing
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 16;" ::"r"(at) : "memory");
    arrive(at);
  }
  out[t] = 1;
  if (t == 0) o[1] = 1;
}
