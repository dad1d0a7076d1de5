// Helpers for tensors of the stable ABI: errors, sizes, dtypes, storage, copies.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "error_tags.h"

// Torch's headers declare these two functions only for a library that asks for version 2.13 of the
// ABI; all else that we call is in version 2.10. The symbols are weak. They are null under a torch
// before 2.13, whatever version we were compiled with, so every caller needs another way.
extern "C" {
__attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream,
                                                                void** native_handle);
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}

namespace fusedrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fusedrnn: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

// Returns the text of a string argument and deletes the argument. (The conversion in torch 2.13
// leaks a string.)
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  std::string copy(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

// Sizes that a message shows. They become text only if a message is made.
struct Shape {
  Sizes sizes;
};

inline Shape shape(const Tensor& t) { return {t.sizes()}; }

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (size_t i = 0; i < shape.sizes.size(); ++i) out << (i ? ", " : "") << shape.sizes[i];
  return out << "]";
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Torch's message for a lack of memory on a GPU has these words.
constexpr const char* kTorchLacksGpuMemory = "CUDA out of memory";

// check_torch throws this under a torch that does not give the reason.
struct TorchSaysNothing : std::runtime_error {
  TorchSaysNothing()
      : std::runtime_error(
            "fusedrnn: torch failed; before version 2.13 it says why on standard error alone") {}
};

// Throws if a call of torch's C interface failed, with torch's own message. The call returns the
// same code for every error, and torch_exception_get_what_without_backtrace, since 2.13, gives the
// message alone. So only words of the message tell a lack of memory from other errors: the name of
// std::bad_alloc, or torch's words for a GPU. The check "out of memory" of fusedrnn/selftest.py,
// which needs a GPU, fails if torch changes its words.
inline void check_torch(AOTITorchError code) {
  if (code == TORCH_SUCCESS) return;
  if (!torch_exception_get_what_without_backtrace) throw TorchSaysNothing();
  const char* const what = torch_exception_get_what_without_backtrace();
  if (std::strstr(what, "bad_alloc")) throw std::bad_alloc();
  if (std::strstr(what, kTorchLacksGpuMemory)) fail(what, kMemoryTag);
  fail(what);
}

// Torch's message for a lack of memory on the CPU has these words. Code that catches it to try
// again looks for them.
constexpr const char* kTorchLacksMemory = "DefaultCPUAllocator: can't allocate memory";

// The error for a lack of memory outside of tensors. It is made in advance, because memory is
// lacking when it is thrown.
inline const std::runtime_error kLackOfMemory(
    std::string("fusedrnn: not enough memory for a call's own notes (std::bad_alloc, which torch "
                "says as \"")
        .append(kTorchLacksMemory)
        .append("\"); a smaller batch or shorter sequences need less"));

// An op in the form in which torch calls it. Any lack of memory in it becomes a RuntimeError in
// Python, as in torch.
template <auto op>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  try {
    TORCH_BOX(op)(stack, arguments, outputs);
  } catch (const std::bad_alloc&) {
    throw kLackOfMemory;
  } catch (const std::length_error&) {  // a vector larger than any memory
    throw kLackOfMemory;
  }
}

// The bytes that a tensor would need. The result is a double because sizes that are far too large
// may overflow an integer.
inline double bytes_wanted(Sizes sizes, ScalarType dtype) {
  auto bytes = static_cast<double>(aoti_torch_dtype_element_size(
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))));
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  return bytes;
}

// An uninitialised tensor on the device of `like`. Two other functions would not do: stable::empty
// looks the op up by its name and takes twice as long, and aoti_torch_empty_strided ignores
// torch.utils.deterministic.fill_uninitialized_memory.
inline Tensor new_empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                        static_cast<int64_t>(sizes.size()), &code, nullptr, nullptr,
                                        0, nullptr, &made));
  return Tensor(made);
}

inline size_t bytes_of(const Tensor& t) {
  return static_cast<size_t>(t.numel()) * t.element_size();
}

// Copies the values of `from` to `to`, whose dtype and strides stay. (stable::copy_ would not say
// why it failed.)
inline void copy(const Tensor& to, const Tensor& from) {
  check_torch(aoti_torch_copy_(to.get(), from.get(), 0));
}

template <class Value>
Value* data(const Tensor& t) {
  return static_cast<Value*>(t.data_ptr());
}

// Whether the data of t begin at a multiple of `bytes`. The memory of a buffer that came from
// Python may be unaligned.
inline bool is_aligned(const Tensor& t, size_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % bytes == 0;
}

// Throws if the storage of t is smaller than its sizes, strides and offset need. Torch does not
// check this when it hands out a pointer.
inline void check_storage(const Tensor& t, const char* name) {
  int64_t there = 0, offset = 0, rank = 0, *sizes = nullptr, *strides = nullptr;
  check_torch(aoti_torch_get_storage_size(t.get(), &there));
  check_torch(aoti_torch_get_storage_offset(t.get(), &offset));
  check_torch(aoti_torch_get_dim(t.get(), &rank));
  check_torch(aoti_torch_get_sizes(t.get(), &sizes));
  check_torch(aoti_torch_get_strides(t.get(), &strides));
  int64_t values = offset + 1;
  for (int64_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0) return;
    values += (sizes[i] - 1) * strides[i];
  }
  const int64_t needed = values * static_cast<int64_t>(t.element_size());
  if (needed <= there) return;
  fail(name, " must have a storage of ", needed, " bytes for ", shape(t), " in ",
       name_of(t.scalar_type()), ", got one of ", there,
       ": its memory was freed (untyped_storage().resize_). FSDP frees weights so outside of the "
       "forward and backward of the module that it wraps: call backward on what that module "
       "returned, not on a tensor that was kept inside it");
}

}  // namespace fusedrnn
