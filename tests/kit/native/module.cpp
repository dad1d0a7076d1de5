// Parts of the CPU engine for numpy arrays, without torch. tests/kit/build.py builds this module,
// which is not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "sweep.h"
#include "vecmath_table.h"

namespace py = pybind11;

namespace fusedrnn_test {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// The reason why `isa` cannot run here. It is empty if `isa` can run.
std::string missing(const std::string& isa) {
  for (const fusedrnn::cpu::IsaInfo& info : fusedrnn::cpu::instruction_sets())
    if (isa == info.name)
      return info.supported ? "" : "this processor lacks " + std::string(info.needs);
  throw std::invalid_argument("no instruction set is named " + isa);
}

const VecMathTable& table(const std::string& isa) {
  if (isa == "scalar") return kScalar;
  const std::string reason = missing(isa);
  if (!reason.empty()) throw std::runtime_error(isa + ": " + reason);
  return isa.starts_with("avx512") ? kAvx512 : isa == "avx2" ? kAvx2 : kPortable;
}

template <class T>
const VecMath<T>& functions(const std::string& isa) {
  if constexpr (sizeof(T) == 4) {
    return table(isa).f32;
  } else {
    return table(isa).f64;
  }
}

template <class T>
typename VecMath<T>::Function function_named(const std::string& isa, const std::string& name) {
  const VecMath<T>& all = functions<T>(isa);
  const auto found = name == "exp"       ? all.exp
                     : name == "sigmoid" ? all.sigmoid
                     : name == "tanh"    ? all.tanh
                     : name == "relu"    ? all.relu
                                         : nullptr;
  if (!found) throw std::invalid_argument(isa + " has no function " + name);
  return found;
}

// Memory of n numbers that ends where an inaccessible page begins.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (static_cast<size_t>(n) * sizeof(T) + page - 1) / page * page;
    size_ = used + page;
    base_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + used, page, PROT_NONE);
    data = reinterpret_cast<T*>(base_ + used) - n;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data;

 private:
  char* base_;
  size_t size_;
};

// Both arrays end at inaccessible pages, so an access past n is a segmentation fault.
template <class T>
Array<T> vecmath(const std::string& isa, const std::string& name, const Array<T>& x) {
  const auto function = function_named<T>(isa, name);
  const int64_t n = x.size();
  const Guarded<T> in(n), out(n);
  std::memcpy(in.data, x.data(), static_cast<size_t>(n) * sizeof(T));
  function(in.data, out.data, n);
  Array<T> y(n);
  std::memcpy(y.mutable_data(), out.data, static_cast<size_t>(n) * sizeof(T));
  return y;
}

template <class T>
Array<T> relu_grad(const std::string& isa, const Array<T>& y, const Array<T>& d) {
  if (y.size() != d.size()) throw std::invalid_argument("y and d must be of one size");
  Array<T> out(y.size());
  functions<T>(isa).relu_grad(y.data(), d.data(), out.mutable_data(), y.size());
  return out;
}

template <class T>
Array<T> load_partial(const std::string& isa, const Array<T>& x) {
  const VecMath<T>& all = functions<T>(isa);
  if (x.size() > all.lanes) throw std::invalid_argument("x is longer than a vector");
  const Guarded<T> in(x.size());
  std::memcpy(in.data, x.data(), static_cast<size_t>(x.size()) * sizeof(T));
  Array<T> out(all.lanes);
  all.load_partial(in.data, static_cast<int>(x.size()), out.mutable_data());
  return out;
}

template <class T>
py::dict as_dict(const Findings<T>& findings) {
  py::dict out;
  out["worst_ulps"] = findings.worst_ulps;
  out["worst_at"] = findings.worst_at;
  out["worst_step_back"] = findings.worst_step_back;
  out["step_back_at"] = findings.step_back_at;
  out["count"] = findings.count;
  return out;
}

template <class T>
py::dict judge(const std::string& name, const Array<T>& x, const Array<T>& y) {
  if (x.size() != y.size()) throw std::invalid_argument("x and y must be of one size");
  Findings<T> findings;
  findings.judge(reference<T>(name), x.data(), y.data(), x.size());
  return as_dict(findings);
}

template <class T>
py::dict sweep_range(const std::string& isa, const std::string& name, T lowest, T highest,
                     uint64_t stride) {
  if (!(lowest <= highest)) throw std::invalid_argument("lowest must not be above highest");
  if (stride == 0) throw std::invalid_argument("stride must be positive");
  const auto function = function_named<T>(isa, name);
  const auto wanted = reference<T>(name);
  Findings<T> findings;
  {
    py::gil_scoped_release release;
    findings = sweep<T>(function, wanted, lowest, highest, stride);
  }
  return as_dict(findings);
}

template <class T>
void define_for(py::module_& m, const char* sweep_name) {
  const auto exact = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("vecmath", vecmath<T>, py::arg("isa"), py::arg("function"), exact("x"));
  m.def("relu_grad", relu_grad<T>, py::arg("isa"), exact("y"), exact("d"));
  m.def("load_partial", load_partial<T>, py::arg("isa"), exact("x"),
        "x and then zeros, as one vector.");
  m.def("judge", judge<T>, py::arg("function"), exact("x"), exact("y"),
        "The findings of a sweep, for a function that gave y at the rising arguments x.");
  if constexpr (kHasReference<T>) {
    constexpr T kInfinite = std::numeric_limits<T>::infinity();
    m.def(sweep_name, sweep_range<T>, py::arg("isa"), py::arg("function"),
          py::arg("lowest") = -kInfinite, py::arg("highest") = kInfinite, py::arg("stride") = 1,
          "Compares a function to libm in a wider type, over one block of 256 numbers in `stride` "
          "between lowest and highest: its worst error and its worst step back, in ulps.");
  }
}

}  // namespace
}  // namespace fusedrnn_test

PYBIND11_MODULE(_native, m) {
  using namespace fusedrnn_test;
  m.def(
      "isas",
      [] {
        py::dict reasons;
        for (const fusedrnn::cpu::IsaInfo& info : fusedrnn::cpu::instruction_sets())
          reasons[info.name] = missing(info.name);
        return reasons;
      },
      "Every instruction set compiled in, and why it cannot run here (empty where it can).");
  define_for<float>(m, "sweep_float32");
  define_for<double>(m, "sweep_float64");
  define_kernels(m);
}
