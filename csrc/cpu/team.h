// Threads that stay together for a whole layer call and share one piece of work after another. A
// thread that the scheduler keeps waiting is waited for only where it holds a piece.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <utility>

namespace fusedrnn::cpu {

// Waits a little; after a while gives the processor away, for whoever is waited for may want it.
inline void relax(int64_t spins) {
  if (spins % 256 == 255) {
    std::this_thread::yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// One thread leads: it calls parallel, and close at the end, whatever was thrown. Any others call
// help, which returns after that; whether any do, and when, makes no difference to what is
// computed.
class Team {
 public:
  // body(i) for every i in [0, n), n <= kMost, shared by whoever is there; returns when all are
  // done, and then throws what a piece threw, of several the first.
  void parallel(int64_t n, const std::function<void(int64_t)>& body) {
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

  static constexpr int64_t kMost = (int64_t{1} << 24) - 1;

 private:
  // The job's number, how many pieces it has and how many are taken, in one word: so a thread that
  // looked at a job that is over takes nothing of the next.
  static constexpr int kBits = 24;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

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

  // Valid from a piece's being taken until it is done.
  const std::function<void(int64_t)>* body_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> closed_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;  // of the piece that set failed_; done_ hands it to the leader
};

}  // namespace fusedrnn::cpu
