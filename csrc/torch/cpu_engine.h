// The ops on the CPU. A layer computes in float (for float, bfloat16 and float16) or in double.
// If x is bfloat16, the instruction set multiplies pairs of bfloat16, and I, H and P are even, then
// the factors of products and the saved values are bfloat16, h is rounded to bfloat16 in each step,
// and sums and c are float. In all other cases the engine works on contiguous tensors of the
// compute type. Outputs are converted back to the dtype of x.
#pragma once

#include <cstring>
#include <memory>

#include "../cpu/layer.h"
#include "../layer/reserve.h"
#include "call.h"
#include "runtime.h"

namespace fusedrnn {

// Calls body with a value of the call's stored type.
template <class Body>
auto with_stored(const OpCall& call, const Body& body) {
  switch (call.stored) {
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(Bf16());
    default:
      return body(float());
  }
}

class CpuEngine {
 public:
  static constexpr bool kHostReads = true;
  explicit CpuEngine(const Tensor& x) : x_(x) { check_device(x, "x"); }

  void check_device(const Tensor& t, const char* name) const {
    check(t.is_cpu(), name, " must be on the CPU");
  }

  Tensor empty(Sizes sizes, ScalarType dtype) const { return empty_on_cpu(x_, sizes, dtype); }

  // A contiguous copy of t in `dtype`.
  Tensor copied(const Tensor& t, ScalarType dtype) const {
    Tensor own = empty(t.sizes(), dtype);
    copy(own, t);
    return own;
  }

  // t itself if it is contiguous and aligned and has this dtype, else a copy.
  Tensor prepare(const Tensor& t, ScalarType dtype) const {
    const bool ready = t.scalar_type() == dtype && t.is_contiguous();
    return ready && is_aligned(t, t.element_size()) ? t : copied(t, dtype);
  }

  // Zeroes the memory of t from byte `begin` on.
  void zero_from(const Tensor& t, size_t begin) const {
    const size_t bytes = bytes_of(t);
    if (begin < bytes) std::memset(data<char>(t) + begin, 0, bytes - begin);
  }

  ScalarType stored_dtype(const OpCall& call) const {
    const bool pairs = (call.I | call.H | call.P) % cpu::kTerms<Bf16> == 0;
    return call.dtype == ScalarType::BFloat16 && pairs && cpu::kernels().bf16 ? call.dtype
                                                                              : call.compute;
  }
  ScalarType h_dtype(const OpCall& call) const { return call.stored; }
  ScalarType gradient_dtype(const OpCall& call) const { return call.compute; }
  ScalarType reserve_dtype(const OpCall& call) const { return call.compute; }
  int64_t reserve_size(const OpCall& call, int64_t rows) const {
    return with_stored(call, [&](auto stored) {
      using Stored = decltype(stored);
      return static_cast<int64_t>(reserve_bytes<Stored>(call.layer(), rows) / sizeof(Real<Stored>));
    });
  }

  Tensor packed_rows(const OpCall& call, const Tensor& rows, int64_t width) const {
    const Tensor ready = prepare(rows, call.stored);
    if (!call.moves_rows()) return ready;
    Tensor packed = empty({call.sequences().rows(), width}, call.stored);
    move_rows(call, width * ready.element_size(), [&](int64_t bytes, int64_t begin, int64_t end) {
      pack_rows(*call.pieces, ready.data_ptr(), packed.data_ptr(), bytes, begin, end);
    });
    return packed;
  }

  Tensor output_rows(const OpCall& call, const Tensor& packed, int64_t width) const {
    if (!call.moves_rows()) return prepare(packed, call.dtype);
    const bool packed_input = !call.pieces->row_offset.empty();
    Tensor rows = empty(packed_input ? std::vector<int64_t>{call.sequences().rows(), width}
                                     : std::vector<int64_t>{call.T, call.N, width},
                        packed.scalar_type());
    if (call.padded) zero_from(rows, 0);
    move_rows(call, width * packed.element_size(), [&](int64_t bytes, int64_t begin, int64_t end) {
      unpack_rows(*call.pieces, packed.data_ptr(), rows.data_ptr(), bytes, begin, end);
    });
    return prepare(rows, call.dtype);
  }

