// The ops of csrc/torch_cuda on CPU tensors. A Python object of the tests starts kernels in the PTX
// interpreter; memory and products come from torch, as on a GPU. tests/kit/bindings.py builds this
// module, which is not part of the package.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <utility>

#include "../cuda/device.h"
#include "torch/passes.h"
#include "torch_cuda/gpu_engine.h"

namespace fusedrnn_test {
namespace {

namespace py = pybind11;
using namespace fusedrnn;

// The device, with the methods of tests.kit.torch_device.TorchDevice, or None if no test runs.
PyObject* current = nullptr;
// All memory that was allocated for this device. The interpreter may access it until the test ends.
std::vector<Tensor> allocated;
// The products on this device: rows of the result, dtype of the factors, dtype of the result.
std::vector<std::tuple<int64_t, std::string, std::string>> products;
size_t product_limit = cuda::kProductBytes;
// Torch's C functions for products. Tests may take them away, as if this torch lacked them.
cuda::Products c_functions;

// How often the bindings called torch, by the name of a function, and an op by its name.
std::map<std::string, int> calls;
bool counting = true;

void count(const std::string& name) {
  if (counting) ++calls[name];
}

// While an object of this class lives, calls of torch belong to the tests.
class NotCounted {
 public:
  NotCounted() : before_(std::exchange(counting, false)) {}
  ~NotCounted() { counting = before_; }

 private:
  bool before_;
};

py::object device_object() {
  check(current, "no test has chosen a device");
  return py::reinterpret_borrow<py::object>(current);
}

class InterpreterLauncher final : public cuda::TorchLauncher {
 public:
  explicit InterpreterLauncher(const Tensor& x) : TorchLauncher(x, c_functions) {
    check_device(x, "x");
    product_limit_ = product_limit;
    const py::gil_scoped_acquire gil;
    device_ = fusedrnn_test::device_of(device_object());
  }

  void check_device(const Tensor& t, const char* name) const {
    check(t.is_cpu(), name, " must be on the CPU");
  }

  const cuda::Device& device() const override { return device_; }

  int registers_of(const std::string& kernel) override {
    const py::gil_scoped_acquire gil;
    return device_object().attr("registers_of")(kernel).cast<int>();
  }

  void launch(const cuda::Launch& l) override {
    const py::gil_scoped_acquire gil;
    device_object().attr("launch")(l.kernel, py::make_tuple(l.grid.x, l.grid.y, l.grid.z),
                                   py::make_tuple(l.block.x, l.block.y, l.block.z), l.shared_bytes,
                                   py::bytes(static_cast<const char*>(l.args), l.args_bytes),
                                   l.cooperative, l.cluster);
  }

  void zero(void* p, size_t bytes) override {
    const py::gil_scoped_acquire gil;
    device_object().attr("zero")(reinterpret_cast<uintptr_t>(p), bytes);
  }

 protected:
  // New memory holds NaN, so that values that were never written spread to the results.
  Tensor allocate(Sizes sizes, ScalarType dtype) override {
    {
      const py::gil_scoped_acquire gil;
      if (device_object().attr("full").cast<bool>()) throw TorchSaysNothing();
    }
    const Tensor t = TorchLauncher::allocate(sizes, dtype);
    count("allocate");
    std::memset(t.data_ptr(), 0xff, bytes_of(t));
    allocated.push_back(t);
    const py::gil_scoped_acquire gil;
    device_object().attr("lend")(reinterpret_cast<uintptr_t>(t.data_ptr()), bytes_of(t), true);
    return t;
  }

  Memory memory() const override {
    const py::gil_scoped_acquire gil;
    const auto [free, total] =
        device_object().attr("memory_left")().cast<std::pair<size_t, size_t>>();
    return {free, total};
  }

