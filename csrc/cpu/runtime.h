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
  // Why there are no more threads than these, for the log; "" where the caller set their number.
  virtual const char* why_threads() const { return ""; }
  // body(i) for every i in [0, n), in any order, at once or one after another. What one of them
  // throws is thrown when no other runs any more.
  virtual void parallel(int64_t n, const std::function<void(int64_t)>& body) = 0;
  // Runs body, in which calls of parallel may share the same threads.
  virtual void together(const std::function<void()>& body) { body(); }
  // Uninitialised, aligned to 64 bytes, valid until the layer call returns.
  virtual void* scratch(size_t bytes) = 0;
};

}  // namespace fusedrnn::cpu
