// The host side of the CUDA engine for Python. A Python object of the tests gives memory and runs
// launches. Pointers are integers, and 0 means that there is none. tests/kit/build.py builds this
// module, which is not part of the package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/estimate.h"
#include "cuda/layer.h"
#include "cuda/row_sums.h"
#include "device.h"
#include "layer/reserve.h"

namespace fusedrnn_test {
namespace {

namespace py = pybind11;
using namespace fusedrnn;
using namespace fusedrnn::cuda;

using Address = uintptr_t;

// Calls the methods of a Python object that have the same names.
class PythonLauncher final : public Launcher {
 public:
  explicit PythonLauncher(py::object object)
      : object_(std::move(object)), device_(fusedrnn_test::device_of(object_)) {}

  const Device& device() const override { return device_; }

  int registers_of(const std::string& kernel) override {
    return object_.attr("registers_of")(kernel).cast<int>();
  }

  void launch(const Launch& l) override {
    object_.attr("launch")(l.kernel, py::make_tuple(l.grid.x, l.grid.y, l.grid.z),
                           py::make_tuple(l.block.x, l.block.y, l.block.z), l.shared_bytes,
                           py::bytes(static_cast<const char*>(l.args), l.args_bytes), l.cooperative,
                           l.cluster);
  }

  void multiply(const MatrixProduct& p) override {
    // (address, rows and columns in memory, row stride, whether the product transposes it).
    const auto operand = [](const auto& m) {
      return py::make_tuple(reinterpret_cast<Address>(m.data), m.transposed ? m.columns : m.rows,
                            m.transposed ? m.rows : m.columns, m.ld, m.transposed);
    };
    object_.attr("multiply")(name_of(p.dtype), name_of(p.c_dtype), operand(p.a), operand(p.b),
                             operand(p.c), p.accumulate);
  }

  void zero(void* p, size_t bytes) override {
    object_.attr("zero")(reinterpret_cast<Address>(p), bytes);
  }

  void scratch(std::vector<ScratchPart>& parts) override {
    py::list wanted;
    for (const ScratchPart& part : parts) wanted.append(py::make_tuple(part.bytes, part.zero));
    const auto given = object_.attr("scratch")(wanted).cast<std::vector<Address>>();
    for (size_t i = 0; i < parts.size(); ++i) parts[i].at = reinterpret_cast<void*>(given.at(i));
  }

 private:
  py::object object_;
  Device device_ = {};
};

CellKind cell_of(const std::string& name) {
  const CellKind cell = cell_named(name.c_str());
  if (cell == CellKind::kCount) throw std::invalid_argument("no cell is named " + name);
  return cell;
}

// regime: "per_step", "resident", "streamed", or empty to let the plan choose.
Options options_of(const std::string& regime, bool allow_tf32, int64_t gates_bytes,
                   unsigned spin_limit, const std::string& choice) {
  Options options;
  options.choice = choice_named(choice);
  options.gates_bytes = gates_bytes;
  options.allow_tf32 = allow_tf32;
  options.spin_limit = spin_limit;
  options.regime = regime_named(regime);
  return options;
}

py::dict device_dict(const Device& d) {
  py::dict out;
  out["capability"] = d.capability;
  out["sms"] = d.sms;
  out["threads_per_sm"] = d.threads_per_sm;
  out["registers_per_sm"] = d.registers_per_sm;
  out["shared_per_block"] = d.shared_per_block;
  out["shared_per_sm"] = d.shared_per_sm;
  out["shared_reserved"] = d.shared_reserved;
  out["l2_bytes"] = d.l2_bytes;
  for (size_t i = 0; i < kClusterSizes.size(); ++i)
    out[("blocks_in_clusters_of_" + std::to_string(kClusterSizes[i])).c_str()] =
        d.cluster_blocks[i];
  return out;
}

// card, date, cell, dtype, tf32, backward, {D, N, H, P}, regime, choice
using Measured = std::tuple<std::string, std::string, std::string, std::string, bool, bool,
                            std::array<int64_t, 4>, std::string, std::string>;

// The table that the tuples describe, which have to live longer.
std::vector<Measurement> measurements(const std::vector<Measured>& from) {
  std::vector<Measurement> table;
  for (const auto& [card, date, cell, dtype, tf32, backward, sizes, regime, choice] : from)
    table.push_back({card, date, cell, dtype, tf32, backward, sizes[0], sizes[1], sizes[2],
                     sizes[3], regime, choice});
  return table;
}

py::dict plan(const std::string& cell, const std::string& dtype, const std::vector<int64_t>& sizes,
              const std::string& arch, bool backward, bool allow_tf32, const std::string& regime,
              int registers, const py::object& device, const std::string& choice,
              const std::vector<Measured>& measured) {
  PlanRequest q = request_named({cell_of(cell), dtype, sizes, arch, backward, allow_tf32, regime});
  q.registers_fma = q.registers_mma = registers;
  q.choice = choice_named(choice);
  if (!device.is_none()) q.device = device_of(device);
  const std::vector<Measurement> table = measurements(measured);
  q.measured = table;
  const Plan plan = make_plan(q);
  const Card& card = card_named(arch);
  const Estimate e = estimate(q, plan, card);
  py::dict out;
  out["regime"] = name_of(plan.regime);
  out["why_per_step"] = plan.why_per_step;
  out["text"] = to_text(q, plan, card);
  out["cores"] = plan.cores == Cores::kMma ? "mma" : "fma";
  out["grid"] = py::make_tuple(plan.grid.x, plan.grid.y, plan.grid.z);
  out["blocks_per_sm"] = plan.blocks_per_sm;
  out["clocks"] = plan.clocks;
  out["measured"] = plan.measured;
  out["units"] = plan.shape.units;
  out["rows"] = plan.shape.rows;
  out["rows_pad"] = plan.shape.rows_pad;
  out["cluster"] = plan.shape.cluster;
  out["proj_units"] = plan.shape.proj_units;
  out["group"] = plan.shape.group;
  out["partial_rows"] = plan.shape.partial_rows;
  out["streamed_bytes"] = plan.shape.streamed_bytes;
  out["shared_bytes"] = plan.shape.shared_bytes;
  out["workspace_bytes"] = plan.workspace_bytes();
  py::list tiles;
  for (int s = 0; s < info_of(q.cell).stages; ++s) {
    const ProductTile& tile = plan.shape.tile[s];
    py::dict t;
    t["R"] = tile.R;
    t["ld"] = tile.ld;
    t["slices"] = tile.slices;
    t["steps"] = tile.steps;
    t["K_pad"] = tile.K_pad;
    t["K_part"] = tile.K_part;
    t["weights"] = tile.weights;
    t["on_chip"] = tile.on_chip;
    t["ring"] = tile.ring;
    t["streamed"] = tile.streamed;
    tiles.append(t);
  }
  out["tiles"] = tiles;
  out["partials"] = plan.shape.partials;
  out["staged"] = plan.shape.staged;
  out["bias"] = plan.shape.bias;
  out["params"] = plan.shape.params;
  out["step_us"] = e.step();
  out["total_us"] = e.total();
  out["limit"] = e.limit();
  out["text"] = to_text(q, plan, card);
  return out;
}

// The sizes and options of a call.
struct Call {
  std::string cell;
  int64_t N, I, H, P, D;
  Sequences sequences;
  bool has_starts, c_in_y;