  Tensor own_state(const OpCall& call, const OptionalTensor& state, Sizes sizes, ScalarType dtype,
                   StateAt at) const {
    std::vector<int64_t> own_sizes(sizes.begin(), sizes.end());
    if (call.pieces) own_sizes[1] = call.sequences().N;
    Tensor own = empty(own_sizes, dtype);
    if (!state || (call.pieces && call.has_starts)) zero_from(own, 0);
    if (!state) return own;
    const Tensor ready = prepare(*state, dtype);
    const int64_t bytes = sizes.back() * own.element_size();
    if (call.pieces) {
      take_states(*call.pieces, ready.data_ptr(), own.data_ptr(), call.D, at, bytes);
    } else if (call.D * call.N > 0) {
      copy_row(ready.data_ptr(), 0, own.data_ptr(), 0, call.D * call.N * bytes);
    }
    return own;
  }

  Tensor output_state(const OpCall& call, const Tensor& own, int64_t width, ScalarType dtype,
                      StateAt at) const {
    if (!call.pieces) return prepare(own, dtype);
    Tensor out = empty({call.D, call.N, width}, own.scalar_type());
    if (call.has_starts) zero_from(out, 0);
    give_states(*call.pieces, own.data_ptr(), out.data_ptr(), call.D, at,
                width * out.element_size());
    return prepare(out, dtype);
  }

  // Memory for an output that the caller does not want. It is large enough for the compute type.
  class Spare {
   public:
    Spare(CpuEngine&, const OpCall& call, int64_t values)
        : memory_(std::make_unique_for_overwrite<std::byte[]>(
              values * (call.compute == ScalarType::Double ? sizeof(double) : sizeof(float)))) {}
    void* data() const { return memory_.get(); }

   private:
    std::unique_ptr<std::byte[]> memory_;
  };

  void forward(const OpCall& call, const ForwardTensors& t) const {
    with_stored(call, [&](auto stored) { run<decltype(stored)>(call, t); });
  }
  void backward(const OpCall& call, const BackwardTensors& t) const {
    with_stored(call, [&](auto stored) { run<decltype(stored)>(call, t); });
  }

 private:
  // Moving a byte of a row counts as this many multiply-adds.
  static constexpr double kWorkOfByte = 2;

  // Shares the copies of all live rows among threads. copy(bytes of a row, begin, end) makes those
  // of the steps [begin, end).
  template <class Copy>
  void move_rows(const OpCall& call, int64_t bytes, const Copy& copy) const {
    const Sequences& seq = call.sequences();
    TorchRuntime runtime(x_, kWorkOfByte * static_cast<double>(seq.rows() * bytes));
    // Steps differ in their number of rows, so there are several pieces of work for each thread.
    const int64_t parts = runtime.threads() == 1 ? 1 : 4 * runtime.threads();
    runtime.together([&] {
      runtime.parallel(parts, [&](int64_t part) {
        const auto step_at = [&](int64_t row) {
          return std::lower_bound(seq.row_offset.begin(), seq.row_offset.end(), row) -
                 seq.row_offset.begin();
        };
        copy(bytes, step_at(seq.rows() * part / parts), step_at(seq.rows() * (part + 1) / parts));
      });
    });
  }

  template <class Stored>
  void run(const OpCall& call, const ForwardTensors& t) const {
    cpu::LayerForward<Stored> args = {};
    args.x = data<Stored>(t.x);
    for (int64_t d = 0; d < call.D; ++d) args.w[d] = pointers<const Stored>(call, call.weights, d);
    args.h = data<Stored>(t.h);
    args.c = t.c ? data<Real<Stored>>(*t.c) : nullptr;
    args.y = static_cast<Stored*>(t.y);
    args.reserve = t.reserve ? t.reserve->data_ptr() : nullptr;
    TorchRuntime runtime(x_, call.work());
    cpu::layer_forward<Stored>(call.layer(), cpu::kernels(), runtime, args);
  }

  template <class Stored>
  void run(const OpCall& call, const BackwardTensors& t) const {
    cpu::LayerBackward<Stored> args = {};
    args.x = data<Stored>(t.x);
    args.reserve = t.reserve.data_ptr();
    args.d_y = t.d_y ? data<Stored>(*t.d_y) : nullptr;
    args.d_h = data<Real<Stored>>(t.d_h);
    args.d_c = t.d_c ? data<Real<Stored>>(*t.d_c) : nullptr;
    args.d_x = t.d_x ? data<Real<Stored>>(*t.d_x) : nullptr;
    for (int64_t d = 0; d < call.D; ++d) {
      args.w[d] = pointers<const Stored>(call, call.weights, d);
      if (!t.d_weights.empty()) args.d_w[d] = pointers<Real<Stored>>(call, t.d_weights, d);
    }
    TorchRuntime runtime(x_, call.work());
    cpu::layer_backward<Stored>(call.layer(), cpu::kernels(), runtime, args);
  }

  const Tensor& x_;
};

}  // namespace fusedrnn
