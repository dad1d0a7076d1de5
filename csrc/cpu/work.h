// Independent pieces of a layer call's work, shared among its threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "runtime.h"

namespace fusedrnn::cpu {

// Collects pieces of work that do not depend on each other, of several kinds, and shares them among
// the threads. The threads wait for each other once, after the pieces of all kinds.
class Work {
 public:
  explicit Work(Runtime& runtime) : runtime_(runtime) {}
  int64_t threads() const { return runtime_.threads(); }

  // Adds body(i) for every i in [0, n), as one kind.
  void add(int64_t n, std::function<void(int64_t)> body) {
    if (n == 0) return;
    kinds_.push_back({pieces_, std::move(body)});
    pieces_ += n;
  }

  // Cuts [0, n) into ranges and adds body(begin, end) for each. There are up to four ranges for
  // each thread, so that other threads can take over the work of a late one. A range is at least
  // `least` long, unless a thread would otherwise have none.
  template <class Body>
  void split(int64_t n, int64_t least, Body body) {
    const int64_t most = std::min(n, threads() == 1 ? 1 : 4 * threads());
    const int64_t ranges = std::clamp(n / least, std::min(n, threads()), most);
    add(ranges, [=](int64_t i) { body(n * i / ranges, n * (i + 1) / ranges); });
  }

  // Runs the pieces in the order in which they were added, and returns when all are done.
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
