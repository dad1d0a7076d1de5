// The scratch memory of a layer call, in one allocation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace fusedrnn::cpu {

// Hands out aligned pieces of one allocation. An arena with base null hands out null, and only
// measures how much memory is needed.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class Scalar>
  Scalar* take(int64_t values) {
    Scalar* piece = base_ ? reinterpret_cast<Scalar*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(values) * sizeof(Scalar) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlign = 64;
  char* base_;
  size_t used_ = 0;
};

// Runs lay_out(arena) twice: first to measure, then on memory of the measured size.
template <class LayOut>
void allocate(Runtime& runtime, const LayOut& lay_out) {
  Arena measure(nullptr);
  lay_out(measure);
  Arena arena(runtime.scratch(measure.used()));
  lay_out(arena);
}

}  // namespace fusedrnn::cpu
