// Probes of clusters of blocks: their special registers, their barrier, and shared memory of other
// blocks. Each faulty kernel stands beside the correct kernel that it was made from.
#include <cooperative_groups.h>

#include <cstdint>

namespace {

__device__ unsigned rank_of_block() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ unsigned blocks_of_cluster() {
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
__device__ unsigned shared_address(const void* p) { return __cvta_generic_to_shared(p); }
// The address in .shared::cluster of what another block has at the address of p.
__device__ unsigned mapped(const void* p, unsigned rank) {
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(p)), "r"(rank));
  return to;
}
__device__ int load(unsigned at) {
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ void store(unsigned at, int v) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

__device__ void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void arrive_each() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
__device__ void arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ void arrive_after_fence() {
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ void arrive_after_block_fence() {
  asm volatile("fence.acq_rel.cta;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void wait_each() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
__device__ void none() {}
__device__ void block_barrier() { __syncthreads(); }

}  // namespace

// out [blocks, 12]
extern "C" __global__ void registers(unsigned* out) {
  if (threadIdx.x + threadIdx.y + threadIdx.z > 0) return;
  unsigned v[12];
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(v[0]));
  asm("mov.u32 %0, %%clusterid.y;" : "=r"(v[1]));
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(v[2]));
  asm("mov.u32 %0, %%nclusterid.y;" : "=r"(v[3]));
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(v[4]));
  asm("mov.u32 %0, %%cluster_ctaid.y;" : "=r"(v[5]));
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(v[6]));
  asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(v[7]));
  v[8] = rank_of_block();
  v[9] = blocks_of_cluster();
  asm("{ .reg .pred p; mov.pred p, %%is_explicit_cluster; selp.u32 %0, 1, 0, p; }" : "=r"(v[10]));
  v[11] = 1;
  for (int k = 0; k < 12; ++k) out[(blockIdx.y * gridDim.x + blockIdx.x) * 12 + k] = v[k];
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) required(unsigned* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blocks_of_cluster() * 10 + rank_of_block();
}
// Time goes on between two reads of each clock. The launch before this one has ended.
extern "C" __global__ void clocks(int* out) {
  unsigned long long a, b;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(a));
  const long long c = clock64();
  const int d = clock();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(b));
  out[threadIdx.x] = b > a && clock64() > c && clock() > d;
}

// Each block passes its numbers to the next block of its cluster, `steps` times, through shared
// memory that the next block reads: x [blocks, threads]. Two buffers take turns, with one barrier
// for each step; another one at the end keeps the block alive while it is read.
template <void (*kArrive)(), void (*kWait)(), void (*kArriveLast)(), void (*kWaitLast)(),
          int kBuffers>
__device__ void pass(int* x, int steps) {
  __shared__ int tile[2][64];
  const int t = threadIdx.x, k = blockIdx.x * blockDim.x + t;
  const unsigned from = (rank_of_block() + blocks_of_cluster() - 1) % blocks_of_cluster();
  int own = x[k];
  for (int s = 0; s < steps; ++s) {
    int* at = &tile[s % kBuffers][0];
    at[t] = own;
    kArrive();
    kWait();
    own = load(mapped(at + (t + 1) % blockDim.x, from)) + 1;
  }
  kArriveLast();
  kWaitLast();
  x[k] = own;
}
#define PASS(name, ...) \
  extern "C" __global__ void pass_##name(int* x, int steps) { pass<__VA_ARGS__>(x, steps); }
PASS(right, arrive, wait, arrive, wait, 2)
PASS(unaligned, arrive_each, wait_each, arrive_each, wait_each, 2)
PASS(fenced, arrive_after_fence, wait, arrive_after_fence, wait, 2)
PASS(relaxed, arrive_relaxed, wait, arrive, wait, 2)
PASS(fenced_in_block, arrive_after_block_fence, wait, arrive, wait, 2)
PASS(one_buffer, arrive, wait, arrive, wait, 1)
PASS(block_barrier, block_barrier, none, arrive, wait, 2)
PASS(arrive_only, arrive, none, arrive, wait, 2)
PASS(wait_only, none, wait, arrive, wait, 2)
PASS(no_last_barrier, arrive, wait, none, none, 2)
PASS(last_arrival_only, arrive, wait, arrive, none, 2)

