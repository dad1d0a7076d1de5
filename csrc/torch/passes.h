// The passes behind the ops, on any device. They check the arguments, bring rows and states into
// packed order and into the engine's dtypes, run the engine, and bring the results back.
//
// An Engine lives for one call of an op and is on the device of x. It has these members:
//   kHostReads                       whether the host can read the memory of tensors
//   Engine(x)                        throws if x is on another kind of device
//   check_device(t, name)            throws if t is on another device than x
//   empty(sizes, dtype)              an uninitialised tensor
//   copied(t, dtype)                 a contiguous copy
//   prepare(t, dtype)                t itself if it is contiguous and has this dtype, else a copy
//   zero_from(t, byte)               zeroes the memory of t from a byte on
//   stored_dtype(call)               dtype of rows and weights as the engine takes them
//   h_dtype(call)                    dtype of h
//   gradient_dtype(call)             dtype of the gradients of rows and weights
//   reserve_dtype(call)              dtype of the reserve
//   reserve_size(call, rows)         number of values of the reserve for `rows` rows
//   packed_rows                      the caller's rows (x, gradient of y) in packed order
//   output_rows                      packed rows (y, gradient of x) as the caller has them
//   own_state                        a copy of a state in packed order and in a given dtype, which
//                                    the pass updates in place; zeros if the state is absent. A
//                                    StateAt says which of the two states of a sequence it is
//   output_state                     such a state in the caller's order and in a given dtype
//   Spare(engine, call, values)      memory for an output that the caller does not want
//   forward(call, tensors), backward(call, tensors)
#pragma once

#include <cstdint>
#include <tuple>

#include "call.h"

