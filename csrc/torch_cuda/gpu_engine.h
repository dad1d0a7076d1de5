// The ops on a GPU. Tensors are in their own dtype, and states in the compute type. A launcher
// gives the engine memory and starts its kernels. `L` is the launcher's class, a TorchLauncher that
// is made from x: on a GPU it uses the CUDA runtime, in the tests the PTX interpreter.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <limits>

#include "../cuda/launches.h"
#include "../cuda/layer.h"
#include "../layer/reserve.h"
#include "../torch/call.h"
#include "copies.h"
#include "torch_launcher.h"

namespace fusedrnn {

// What an environment variable asks for, read by named(text, variable), which throws
// std::invalid_argument.
template <class Named>
auto asked_for(const char* variable, const Named& named) {
  const char* value = std::getenv(variable);
  try {
    return named(value ? value : "", variable);
  } catch (const std::invalid_argument& wrong) {
    fail(wrong.what());
  }
}

// The spin limit from FUSEDRNN_CUDA_SPIN_LIMIT, or the engine's default.
inline unsigned spin_limit_asked_for() {
  const char* value = std::getenv("FUSEDRNN_CUDA_SPIN_LIMIT");
  const std::string text = value ? value : "";
  if (text.empty()) return cuda::Options().spin_limit;
  unsigned limit = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, limit);
  check(error == std::errc() && stop == end && limit > 0,
        "FUSEDRNN_CUDA_SPIN_LIMIT must be a whole number from 1 to ",
        std::numeric_limits<unsigned>::max(), ", got '", text, "'");
  return limit;
}

template <class L>
class GpuEngine {
 public:
  static constexpr bool kHostReads = false;
  explicit GpuEngine(const Tensor& x) : launcher_(x) {}

  void check_device(const Tensor& t, const char* name) const { launcher_.check_device(t, name); }

  Tensor empty(Sizes sizes, ScalarType dtype) { return launcher_.empty(sizes, dtype); }

  // A contiguous copy of t in `dtype`.
  Tensor copied(const Tensor& t, ScalarType dtype) {
    Tensor own = empty(t.sizes(), dtype);
    copy(own, t);
    return own;
  }

  // t itself if it is contiguous and has this dtype, else a copy.
  Tensor prepare(const Tensor& t, ScalarType dtype) {
    return t.scalar_type() == dtype && t.is_contiguous() ? t : copied(t, dtype);
  }

  // Zeroes the memory of t from byte `begin` on.
  void zero_from(const Tensor& t, size_t begin) {
    const size_t bytes = bytes_of(t);
    if (begin < bytes) launcher_.zero(data<char>(t) + begin, bytes - begin);
  }

  ScalarType stored_dtype(const OpCall& call) const { return call.dtype; }
  ScalarType h_dtype(const OpCall& call) const { return call.compute; }
  ScalarType gradient_dtype(const OpCall& call) const { return call.dtype; }
  ScalarType reserve_dtype(const OpCall&) const { return ScalarType::Byte; }
  int64_t reserve_size(const OpCall& call, int64_t rows) const {
    return with_stored(call, [&](auto stored) {
      return static_cast<int64_t>(reserve_bytes<decltype(stored)>(call.layer(), rows));
    });
  }

  Tensor packed_rows(const OpCall& call, const Tensor& rows, int64_t width) {
    const Tensor ready = prepare(rows, call.stored);
    if (!call.moves_rows()) return ready;
    const Tensor packed = empty({call.sequences().rows(), width}, call.stored);
    move_rows("pack", rows_of(call, width), ready, packed);
    return packed;
  }

  Tensor output_rows(const OpCall& call, const Tensor& packed, int64_t width) {
    if (!call.moves_rows()) return packed;
    const Tensor padded = empty({call.T, call.N, width}, call.stored);
    move_rows("unpack", rows_of(call, width), packed, padded);
    return padded;
  }

  Tensor own_state(const OpCall& call, const OptionalTensor& state, Sizes sizes, ScalarType dtype,
                   StateAt) {
    Tensor own = empty(sizes, dtype);
    if (!state) {
      zero_from(own, 0);
    } else if (call.moves_rows()) {
      move_rows("pack", states_of(call, sizes.back()), prepare(*state, dtype), own);
    } else {
      copy(own, *state);
    }
    return own;
  }

  Tensor output_state(const OpCall& call, const Tensor& own, int64_t width, ScalarType dtype,
                      StateAt) {
    if (!call.moves_rows()) return prepare(own, dtype);
    const Tensor out = empty({call.D, call.N, width}, call.compute);
    move_rows("unpack", states_of(call, width), own, out);
    return prepare(out, dtype);
  }

  // Memory, in the stored type, for an output that the caller does not want.
  class Spare {
   public:
    Spare(GpuEngine& engine, const OpCall& call, int64_t values)
        : memory_(engine.empty({values}, call.stored)) {}
    void* data() const { return memory_.data_ptr(); }

   private:
    Tensor memory_;
  };

  void forward(const OpCall& call, const ForwardTensors& t) {
    with_stored(call, [&](auto stored) {
      using Stored = decltype(stored);
      cuda::LayerForward<Stored> args = {};
      args.x = data<Stored>(t.x);
      for (int64_t d = 0; d < call.D; ++d)
        args.w[d] = pointers<const Stored>(call, call.weights, d);
      args.h = data<Real<Stored>>(t.h);
      args.c = t.c ? data<Real<Stored>>(*t.c) : nullptr;
      args.y = static_cast<Stored*>(t.y);
      args.reserve = t.reserve ? t.reserve->data_ptr() : nullptr;
      args.beginnings = find_beginnings(call);
      run([&] { cuda::layer_forward<Stored>(call.layer(), launcher_, options(call), args); });
    });
  }

