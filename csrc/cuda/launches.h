// Typed shorthands by which the host side of the engine calls its launcher.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "args.h"
#include "launcher.h"
#include "plan.h"

namespace fusedrnn::cuda {

template <class Value>
Matrix<const void> untyped(const Matrix<Value>& m) {
  return {m.data, m.rows, m.columns, m.ld, m.transposed};
}

// c = a b, or c += a b.
template <class Stored, class Result>
void multiply(Launcher& launcher, const Matrix<const Stored>& a, const Matrix<const Stored>& b,
              const Matrix<Result>& c, bool accumulate = false) {
  launcher.multiply({.dtype = DtypeOf<Stored>::kDtype,
                     .c_dtype = DtypeOf<Result>::kDtype,
                     .a = untyped(a),
                     .b = untyped(b),
                     .c = {c.data, c.rows, c.columns, c.ld, c.transposed},
                     .accumulate = accumulate});
}

// Starts the kernel `name` for the type Stored: its dtype is appended to the name.
template <class Stored, class Args>
void launch(Launcher& launcher, const char* name, Dim3 grid, const Args& args) {
  launcher.launch({.kernel = std::string(name) + "_" + name_of(DtypeOf<Stored>::kDtype),
                   .grid = grid,
                   .block = {kThreads},
                   .args = &args,
                   .args_bytes = sizeof(args)});
}

// The scratch memory of a pass. Everything is asked for before the one call that allocates it. The
// pointers that are given here must stay where they are until then.
class Scratch {
 public:
  // `pointer` will point to `count` uninitialised values.
  template <class Value>
  void want(Value*& pointer, int64_t count) {
    add(&pointer, static_cast<size_t>(count) * sizeof(Value), false);
  }

  // `pointer` will point to `count` values, which are zero.
  template <class Value>
  void want_zero(Value*& pointer, int64_t count) {
    add(&pointer, static_cast<size_t>(count) * sizeof(Value), true);
  }

  // Allocates what was asked for since the last call, and sets the pointers.
  void allocate(Launcher& launcher) {
    if (parts_.empty()) return;
    launcher.scratch(parts_);
    for (size_t i = 0; i < parts_.size(); ++i)
      std::memcpy(pointers_[i], &parts_[i].at, sizeof(parts_[i].at));
    parts_.clear();
    pointers_.clear();
  }

 private:
  void add(void* pointer, size_t bytes, bool zero) {
    parts_.push_back({bytes, zero});
    pointers_.push_back(pointer);
  }

  std::vector<ScratchPart> parts_;
  std::vector<void*> pointers_;  // the address of each part's pointer
};

template <class Value>
void zero(Launcher& launcher, Value* p, int64_t values) {
  if (p && values) launcher.zero(p, static_cast<size_t>(values) * sizeof(Value));
}

// The grid for `count` values: one thread for each value, in at most `most` blocks. Where the
// blocks are not enough, the kernels take several values in each thread.
inline Dim3 grid_for(int64_t count, int64_t most = 1 << 20) {
  return {static_cast<unsigned>(std::min(ceil_div(count, kThreads), most))};
}

// Copies numbers of the host to device memory. They travel as arguments of kernels, so no copy has
// to wait for the host and a CUDA graph keeps them.
inline void put_numbers(Launcher& launcher, const std::vector<int64_t>& numbers, int64_t* to) {
  const auto count = static_cast<int64_t>(numbers.size());
  for (int64_t begin = 0; begin < count; begin += kNumbersPerLaunch) {
    NumbersArgs args = {};
    args.count = static_cast<int>(std::min<int64_t>(kNumbersPerLaunch, count - begin));
    args.to = to + begin;
    std::copy_n(numbers.data() + begin, args.count, args.values);
    launcher.launch({.kernel = "write_numbers",
                     .grid = {},
                     .block = {kThreads},
                     .args = &args,
                     .args_bytes = sizeof(args)});
  }
}

}  // namespace fusedrnn::cuda
