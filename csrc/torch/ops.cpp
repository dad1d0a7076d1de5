// The ops: schemas and what runs behind them. This folder alone knows torch, and only through its
// stable ABI.
//
// A layer computes in float (for float, bfloat16 and float16) or double. Everything is in
// contiguous copies of that dtype where it is not already; outputs go back to the dtype of x.
#include <cstring>
#include <memory>
#include <tuple>

#include "../cpu/dispatch.h"
#include "call.h"
#include "runtime.h"

namespace fusedrnn {
namespace {

// What forward keeps for backward. With lengths its size is that of the padded batch, since the
// shape of an output must not depend on values; the part that no live row fills is zero.
Tensor empty_reserve(const Call& call) {
  const Tensor reserve =
      empty(call.x, {reserve_size(call.layer(), call.reserve_rows())}, call.compute);
  const size_t used = reserve_size(call.layer(), call.sequences().rows()) * reserve.element_size();
  const size_t bytes = reserve.numel() * reserve.element_size();
  if (used < bytes) std::memset(static_cast<char*>(reserve.data_ptr()) + used, 0, bytes - used);
  return reserve;
}

void check_reserve(const Call& call, const Tensor& reserve) {
  check_tensor(reserve, "reserve", call.compute, "what forward kept",
               {reserve_size(call.layer(), call.reserve_rows())});
  check(reserve.is_contiguous(), "reserve must be contiguous");
}

// For the gradients of the weights, none where they are not wanted.
std::vector<Tensor> empty_gradients(const Call& call, bool wanted) {
  std::vector<Tensor> gradients;
  if (!wanted) return gradients;
  gradients.reserve(call.weights.size());
  for (const Tensor& w : call.weights) gradients.push_back(empty(w, w.sizes(), call.compute));
  return gradients;
}

template <class T>
void run_forward(const Call& call, const Tensor& x, const Tensor& h, const OptionalTensor& c, T* y,
                 const OptionalTensor& reserve) {
  LayerForward<T> args = {};
  args.x = data<T>(x);
  for (int64_t d = 0; d < call.D; ++d) args.w[d] = pointers<const T>(call, call.weights, d);
  args.h = data<T>(h);
  args.c = c ? data<T>(*c) : nullptr;
  args.y = y;
  args.reserve = reserve ? data<T>(*reserve) : nullptr;
  TorchRuntime runtime(call.x);
  layer_forward<T>(call.layer(), kernels_of<T>(kernels()), runtime, args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, OptionalTensor h0,
                                                   OptionalTensor c0, std::vector<Tensor> weights,
                                                   OptionalTensor batch_sizes,
                                                   OptionalTensor lengths, int64_t batch,
                                                   StringHandle cell, bool bidirectional,
                                                   bool keep) {
  const Call call =
      read_call(x, weights, batch_sizes, lengths, batch, take_string(cell), bidirectional);
  const bool has_c = call.info().has_c;
  check(has_c || !c0, "c0 must be absent: ", call.info().name, " has no cell state");
  const int64_t width = call.D * call.P;

  const Tensor rows = packed_rows(call, x, call.I);
  const Tensor h = own_state(call, h0, "h0", "[D, N, P]", {call.D, call.N, call.P});
  OptionalTensor c;
  if (has_c) c = own_state(call, c0, "c0", "[D, N, H]", {call.D, call.N, call.H});
  const Tensor y = empty(call.x,
                         call.padded ? std::vector<int64_t>{call.sequences().rows(), width}
                                     : call.rows_shape(batch_sizes.has_value(), width),
                         call.compute);
  OptionalTensor reserve;
  if (keep) reserve = empty_reserve(call);
  if (call.compute == ScalarType::Double) {
    run_forward<double>(call, rows, h, c, data<double>(y), reserve);
  } else {
    run_forward<float>(call, rows, h, c, data<float>(y), reserve);
  }
  return {output_rows(call, y, width), output_state(call, h, call.P),
          has_c ? output_state(call, *c, call.H) : empty(call.x, {0}, call.dtype),
          reserve ? *reserve : empty(call.x, {0}, call.compute)};
}

template <class T>
void run_backward(const Call& call, const Tensor& x, const Tensor& reserve,
                  const OptionalTensor& d_y, const Tensor& d_h, const OptionalTensor& d_c,
                  const OptionalTensor& d_x, const std::vector<Tensor>& d_weights) {
  LayerBackward<T> args = {};
  args.x = data<T>(x);
  args.reserve = data<T>(reserve);
  args.d_y = d_y ? data<T>(*d_y) : nullptr;
  args.d_h = data<T>(d_h);
  args.d_c = d_c ? data<T>(*d_c) : nullptr;
  args.d_x = d_x ? data<T>(*d_x) : nullptr;
  for (int64_t d = 0; d < call.D; ++d) {
    args.w[d] = pointers<const T>(call, call.weights, d);
    if (!d_weights.empty()) args.d_w[d] = pointers<T>(call, d_weights, d);
  }
  TorchRuntime runtime(call.x);
  layer_backward<T>(call.layer(), kernels_of<T>(kernels()), runtime, args);
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    OptionalTensor grad_y, OptionalTensor grad_h, OptionalTensor grad_c, const Tensor& x,
    OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights, const Tensor& reserve,
    OptionalTensor batch_sizes, OptionalTensor lengths, int64_t batch, StringHandle cell,
    bool bidirectional, bool need_x, bool need_state, bool need_weights) {
  // h0 and c0 are in the reserve; the op takes them for its own derivative, which recomputes.
  (void)h0;
  (void)c0;
  const Call call =
      read_call(x, weights, batch_sizes, lengths, batch, take_string(cell), bidirectional);
  const bool has_c = call.info().has_c;
  const int64_t width = call.D * call.P;
  check(has_c || !grad_c, "grad_c must be absent: ", call.info().name, " has no cell state");
  check_reserve(call, reserve);

  const Tensor rows = packed_rows(call, x, call.I);
  OptionalTensor d_y, d_c, d_x;
  if (grad_y) {
    check_tensor(*grad_y, "grad_y", call.dtype, "the shape of y",
                 call.rows_shape(batch_sizes.has_value(), width));
    d_y = packed_rows(call, *grad_y, width);
  }
  const Tensor d_h = own_state(call, grad_h, "grad_h", "[D, N, P]", {call.D, call.N, call.P});
  if (has_c) d_c = own_state(call, grad_c, "grad_c", "[D, N, H]", {call.D, call.N, call.H});
  if (need_x) {
    const int64_t rows_alone[] = {call.sequences().rows(), call.I};
    d_x = empty(x, call.padded ? Sizes(rows_alone) : x.sizes(), call.compute);
  }
  std::vector<Tensor> d_weights = empty_gradients(call, need_weights);

  if (call.compute == ScalarType::Double) {
    run_backward<double>(call, rows, reserve, d_y, d_h, d_c, d_x, d_weights);
  } else {
    run_backward<float>(call, rows, reserve, d_y, d_h, d_c, d_x, d_weights);
  }
  for (Tensor& w : d_weights) w = in_dtype(w, call.dtype);
  const auto none = [&] { return empty(x, {0}, call.dtype); };
  return {need_x ? output_rows(call, *d_x, call.I) : none(),
          need_state ? output_state(call, d_h, call.P) : none(),
          need_state && has_c ? output_state(call, *d_c, call.H) : none(), d_weights};
}

// forward for one step. Returns h, then c of a cell that has one, then what is kept if `keep`.
std::vector<Tensor> step(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                         const std::vector<Tensor>& weights, int64_t input_size,
                         int64_t hidden_size, StringHandle cell, bool keep) {
  const Call call = read_step(x, weights, input_size, hidden_size, take_string(cell));
  const bool has_c = call.info().has_c;
  check(has_c || !c0, "c must be absent: ", call.info().name, " has no cell state");
  check(!has_c || h0.has_value() == c0.has_value(), "h and c must both be there, or neither");

  const std::vector<int64_t> sizes = step_sizes(call, call.H);
  const Tensor rows = prepare(x, call.compute);
  const Tensor h = own_state(call, h0, "h", "[N, H]", sizes);
  OptionalTensor c;
  if (has_c) c = own_state(call, c0, "c", "[N, H]", sizes);
  OptionalTensor reserve;
  if (keep) reserve = empty_reserve(call);
  // y is h once more, which nobody wants.
  if (call.compute == ScalarType::Double) {
    const auto y = std::make_unique_for_overwrite<double[]>(h.numel());
    run_forward<double>(call, rows, h, c, y.get(), reserve);
  } else {
    const auto y = std::make_unique_for_overwrite<float[]>(h.numel());
    run_forward<float>(call, rows, h, c, y.get(), reserve);
  }
  std::vector<Tensor> result;
  result.reserve(3);
  result.push_back(in_dtype(h, call.dtype));
  if (has_c) result.push_back(in_dtype(*c, call.dtype));
  if (keep) result.push_back(*reserve);
  return result;
}

// backward for one step; what is not wanted is absent.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, std::vector<Tensor>> step_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& x,
    const std::vector<Tensor>& weights, const Tensor& reserve, int64_t input_size,
    int64_t hidden_size, StringHandle cell, bool need_x, bool need_state, bool need_weights) {
  const Call call = read_step(x, weights, input_size, hidden_size, take_string(cell));
  const bool has_c = call.info().has_c;
  check(has_c || !grad_c, "grad_c must be absent: ", call.info().name, " has no cell state");
  check_reserve(call, reserve);

  const std::vector<int64_t> sizes = step_sizes(call, call.H);
  const Tensor rows = prepare(x, call.compute);
  const Tensor d_h = own_state(call, grad_h, "grad_h", "[N, H]", sizes);
  OptionalTensor d_c, d_x;
  if (has_c) d_c = own_state(call, grad_c, "grad_c", "[N, H]", sizes);
  if (need_x) d_x = empty(x, x.sizes(), call.compute);
  std::vector<Tensor> d_weights = empty_gradients(call, need_weights);
  if (call.compute == ScalarType::Double) {
    run_backward<double>(call, rows, reserve, std::nullopt, d_h, d_c, d_x, d_weights);
  } else {
    run_backward<float>(call, rows, reserve, std::nullopt, d_h, d_c, d_x, d_weights);
  }
  for (Tensor& w : d_weights) w = in_dtype(w, call.dtype);
  const auto wanted = [&](bool need, const OptionalTensor& t) -> OptionalTensor {
    if (!need || !t) return std::nullopt;
    return in_dtype(*t, call.dtype);
  };
  return {wanted(need_x, d_x), wanted(need_state, d_h), wanted(need_state, d_c), d_weights};
}

// Lines of `key value ...`, read by fusedrnn._library: the chosen instruction set, those compiled,
// and the constants of the cells. Throws where FUSEDRNN_ISA asks for what cannot be had.
std::string info() {
  std::ostringstream text;
  text << "isa " << kernels().isa << "\n";
  for (const IsaInfo& isa : instruction_sets())
    text << "compiled " << isa.name << " " << (isa.supported ? "supported" : "unsupported") << "\n";
  for (const CellInfo& cell : kCellInfo) {
    text << "cell " << cell.name << " " << cell.gates << " " << cell.saved << " " << cell.has_c
         << " " << cell.stages << " " << cell.projects << "\n";
  }
  return text.str();
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
  m.def("info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("forward", TORCH_BOX(&fusedrnn::forward));
  m.impl("backward", TORCH_BOX(&fusedrnn::backward));
  m.impl("_step", TORCH_BOX(&fusedrnn::step));
  m.impl("_step_backward", TORCH_BOX(&fusedrnn::step_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("info", TORCH_BOX(&fusedrnn::info));
}
