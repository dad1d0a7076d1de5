// The reserve: the memory with everything that forward keeps for backward. Both engines use the
// same layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "layer.h"

namespace fusedrnn {

// The arrays of one direction. A row number stands for the same sequence and step in all arrays
// that have `rows` rows.
template <class Stored>
struct Reserve {
  Stored* saved;       // [rows, kSaved*H]; see saved_rows
  Stored* h_in;        // [rows, P] h_{t-1}
  Real<Stored>* c_in;  // [rows, H] c_{t-1}; null without c
  Stored* emit;        // [rows, H] the emit of stage 0; null for cells of one stage
};

// The rows of `saved`. A cell with kSavesH (contract.h) saves h of each sequence's last step alone,
// [N, H], because h of an earlier step is h_in of the next one. That does not hold for a step
// before a beginning. How many of them there are must not change the size of the reserve.
inline int64_t saved_rows(const Layer& layer, int64_t rows) {
  return layer.info().saves_h && !layer.has_starts ? layer.sequences.N : rows;
}

// The offsets of the arrays of one direction in bytes (`saved` begins at 0), and their total size.
struct ReserveLayout {
  size_t h_in, c_in, emit, bytes;
};

template <class Stored>
ReserveLayout reserve_layout(const Layer& layer, int64_t rows) {
  const CellInfo& info = layer.info();
  const auto bytes_of = [](int64_t values, size_t size) {
    return static_cast<size_t>(values) * size;
  };
  const auto aligned = [](size_t bytes) {
    constexpr size_t kAlign = sizeof(Real<Stored>);
    return (bytes + kAlign - 1) / kAlign * kAlign;
  };
  ReserveLayout at;
  at.h_in = bytes_of(saved_rows(layer, rows) * info.saved * layer.H, sizeof(Stored));
  at.c_in = at.h_in + bytes_of(rows * layer.P, sizeof(Stored));
  if (info.has_c) at.c_in = aligned(at.c_in);
  at.emit = at.c_in + bytes_of(info.has_c ? rows * layer.H : 0, sizeof(Real<Stored>));
  at.bytes = aligned(at.emit + bytes_of(info.stages > 1 ? rows * layer.H : 0, sizeof(Stored)));
  return at;
}

// The size in bytes of the whole reserve, in all directions, for `rows` rows of layer.sequences.N
// sequences.
template <class Stored>
size_t reserve_bytes(const Layer& layer, int64_t rows) {
  return static_cast<size_t>(layer.D) * reserve_layout<Stored>(layer, rows).bytes;
}

// The arrays of direction d of a reserve that has all rows of the layer. Backward passes a const
// reserve and only reads through the pointers that it gets here.
template <class Stored>
Reserve<Stored> reserve_of(const Layer& layer, const void* reserve, int64_t d) {
  const CellInfo& info = layer.info();
  const ReserveLayout at = reserve_layout<Stored>(layer, layer.sequences.rows());
  char* base = static_cast<char*>(const_cast<void*>(reserve)) + d * static_cast<int64_t>(at.bytes);
  return {.saved = reinterpret_cast<Stored*>(base),
          .h_in = reinterpret_cast<Stored*>(base + at.h_in),
          .c_in = info.has_c ? reinterpret_cast<Real<Stored>*>(base + at.c_in) : nullptr,
          .emit = info.stages > 1 ? reinterpret_cast<Stored*>(base + at.emit) : nullptr};
}

// Calls zero(pointer, values) for the values of the reserve that no step of forward writes. Only
// cells with kSavesH have some: `saved` is h of each sequence's last step, a sequence of length 0
// has no last step, and with beginnings there may be more rows than sequences.
template <class Stored, class Zero>
void zero_unwritten(const Layer& layer, const void* reserve, const Zero& zero) {
  const Sequences& seq = layer.sequences;
  if (!reserve || !layer.info().saves_h) return;
  for (int64_t d = 0; d < layer.D; ++d)
    zero(reserve_of<Stored>(layer, reserve, d).saved + seq.widest() * layer.H,
         (saved_rows(layer, seq.rows()) - seq.widest()) * layer.H);
}

}  // namespace fusedrnn
