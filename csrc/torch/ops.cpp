// The schemas of all ops, and the functions that run them on the CPU.
#include "cpu_engine.h"
#include "passes.h"

namespace fusedrnn {
namespace {

// Returns the facts that fusedrnn._library reads, a line each:
// - the chosen instruction set;
// - whether bfloat16 is multiplied in pairs;
// - each instruction set that was compiled, and whether this processor supports it;
// - each cell, with its properties as key=value. Of each parameter it gives the name, the sizes and
//   whether it is a bias.
// Throws if FUSEDRNN_ISA names an instruction set that cannot be used.
std::string info() {
  std::ostringstream text;
  text << "isa " << cpu::kernels().isa << "\n";
  text << "pairs " << (cpu::kernels().bf16 != nullptr) << "\n";
  for (const cpu::IsaInfo& isa : cpu::instruction_sets())
    text << "compiled " << isa.name << " " << (isa.supported ? "supported" : "unsupported") << "\n";
  for (const CellInfo& cell : kCellInfo) {
    text << "cell name=" << cell.name << " gates=" << cell.gates << " saved=" << cell.saved
         << " saves_h=" << cell.saves_h << " has_c=" << cell.has_c << " stages=" << cell.stages
         << " projects=" << cell.projects << " takes_row=" << cell.takes_row << " parameters=";
    const char* separator = "";
    for (const Parameter p : parameters_of(cell, true)) {
      text << separator << info_of(p).name << ":";
      for (const char letter : ShapeInLetters{cell, p}.text())
        if (!std::strchr("[] ", letter)) text << letter;
      text << ":" << info_of(p).is_bias;
      separator = ";";
    }
    text << "\n";
  }
  return text.str();
}

void check_storage_of(const Tensor& t, StringHandle name) {
  check_storage(t, take_string(name).c_str());
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(
      "forward(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, SymInt batch, str cell, bool bidirectional, bool keep, "
      "Tensor? starts=None, bool c_in_y=False) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)");
  m.def(
      "backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, Tensor reserve, Tensor? batch_sizes, Tensor? lengths, SymInt batch, "
      "str cell, bool bidirectional, bool need_x, bool need_state, bool need_weights, "
      "Tensor? starts=None, bool c_in_y=False) "
      "-> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor[] d_weights)");
  // One step of a cell. These two ops serve eager mode alone: neither autograd nor the compiler
  // knows them.
  m.def(
      "_step(Tensor x, Tensor? h, Tensor? c, Tensor[] weights, int input_size, int hidden_size, "
      "str cell, bool keep) -> Tensor[]");
  m.def(
      "_step_backward(Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor[] weights, Tensor reserve, "
      "int input_size, int hidden_size, str cell, bool need_x, bool need_state, bool need_weights) "
      "-> (Tensor? d_x, Tensor? d_h, Tensor? d_c, Tensor[] d_weights)");
  // Throws if the memory of a tensor was freed. It checks tensors that torch reads before an op
  // above could check them.
  m.def("_check_storage(Tensor t, str name) -> ()");
  m.def("info() -> str");
  m.def("cuda_info() -> str");
  // Whether torch's settings allow TF32 in float32 products on a GPU when a kernel runs. Python
  // implements this op, because the stable ABI has no way to read these settings.
  m.def("_allow_tf32() -> bool");
  // The plan of the CUDA engine on a card, which is given by its name or by an architecture such as
  // sm_90, and an estimate: a text, the microseconds of a step and of the pass, and the resource
  // that limits a step. sizes are T, N, I, H, P, D. choice is what FUSEDRNN_CUDA_PLAN may be.
  m.def(
      "_plan(str cell, str dtype, int[] sizes, str card, bool backward, bool allow_tf32, "
      "str regime, str choice=\"\") -> (str text, float step, float total, str limit)");
  // One line for each card: its name, its architecture and the driver's name for it, with tabs
  // between them.
  m.def("_plan_cards() -> str");
  // The figures that the plan uses for a card: its limits in lines of `key value`, and how many
  // blocks of a kernel one multiprocessor runs together.
  m.def("_plan_device(str card) -> str");
  m.def("_plan_blocks_per_sm(str card, int registers, int shared_bytes) -> int");
  // The driver's figures for the same: limits by the same keys, versions, and a line for each
  // kernel; and the driver's own count of the blocks.
  m.def("_device_facts(int index) -> str");
  m.def("_occupancy(str kernel, int shared_bytes, int index) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("forward", &fusedrnn::boxed<&fusedrnn::forward<fusedrnn::CpuEngine>>);
  m.impl("backward", &fusedrnn::boxed<&fusedrnn::backward<fusedrnn::CpuEngine>>);
  m.impl("_step", &fusedrnn::boxed<&fusedrnn::step<fusedrnn::CpuEngine>>);
  m.impl("_step_backward", &fusedrnn::boxed<&fusedrnn::step_backward<fusedrnn::CpuEngine>>);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("info", &fusedrnn::boxed<&fusedrnn::info>);
  m.impl("_check_storage", &fusedrnn::boxed<&fusedrnn::check_storage_of>);
}
