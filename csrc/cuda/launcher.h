// The interface through which the host side of the CUDA engine starts kernels, multiplies matrices
// and gets memory. On a GPU the CUDA runtime and torch implement it, on the current stream; in the
// tests the PTX interpreter and numpy do. Calls take effect in the order in which they are made.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../layer/dtype.h"
#include "../layer/matrix.h"

namespace fusedrnn::cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The numbers of blocks that a cluster may have, but for 1, which means no clusters.
constexpr std::array kClusterSizes = {2, 4, 8};

// The limits of a device, on which the plan depends, and its name.
struct Device {
  int capability;  // 10 * major + minor
  int sms;
  int threads_per_sm;
  int registers_per_sm;     // registers of 32 bits
  size_t shared_per_block;  // the most bytes that a block may ask for (opt-in)
  size_t shared_per_sm;
  size_t shared_reserved;  // bytes that the system takes for each block
  size_t l2_bytes;
  // How many blocks of clusters of each size run together, one on each multiprocessor. Zero if the
  // device has no clusters.
  int cluster_blocks[kClusterSizes.size()];
  // The driver's name of the card, by which the plan finds measurements.
  std::string_view name = {};
};

// The start of a kernel, whose only argument is a struct.
struct Launch {
  std::string kernel;  // the kernel's extern "C" name
  Dim3 grid, block;
  size_t shared_bytes = 0;
  const void* args = nullptr;
  size_t args_bytes = 0;
  bool cooperative = false;  // the launch fails unless all blocks can run together
  unsigned cluster = 1;      // blocks of a cluster, along x
};

// The product c = a b, or c += a b. Its sums are in float32 at least. c is not transposed.
struct MatrixProduct {
  Dtype dtype;           // the dtype of a and b
  Dtype c_dtype;         // the same, or float32 for 16-bit a and b
  Matrix<const void> a;  // [M, K]
  Matrix<const void> b;  // [K, N]
  Matrix<void> c;        // [M, N]
  bool accumulate = false;
};

// A part of the scratch memory of a pass.
struct ScratchPart {
  size_t bytes;
  bool zero;           // whether it must be zero, else it is uninitialised
  void* at = nullptr;  // receives its address, a multiple of 256
};

class Launcher {
 public:
  virtual ~Launcher() = default;
  virtual const Device& device() const = 0;
  // How many registers a thread of this kernel has in the code compiled for this device.
  virtual int registers_of(const std::string& kernel) = 0;
  // Throws if the kernel does not start. The message names the kernel and the grid, and says what
  // to do.
  virtual void launch(const Launch& launch) = 0;
  virtual void multiply(const MatrixProduct& product) = 0;
  virtual void zero(void* p, size_t bytes) = 0;
  // Gives each part device memory, which is valid until all work that was started has run. On a GPU
  // the parts share one allocation, and those that must be zero lie together for one memset. In the
  // tests each part is an array with bounds of its own.
  virtual void scratch(std::vector<ScratchPart>& parts) = 0;
};

}  // namespace fusedrnn::cuda
