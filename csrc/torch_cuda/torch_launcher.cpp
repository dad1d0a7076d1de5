#include "torch_launcher.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <iomanip>
#include <type_traits>

#include "../cuda/launches.h"
#include "copies.h"

namespace fusedrnn::cuda {
namespace {

namespace stable = torch::stable::detail;

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return ScalarType::Float;
    case Dtype::kFloat64:
      return ScalarType::Double;
    case Dtype::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::BFloat16;
  }
}

// Stores rows [begin, begin + count) of a product in the product's result c, or adds them to it.
template <class Stored>
void store(Launcher& launcher, const MatrixProduct& p, const void* product, int64_t begin,
           int64_t count) {
  const StoreArgs<Stored> args = {count,
                                  p.c.columns,
                                  static_cast<const Real<Stored>*>(product),
                                  static_cast<Stored*>(p.c.data) + begin * p.c.ld,
                                  p.c.ld,
                                  p.accumulate};
  launch<Stored>(launcher, "store", grid_for(count * p.c.columns, 4096), args);
}

bool same(const Matrix<const void>& a, const Matrix<const void>& b) {
  return a.data == b.data && a.rows == b.rows && a.columns == b.columns && a.ld == b.ld &&
         a.transposed == b.transposed;
}

int32_t code_of(ScalarType dtype) { return stable::to<int32_t>(stable::from(dtype)); }

}  // namespace

Products products_of(const char* library, const std::string& device) {
  void* const loaded = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  Products products;
  if (!loaded) return products;
  const auto find = [&](const char* function, auto& pointer) {
    const std::string name = "aoti_torch_" + device + "_" + function;
    pointer =
        reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(dlsym(loaded, name.c_str()));
  };
  find("mm_out", products.mm_out);
  find("mm_dtype_out", products.mm_dtype_out);
  find("addmm_out", products.addmm_out);
  return products;
}

TorchLauncher::TorchLauncher(const Tensor& like, const Products& products)
    : like_(like), products_(products) {
  check_torch(aoti_torch_get_device_type(like.get(), &device_type_));
  check_torch(aoti_torch_get_device_index(like.get(), &device_index_));
}

Tensor TorchLauncher::empty(Sizes sizes, ScalarType dtype) {
  try {
    return allocate(sizes, dtype);
  } catch (const TorchSaysNothing&) {
    // If memory is not what was lacking, memory() throws: after an error of earlier work every call
    // fails.
    const Memory left = memory();
    fail(kTorchLacksGpuMemory, ". Tried to allocate ", std::fixed, std::setprecision(0),
         bytes_wanted(sizes, dtype), " bytes (", left.free, " of ", left.total,
         " free); torch before 2.13 does not say more", kMemoryTag);
  }
}

Tensor TorchLauncher::allocate(Sizes sizes, ScalarType dtype) {
  return new_empty(like_, sizes, dtype);
}

void TorchLauncher::scratch(std::vector<ScratchPart>& parts) {
  // The parts that must be zero come first.
  size_t bytes = 0, zeros = 0;
  const auto for_each = [&](const auto& body) {
    for (const bool zero : {true, false})
      for (ScratchPart& part : parts)
        if (part.zero == zero) body(part);
  };
  const auto padded = [](size_t size) { return (size + 255) / 256 * 256; };
  for_each([&](const ScratchPart& part) {
    bytes += padded(part.bytes);
    if (part.zero) zeros = bytes;
  });
  if (bytes == 0) return;
  kept_.push_back(empty({static_cast<int64_t>(bytes)}, ScalarType::Byte));
  char* at = data<char>(kept_.back());
  if (zeros) this->zero(at, zeros);
  for_each([&](ScratchPart& part) {
    part.at = at;
    at += padded(part.bytes);
  });
}

Tensor TorchLauncher::tensor_of(const Matrix<const void>& m, Dtype dtype) {
  const auto found = std::find_if(views_.begin(), views_.end(), [&](const View& view) {
    return view.dtype == dtype && same(view.matrix, m);
  });
  if (found != views_.end()) {
    std::rotate(views_.begin(), found, found + 1);
  } else {
    if (views_.size() == kViews) views_.pop_back();
    views_.insert(views_.begin(), {m, dtype, make_tensor(m, dtype)});
  }
  return views_.front().tensor;
}

