// What was fastest for a layer in a run on a GPU.
#pragma once

#include <cstdint>
#include <string_view>

namespace fusedrnn::cuda {

struct Measurement {
  std::string_view card, date;   // the driver's name of the card, and the day of the run
  std::string_view cell, dtype;  // the engine's names
  bool tf32;                     // whether float32 products were in TF32
  bool backward;
  int64_t D, N, H, P;
  std::string_view regime,
      choice;  // what FUSEDRNN_CUDA_REGIME and FUSEDRNN_CUDA_PLAN would ask for
};

}  // namespace fusedrnn::cuda
