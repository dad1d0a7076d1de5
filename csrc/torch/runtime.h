// Implements the CPU engine's Runtime with torch: threads and memory.
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

#include "../cpu/huge_pages.h"
#include "../cpu/runtime.h"
#include "../cpu/team.h"
#include "../cpu/threads.h"
#include "tensors.h"

namespace fusedrnn {

// For torch before 2.13, which does not say why an allocation failed. Throws the error of later
// versions if this many bytes cannot be allocated.
inline void check_memory_for(double bytes) {
  void* memory = nullptr;
  const bool lacks = bytes >= 9e18 || posix_memalign(&memory, 64, static_cast<size_t>(bytes)) != 0;
  std::free(memory);
  check(!lacks, kTorchLacksMemory, ": you tried to allocate ", std::fixed, std::setprecision(0),
        bytes, " bytes; torch before 2.13 does not say more");
}

// As new_empty, and asks for huge pages if the tensor is large. If memory is lacking, the error
// says so under every version of torch.
inline Tensor empty_on_cpu(const Tensor& like, Sizes sizes, ScalarType dtype) {
  try {
    Tensor t = new_empty(like, sizes, dtype);
    cpu::advise_huge_pages(t.data_ptr(), bytes_of(t));
    return t;
  } catch (const TorchSaysNothing&) {
    check_memory_for(bytes_wanted(sizes, dtype));
    throw;
  }
}

// The process that loaded the library. A process that was forked from it has the data of the
// parent's OpenMP thread pool but not the threads, and a parallel region of torch would wait for
// them for ever. So in a forked process a call that wants threads starts its own.
inline const pid_t kLoadedIn = getpid();

class TorchRuntime final : public cpu::Runtime {
 public:
  // work is about the number of multiply-adds of the call.
  TorchRuntime(const Tensor& like, double work)
      : like_(like),
        forked_(work >= cpu::kWorkForThreads && getpid() != kLoadedIn),
        choice_(cpu::choose_threads(work, forked_, torch::stable::get_num_threads)) {}

  int64_t threads() const override { return choice_.threads; }
  const char* why_threads() const override { return choice_.why; }

  void parallel(int64_t n, const std::function<void(int64_t)>& body) override {
    if (n <= 1 || !team_) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    team_->parallel(n, body);
  }

  // Runs the whole call in one parallel region of torch. So the call waits only once, at its end,
  // for threads that other processes keep from running. Beside two busy processes each such wait
  // took up to 8 ms.
  void together(const std::function<void()>& body) override {
    if (threads() == 1) return body();
    cpu::Team team;
    team_ = &team;
    const cpu::Crowd::Clock::time_point start = cpu::Crowd::Clock::now();
    cpu::Crowd::Clock::time_point finished = start;
    std::exception_ptr failed;  // through torch only an error code would arrive
    const auto lead = [&] {
      try {
        body();
      } catch (...) {
        failed = std::current_exception();
      }
      team.close();
      finished = cpu::Crowd::Clock::now();
    };
    if (forked_) {
      with_own_threads(team, lead);
    } else {
      torch::stable::parallel_for(0, threads(), 1, [&](int64_t begin, int64_t) {
        if (begin > 0) return team.help();
        lead();
      });
    }
    team_ = nullptr;
    if (failed) std::rethrow_exception(failed);
    cpu::Crowd::note(start, finished, cpu::Crowd::Clock::now());
  }

  void* scratch(size_t bytes) override {
    if (void* mapped = mapping_.map(bytes)) return mapped;
    scratch_.push_back(empty_on_cpu(like_, {static_cast<int64_t>(bytes) + 64}, ScalarType::Byte));
    const auto address = reinterpret_cast<uintptr_t>(scratch_.back().data_ptr());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  // Runs lead with threads of this call. lead must close the team and must not throw.
  template <class Lead>
  void with_own_threads(cpu::Team& team, const Lead& lead) const {
    std::vector<std::jthread> helpers;
    try {
      while (static_cast<int64_t>(helpers.size()) < threads() - 1)
        helpers.emplace_back([&team] { team.help(); });
    } catch (const std::exception&) {
      // The system gives no more threads. The team works with those it has.
    }
    lead();
  }

  const Tensor& like_;  // scratch tensors are made like it
  const bool forked_;
  const cpu::ThreadChoice choice_;
  cpu::Team* team_ = nullptr;  // set while together() runs
  cpu::HugePages mapping_;
  std::vector<Tensor> scratch_;
};

}  // namespace fusedrnn