// The same with cooperative groups, through generic addresses.
extern "C" __global__ void pass_groups(int* x, int steps) {
  namespace cg = cooperative_groups;
  __shared__ int tile[2][64];
  cg::cluster_group cluster = cg::this_cluster();
  const int t = threadIdx.x, k = blockIdx.x * blockDim.x + t;
  const unsigned n = cluster.num_blocks(), from = (cluster.block_rank() + n - 1) % n;
  int own = x[k];
  for (int s = 0; s < steps; ++s) {
    tile[s % 2][t] = own;
    cluster.sync();
    own = *cluster.map_shared_rank(&tile[s % 2][(t + 1) % blockDim.x], from) + 1;
  }
  cluster.sync();
  x[k] = own;
}

// Each block writes its numbers into the shared memory of the next block. Without the first barrier
// the next block may not have started, and without the second one the numbers may not be there.
template <void (*kFirst)(), bool kSecond>
__device__ void push(const int* x, int* out) {
  __shared__ int tile[64];
  const int t = threadIdx.x, k = blockIdx.x * blockDim.x + t;
  kFirst();
  store(mapped(&tile[t], (rank_of_block() + 1) % blocks_of_cluster()), x[k]);
  if (kSecond) {
    arrive();
    wait();
  }
  out[k] = tile[blockDim.x - 1 - t];
  arrive();
  wait();
}
__device__ void barrier() {
  arrive();
  wait();
}
__device__ void barrier_relaxed() {
  arrive_relaxed();
  wait();
}
extern "C" __global__ void push_right(const int* x, int* out) { push<barrier, true>(x, out); }
extern "C" __global__ void push_relaxed(const int* x, int* out) {
  push<barrier_relaxed, true>(x, out);
}
extern "C" __global__ void push_at_once(const int* x, int* out) { push<none, true>(x, out); }
extern "C" __global__ void push_unseen(const int* x, int* out) { push<barrier, false>(x, out); }

// Accesses shared memory of block `rank` at byte `at`, with an instruction for each `how`; a block
// has 256 bytes.
extern "C" __global__ void reaches(int* out, int rank, int at, int how) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  barrier();
  const unsigned to = mapped(tile, rank) + at;
  if (threadIdx.x == 0) {
    int v = 0;
    if (how == 0) v = load(to);
    if (how == 1) asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(to) : "memory");
    if (how == 2) {
      uint64_t generic;
      asm("mapa.u64 %0, %1, %2;" : "=l"(generic) : "l"(tile), "r"(rank));
      asm volatile("ld.s32 %0, [%1];" : "=r"(v) : "l"(generic + at) : "memory");
      unsigned back, far, near;
      asm("getctarank.u64 %0, %1;" : "=r"(back) : "l"(generic));
      asm("{ .reg .pred p; isspacep.shared::cluster p, %1; selp.u32 %0, 1, 0, p; }"
          : "=r"(far)
          : "l"(generic));
      asm("{ .reg .pred p; isspacep.shared p, %1; selp.u32 %0, 1, 0, p; }"
          : "=r"(near)
          : "l"(generic));
      v += 100 * back + 1000 * far + 10000 * near;
    }
    if (how == 3) {
      asm("getctarank.shared::cluster.u32 %0, %1;" : "=r"(v) : "r"(to));
    }
    out[blockIdx.x] = v;
  }
  barrier();
}

// All blocks count in shared memory of block 0 of their cluster: hits [clusters].
extern "C" __global__ void counts_in_cluster(unsigned* hits) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  barrier();
  const unsigned to = mapped(&count, 0);
  unsigned before;
  asm volatile("atom.relaxed.cluster.shared::cluster.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "r"(to)
               : "memory");
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], 1;" ::"r"(to) : "memory");
  barrier();
  if (threadIdx.x == 0 && rank_of_block() == 0) hits[blockIdx.x / blocks_of_cluster()] = count;
}
// The same in the scope of a block, which the blocks of a cluster do not share.
extern "C" __global__ void counts_in_block(unsigned* hits) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  barrier();
  asm volatile("red.relaxed.cta.shared::cluster.add.u32 [%0], 1;" ::"r"(mapped(&count, 0))
               : "memory");
  barrier();
  if (threadIdx.x == 0 && rank_of_block() == 0) hits[blockIdx.x / blocks_of_cluster()] = count;
}

