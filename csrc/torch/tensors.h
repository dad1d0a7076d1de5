// Small words for tensors of the stable ABI: errors, sizes, dtypes, copies.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// In torch's headers where a library asks for version 2.13 of the ABI; what else we call is in
// those of 2.10. Weak: null under a torch before 2.13, whichever we were compiled with, so that
// each call of them needs a second way.
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

// The text of a string argument, which is deleted. (torch 2.13's own conversion leaks one string.)
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  std::string copy(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

// Sizes as a message shows them; a call that fails nowhere makes no text of them.
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
    default:
      return "another dtype";
  }
}

// What check_torch throws under a torch that does not give the reason.
struct TorchSaysNothing : std::runtime_error {
  TorchSaysNothing()
      : std::runtime_error(
            "fusedrnn: torch failed; before version 2.13 it says why on standard error alone") {}
};

// Throws with torch's own words where a call of its C interface failed.
inline void check_torch(AOTITorchError code) {
  if (code == TORCH_SUCCESS) return;
  if (!torch_exception_get_what_without_backtrace) throw TorchSaysNothing();
  fail(torch_exception_get_what_without_backtrace());
}

// Uninitialised, on the device of `like`. (Not stable::empty, which looks the op up by its name and
// takes twice as long; and not aoti_torch_empty_strided, which knows nothing of
// torch.utils.deterministic.fill_uninitialized_memory.)
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

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace fusedrnn
