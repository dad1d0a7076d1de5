// The ops: schemas and what runs behind them. This folder alone knows torch, and only through its
// stable ABI.
//
// A layer computes in float (for float, bfloat16 and float16) or double. Everything is in
// contiguous copies of that dtype where it is not already; outputs go back to the dtype of x.
#include <cstring>
#include <tuple>

#include "../cpu/dispatch.h"
#include "call.h"
#include "runtime.h"

namespace fusedrnn {
namespace {

// What forward keeps for backward. With lengths its size is that of the padded batch, since the
// shape of an output must not depend on values; the part that no live row fills is zero.
Tensor empty_reserve(const Call& call, bool keep) {
  if (!keep) return empty(call.x, {0}, call.compute);
  const Tensor reserve =
      empty(call.x, {reserve_size(call.layer(), call.reserve_rows())}, call.compute);
  const size_t used = reserve_size(call.layer(), call.sequences().rows()) * reserve.element_size();
  const size_t bytes = reserve.numel() * reserve.element_size();
  if (used < bytes) std::memset(static_cast<char*>(reserve.data_ptr()) + used, 0, bytes - used);
  return reserve;
}

template <class T>
void run_forward(const Call& call, const Tensor& x, const Tensor& h, const OptionalTensor& c,
                 const Tensor& y, const Tensor& reserve, bool keep) {
  LayerForward<T> args = {};
  args.x = data<T>(x);
  for (int64_t d = 0; d < call.D; ++d) args.w[d] = pointers<const T>(call, call.weights, d);
  args.h = data<T>(h);
  args.c = c ? data<T>(*c) : nullptr;
  args.y = data<T>(y);
  args.reserve = keep ? data<T>(reserve) : nullptr;
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
  const Tensor h = own_state(call, h0, "h0", "[D, N, P]", call.P);
  OptionalTensor c;
  if (has_c) c = own_state(call, c0, "c0", "[D, N, H]", call.H);
  const Tensor y = empty(call.x,
                         call.padded ? std::vector<int64_t>{call.sequences().rows(), width}
                                     : call.rows_shape(batch_sizes.has_value(), width),
                         call.compute);
  const Tensor reserve = empty_reserve(call, keep);
  if (call.compute == ScalarType::Double) {
    run_forward<double>(call, rows, h, c, y, reserve, keep);
  } else {
    run_forward<float>(call, rows, h, c, y, reserve, keep);
  }
  return {output_rows(call, y, width), output_state(call, h, call.P),
          has_c ? output_state(call, *c, call.H) : empty(call.x, {0}, call.dtype), reserve};
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
  check_tensor(reserve, "reserve", call.compute, "what forward kept",
               {reserve_size(call.layer(), call.reserve_rows())});
  check(reserve.is_contiguous(), "reserve must be contiguous");

  const Tensor rows = packed_rows(call, x, call.I);
  OptionalTensor d_y, d_c, d_x;
  if (grad_y) {
    check_tensor(*grad_y, "grad_y", call.dtype, "the shape of y",
                 call.rows_shape(batch_sizes.has_value(), width));
    d_y = packed_rows(call, *grad_y, width);
  }
  const Tensor d_h = own_state(call, grad_h, "grad_h", "[D, N, P]", call.P);
  if (has_c) d_c = own_state(call, grad_c, "grad_c", "[D, N, H]", call.H);
  if (need_x) d_x = empty(call.x, {call.sequences().rows(), call.I}, call.compute);
  std::vector<Tensor> d_weights;
  if (need_weights)
    for (const Tensor& w : call.weights) d_weights.push_back(empty(w, w.sizes(), call.compute));

  if (call.compute == ScalarType::Double) {
    run_backward<double>(call, rows, reserve, d_y, d_h, d_c, d_x, d_weights);
  } else {
    run_backward<float>(call, rows, reserve, d_y, d_h, d_c, d_x, d_weights);
  }
  const Tensor none = empty(call.x, {0}, call.dtype);
  for (Tensor& w : d_weights) w = in_dtype(w, call.dtype);
  Tensor out_x = none;
  if (need_x) {
    out_x = output_rows(call, *d_x, call.I);
    if (x.dim() == 3 && !call.padded) out_x = torch::stable::view(out_x, x.sizes());
  }
  return {out_x, need_state ? output_state(call, d_h, call.P) : empty(call.x, {0}, call.dtype),
          need_state && has_c ? output_state(call, *d_c, call.H) : empty(call.x, {0}, call.dtype),
          d_weights};
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
  m.def("info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("forward", TORCH_BOX(&fusedrnn::forward));
  m.impl("backward", TORCH_BOX(&fusedrnn::backward));
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("info", TORCH_BOX(&fusedrnn::info));
}
