// The surroundings of the CPU engine: threads and scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fusedrnn::cpu {

class Runtime {
 public:
  virtual ~Runtime() = default;
  virtual int64_t threads() const = 0;
  // Why there are not more threads, for the log; "" if the caller set their number.
  virtual const char* why_threads() const { return ""; }
  // Runs body(i) for every i in [0, n), in any order, and perhaps at the same time. If one of them
  // throws, the exception is thrown here, after all that have begun have ended.
  virtual void parallel(int64_t n, const std::function<void(int64_t)>& body) = 0;
  // Runs body. The calls of `parallel` within it may share the same threads.
  virtual void together(const std::function<void()>& body) { body(); }
  // Returns uninitialised memory, aligned to 64 bytes and valid until the layer call returns.
  virtual void* scratch(size_t bytes) = 0;
};

}  // namespace fusedrnn::cpu
