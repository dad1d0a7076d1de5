// The Python module _ptxvm: programs, the memory of numpy arrays that their kernels may touch, and
// launches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "machine.h"

namespace py = pybind11;

namespace ptxvm {
namespace {

struct Memory {
  std::map<uint64_t, std::unique_ptr<Buffer>> buffers;

  void add(const std::string& name, uint64_t address, uint64_t size, bool written, bool writable) {
    const auto next = buffers.lower_bound(address);
    const bool over_next = next != buffers.end() && next->first < address + size;
    const bool over_last =
        next != buffers.begin() && std::prev(next)->first + std::prev(next)->second->size > address;
    if (over_next || over_last)
      throw std::invalid_argument(name + " overlaps " +
                                  (over_next ? next->second : std::prev(next)->second)->name);
    auto buffer = std::make_unique<Buffer>();
    buffer->name = name;
    buffer->data = reinterpret_cast<unsigned char*>(address);
    buffer->size = size;
    buffer->writable = writable;
    if (!written) buffer->written.assign(size, 0);
    buffers[address] = std::move(buffer);
  }

  Buffer& at(uint64_t address) {
    const auto found = buffers.find(address);
    if (found == buffers.end()) throw std::invalid_argument("no buffer begins at this address");
    return *found->second;
  }

  // Marks bytes as written by the host.
  void mark_written(uint64_t address, uint64_t size) {
    const auto next = buffers.upper_bound(address);
    if (next == buffers.begin()) throw std::invalid_argument("no buffer holds this address");
    Buffer& buffer = *std::prev(next)->second;
    const uint64_t offset = address - buffer.address();
    if (offset + size > buffer.size) throw std::invalid_argument("no buffer holds these bytes");
    if (!buffer.written.empty()) std::fill_n(buffer.written.begin() + offset, size, 1);
  }

  py::array_t<bool> written(uint64_t address) {
    const Buffer& buffer = at(address);
    py::array_t<bool> out(static_cast<py::ssize_t>(buffer.size));
    for (uint64_t k = 0; k < buffer.size; ++k)
      out.mutable_data()[k] = buffer.written.empty() || buffer.written[k];
    return out;
  }
};

py::dict launch(const Module& module, const std::string& name, const std::array<uint32_t, 3>& grid,
                const std::array<uint32_t, 3>& block, const std::array<uint32_t, 3>& cluster,
                uint64_t shared, const std::vector<py::bytes>& arguments, Memory& memory,
                uint64_t seed, int quantum, uint64_t max_steps, bool races, bool uninitialised,
                bool stale) {
  const auto found = module.kernels.find(name);
  if (found == module.kernels.end()) throw std::invalid_argument("no kernel is named " + name);
  const Kernel& kernel = found->second;
  if (arguments.size() != kernel.parameters.size())
    throw std::invalid_argument(name + " takes " + std::to_string(kernel.parameters.size()) +
                                " arguments, got " + std::to_string(arguments.size()));
  std::vector<unsigned char> parameters(kernel.parameter_bytes);
  for (size_t k = 0; k < arguments.size(); ++k) {
    const std::string bytes = arguments[k];
    const Parameter& parameter = kernel.parameters[k];
    if (bytes.size() != static_cast<size_t>(parameter.size))
      throw std::invalid_argument("argument " + std::to_string(k) + " of " + name + " has " +
                                  std::to_string(parameter.size) + " bytes, got " +
                                  std::to_string(bytes.size()));
    std::memcpy(&parameters[parameter.offset], bytes.data(), bytes.size());
  }
  std::vector<Buffer*> buffers;
  for (auto& [address, buffer] : memory.buffers) buffers.push_back(buffer.get());
  Options options;
  options.seed = seed;
  options.quantum = std::max(1, quantum);
  std::copy(cluster.begin(), cluster.end(), options.cluster);
  if (max_steps) options.max_steps = max_steps;
  options.races = races;
  options.uninitialised = uninitialised;
  // The check "stale" needs the marks of accesses, which only the check "races" makes.
  options.stale = stale && races;
  Statistics statistics;
  {
    py::gil_scoped_release release;
    Machine machine(module, kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                    shared, std::move(parameters), std::move(buffers), options);
    statistics = machine.run();
  }
  for (auto& [address, buffer] : memory.buffers) buffer->shadows.reset();
  py::dict out;
  out["instructions"] = statistics.instructions;
  out["stale_loads"] = statistics.stale_loads;
  return out;
}

}  // namespace
}  // namespace ptxvm

PYBIND11_MODULE(_ptxvm, m) {
  using namespace ptxvm;
  static py::handle fault_type = py::exception<Fault>(m, "Fault", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Fault& fault) {
      py::object error = fault_type(fault.what());
      const auto or_none = [](int n) { return n < 0 ? py::object(py::none()) : py::int_(n); };
      error.attr("kind") = fault.kind;
      error.attr("block") = or_none(fault.block);
      error.attr("thread") = or_none(fault.thread);
      error.attr("ptx_line") = or_none(fault.ptx_line);
      error.attr("source") = fault.source;
      PyErr_SetObject(fault_type.ptr(), error.ptr());
    }
  });
  py::class_<Memory>(m, "Memory")
      .def(py::init<>())
      .def("add", &Memory::add, py::arg("name"), py::arg("address"), py::arg("size"),
           py::arg("written"), py::arg("writable"))
      .def("remove", [](Memory& memory, uint64_t address) { memory.buffers.erase(address); })
      .def("mark_written", &Memory::mark_written)
      .def("written", &Memory::written);
  py::class_<Module>(m, "Module")
      .def(py::init([](const std::string& text) { return parse(text); }))
      .def_readonly("target", &Module::target)
      .def("kernels",
           [](const Module& module) {
             py::dict out;
             for (const auto& [name, kernel] : module.kernels) {
               std::vector<int> sizes;
               for (const Parameter& p : kernel.parameters) sizes.push_back(p.size);
               const std::vector<uint32_t> cluster(kernel.cluster, kernel.cluster + 3);
               out[py::str(name)] =
                   py::make_tuple(sizes, kernel.shared_bytes, kernel.max_threads, cluster);
             }
             return out;
           })
      .def("unknown",
           [](const Module& module, const std::string& name) {
             std::vector<std::string> out;
             const Kernel& kernel = module.kernels.at(name);
             for (const Instruction& i : kernel.code)
               if (!is_known(i)) out.push_back(kernel.origins[i.place].text);
             return out;
           })
      .def("launch", &launch);
}
