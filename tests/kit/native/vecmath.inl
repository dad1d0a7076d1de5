// The body of each vecmath_<isa>.cpp, which defines FUSEDRNN_VECTOR_BYTES and TABLE. The last
// numbers of an array go through load_partial and store_partial, as in the engine.
#include "cpu/vecmath.h"
#include "vecmath_table.h"

namespace fusedrnn::cpu {
namespace {

// clang-format off
struct Exp { template <class V> static FUSEDRNN_INLINE V of(V x) { return exp(x); } };
struct Sigmoid { template <class V> static FUSEDRNN_INLINE V of(V x) { return sigmoid(x); } };
struct Tanh { template <class V> static FUSEDRNN_INLINE V of(V x) { return tanh(x); } };
struct Relu { template <class V> static FUSEDRNN_INLINE V of(V x) { return relu(x); } };
// clang-format on

template <class F, class T>
void map(const T* x, T* y, int64_t n) {
  using V = Vec<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) F::of(V::load(x + i)).store(y + i);
  const int rest = static_cast<int>(n - i);
  F::of(V::load_partial(x + i, rest)).store_partial(y + i, rest);
}

template <class T>
void map_relu_grad(const T* y, const T* d, T* out, int64_t n) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const int lanes = static_cast<int>(n - i < V::kLanes ? n - i : V::kLanes);
    relu_grad(V::load_partial(y + i, lanes), V::load_partial(d + i, lanes))
        .store_partial(out + i, lanes);
  }
}

template <class T>
void load_partial(const T* p, int n, T* out) {
  Vec<T>::load_partial(p, n).store(out);
}

template <class T>
constexpr fusedrnn_test::VecMath<T> table() {
  return {map<Exp, T>,      map<Sigmoid, T>, map<Tanh, T>,   map<Relu, T>,
          map_relu_grad<T>, Vec<T>::kLanes,  load_partial<T>};
}

}  // namespace
}  // namespace fusedrnn::cpu

namespace fusedrnn_test {
extern const VecMathTable TABLE = {fusedrnn::cpu::table<float>(), fusedrnn::cpu::table<double>()};
}
