// How many threads a call takes: a policy about time. Numbers never depend on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace fusedrnn::cpu {

// Less work than this, in multiply-adds, one thread does alone, in up to 15 µs. A second one saves
// 1 µs of it on an idle machine, and where another process holds its core, costs hundreds. (A step
// of an LSTM, N = 1, I = H = 64: 20 µs by one thread; by two 19, or 200 beside another process.)
constexpr double kWorkForThreads = 1 << 19;

// The same for a thread that is started for the call alone, which takes 30 µs.
constexpr double kWorkForOwnThread = 16 * kWorkForThreads;

// Whether other processes hold the processors that our threads would run on. A call that waited at
// its end for a thread that was not running says so; then calls run on the caller's thread alone
// for a while, since two that take turns in running get less done than one. Nothing else outlives a
// call.
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

struct ThreadChoice {
  int64_t threads;
  const char* why;  // there are no more, for the log; "" where the caller set their number
};

// work: multiply-adds of the call, about. available(): how many threads the caller allows; asked
// only where more than one may run. own: the call would have to start them itself.
template <class Available>
ThreadChoice choose_threads(double work, bool own, const Available& available) {
  if (work < kWorkForThreads) return {1, "little work"};
  if (Crowd::here()) return {1, "the machine is busy"};
  const int64_t most = available();
  if (most == 1 || !own) return {most, ""};
  const double worth = std::clamp(work / kWorkForOwnThread, 1.0, static_cast<double>(most));
  return {static_cast<int64_t>(worth), "in a forked process, which starts them for each call"};
}

}  // namespace fusedrnn::cpu