namespace fusedrnn {

template <class E>
concept PassEngine = requires(
    E& engine, const OpCall& call, const Tensor& t, const OptionalTensor& maybe, Sizes sizes,
    ScalarType dtype, const ForwardTensors& forward, const BackwardTensors& backward,
    Tensor (*as_tensor)(Tensor), ScalarType (*as_dtype)(ScalarType), int64_t (*as_size)(int64_t)) {
  E(t);
  engine.check_device(t, "");
  as_tensor(engine.empty(sizes, dtype));
  as_tensor(engine.copied(t, dtype));
  as_tensor(engine.prepare(t, dtype));
  engine.zero_from(t, size_t{});
  as_dtype(engine.stored_dtype(call));
  as_dtype(engine.h_dtype(call));
  as_dtype(engine.gradient_dtype(call));
  as_dtype(engine.reserve_dtype(call));
  as_size(engine.reserve_size(call, int64_t{}));
  as_tensor(engine.packed_rows(call, t, int64_t{}));
  as_tensor(engine.output_rows(call, t, int64_t{}));
  as_tensor(engine.own_state(call, maybe, sizes, dtype, StateAt{}));
  as_tensor(engine.output_state(call, t, int64_t{}, dtype, StateAt{}));
  typename E::Spare;
  engine.forward(call, forward);
  engine.backward(call, backward);
};

// Allocates the reserve. With lengths it has the size for all T N rows of the padded batch, because
// the shape of an output must not depend on values. The part that the live rows leave unused is
// zero.
template <PassEngine Engine>
Tensor empty_reserve(Engine& engine, const OpCall& call) {
  const Tensor reserve =
      engine.empty({engine.reserve_size(call, call.reserve_rows())}, engine.reserve_dtype(call));
  if (call.padded)
    engine.zero_from(reserve, engine.reserve_size(call, call.sequences().rows()) *
                                  static_cast<int64_t>(reserve.element_size()));
  return reserve;
}

// Checks the reserve and returns it as the kernels read it. Between forward and backward, hooks for
// saved tensors may have replaced it by a tensor with the same values in other memory.
template <PassEngine Engine>
Tensor read_reserve(Engine& engine, const OpCall& call, const Tensor& reserve) {
  const ScalarType dtype = engine.reserve_dtype(call), got = reserve.scalar_type();
  check(got == dtype, "reserve must be ", name_of(dtype), ", got ", name_of(got),
        "; it is what forward kept, which a hook for saved tensors has to give back as it was");
  check_tensor(engine, reserve, "reserve", dtype, "what forward kept",
               {engine.reserve_size(call, call.reserve_rows())});
  // The kernels read floats or doubles from it, even if its dtype is bytes.
  const bool ready = reserve.is_contiguous() && is_aligned(reserve, sizeof(double));
  return ready ? reserve : engine.copied(reserve, dtype);
}

// How a state, or its gradient, must be when the caller gives it, and the dtype that the engine
// takes.
struct GivenState {
  const char* name;
  const char* meaning;  // its sizes in size letters
  Sizes sizes;
  ScalarType given;   // the dtype that it must have
  ScalarType wanted;  // the dtype that the engine takes
  StateAt at;
};

template <PassEngine Engine>
Tensor own_state(Engine& engine, const OpCall& call, const OptionalTensor& state,
                 const GivenState& as) {
  if (state) check_tensor(engine, *state, as.name, as.given, as.meaning, as.sizes);
  return engine.own_state(call, state, as.sizes, as.wanted, as.at);
}

// Allocates the gradients of the weights, in the engine's dtype for gradients. Returns none if they
// are not wanted. (Autograd converts a gradient to the dtype of its weight. So a float32 gradient
// stays as it is for a weight that was cast from float32, and is rounded for a 16-bit weight.)
template <PassEngine Engine>
std::vector<Tensor> empty_gradients(Engine& engine, const OpCall& call, bool wanted) {
  std::vector<Tensor> gradients;
  if (!wanted) return gradients;
  gradients.reserve(call.weights.size());
  for (const Tensor& w : call.weights)
    gradients.push_back(engine.empty(w.sizes(), engine.gradient_dtype(call)));
  return gradients;
}

template <PassEngine Engine>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, OptionalTensor h0,
                                                   OptionalTensor c0, std::vector<Tensor> weights,
                                                   OptionalTensor batch_sizes,
                                                   OptionalTensor lengths, int64_t batch,
                                                   StringHandle cell, bool bidirectional, bool keep,
                                                   OptionalTensor starts, bool c_in_y) {
  const std::string name = take_string(cell);
  Engine engine(x);
  const OpCall call = read_call(engine, x, weights, {batch_sizes, lengths, batch, starts},
                                {name, bidirectional, c_in_y});
  const bool has_c = call.info().has_c;
  check(has_c || !c0, "c0 must be absent: ", call.info().name, " has no cell state");
  const int64_t width = call.layer().y_width();

  const Tensor rows = engine.packed_rows(call, x, call.I);
  const Tensor h = own_state(engine, call, h0,
                             {"h0",
                              "[D, N, P]",
                              {call.D, call.N, call.P},
                              call.dtype,
                              engine.h_dtype(call),
                              StateAt::kBegin});
  const ScalarType c_type = c_dtype(call, c0);
  OptionalTensor c;
  if (has_c)
    c = own_state(
        engine, call, c0,
        {"c0", "[D, N, H]", {call.D, call.N, call.H}, c_type, call.compute, StateAt::kBegin});
  const Tensor y =
      engine.empty(call.moves_rows() ? std::vector<int64_t>{call.sequences().rows(), width}
                                     : call.rows_shape(batch_sizes.has_value(), width),
                   call.stored);
  OptionalTensor reserve;
  if (keep) reserve = empty_reserve(engine, call);
  engine.forward(call, {rows, h, c, y.data_ptr(), reserve});
  return {engine.output_rows(call, y, width),
          engine.output_state(call, h, call.P, call.dtype, StateAt::kEnd),
          has_c ? engine.output_state(call, *c, call.H, c_type, StateAt::kEnd)
                : engine.empty({0}, call.dtype),
          reserve ? *reserve : engine.empty({0}, engine.reserve_dtype(call))};
}

template <PassEngine Engine>
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    OptionalTensor grad_y, OptionalTensor grad_h, OptionalTensor grad_c, const Tensor& x,
    OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights, const Tensor& reserve,
    OptionalTensor batch_sizes, OptionalTensor lengths, int64_t batch, StringHandle cell,
    bool bidirectional, bool need_x, bool need_state, bool need_weights, OptionalTensor starts,
    bool c_in_y) {
  // The reserve has the values of h0 and c0. The op takes both for its own derivative, which
  // computes forward again. Only the dtype of c0 is used here.
  (void)h0;
  const std::string name = take_string(cell);
  Engine engine(x);
  const OpCall call = read_call(engine, x, weights, {batch_sizes, lengths, batch, starts},
                                {name, bidirectional, c_in_y});
  const bool has_c = call.info().has_c;
  const int64_t width = call.layer().y_width();
  check(has_c || !grad_c, "grad_c must be absent: ", call.info().name, " has no cell state");
  const Tensor checked_reserve = read_reserve(engine, call, reserve);

  const Tensor rows = engine.packed_rows(call, x, call.I);
  OptionalTensor d_y, d_c, d_x;
  if (grad_y) {
    check_tensor(engine, *grad_y, "grad_y", call.dtype, "the shape of y",
                 call.rows_shape(batch_sizes.has_value(), width));
    d_y = engine.packed_rows(call, *grad_y, width);
  }
  const Tensor d_h = own_state(
      engine, call, grad_h,
      {"grad_h", "[D, N, P]", {call.D, call.N, call.P}, call.dtype, call.compute, StateAt::kEnd});
  const ScalarType c_type = c_dtype(call, c0);
  if (has_c)
    d_c = own_state(
        engine, call, grad_c,
        {"grad_c", "[D, N, H]", {call.D, call.N, call.H}, c_type, call.compute, StateAt::kEnd});
  if (need_x) {
    const int64_t rows_alone[] = {call.sequences().rows(), call.I};
    d_x = engine.empty(call.moves_rows() ? Sizes(rows_alone) : x.sizes(),
                       engine.gradient_dtype(call));
  }
  std::vector<Tensor> d_weights = empty_gradients(engine, call, need_weights);

  engine.backward(call, {rows, checked_reserve, d_y, d_h, d_c, d_x, d_weights});
  const auto none = [&] { return engine.empty({0}, call.dtype); };
  return {need_x ? engine.output_rows(call, *d_x, call.I) : none(),
          need_state ? engine.output_state(call, d_h, call.P, call.dtype, StateAt::kBegin) : none(),
          need_state && has_c ? engine.output_state(call, *d_c, call.H, c_type, StateAt::kBegin)
                              : none(),
          d_weights};
}