Tensor TorchLauncher::make_tensor(const Matrix<const void>& m, Dtype dtype) const {
  std::array<int64_t, 2> sizes = {m.rows, m.columns}, strides = {m.ld, 1};
  if (m.transposed) std::swap(strides[0], strides[1]);
  AtenTensorHandle made = nullptr;
  check_torch(aoti_torch_create_tensor_from_blob(const_cast<void*>(m.data), 2, sizes.data(),
                                                 strides.data(), 0, code_of(scalar_type(dtype)),
                                                 device_type_, device_index_, &made));
  return Tensor(made);
}

void TorchLauncher::mm(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
  const ScalarType dtype = out.scalar_type();
  if (accumulate)
    return check_torch(products_.addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  if (dtype == a.scalar_type()) {
    if (products_.mm_out) return check_torch(products_.mm_out(out.get(), a.get(), b.get()));
    std::array<StableIValue, 3> stack = {stable::from(a), stable::from(b), stable::from(out)};
    check_torch(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    stable::to<Tensor>(stack[0]);
  } else {
    if (products_.mm_dtype_out)
      return check_torch(products_.mm_dtype_out(out.get(), a.get(), b.get(), code_of(dtype)));
    std::array<StableIValue, 4> stack = {stable::from(a), stable::from(b), stable::from(dtype),
                                         stable::from(out)};
    check_torch(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    stable::to<Tensor>(stack[0]);
  }
}

bool TorchLauncher::can_add(const MatrixProduct& p) const {
  return products_.addmm_out && p.dtype == p.c_dtype && size_of(p.dtype) >= sizeof(float);
}

void* TorchLauncher::product_memory(size_t bytes) {
  if (!product_ || bytes_of(*product_) < bytes) {
    product_.reset();
    const size_t size = std::max(bytes, std::min(kLeastProductBytes, product_limit_));
    product_ = empty({static_cast<int64_t>(size)}, ScalarType::Byte);
  }
  return product_->data_ptr();
}

void TorchLauncher::multiply(const MatrixProduct& p) {
  const int64_t M = p.c.rows, N = p.c.columns;
  const auto rows_of_a = [&](int64_t begin, int64_t count) {
    Matrix<const void> rows = p.a;
    const int64_t offset = p.a.transposed ? begin : begin * p.a.ld;
    rows.data =
        static_cast<const char*>(p.a.data) + offset * static_cast<int64_t>(size_of(p.dtype));
    rows.rows = count;
    return tensor_of(rows, p.dtype);
  };
  const Tensor b = tensor_of(p.b, p.dtype);
  // Torch itself writes a product only if the result is in the compute type:
  // - With a 16-bit result torch may split a long sum and add the parts in 16 bits
  //   (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, on by default).
  // - To c it can add only a product of factors in the dtype of c, by addmm. By its name that op
  //   cannot be called: it takes Scalars, which the stable ABI lacks.
  const Dtype real = p.c_dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  if (p.c_dtype == real && (!p.accumulate || can_add(p)))
    return mm(rows_of_a(0, M), b, tensor_of({p.c.data, M, N, p.c.ld}, real), p.accumulate);

  const int64_t rows = strip_rows(M, N, size_of(real), product_limit_);
  void* product = product_memory(static_cast<size_t>(rows * N) * size_of(real));
  for (int64_t begin = 0; begin < M; begin += rows) {
    const int64_t count = std::min(rows, M - begin);
    mm(rows_of_a(begin, count), b, tensor_of({product, count, N, N}, real), false);
    switch (p.c_dtype) {
      case Dtype::kFloat32:
        store<float>(*this, p, product, begin, count);
        break;
      case Dtype::kFloat64:
        store<double>(*this, p, product, begin, count);
        break;
      case Dtype::kFloat16:
        store<Half>(*this, p, product, begin, count);
        break;
      case Dtype::kBFloat16:
        store<Bf16>(*this, p, product, begin, count);
        break;
    }
  }
}

bool torch_allows_tf32() {
  StableIValue answer = 0;
  // Python implements this op. In a process without Python the call fails, and TF32 is not allowed.
  if (torch_call_dispatcher("fusedrnn::_allow_tf32", "", &answer, TORCH_ABI_VERSION) !=
      TORCH_SUCCESS)
    return false;
  return stable::to<bool>(answer);
}

}  // namespace fusedrnn::cuda