// Block 0 passes 32 numbers to the block of rank 1, through global memory and a flag in shared
// memory of that block. `kFlag` is the scope of the flag, `kFence` that of the fences.
#define HANDS_OVER(name, flag, fence)                                                            \
  extern "C" __global__ void hands_over_##name(int* x, int* out) {                               \
    __shared__ unsigned ready;                                                                   \
    if (threadIdx.x == 0) ready = 0;                                                             \
    barrier();                                                                                   \
    if (rank_of_block() == 0) {                                                                  \
      x[threadIdx.x] = threadIdx.x;                                                              \
      __syncthreads();                                                                           \
      if (threadIdx.x == 0) {                                                                    \
        asm volatile("fence.acq_rel." fence ";" ::: "memory");                                   \
        asm volatile("st.relaxed." flag ".shared::cluster.u32 [%0], 1;" ::"r"(mapped(&ready, 1)) \
                     : "memory");                                                                \
      }                                                                                          \
    } else if (rank_of_block() == 1) {                                                           \
      unsigned v;                                                                                \
      do {                                                                                       \
        asm volatile("ld.relaxed." flag ".shared.u32 %0, [%1];"                                  \
                     : "=r"(v)                                                                   \
                     : "r"(shared_address(&ready))                                               \
                     : "memory");                                                                \
      } while (v == 0);                                                                          \
      asm volatile("fence.acq_rel." fence ";" ::: "memory");                                     \
      out[threadIdx.x] = x[31 - threadIdx.x];                                                    \
    }                                                                                            \
    barrier();                                                                                   \
  }
HANDS_OVER(right, "cluster", "cluster")
HANDS_OVER(wide, "gpu", "gpu")
HANDS_OVER(fence_of_block, "cluster", "cta")
HANDS_OVER(flag_of_block, "cta", "cluster")

// The same through global memory between two clusters, for which the scope of a cluster is too
// small.
#define ACROSS(name, scope)                                                              \
  extern "C" __global__ void across_##name(int* x, unsigned* flag, int* out) {           \
    if (blockIdx.x == 0) {                                                               \
      x[threadIdx.x] = threadIdx.x;                                                      \
      __syncthreads();                                                                   \
      if (threadIdx.x == 0)                                                              \
        asm volatile("st.release." scope ".global.u32 [%0], 1;" ::"l"(flag) : "memory"); \
    } else if (blockIdx.x == 2) {                                                        \
      unsigned v;                                                                        \
      do {                                                                               \
        asm volatile("ld.acquire." scope ".global.u32 %0, [%1];"                         \
                     : "=r"(v)                                                           \
                     : "l"(flag)                                                         \
                     : "memory");                                                        \
      } while (v == 0);                                                                  \
      out[threadIdx.x] = x[31 - threadIdx.x];                                            \
    }                                                                                    \
  }
ACROSS(device, "gpu")
ACROSS(cluster, "cluster")

// --- Arrivals and waits --------------------------------------------------------------------------

extern "C" __global__ void arrives_twice(int* out) {
  arrive_each();
  arrive_each();
  wait_each();
  out[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_warp_arrives(int* out) {
  if (threadIdx.x < 16) {
    arrive();
  } else {
    arrive();
    out[threadIdx.x] = 1;
  }
  wait_each();
}
// Threads from `n` on exit; the others do not wait for them.
extern "C" __global__ void some_exit(int* out, int n) {
  if (threadIdx.x >= n) return;
  arrive_each();
  wait_each();
  arrive_each();
  wait_each();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
// Threads from `n` on exit after they have arrived.
extern "C" __global__ void some_arrive_and_exit(int* out, int n) {
  arrive_each();
  if (threadIdx.x >= n) return;
  wait_each();
  arrive_each();
  wait_each();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
// The blocks of even rank have one barrier more.
extern "C" __global__ void one_block_waits(int* out) {
  barrier();
  if (rank_of_block() % 2 == 0) {
    arrive();
    wait();
  } else {
    __syncthreads();
    while (*static_cast<volatile int*>(out) == 0) {
    }
  }
  out[blockIdx.x] = 1;
}
