// The operations that the host side of the CUDA engine needs: start a kernel, multiply matrices,
// get memory. On a GPU that is the CUDA runtime and torch on the current stream; in the tests the
// PTX interpreter and numpy. Every call takes effect in the order of the calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../layer/dtype.h"
#include "../layer/matrix.h"

namespace fusedrnn::cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Limits of a device that decide what can run on it.
struct Device {
  int capability;  // 10 * major + minor
  int sms;
  int threads_per_sm;
  int registers_per_sm;     // registers of 32 bits
  size_t shared_per_block;  // bytes that a block may ask for at most (opt-in)
  size_t shared_per_sm;
  size_t shared_reserved;  // taken by the system from each block's share
};

// One kernel, started with one struct.
struct Launch {
  std::string kernel;  // its extern "C" name
  Dim3 grid, block;
  size_t shared_bytes = 0;
  const void* args = nullptr;
  size_t args_bytes = 0;
  bool cooperative = false;  // all blocks must run together, or the launch must fail
};

// c = a b or c += a b, summed at least in float32. c is not transposed.
struct Product {
  Dtype dtype;           // of a and b
  Dtype c_dtype;         // dtype, or float32 for 16-bit a and b
  Matrix<const void> a;  // [M, K]
  Matrix<const void> b;  // [K, N]
  Matrix<void> c;        // [M, N]
  bool accumulate = false;
};

class Launcher {
 public:
  virtual ~Launcher() = default;
  virtual const Device& device() const = 0;
  // Registers of a thread of this kernel, as the compiler made it for this device.
  virtual int registers_of(const std::string& kernel) = 0;
  // Throws where the kernel does not start; the message names kernel, grid and way out.
  virtual void launch(const Launch& launch) = 0;
  virtual void multiply(const Product& product) = 0;
  virtual void zero(void* p, size_t bytes) = 0;
  // Device memory, uninitialised, aligned to 256 bytes, valid until what was started has run.
  virtual void* scratch(size_t bytes) = 0;
};

}  // namespace fusedrnn::cuda
