// The number of threads that a call uses. It affects only the time that a call takes, never its
// results.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace fusedrnn::cpu {

// The least work, in multiply-adds, for which a call uses more than one thread. One thread takes up
// to 15 µs for less work. A second thread saves 1 µs of that on an idle machine, but costs hundreds
// of microseconds if another process holds its core. (A step of an LSTM with N = 1, I = H = 64
// takes 20 µs with one thread; with two it takes 19 µs, or 200 µs beside another process.)
constexpr double kWorkForThreads = 1 << 19;

// The least work for each thread if the threads are started for this call alone. To start one takes
// 30 µs.
constexpr double kWorkForOwnThread = 16 * kWorkForThreads;

// Whether other processes hold the processors that our threads would run on. A call notes this if
// it had to wait at its end for a thread that was not running. For a while after that, calls run on
// the caller's thread alone, because two threads that run in turns get less done than one. This is
// the only state that outlives a call.
class Crowd {
 public:
  using Clock = std::chrono::steady_clock;

  static bool here() { return Clock::now().time_since_epoch().count() < until_; }

  // A call that ran from `start` to `end` reports that it waited for its other threads from
  // `finished` on.
  static void note(Clock::time_point start, Clock::time_point finished, Clock::time_point end) {
    // A thread that is running leaves within microseconds. If less than half of the call was spent
    // waiting, two threads that are stopped now and then still get more done than one. (LSTM
    // (100,32,256,256) training beside two busy processes took 2.7 times as long as on an idle
    // machine, and 4 times as long on the caller's thread alone.)
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
  const char* why;  // why there are not more, for the log; "" if the caller set their number
};

// work: roughly the number of multiply-adds of the call. own: whether the call would have to start
// the threads itself. available(): the number of threads that the caller allows; it is called only
// if more than one may run.
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