// forward for one step. Returns h, then c in cells that have it, then the reserve if `keep`.
template <PassEngine Engine>
std::vector<Tensor> step(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                         const std::vector<Tensor>& weights, int64_t input_size,
                         int64_t hidden_size, StringHandle cell, bool keep) {
  const std::string name = take_string(cell);
  Engine engine(x);
  const OpCall call = read_step(engine, x, weights, input_size, hidden_size, name);
  const bool has_c = call.info().has_c;
  check(has_c || !c0, "c must be absent: ", call.info().name, " has no cell state");
  check(!has_c || h0.has_value() == c0.has_value(), "h and c must both be there, or neither");

  const std::vector<int64_t> sizes = step_sizes(call, call.H);
  const Tensor rows = engine.prepare(x, call.stored);
  const Tensor h = own_state(
      engine, call, h0, {"h", "[N, H]", sizes, call.dtype, engine.h_dtype(call), StateAt::kBegin});
  const ScalarType c_type = c_dtype(call, c0);
  OptionalTensor c;
  if (has_c)
    c = own_state(engine, call, c0, {"c", "[N, H]", sizes, c_type, call.compute, StateAt::kBegin});
  OptionalTensor reserve;
  if (keep) reserve = empty_reserve(engine, call);
  // The engine writes y too, which is a second copy of h.
  const typename Engine::Spare y(engine, call, h.numel());
  engine.forward(call, {rows, h, c, y.data(), reserve});
  std::vector<Tensor> result;
  result.reserve(3);
  result.push_back(engine.prepare(h, call.dtype));
  if (has_c) result.push_back(engine.prepare(*c, c_type));
  if (keep) result.push_back(*reserve);
  return result;
}

// backward for one step. Results that are not wanted are absent. The gradient of c is in the
// compute type.
template <PassEngine Engine>
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, std::vector<Tensor>> step_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& x,
    const std::vector<Tensor>& weights, const Tensor& reserve, int64_t input_size,
    int64_t hidden_size, StringHandle cell, bool need_x, bool need_state, bool need_weights) {
  const std::string name = take_string(cell);
  Engine engine(x);
  const OpCall call = read_step(engine, x, weights, input_size, hidden_size, name);
  const bool has_c = call.info().has_c;
  check(has_c || !grad_c, "grad_c must be absent: ", call.info().name, " has no cell state");
  const Tensor checked_reserve = read_reserve(engine, call, reserve);

  const std::vector<int64_t> sizes = step_sizes(call, call.H);
  const Tensor rows = engine.prepare(x, call.stored);
  const Tensor d_h = own_state(
      engine, call, grad_h, {"grad_h", "[N, H]", sizes, call.dtype, call.compute, StateAt::kEnd});
  OptionalTensor d_c, d_x;
  if (has_c)
    d_c =
        own_state(engine, call, grad_c,
                  {"grad_c", "[N, H]", sizes, c_dtype(call, grad_c), call.compute, StateAt::kEnd});
  if (need_x) d_x = engine.empty(x.sizes(), engine.gradient_dtype(call));
  std::vector<Tensor> d_weights = empty_gradients(engine, call, need_weights);
  engine.backward(call, {rows, checked_reserve, std::nullopt, d_h, d_c, d_x, d_weights});
  const auto wanted = [&](bool need, const OptionalTensor& t) -> OptionalTensor {
    if (!need || !t) return std::nullopt;
    return engine.prepare(*t, call.dtype);
  };
  return {wanted(need_x, d_x), wanted(need_state, d_h), need_state ? d_c : std::nullopt, d_weights};
}

}  // namespace fusedrnn
