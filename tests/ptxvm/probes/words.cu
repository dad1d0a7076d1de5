// Probes that pass words {data, number} of 64 bits between blocks without a barrier. The reader of
// a word spins until the number is the one that it waits for; the data then came with it.
#include <cstdint>

namespace {

// Ways to store a word, and to load it.
__device__ void store(uint64_t* p, uint32_t data, uint32_t number) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p),
               "l"(static_cast<uint64_t>(number) << 32 | data)
               : "memory");
}
__device__ void store_plain(uint64_t* p, uint32_t data, uint32_t number) {
  asm volatile("st.global.u64 [%0], %1;" ::"l"(p), "l"(static_cast<uint64_t>(number) << 32 | data)
               : "memory");
}
__device__ void store_in_block(uint64_t* p, uint32_t data, uint32_t number) {
  asm volatile("st.relaxed.cta.global.u64 [%0], %1;" ::"l"(p),
               "l"(static_cast<uint64_t>(number) << 32 | data)
               : "memory");
}
__device__ void store_pair(uint64_t* p, uint32_t data, uint32_t number) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(data), "r"(number)
               : "memory");
}
__device__ void store_halves(uint64_t* p, uint32_t data, uint32_t number) {
  uint32_t* half = reinterpret_cast<uint32_t*>(p);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(half), "r"(data) : "memory");
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(half + 1), "r"(number) : "memory");
}
__device__ uint64_t load(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ uint64_t load_plain(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ uint64_t load_pair(const uint64_t* p) {
  uint32_t data, number;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(data), "=r"(number)
               : "l"(p)
               : "memory");
  return static_cast<uint64_t>(number) << 32 | data;
}

// The number of each step, and whether the reader takes a word whose number is not the one it waits
// for.
__device__ uint32_t step(int s) { return s + 1; }
__device__ uint32_t same(int) { return 1; }
__device__ bool equal(uint32_t number, uint32_t wanted) { return number == wanted; }
__device__ bool at_least(uint32_t number, uint32_t wanted) { return number >= wanted; }

}  // namespace

template <void (*kStore)(uint64_t*, uint32_t, uint32_t), uint64_t (*kLoad)(const uint64_t*),
          uint32_t (*kNumber)(int), bool (*kAccepts)(uint32_t, uint32_t), int kBuffers>
struct Words {
  static __device__ uint32_t wait(const uint64_t* p, uint32_t number) {
    uint64_t v;
    do {
      v = kLoad(p);
    } while (!kAccepts(v >> 32, number));
    return static_cast<uint32_t>(v);
  }
  // Each number of a ring becomes the sum of its neighbours. words [kBuffers, n] is zero before.
  // A thread stores the word of step s + 2 after its neighbours' words of step s + 1 came, which
  // they stored after they had read its word of step s. Two buffers are therefore enough.
  static __device__ void pass(int* x, uint64_t* words, int n, int steps) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t own = x[k];
    for (int s = 0; s < steps; ++s) {
      uint64_t* at = words + s % kBuffers * n;
      kStore(at + k, own, kNumber(s));
      own = wait(at + (k + n - 1) % n, kNumber(s)) + wait(at + (k + 1) % n, kNumber(s));
    }
    x[k] = own;
  }
};

#define WORDS(name, ...)                                                               \
  extern "C" __global__ void words_##name(int* x, uint64_t* words, int n, int steps) { \
    Words<__VA_ARGS__>::pass(x, words, n, steps);                                      \
  }
WORDS(right, store, load, step, equal, 2)
WORDS(right_at_least, store, load, step, at_least, 2)
WORDS(plain_store, store_plain, load, step, equal, 2)
WORDS(plain_load, store, load_plain, step, equal, 2)
WORDS(block_scope, store_in_block, load, step, equal, 2)
WORDS(two_stores, store_halves, load, step, equal, 2)
WORDS(pair_and_word, store_pair, load, step, equal, 2)
WORDS(pairs, store_pair, load_pair, step, equal, 2)
WORDS(same_number, store, load, same, equal, 2)
WORDS(one_buffer, store, load, step, equal, 1)
WORDS(one_buffer_at_least, store, load, step, at_least, 1)

// Block 1 stores two words after each other; block 0 reads both halves of a word at once, again and
// again: out [n]. The stale value of a word is a whole earlier one.
extern "C" __global__ void halves_agree(uint64_t* word, int* out, int n) {
  if (blockIdx.x == 1) {
    for (int k = 1; k <= n; ++k) store(word, 3 * k, k);
  } else {
    for (int k = 0; k < n; ++k) {
      const uint64_t v = load(word);
      out[k] = static_cast<uint32_t>(v) == 3 * (v >> 32);
    }
  }
}