  void mm(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) override {
    const ScalarType dtype = out.scalar_type();
    products.emplace_back(a.size(0), fusedrnn::name_of(a.scalar_type()), fusedrnn::name_of(dtype));
    count("product");
    // On a CPU the bits of torch's products depend on the alignment of the factors. All clones have
    // the same alignment.
    if (dtype == a.scalar_type()) {
      const auto [own_a, own_b] = clones(a, b);
      return TorchLauncher::mm(own_a, own_b, out, accumulate);
    }
    // On a CPU the result of torch's product has the dtype of its factors.
    const NotCounted here;
    Tensor to = out;
    torch::stable::copy_(
        to, torch::stable::matmul(torch::stable::to(a, dtype), torch::stable::to(b, dtype)));
  }

 private:
  static std::pair<Tensor, Tensor> clones(const Tensor& a, const Tensor& b) {
    const NotCounted here;
    return {torch::stable::clone(a), torch::stable::clone(b)};
  }

  cuda::Device device_ = {};
};

using Engine = GpuEngine<InterpreterLauncher>;

// The function of torch with this name, which a function of this module hides.
template <class Function>
Function* of_torch(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace
}  // namespace fusedrnn_test

// These functions of torch are counted when the bindings call them.
#define FUSEDRNN_COUNTED(function, label, ...)                            \
  fusedrnn_test::count(label);                                            \
  static const auto next = fusedrnn_test::of_torch(&function, #function); \
  return next(__VA_ARGS__)

extern "C" {
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                     uint64_t version) {
  const std::string name = std::string(op) + (*overload ? "." : "") + overload;
  FUSEDRNN_COUNTED(torch_call_dispatcher, name, op, overload, stack, version);
}
AOTITorchError aoti_torch_create_tensor_from_blob(void* data, int64_t rank, const int64_t* sizes,
                                                  const int64_t* strides, int64_t offset,
                                                  int32_t dtype, int32_t type, int32_t index,
                                                  AtenTensorHandle* made) {
  FUSEDRNN_COUNTED(aoti_torch_create_tensor_from_blob, "from_blob", data, rank, sizes, strides,
                   offset, dtype, type, index, made);
}
AOTITorchError aoti_torch_copy_(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking) {
  FUSEDRNN_COUNTED(aoti_torch_copy_, "copy", to, from, non_blocking);
}
}  // extern "C"

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_gpu, CPU, m) {
  m.impl("forward", &fusedrnn::boxed<&fusedrnn::forward<fusedrnn_test::Engine>>);
  m.impl("backward", &fusedrnn::boxed<&fusedrnn::backward<fusedrnn_test::Engine>>);
  m.impl("_step", &fusedrnn::boxed<&fusedrnn::step<fusedrnn_test::Engine>>);
  m.impl("_step_backward", &fusedrnn::boxed<&fusedrnn::step_backward<fusedrnn_test::Engine>>);
}

PYBIND11_MODULE(_cuda_binding, m) {
  // The caller keeps the device alive until it chooses another device or None.
  m.def("use", [](const pybind11::object& device) {
    fusedrnn_test::current = device.is_none() ? nullptr : device.ptr();
    fusedrnn_test::allocated.clear();
    fusedrnn_test::products.clear();
  });
  m.def("products", [] { return fusedrnn_test::products; });
  // How often torch was called since the last call of this function.
  m.def("calls", [] { return std::exchange(fusedrnn_test::calls, {}); });
  // Whether products go through torch's C functions, or through ops by their names.
  m.def("use_c_functions", [](bool use) {
    using namespace fusedrnn::cuda;
    fusedrnn_test::c_functions = use ? products_of("libtorch_cpu.so", "cpu") : Products();
  });
  m.attr("use_c_functions")(true);
  m.attr("PRODUCT_BYTES") = fusedrnn::cuda::kProductBytes;
  m.def("limit_products", [](size_t bytes) { fusedrnn_test::product_limit = bytes; });
  m.def("slice_rows", fusedrnn::cuda::strip_rows);
}
