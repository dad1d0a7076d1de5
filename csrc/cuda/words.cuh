// An exchange without a barrier. A value travels in a word of 8 bytes, with a number that says for
// which position it is. A block reads a word until it has the number that it waits for; then it has
// the value too. So a step takes one trip through L2, where the barrier takes an arrival, a poll
// that sees it, and a load. A word carries 4 bytes, so this is for few sequences.
//
// Why this is right under the memory model of PTX:
// - Words are written and read by relaxed accesses of 64 bits at gpu scope to aligned addresses.
//   Such an access is single-copy atomic: a reader sees the value and the number of one write. No
//   other order is needed, because nothing but the word itself is handed over. The interpreter of
//   the tests judges this, with loads that may return older words.
// - Numbers never repeat in a call: they grow by one from position to position, also from launch to
//   launch, and the words are zero at first. So an older word is never taken for the one awaited.
// - Two buffers are enough. Let w be a write of block A for position p + 2 to the word that block B
//   reads (r) for position p. The value of w depends on the values that A read for position p + 1
//   of the same sequence, among them one that B wrote; and that value depends on r, since B's
//   product for position p has all words of the sequence as factors. So if r returned w, there
//   would be a cycle of dependencies and reads-from, which the axiom "No Thin Air" forbids. A block
//   writes words of a sequence only for positions at which it is alive, so that each write has
//   these dependencies. Where another sequence begins, zero takes the place of the value, and
//   `unless` lets it depend on the value all the same. The interpreter does not run loads late and
//   cannot judge this part.
#pragma once

#include "barrier.cuh"
#include "storage.cuh"

namespace fusedrnn::cuda {

// Rows of the source of a product, in the exchange: values for which the block has waited, or words
// with a number.
template <class Stored>
struct Source {
  const Stored* values;
  const uint64_t* words;  // null if there are none
  unsigned number;
  unsigned spin_limit;
  const char* kernel;

  // The same from row `row` on. A row has `K_pad` values.
  __device__ __forceinline__ Source from_row(int64_t row, int K_pad) const {
    Source rest = *this;
    rest.values += row * K_pad;
    if (words) rest.words += row * K_pad;
    return rest;
  }
};

// The value if `dropped` is 0, and zero if it is 1, whatever the value is. Either result comes from
// an instruction that takes the value, which no compiler sees through.
__device__ __forceinline__ float unless(unsigned dropped, float value) {
  unsigned bits;
  asm("and.b32 %0, %1, %2;" : "=r"(bits) : "r"(__float_as_uint(value)), "r"(dropped - 1));
  return __uint_as_float(bits);
}

__device__ __forceinline__ void put_word(uint64_t* word, float value, unsigned number) {
  const uint64_t both = uint64_t(number) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(both) : "memory");
}

// The value of a word, once it has its number.
template <class Stored>
__device__ __forceinline__ float take_word(const Source<Stored>& source, int64_t at) {
  uint64_t both;
  unsigned looks = 0;
  do {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                 : "=l"(both)
                 : "l"(source.words + at)
                 : "memory");
  } while (static_cast<unsigned>(both >> 32) != source.number && ++looks < source.spin_limit);
  if (looks == source.spin_limit) give_up_waiting(source.kernel);
  return __uint_as_float(static_cast<unsigned>(both));
}

}  // namespace fusedrnn::cuda