  void backward(const OpCall& call, const BackwardTensors& t) {
    with_stored(call, [&](auto stored) {
      using Stored = decltype(stored);
      cuda::LayerBackward<Stored> args = {};
      args.x = data<Stored>(t.x);
      args.reserve = t.reserve.data_ptr();
      args.beginnings = find_beginnings(call);
      args.d_y = t.d_y ? data<Stored>(*t.d_y) : nullptr;
      args.d_h = data<Real<Stored>>(t.d_h);
      args.d_c = t.d_c ? data<Real<Stored>>(*t.d_c) : nullptr;
      args.d_x = t.d_x ? data<Stored>(*t.d_x) : nullptr;
      for (int64_t d = 0; d < call.D; ++d) {
        args.w[d] = pointers<const Stored>(call, call.weights, d);
        if (!t.d_weights.empty()) args.d_w[d] = pointers<Stored>(call, t.d_weights, d);
      }
      run([&] { cuda::layer_backward<Stored>(call.layer(), launcher_, options(call), args); });
    });
  }

 private:
  // Calls body with a value of the call's stored type.
  template <class Body>
  static auto with_stored(const OpCall& call, const Body& body) {
    switch (call.dtype) {
      case ScalarType::Double:
        return body(double());
      case ScalarType::Half:
        return body(Half());
      case ScalarType::BFloat16:
        return body(Bf16());
      default:
        return body(float());
    }
  }

  // Runs a pass of the engine. The engine knows no torch, so its error about a regime that cannot
  // run becomes an error of the ops here.
  template <class Pass>
  static void run(const Pass& pass) {
    try {
      pass();
    } catch (const cuda::RegimeRefused& refused) {
      fail(refused.what(), kRegimeTag);
    }
  }

  cuda::Options options(const OpCall& call) const {
    return {.allow_tf32 = call.dtype == ScalarType::Float && cuda::torch_allows_tf32(),
            .regime = asked_for("FUSEDRNN_CUDA_REGIME", cuda::regime_named),
            .choice = asked_for("FUSEDRNN_CUDA_PLAN", cuda::choice_named),
            .spin_limit = spin_limit_asked_for(),
            .row_offset = row_offset_};
  }

  // Brings the order of the sequences, if they are not in the caller's, and the offsets of the
  // steps to the device, at the first call.
  void put_batch(const OpCall& call) {
    if (row_offset_) return;
    const std::vector<int64_t>& offsets = call.sequences().row_offset;
    std::vector<int64_t> numbers;
    if (call.moves_rows())
      for (const Piece& piece : call.pieces->piece) numbers.push_back(piece.n);
    const size_t ordered = numbers.size();
    numbers.insert(numbers.end(), offsets.begin(), offsets.end());
    int64_t* memory = nullptr;
    cuda::Scratch scratch;
    scratch.want(memory, static_cast<int64_t>(numbers.size()));
    scratch.allocate(launcher_);
    cuda::put_numbers(launcher_, numbers, memory);
    if (ordered) order_ = memory;
    row_offset_ = memory + ordered;
  }

  // Finds on the device where sequences begin. The host does not wait for it, since it never knows.
  cuda::Beginnings find_beginnings(const OpCall& call) {
    const Sequences& seq = call.sequences();
    if (!call.starts || seq.rows() == 0) return {};
    if (seq.batch_sizes.back() < call.N) put_batch(call);
    cuda::BeginningsArgs args = {call.N, seq.T,  row_offset_, order_, data<uint8_t>(*call.starts),
                                 {},     nullptr};
    cuda::Scratch scratch;
    for (int64_t d = 0; d < call.D; ++d) scratch.want(args.drops[d], seq.rows());
    scratch.want(args.begins, call.N);
    scratch.allocate(launcher_);
    launcher_.launch({.kernel = "find_beginnings",
                      .grid = cuda::grid_for(seq.T * call.N, 65535),
                      .block = {cuda::kThreads},
                      .args = &args,
                      .args_bytes = sizeof(args)});
    return {{args.drops[0], args.drops[1]}, args.begins};
  }

  cuda::PackArgs rows_of(const OpCall& call, int64_t width) {
    put_batch(call);
    return {call.T, call.N, width, call.sequences().T, row_offset_, order_, nullptr, nullptr};
  }

  cuda::PackArgs states_of(const OpCall& call, int64_t width) {
    put_batch(call);
    return {call.D, call.N, width, call.D, nullptr, order_, nullptr, nullptr};
  }

  // Starts the kernel that packs or unpacks rows. how is "pack" or "unpack".
  void move_rows(const char* how, cuda::PackArgs args, const Tensor& from, const Tensor& to) {
    const bool packs = std::string(how) == "pack";
    const int64_t values = (packs ? args.steps : args.T) * args.N * args.width;
    if (values == 0) return;
    args.from = from.data_ptr();
    args.to = to.data_ptr();
    launcher_.launch(
        {.kernel = std::string(how).append("_rows_b").append(std::to_string(8 * to.element_size())),
         .grid = cuda::grid_for(values, 65535),
         .block = {cuda::kThreads},
         .args = &args,
         .args_bytes = sizeof(args)});
  }

  L launcher_;
  const int64_t* order_ = nullptr;       // [N] in device memory, if the batch is padded
  const int64_t* row_offset_ = nullptr;  // [steps + 1] in device memory, after put_batch
};

}  // namespace fusedrnn
