// Reads the arguments that the ops share, and checks everything that memory safety needs.
//
// An Engine knows the device and the dtypes in which it takes tensors. passes.h lists its members.
#pragma once

#include <algorithm>

#include "../layer/layer.h"
#include "../layer/pieces.h"
#include "tensors.h"

namespace fusedrnn {

// The arguments of a call of forward or backward, read and checked.
struct OpCall {
  const Tensor& x;  // the caller's tensor
  CellKind cell = {};
  int64_t I = 0, H = 0, P = 0, D = 0, T = 0, N = 0;
  bool bias = false;
  ScalarType dtype = ScalarType::Float;    // dtype of x and of the caller's tensors
  ScalarType compute = ScalarType::Float;  // the compute type: Float or Double
  ScalarType stored = ScalarType::Float;   // the stored type, in which the engine takes rows
  // How the caller's sequences become those of the engine, if they are others or have beginnings
  // that the host reads.
  std::optional<Pieces> pieces = {};
  Sequences packed = {};    // the batch if there are no pieces
  bool padded = false;      // whether there are lengths, so that rows of the caller may be padding
  bool has_starts = false;  // whether the caller says where sequences begin
  // The same as a contiguous tensor of bool, [T, N] or [S], if the kernels read it.
  OptionalTensor starts = {};
  bool c_in_y = false;               // whether y also has c of every step
  std::vector<Tensor> weights = {};  // in the stored type

