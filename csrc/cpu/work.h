// Independent pieces of a layer call's work, shared among its threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "runtime.h"

namespace fusedrnn::cpu {

// Pieces of work that do not depend on each other, collected to be shared among the threads: they
// wait for each other at the end of all, not of each kind.
class Work {
 public:
  explicit Work(Runtime& runtime) : runtime_(runtime) {}
  int64_t threads() const { return runtime_.threads(); }

  // body(i) for every i in [0, n).
  void add(int64_t n, std::function<void(int64_t)> body) {
    if (n == 0) return;
    kinds_.push_back({pieces_, std::move(body)});
    pieces_ += n;
  }

  // body(begin, end) for parts of [0, n): up to four for each thread, so that others can take over
  // from a late one, but none of less than `least` unless a thread would have none.
  template <class Body>
  void split(int64_t n, int64_t least, Body body) {
    const int64_t most = std::min(n, threads() == 1 ? 1 : 4 * threads());
    const int64_t parts = std::clamp(n / least, std::min(n, threads()), most);
    add(parts, [=](int64_t i) { body(n * i / parts, n * (i + 1) / parts); });
  }

  // Does what was added, from the first on, and returns when all is done.
  void run() {
    if (pieces_ == 0) return;
    runtime_.parallel(pieces_, [&](int64_t i) {
      size_t kind = kinds_.size() - 1;
      while (kinds_[kind].first > i) --kind;
      kinds_[kind].body(i - kinds_[kind].first);
    });
    kinds_.clear();
    pieces_ = 0;
  }

 private:
  struct Kind {
    int64_t first;
    std::function<void(int64_t)> body;
  };
  Runtime& runtime_;
  std::vector<Kind> kinds_;
  int64_t pieces_ = 0;
};

}  // namespace fusedrnn::cpu
