// Threads that stay together for a whole layer call and share one job after another. If the
// operating system has stopped a thread, the other threads wait for it only if it has taken a piece
// of the job.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>

namespace fusedrnn::cpu {

// Waits a little. After a while it gives the processor away, because the thread that is waited for
// may need it.
inline void relax(int64_t spins) {
  if (spins % 256 == 255) {
    std::this_thread::yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// One thread leads: it calls parallel, and at the end close, also after an exception. Other threads
// call help, which returns after close. Whether and when they do makes no difference to the
// results.
class Team {
 public:
  // Runs body(i) for every i in [0, n) on the threads that are there. It returns when all pieces
  // are done. If pieces threw, it then throws the first of those exceptions. One call is one job.
  // It throws at once if n > kMost.
  void parallel(int64_t n, const std::function<void(int64_t)>& body) {
    if (n > kMost) throw std::runtime_error("fusedrnn: a job has more than 2^24 - 1 pieces");
    body_ = &body;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t jobs = ticket_.load(std::memory_order_relaxed) >> (2 * kBits);
    ticket_.store(((jobs + 1) << (2 * kBits)) | (static_cast<uint64_t>(n) << kBits),
                  std::memory_order_release);
    while (take_one()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < n; ++spins) relax(spins);
    if (!failed_.load(std::memory_order_relaxed)) return;
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(exception_, nullptr));
  }

  void help() {
    for (int64_t spins = 0; !closed_.load(std::memory_order_acquire); ++spins) {
      if (take_one()) {
        spins = 0;
      } else {
        relax(spins);
      }
    }
  }

  void close() { closed_.store(true, std::memory_order_release); }

 private:
  // One word holds the job's number, the number of its pieces and the number of those taken. So a
  // thread that has read an earlier job cannot take a piece of the next one.
  static constexpr int kBits = 24;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  static constexpr int64_t kMost = static_cast<int64_t>(kMask);  // pieces of a job

  bool take_one() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if ((ticket & kMask) == (ticket >> kBits & kMask)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                            std::memory_order_acquire));
    try {
      (*body_)(static_cast<int64_t>(ticket & kMask));
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) exception_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  // It is valid from the moment when a piece is taken until the piece is done.
  const std::function<void(int64_t)>* body_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> closed_{false};
  std::atomic<bool> failed_{false};
  // The exception of the piece that set failed_. The leader reads it after it has seen in done_
  // that all pieces are done.
  std::exception_ptr exception_;
};

}  // namespace fusedrnn::cpu
