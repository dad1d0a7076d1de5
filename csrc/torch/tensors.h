// Small words for tensors of the stable ABI: errors, sizes, dtypes, copies.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
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

inline std::string shape(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i)
    text.append(i ? ", " : "").append(std::to_string(sizes[i]));
  return text.append("]");
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
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

inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype, const char* meaning,
                         const std::vector<int64_t>& expected) {
  check(t.is_cpu(), name, " must be on the CPU");
  check(t.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ",
        name_of(t.scalar_type()));
  check(sizes_of(t) == expected, name, " must be ", meaning, " = ", shape(expected), ", got ",
        shape(sizes_of(t)));
}

// Asks for huge pages where a tensor has fresh memory: the first touch of 34 MB takes 15 ms in small
// pages and 2 ms in huge ones. From this size on, as NumPy does it.
constexpr size_t kHugePagesFrom = size_t{4} << 20;

inline void advise_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < kHugePagesFrom) return;
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = torch::stable::empty(sizes, dtype);
  advise_huge_pages(t);
  return t;
}

inline Tensor zeros(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = empty(sizes, dtype);
  return torch::stable::zero_(t);
}

// t in `dtype`, contiguous; t itself where it is that already.
inline Tensor prepare(const Tensor& t, ScalarType dtype) {
  Tensor out = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return out.is_contiguous() ? out : torch::stable::contiguous(out);
}

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace fusedrnn
