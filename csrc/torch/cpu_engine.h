// The ops on the CPU. A layer computes in float (for float, bfloat16 and float16) or double. Where
// the instruction set multiplies pairs of bfloat16, the factors of products and what is saved are
// bfloat16, h is rounded to it each step, and sums and c are float. Else everything is in
// contiguous copies of the dtype that it is computed in. Outputs go back to the dtype of x.
#pragma once

#include <cstring>
#include <memory>

#include "../cpu/dispatch.h"
#include "call.h"
#include "runtime.h"

namespace fusedrnn {

// Calls body with a value of the type of a call's factors.
template <class Body>
auto with_factors(const Call& call, const Body& body) {
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
  explicit CpuEngine(const Tensor& x) : x_(x) { check_device(x, "x"); }

  void check_device(const Tensor& t, const char* name) const {
    check(t.is_cpu(), name, " must be on the CPU");
  }

  Tensor empty(Sizes sizes, ScalarType dtype) const { return empty_on_cpu(x_, sizes, dtype); }

  // t in `dtype`, contiguous, in memory of its own.
  Tensor copied(const Tensor& t, ScalarType dtype) const {
    Tensor own = empty(t.sizes(), dtype);
    copy(own, t);
    return own;
  }

  // The same; t itself where it is that already.
  Tensor prepare(const Tensor& t, ScalarType dtype) const {
    const bool ready = t.scalar_type() == dtype && t.is_contiguous();
    return ready && is_aligned(t, t.element_size()) ? t : copied(t, dtype);
  }

  // Zeroes what follows the first bytes.
  void zero_from(const Tensor& t, size_t begin) const {
    const size_t bytes = bytes_of(t);
    if (begin < bytes) std::memset(data<char>(t) + begin, 0, bytes - begin);
  }

  ScalarType stored_dtype(const Call& call) const {
    const bool pairs = (call.I | call.H | call.P) % kTerms<Bf16> == 0;
    return call.dtype == ScalarType::BFloat16 && pairs && kernels().bf16 ? call.dtype
                                                                         : call.compute;
  }
  ScalarType h_dtype(const Call& call) const { return call.stored; }
  ScalarType gradient_dtype(const Call& call) const { return call.compute; }
  ScalarType reserve_dtype(const Call& call) const { return call.compute; }
  int64_t reserve_size(const Call& call, int64_t rows) const {
    return with_factors(
        call, [&](auto f) { return fusedrnn::reserve_size<decltype(f)>(call.layer(), rows); });
  }

  Tensor packed_rows(const Call& call, const Tensor& rows, int64_t width) const {
    const Tensor ready = prepare(rows, call.stored);
    if (!call.padded) return ready;
    Tensor packed = empty({call.sequences().rows(), width}, call.stored);
    pack_rows(*call.padded, ready.data_ptr(), packed.data_ptr(), width * ready.element_size());
    return packed;
  }

  Tensor output_rows(const Call& call, const Tensor& packed, int64_t width) const {
    if (!call.padded) return prepare(packed, call.dtype);
    Tensor padded = empty({call.T, call.N, width}, packed.scalar_type());
    zero_from(padded, 0);
    unpack_rows(*call.padded, packed.data_ptr(), padded.data_ptr(), width * packed.element_size());
    return prepare(padded, call.dtype);
  }

  Tensor own_state(const Call& call, const OptionalTensor& state, Sizes sizes,
                   ScalarType dtype) const {
    Tensor own = empty(sizes, dtype);
    if (!state) {
      zero_from(own, 0);
      return own;
    }
    const Tensor ready = prepare(*state, dtype);
    const int64_t bytes = sizes.back() * own.element_size();
    if (call.padded) {
      sort_states(*call.padded, ready.data_ptr(), own.data_ptr(), call.D, bytes);
    } else if (call.D * call.N > 0) {
      copy_row(ready.data_ptr(), 0, own.data_ptr(), 0, call.D * call.N * bytes);
    }
    return own;
  }

  Tensor output_state(const Call& call, const Tensor& own, int64_t width, ScalarType dtype) const {
    if (!call.padded) return prepare(own, dtype);
    Tensor out = empty({call.D, call.N, width}, own.scalar_type());
    unsort_states(*call.padded, own.data_ptr(), out.data_ptr(), call.D, width * out.element_size());
    return prepare(out, dtype);
  }

  // Memory for values of the compute dtype that nobody wants.
  class Spare {
   public:
    Spare(CpuEngine&, const Call& call, int64_t values)
        : memory_(std::make_unique_for_overwrite<std::byte[]>(
              values * (call.compute == ScalarType::Double ? sizeof(double) : sizeof(float)))) {}
    void* data() const { return memory_.get(); }

   private:
    std::unique_ptr<std::byte[]> memory_;
  };

  void forward(const Call& call, const ForwardTensors& t) const {
    with_factors(call, [&](auto f) { run<decltype(f)>(call, t); });
  }
  void backward(const Call& call, const BackwardTensors& t) const {
    with_factors(call, [&](auto f) { run<decltype(f)>(call, t); });
  }

 private:
  template <class F>
  void run(const Call& call, const ForwardTensors& t) const {
    LayerForward<F> args = {};
    args.x = data<F>(t.x);
    for (int64_t d = 0; d < call.D; ++d) args.w[d] = pointers<const F>(call, call.weights, d);
    args.h = data<F>(t.h);
    args.c = t.c ? data<Sum<F>>(*t.c) : nullptr;
    args.y = static_cast<F*>(t.y);
    args.reserve = t.reserve ? data<Sum<F>>(*t.reserve) : nullptr;
    TorchRuntime runtime(x_, call.work());
    layer_forward<F>(call.layer(), kernels_of<F>(kernels()), runtime, args);
  }

  template <class F>
  void run(const Call& call, const BackwardTensors& t) const {
    LayerBackward<F> args = {};
    args.x = data<F>(t.x);
    args.reserve = data<Sum<F>>(t.reserve);
    args.d_y = t.d_y ? data<F>(*t.d_y) : nullptr;
    args.d_h = data<Sum<F>>(t.d_h);
    args.d_c = t.d_c ? data<Sum<F>>(*t.d_c) : nullptr;
    args.d_x = t.d_x ? data<Sum<F>>(*t.d_x) : nullptr;
    for (int64_t d = 0; d < call.D; ++d) {
      args.w[d] = pointers<const F>(call, call.weights, d);
      if (!t.d_weights.empty()) args.d_w[d] = pointers<Sum<F>>(call, t.d_weights, d);
    }
    TorchRuntime runtime(x_, call.work());
    layer_backward<F>(call.layer(), kernels_of<F>(kernels()), runtime, args);
  }

  const Tensor& x_;
};

}  // namespace fusedrnn