  Call(const std::string& name, const std::vector<int64_t>& batch_sizes, int64_t n, int64_t i,
       int64_t h, int64_t p, int64_t d, bool starts, bool c)
      : cell(name),
        N(n),
        I(i),
        H(h),
        P(p),
        D(d),
        sequences(fusedrnn::from_batch_sizes(batch_sizes, n)),
        has_starts(starts),
        c_in_y(c) {}
  Layer layer() const { return {cell_of(cell), I, H, P, D, sequences, has_starts, c_in_y}; }
};

// For each direction the addresses of the parameters, 0 for an absent one.
using Addresses = std::vector<std::array<Address, kParameterCount>>;

template <class Stored>
Stored* at(Address address) {
  return reinterpret_cast<Stored*>(address);
}

// The addresses of drops of each direction, and of begins.
Beginnings beginnings_at(const std::array<Address, 3>& addresses) {
  return {{at<uint8_t>(addresses[0]), at<uint8_t>(addresses[1])}, at<uint8_t>(addresses[2])};
}

template <class Stored>
void read_weights(const Addresses& addresses, Parameters<Stored>* w) {
  if (addresses.size() > 2) throw std::invalid_argument("weights must be of one or two directions");
  for (size_t d = 0; d < addresses.size(); ++d) {
    for (int i = 0; i < kParameterCount; ++i)
      w[d][static_cast<Parameter>(i)] = at<Stored>(addresses[d][i]);
  }
}

template <class Stored>
void forward(py::object launcher_object, const Call& call, Address x, const Addresses& weights,
             Address row_input, Address h, Address c, Address y, Address reserve,
             const std::array<Address, 3>& beginnings, const std::string& regime, bool allow_tf32,
             int64_t gates_bytes, unsigned spin_limit, const std::string& choice) {
  PythonLauncher launcher(std::move(launcher_object));
  LayerForward<Stored> args = {};
  args.x = at<Stored>(x);
  read_weights(weights, args.w);
  args.row_input = at<Real<Stored>>(row_input);
  args.h = at<Real<Stored>>(h);
  args.c = at<Real<Stored>>(c);
  args.y = at<Stored>(y);
  args.reserve = at<void>(reserve);
  args.beginnings = beginnings_at(beginnings);
  layer_forward<Stored>(call.layer(), launcher,
                        options_of(regime, allow_tf32, gates_bytes, spin_limit, choice), args);
}

template <class Stored>
void backward(py::object launcher_object, const Call& call, Address x, const Addresses& weights,
              Address row_input, Address reserve, Address d_y, Address d_h, Address d_c,
              Address d_x, const Addresses& d_weights, const std::array<Address, 3>& beginnings,
              const std::string& regime, bool allow_tf32, int64_t gates_bytes, unsigned spin_limit,
              const std::string& choice) {
  PythonLauncher launcher(std::move(launcher_object));
  LayerBackward<Stored> args = {};
  args.x = at<Stored>(x);
  read_weights(weights, args.w);
  args.row_input = at<Real<Stored>>(row_input);
  args.reserve = at<void>(reserve);
  args.beginnings = beginnings_at(beginnings);
  args.d_y = at<Stored>(d_y);
  args.d_h = at<Real<Stored>>(d_h);
  args.d_c = at<Real<Stored>>(d_c);
  args.d_x = at<Stored>(d_x);
  read_weights(d_weights, args.d_w);
  layer_backward<Stored>(call.layer(), launcher,
                         options_of(regime, allow_tf32, gates_bytes, spin_limit, choice), args);
}

// Sums over the rows of some matrices, each given by its columns and the addresses of m, out and
// again.
template <class Stored>
void sum_rows(py::object launcher_object, int64_t rows,
              const std::vector<std::tuple<int64_t, Address, Address, Address>>& matrices) {
  PythonLauncher launcher(std::move(launcher_object));
  int64_t widest = 0;
  for (const auto& matrix : matrices) widest = std::max(widest, std::get<0>(matrix));
  Scratch scratch;
  RowSums<Stored> sums(scratch, rows, widest, static_cast<int>(matrices.size()));
  scratch.allocate(launcher);
  for (const auto& [columns, m, out, again] : matrices)
    sums.add(dense<const Stored>(at<Stored>(m), rows, columns), at<Stored>(out), at<Stored>(again));
  sums.run(launcher);
}

template <class Stored>
void define_for(py::module_& m, const std::string& dtype) {
  m.def(("sum_rows_" + dtype).c_str(), sum_rows<Stored>);
  m.def(("layer_forward_" + dtype).c_str(), forward<Stored>);
  m.def(("layer_backward_" + dtype).c_str(), backward<Stored>);
  m.def(("reserve_bytes_" + dtype).c_str(), [](const Call& call) {
    return reserve_bytes<Stored>(call.layer(), call.sequences.rows());
  });
}

}  // namespace
}  // namespace fusedrnn_test