  const CellInfo& info() const { return info_of(cell); }
  const Sequences& sequences() const { return pieces ? pieces->sequences : packed; }
  Layer layer() const { return {cell, I, H, P, D, sequences(), has_starts, c_in_y}; }
  // Whether the engine's rows are other than the caller's.
  bool moves_rows() const { return pieces && !pieces->in_place; }
  ParameterSizes parameter_sizes() const { return {info().gates, info().params, I, H, P}; }
  // The shape of x, y or a gradient with `width` features, as the caller has it.
  std::vector<int64_t> rows_shape(bool packed_input, int64_t width) const {
    if (packed_input) return {packed.rows(), width};
    return {T, N, width};
  }
  // The work of a call, in multiply-adds of the products with the weights. Packing a weight counts
  // as six rows of its product, because it takes as long. The result is a double because the sizes
  // of a tensor that is expanded from one element could overflow an integer.
  double work() const {
    const double values = static_cast<double>(info().gates * H) * static_cast<double>((I + P) * D);
    return values * (static_cast<double>(sequences().rows()) + 6);
  }
  // The number of rows for which forward allocates the reserve. It does not depend on the values in
  // lengths.
  int64_t reserve_rows() const { return padded ? T * N : sequences().rows(); }
};

inline CellKind cell_of(const std::string& name) {
  const CellKind cell = cell_named(name.c_str());
  if (cell != CellKind::kCount) return cell;
  std::string choices;
  for (const CellInfo& info : kCellInfo)
    choices.append(choices.empty() ? "" : ", ").append(info.name);
  fail("cell must be one of ", choices, ", got '", name, "'");
}

// The arguments that describe the batch. size is N.
struct GivenBatch {
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
  int64_t size;
  const OptionalTensor& starts;
};

inline std::vector<int64_t> read_int64(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU");
  check(t.scalar_type() == ScalarType::Long, name, " must be int64, got ",
        name_of(t.scalar_type()));
  check(t.dim() == 1, name, " must have 1 dimension, got ", t.dim());
  check_storage(t, name);
  std::vector<int64_t> values(t.size(0));
  if (values.empty()) return values;
  const auto* from = data<char>(t);
  const int64_t step = t.stride(0) * static_cast<int64_t>(sizeof(int64_t));
  for (int64_t& value : values) {
    std::memcpy(&value, from, sizeof(value));  // the value may be unaligned
    from += step;
  }
  return values;
}

// Reads where sequences begin. The lengths of the batch are read already. If the host cannot read
// the memory of the device, the kernels have to.
template <class Engine>
void read_starts(Engine& engine, OpCall& call, const Tensor& starts, bool packed_input) {
  engine.check_device(starts, "starts");
  check(starts.scalar_type() == ScalarType::Bool, "starts must be bool, got ",
        name_of(starts.scalar_type()));
  const std::vector<int64_t> expected =
      packed_input ? std::vector{call.packed.rows()} : std::vector{call.T, call.N};
  check(starts.sizes().equals(expected), "starts must be ", packed_input ? "[S]" : "[T, N]", " = ",
        Shape{expected}, ", got ", shape(starts));
  check_storage(starts, "starts");
  call.has_starts = true;
  const Tensor ready = engine.prepare(starts, ScalarType::Bool);
  if constexpr (!Engine::kHostReads) {
    call.starts = ready;
    return;
  }
  const char* const begins = data<char>(ready);
  if (std::none_of(begins, begins + ready.numel(), [](char b) { return b != 0; })) return;
  std::vector<int64_t> lengths(call.N, call.T), row_offset;
  if (packed_input) {
    const std::vector<int64_t>& sizes = call.packed.batch_sizes;
    for (size_t t = sizes.size(); t-- > 0;)
      for (int64_t n = t + 1 < sizes.size() ? sizes[t + 1] : 0; n < sizes[t]; ++n)
        lengths[n] = static_cast<int64_t>(t) + 1;
    row_offset = call.packed.row_offset;
  } else if (call.padded) {
    for (const Piece& piece : call.pieces->piece) lengths[piece.n] = piece.length;
  }
  call.pieces =
      cut_pieces(lengths, std::move(row_offset), [&](int64_t row) { return begins[row]; });
  if (call.padded) call.pieces->in_place = false;
}

inline void read_sequences(OpCall& call, const Tensor& x, const GivenBatch& given) {
  const auto& [batch_sizes, lengths, batch, starts] = given;
  call.N = batch;
  check(batch >= 0, "batch must be N >= 0, got ", batch);
  if (batch_sizes) {
    check(!lengths, "batch_sizes and lengths cannot be given together");
    check(x.dim() == 2, "x must be [S, I] where batch_sizes is given, got ", shape(x));
    std::vector<int64_t> sizes = read_int64(*batch_sizes, "batch_sizes");
    check(!sizes.empty(), "batch_sizes must have at least one step");
    int64_t rows = 0;
    for (size_t t = 0; t < sizes.size(); ++t) {
      check(sizes[t] >= 1 && (t == 0 || sizes[t] <= sizes[t - 1]),
            "batch_sizes must be positive and non-increasing, got ", sizes[t], " at step ", t);
      check(sizes[t] <= x.size(0) - rows, "batch_sizes must sum to x.size(0) = ", x.size(0),
            ", they pass it at step ", t);
      rows += sizes[t];
    }
    check(rows == x.size(0), "batch_sizes must sum to x.size(0) = ", x.size(0), ", got ", rows);
    check(sizes[0] == batch, "batch must be batch_sizes[0] = ", sizes[0], ", got ", batch);
    call.packed = from_batch_sizes(std::move(sizes), batch);
    call.T = call.packed.T;
    return;
  }
  check(x.dim() == 3, "x must be [T, N, I], got ", shape(x));
  call.T = x.size(0);
  check(x.size(1) == batch, "batch must be x.size(1) = ", x.size(1), ", got ", batch);
  if (!lengths) {
    // A batch without sequences has no steps, whatever T is.
    call.packed = from_batch_sizes(std::vector<int64_t>(batch ? call.T : 0, batch), batch);
    return;
  }
  const std::vector<int64_t> values = read_int64(*lengths, "lengths");
  check(static_cast<int64_t>(values.size()) == batch, "lengths must be [N] = [", batch, "], got [",
        values.size(), "]");
  for (size_t n = 0; n < values.size(); ++n)
    check(values[n] >= 0 && values[n] <= call.T, "lengths must be in [0, T] = [0, ", call.T,
          "], got ", values[n], " at ", n);
  call.pieces = from_lengths(values.data(), batch);
  call.padded = true;
}

// meaning says in words what the shape is. It is anything that a stream takes, and is not turned
// into text unless the shape is wrong.
template <class Engine, class Meaning>
void check_tensor(const Engine& engine, const Tensor& t, const char* name, ScalarType dtype,
                  const Meaning& meaning, Sizes expected) {
  engine.check_device(t, name);
  const ScalarType got = t.scalar_type();
  if (got != dtype) fail(name, " must be ", name_of(dtype), ", got ", name_of(got));
  check(t.sizes().equals(expected), name, " must be ", meaning, " = ", Shape{expected}, ", got ",
        shape(t));
  check_storage(t, name);
}

// The shape of a cell's parameter in size letters, for messages. K, which is the number of the
// cell's own parameters, is replaced by that number.
struct ShapeInLetters {
  const CellInfo& cell;
  Parameter parameter;

