// What the resident and the streamed kernels ask of a product: to multiply a block's weight rows by
// a source. It leaves the partial sum of each slice of K in shared memory.
#pragma once

#include "shared_memory.cuh"
#include "storage.cuh"
#include "words.cuh"

namespace fusedrnn::cuda {

// Stands for the function that returns a stage's weights, in the concept below.
template <class Stored>
struct AnyWeight {
  Stored operator()(int row, int k) const;
};

template <class Product, class Stored = typename Product::Stored>
concept BlockProduct = requires(Product& product, typename Product::Memory memory,
                                const Source<Stored>& source, Stored (*as_stored)(Stored)) {
  Product(memory);
  as_stored(Product::exchanged(Real<Stored>{}));
  product.template load_weights<0>(AnyWeight<Stored>());
  product.template multiply<0>(source, int{});
};

// A product that can stream a part of its weights.
template <class Product>
concept StreamedProduct = BlockProduct<Product> && requires(Product& product, char* streamed) {
  product.template load_weights<0>(AnyWeight<typename Product::Stored>(), streamed);
  product.template begin<0>(streamed);
};

}  // namespace fusedrnn::cuda