PYBIND11_MODULE(_cuda_host, m) {
  using namespace fusedrnn_test;
  namespace py = pybind11;
  py::class_<Call>(m, "Call").def(py::init<const std::string&, const std::vector<int64_t>&, int64_t,
                                           int64_t, int64_t, int64_t, int64_t, bool, bool>(),
                                  py::arg("cell"), py::arg("batch_sizes"), py::arg("N"),
                                  py::arg("I"), py::arg("H"), py::arg("P"), py::arg("D"),
                                  py::arg("has_starts") = false, py::arg("c_in_y") = false);
  m.def("cards", [] {
    py::list names;
    for (const Card& card : kCards) names.append(card.name);
    return names;
  });
  // The limits of a card, which is given by its name or by an architecture such as sm_90.
  m.def("device", [](const std::string& name) { return device_dict(card_named(name).device); });
  m.def("bandwidth", [](const std::string& name) { return card_named(name).hbm_gb_s; });
  // TFLOPS of a whole device for products in float32, 16 bits, TF32 and float64.
  m.def("peaks", [](const std::string& name) {
    const Card& card = card_named(name);
    const double clocks = card.device.sms * card.ghz * 1e-3;
    return py::make_tuple(clocks * card.fma_flops, clocks * card.half_flops,
                          clocks * card.tf32_flops, clocks * card.double_flops);
  });
  m.def("plan", plan, py::arg("cell"), py::arg("dtype"), py::arg("sizes"), py::arg("arch"),
        py::kw_only(), py::arg("backward") = false, py::arg("allow_tf32") = false,
        py::arg("regime") = "", py::arg("registers") = 255, py::arg("device") = py::none(),
        py::arg("choice") = "", py::arg("measured") = std::vector<Measured>());
  // Reads every entry of the table that is checked in, and throws if one has an unknown name.
  m.def("read_measured", [] {
    for (const Measurement& m : kMeasured) {
      cell_of(std::string(m.cell));
      dtype_named(std::string(m.dtype));
      following({}, m);
    }
    return kMeasured.size();
  });
  m.attr("SPIN_LIMIT") = Options().spin_limit;
  m.def("blocks_per_sm", [](const std::string& arch, int registers, size_t shared) {
    return blocks_per_sm(card_named(arch).device, registers, shared);
  });
  m.def("rows_of_range", rows_of_range);
  define_for<float>(m, "f32");
  define_for<double>(m, "f64");
  define_for<Half>(m, "f16");
  define_for<Bf16>(m, "bf16");
}
