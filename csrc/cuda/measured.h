// What was fastest in runs on GPUs, which the plan follows for layers of about these sizes.
// `python -m tools.gpu choices FILE... --table csrc/cuda/measured.h` makes this file from the files
// bench.jsonl of all such runs (docs/gpu-run.md).
#pragma once

#include <array>

#include "measurement.h"

namespace fusedrnn::cuda {

// card, date, cell, dtype, tf32, backward, D, N, H, P, regime, choice
inline constexpr std::array<Measurement, 0> kMeasured = {};

}  // namespace fusedrnn::cuda