  std::string text() const {
    std::string text = info_of(parameter).shape;
    std::replace(text.begin(), text.end(), 'K', static_cast<char>('0' + cell.params));
    return text;
  }
  friend std::ostream& operator<<(std::ostream& out, const ShapeInLetters& shape) {
    return out << shape.text();
  }
};

// Checks the weights and takes H, I and P from their shapes. The number of weights of a direction
// says whether there are biases; all else follows from the cell.
template <class Engine>
void read_weights(Engine& engine, OpCall& call, const Tensor& x,
                  const std::vector<Tensor>& weights) {
  const CellInfo& info = call.info();
  const auto per_direction = static_cast<int64_t>(weights.size()) / call.D;
  const int64_t without = parameters_of(info, false).size(),
                with = parameters_of(info, true).size();
  check(static_cast<int64_t>(weights.size()) == per_direction * call.D &&
            (per_direction == without || per_direction == with),
        "weights of ", info.name, " must be ", without, " or ", with, " per direction, got ",
        weights.size(), " for ", call.D, call.D == 1 ? " direction" : " directions");
  check(!info.takes_row, "cell must be one without an input of each row, got ", info.name);
  call.bias = per_direction == with;
  check(weights[0].dim() == 2 && weights[0].size(0) > 0 && weights[0].size(0) % info.gates == 0,
        "weight_ih must be [", info.gates, "H, I], got ", shape(weights[0]));
  call.H = weights[0].size(0) / info.gates;
  call.I = x.size(x.dim() - 1);
  check(call.I > 0, "x must have I > 0 features, got 0");
  call.P = call.H;
  const ParameterList parameters = parameters_of(info, call.bias);
  if (info.projects) {
    const Parameter* at = std::find(parameters.begin(), parameters.end(), Parameter::kWeightHr);
    const Tensor& w_hr = weights[at - parameters.begin()];
    check(w_hr.dim() == 2 && w_hr.size(0) > 0, "weight_hr must be [P, H], got ", shape(w_hr));
    call.P = w_hr.size(0);
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    const Parameter p = parameters[static_cast<int>(i) % parameters.size()];
    const ParameterShape shape = shape_of(p, call.parameter_sizes());
    check_tensor(engine, weights[i], info_of(p).name, call.dtype, ShapeInLetters{info, p},
                 Sizes(shape.size, static_cast<size_t>(shape.rank)));
  }
  call.stored = engine.stored_dtype(call);
  call.weights.reserve(weights.size());
  for (const Tensor& w : weights) call.weights.push_back(engine.prepare(w, call.stored));
}

// Begins a call: reads the cell, the number of directions and the dtype of x.
inline OpCall begin_call(const Tensor& x, const std::string& cell, int64_t directions) {
  OpCall call{x};
  call.cell = cell_of(cell);
  call.D = directions;
  call.dtype = x.scalar_type();
  check(call.dtype == ScalarType::Float || call.dtype == ScalarType::Double ||
            call.dtype == ScalarType::BFloat16 || call.dtype == ScalarType::Half,
        "x must be float64, float32, bfloat16 or float16, got ", name_of(call.dtype));
  check_storage(x, "x");
  call.compute = call.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return call;
}

// The arguments that describe the layer.
struct GivenLayer {
  const std::string& cell;
  bool bidirectional, c_in_y;
};

template <class Engine>
OpCall read_call(Engine& engine, const Tensor& x, const std::vector<Tensor>& weights,
                 const GivenBatch& batch, const GivenLayer& layer) {
  OpCall call = begin_call(x, layer.cell, layer.bidirectional ? 2 : 1);
  call.c_in_y = layer.c_in_y;
  check(!layer.c_in_y || call.info().has_c, "c_in_y must be False: ", call.info().name,
        " has no cell state");
  read_sequences(call, x, batch);
  if (batch.starts) read_starts(engine, call, *batch.starts, batch.batch_sizes.has_value());
  read_weights(engine, call, x, weights);
  return call;
}

// Reads a call of one step. x is [N, I], or [I] for N = 1. I must be input_size, and H must be
// hidden_size.
template <class Engine>
OpCall read_step(Engine& engine, const Tensor& x, const std::vector<Tensor>& weights,
                 int64_t input_size, int64_t hidden_size, const std::string& cell) {
  OpCall call = begin_call(x, cell, 1);
  const int64_t rank = x.dim();
  check(rank == 1 || rank == 2, "x must be [N, I] or [I], got ", shape(x));
  check(!call.info().projects, "cell must be one without projection, got ", call.info().name);
  call.T = 1;
  call.N = rank == 2 ? x.size(0) : 1;
  call.packed = from_batch_sizes(std::vector<int64_t>(call.N ? 1 : 0, call.N), call.N);
  read_weights(engine, call, x, weights);
  check(call.I == input_size, "x must have I = ", input_size, " features, got ", call.I);
  check(call.H == hidden_size, "weight_ih must have rows for H = ", hidden_size, ", got ", call.H);
  return call;
}

// The dtype of c, or of its gradient, as the caller has it. With a 16-bit x it may be float32, and
// then c_n, or the gradient that is returned, is float32 too.
inline ScalarType c_dtype(const OpCall& call, const OptionalTensor& c) {
  return c && c->scalar_type() == call.compute ? call.compute : call.dtype;
}

// The sizes of a state of one step: [N, width], or [width] if x is [I].
inline std::vector<int64_t> step_sizes(const OpCall& call, int64_t width) {
  if (call.x.dim() == 1) return {width};
  return {call.N, width};
}

// Pointers to the tensors of one direction: the weights of a call, or their gradients.
template <class Value>
Parameters<Value> pointers(const OpCall& call, const std::vector<Tensor>& tensors, int64_t d) {
  const ParameterList parameters = parameters_of(call.info(), call.bias);
  const Tensor* given = tensors.data() + d * parameters.size();
  Parameters<Value> p = {};
  for (const Parameter parameter : parameters) p[parameter] = data<Value>(*given++);
  return p;
}

// The tensors that an engine's passes take, in packed order and in the engine's dtypes.
struct ForwardTensors {
  const Tensor& x;
  const Tensor& h;          // in: h_0; out: h_n
  const OptionalTensor& c;  // in: c_0; out: c_n; absent in cells without c
  void* y;
  const OptionalTensor& reserve;
};
struct BackwardTensors {
  const Tensor& x;
  const Tensor& reserve;
  const OptionalTensor& d_y;
  const Tensor& d_h;          // in: gradient of h_n; out: gradient of h_0
  const OptionalTensor& d_c;  // the same for c; absent in cells without c
  const OptionalTensor& d_x;
  const std::vector<Tensor>& d_weights;  // empty if no gradient of a weight is wanted
};

}  // namespace fusedrnn
