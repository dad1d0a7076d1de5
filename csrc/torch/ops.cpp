// The ops: their schemas, and what runs behind them on the CPU.
#include "cpu_engine.h"
#include "passes.h"

namespace fusedrnn {
namespace {

// Lines of `key value ...`, read by fusedrnn._library: the chosen instruction set, whether bfloat16
// layers multiply pairs with it, the instruction sets compiled, and the facts of the cells. Shapes
// of parameters are in letters. Throws where FUSEDRNN_ISA asks for what cannot be had.
std::string info() {
  std::ostringstream text;
  text << "isa " << kernels().isa << "\n";
  text << "pairs " << (kernels().bf16 != nullptr) << "\n";
  for (const IsaInfo& isa : instruction_sets())
    text << "compiled " << isa.name << " " << (isa.supported ? "supported" : "unsupported") << "\n";
  for (const CellInfo& cell : kCellInfo) {
    text << "cell name=" << cell.name << " gates=" << cell.gates << " saved=" << cell.saved
         << " saves_h=" << cell.saves_h << " has_c=" << cell.has_c << " stages=" << cell.stages
         << " projects=" << cell.projects
         << " parameters=weight_ih:G*H,I;weight_hh:G*H,P;bias_ih:G*H;bias_hh:G*H"
         << (cell.projects ? ";weight_hr:P,H" : "") << "\n";
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
      "Tensor? lengths, SymInt batch, str cell, bool bidirectional, bool keep) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)");
  m.def(
      "backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, Tensor reserve, Tensor? batch_sizes, Tensor? lengths, SymInt batch, "
      "str cell, bool bidirectional, bool need_x, bool need_state, bool need_weights) "
      "-> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor[] d_weights)");
  // One step of a cell, for eager mode alone: neither autograd nor the compiler knows these.
  m.def(
      "_step(Tensor x, Tensor? h, Tensor? c, Tensor[] weights, int input_size, int hidden_size, "
      "str cell, bool keep) -> Tensor[]");
  m.def(
      "_step_backward(Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor[] weights, Tensor reserve, "
      "int input_size, int hidden_size, str cell, bool need_x, bool need_state, bool need_weights) "
      "-> (Tensor? d_x, Tensor? d_h, Tensor? d_c, Tensor[] d_weights)");
  // Throws where the memory of a tensor was freed. For what torch reads before the ops above do.
  m.def("_check_storage(Tensor t, str name) -> ()");
  m.def("info() -> str");
  m.def("cuda_info() -> str");
  // Whether float32 products on a GPU may use TF32, as torch is set when a kernel runs. Python has
  // the answer: the stable ABI has no way to ask.
  m.def("_allow_tf32() -> bool");
  // What the CUDA engine would run on a card, by its name or as in sm_90, and an estimate: a text,
  // microseconds of a step and of the pass, and what limits a step. sizes: T, N, I, H, P, D.
  m.def(
      "_plan(str cell, str dtype, int[] sizes, str card, bool backward, bool allow_tf32, "
      "str regime) -> (str text, float step, float total, str limit)");
  // The cards: name, architecture and what the driver calls it, between tabs; a line each.
  m.def("_plan_cards() -> str");
  // What the plan believes of a card: its limits in lines of `key value`, and how many
  // blocks of a kernel one multiprocessor runs together.
  m.def("_plan_device(str card) -> str");
  m.def("_plan_blocks_per_sm(str card, int registers, int shared_bytes) -> int");
  // What the driver says instead: limits by the same keys, versions, and a line for each kernel;
  // and its own count of the blocks.
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
