// What a layer on the CPU needs from its surroundings, given by torch: threads and memory.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <iomanip>
#include <thread>
#include <vector>

#include "../cpu/layer.h"
#include "../cpu/team.h"
#include "huge_pages.h"
#include "tensors.h"

namespace fusedrnn {

// For a torch that does not say why it failed: throws as a later one does where so much memory
// cannot be had.
inline void check_memory_for(double bytes) {
  void* memory = nullptr;
  const bool lacks = bytes >= 9e18 || posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0;
  std::free(memory);
  check(!lacks, kTorchLacksMemory, ": you tried to allocate ", std::fixed, std::setprecision(0),
        bytes, " bytes; torch before 2.13 does not say more");
}

// As new_empty, in huge pages where it is large. A lack of memory is an error that says so under
// every torch.
inline Tensor empty_on_cpu(const Tensor& like, Sizes sizes, ScalarType dtype) {
  try {
    Tensor t = new_empty(like, sizes, dtype);
    advise_huge_pages(t.data_ptr(), bytes_of(t));
    return t;
  } catch (const TorchSaysNothing&) {
    check_memory_for(bytes_wanted(sizes, dtype));
    throw;
  }
}

// Less work than this, in multiply-adds, one thread does alone, in up to 15 µs. A second one saves
// 1 µs of it on an idle machine, and where another process holds its core, costs hundreds. (A step
// of an LSTM, N = 1, I = H = 64: 20 µs by one thread; by two 19, or 200 beside another process.)
constexpr double kWorkForThreads = 1 << 19;

// Whether other processes hold the processors that our threads would run on. A call that waited at
// its end for a thread that was not running says so; then calls run on the caller's thread alone
// for a while, since two that take turns in running get less done than one. The only thing that
// outlives a call: it decides about time, never about numbers, which do not depend on threads.
class Crowd {
 public:
  using Clock = std::chrono::steady_clock;

  static bool here() { return Clock::now().time_since_epoch().count() < until_; }

  // A call that took from start to end waited for threads from `finished` on.
  static void note(Clock::time_point start, Clock::time_point finished, Clock::time_point end) {
    // Threads that run leave within microseconds; while less than half of a call is waiting, two
    // that are stopped now and then still get more done than one. (LSTM (100,32,256,256) training
    // beside two busy processes: 2.7 times the idle time, and 4 alone.)
    const Clock::duration waited = end - finished;
    if (waited < std::chrono::microseconds(500) || 2 * waited < end - start) return;
    const Clock::duration alone =
        std::max<Clock::duration>(kCallsAlone * (end - start), std::chrono::milliseconds(100));
    until_ = (end + alone).time_since_epoch().count();
  }

 private:
  static constexpr int kCallsAlone = 8;
  inline static std::atomic<Clock::rep> until_{0};
};

// A forked process has its parent's pool of threads (OpenMP's), but not the threads: a parallel
// region of torch's waits for them for ever. There a call has threads of its own for its time, one
// for so much work: to start one takes 30 µs.
constexpr double kWorkForOwnThread = 16 * kWorkForThreads;
inline const pid_t kLoadedIn = getpid();

class TorchRuntime final : public Runtime {
 public:
  // work: multiply-adds of the call, about.
  TorchRuntime(const Tensor& like, double work) : like_(like) {
    if (work < kWorkForThreads || Crowd::here()) return;
    threads_ = torch::stable::get_num_threads();
    if (threads_ == 1) return;
    forked_ = getpid() != kLoadedIn;
    if (forked_) {
      const auto most = static_cast<double>(threads_);
      threads_ = static_cast<int64_t>(std::clamp(work / kWorkForOwnThread, 1.0, most));
    }
  }

  int64_t threads() const override { return threads_; }

  void parallel(int64_t n, const std::function<void(int64_t)>& body) override {
    if (n <= 1 || !team_) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    team_->parallel(n, body);
  }

  // One parallel region of torch's for the whole call, so that it waits once, at the end, for
  // threads that have other things to do. Beside two busy processes each wait took up to 8 ms.
  void together(const std::function<void()>& body) override {
    if (threads_ == 1) return body();
    Team team;
    team_ = &team;
    const Crowd::Clock::time_point start = Crowd::Clock::now();
    Crowd::Clock::time_point finished = start;
    std::exception_ptr failed;  // torch would hand on an error code
    const auto lead = [&] {
      try {
        body();
      } catch (...) {
        failed = std::current_exception();
      }
      team.close();
      finished = Crowd::Clock::now();
    };
    if (forked_) {
      with_own_threads(team, lead);
    } else {
      torch::stable::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t) {
        if (begin > 0) return team.help();
        lead();
      });
    }
    team_ = nullptr;
    if (failed) std::rethrow_exception(failed);
    Crowd::note(start, finished, Crowd::Clock::now());
  }

  void* scratch(size_t bytes) override {
    if (void* mapped = mapping_.map(bytes)) return mapped;
    scratch_.push_back(empty_on_cpu(like_, {static_cast<int64_t>(bytes) + 64}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(scratch_.back().data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  // lead closes the team and does not throw.
  template <class Lead>
  void with_own_threads(Team& team, const Lead& lead) const {
    std::vector<std::jthread> helpers;
    try {
      while (static_cast<int64_t>(helpers.size()) < threads_ - 1)
        helpers.emplace_back([&team] { team.help(); });
    } catch (const std::exception&) {
      // No more can be had; fewer do as well.
    }
    lead();
  }

  const Tensor& like_;  // scratch is where it is
  int64_t threads_ = 1;
  bool forked_ = false;
  Team* team_ = nullptr;  // inside together
  HugePages mapping_;
  std::vector<Tensor> scratch_;
};

}  // namespace fusedrnn
