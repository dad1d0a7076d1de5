// The layout of a block of the kernels with a time loop: the tiles of its products, its shared
// memory, and rough figures of the clocks that it needs for a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "args.h"
#include "plan_request.h"

namespace fusedrnn::cuda {

// Fills what a tile of R weight rows and K values has in every layout. Each of `cluster` blocks
// multiplies a part of K. Returns how many bytes of shared memory the weights of an iteration take,
// or nothing if no kernel has so many rows.
inline std::optional<int64_t> fill_tile(Cores cores, int64_t R, int64_t K, int64_t cluster,
                                        int64_t value_bytes, ProductTile& tile) {
  const int64_t part = ceil_div(K, cluster);
  tile.R = static_cast<int>(R);
  tile.K = static_cast<int>(K);
  if (cores == Cores::kFma) {
    if (R > kThreads) return std::nullopt;
    tile.ld = tile.R;
    tile.slices = kThreads / tile.R;
    tile.K_part = static_cast<int>(round_up(part, 4));
    tile.K_pad = static_cast<int>(tile.K_part * cluster);
    tile.steps = static_cast<int>(ceil_div(tile.K_part / 4, tile.slices));
    return kThreads * 4 * value_bytes;
  }
  const int64_t tiles = ceil_div(R, 16), group = 64 / value_bytes;
  if (tiles > kMmaTiles) return std::nullopt;
  // The 4 added columns make the threads of a warp write their sums to different banks.
  tile.ld = static_cast<int>(tiles * 16 + 4);
  tile.slices = kThreads / 32;
  tile.K_part = static_cast<int>(round_up(part, group));
  tile.K_pad = static_cast<int>(tile.K_part * cluster);
  tile.steps = static_cast<int>(ceil_div(tile.K_part / group, tile.slices));
  return tile.slices * tiles * 1024;
}

// How many iterations of a stage have their weights in registers.
inline int held_of(Cores cores, Dtype dtype, Regime regime, int stage) {
  if (stage > 0) return 0;
  if (cores == Cores::kMma) return regime == Regime::kStreamed ? kMmaHeldStreamed : kMmaHeld;
  return dtype == Dtype::kFloat64 ? kFmaHeldDouble : kFmaHeld;
}

// The bytes of the partial sums of a stage, and of the rows of its source in the compute type.
inline int64_t partial_bytes(const BlockShape& shape, const ProductTile& tile, int64_t real_bytes) {
  return int64_t(tile.slices) * shape.partial_rows * tile.ld * real_bytes;
}
inline int64_t staged_bytes(Cores cores, const BlockShape& shape, const ProductTile& tile,
                            int64_t real_bytes) {
  if (cores == Cores::kMma) return 0;
  return std::min<int64_t>(shape.group, kFmaRows) * tile.K_part * real_bytes;
}

// The layout of a resident block of `units` units and `rows` sequences, in a cluster of `cluster`
// blocks, or nothing if the kernels could not run it on any device.
inline std::optional<BlockShape> make_shape(const PlanRequest& q, Cores cores, int64_t units,
                                            int64_t rows, int64_t cluster) {
  const CellInfo& info = info_of(q.cell);
  const int64_t value_bytes = static_cast<int64_t>(size_of(q.dtype));
  if (units * rows > kPairs * kThreads) return std::nullopt;
  BlockShape shape = {};
  shape.units = shape.proj_units = static_cast<int>(units);
  shape.rows = shape.group = static_cast<int>(rows);
  shape.rows_pad = static_cast<int>(cores == Cores::kMma ? round_up(rows, 8) : rows);
  shape.partial_rows = shape.rows_pad;
  shape.cluster = static_cast<int>(cluster);
  int64_t at = 0, partials = 0, staged = 0, received = 0;
  for (int s = 0; s < info.stages; ++s) {
    const int64_t gates = info.stage[s].gates;
    const int64_t R = cluster * (q.backward ? units : gates * units);
    const int64_t K = q.backward ? gates * q.H : q.H;
    ProductTile& tile = shape.tile[s];
    const auto iteration = fill_tile(cores, R, K, cluster, value_bytes, tile);
    if (!iteration) return std::nullopt;
    tile.on_chip = tile.steps;
    tile.weights = static_cast<int>(at);
    at += std::max(0, tile.steps - held_of(cores, q.dtype, Regime::kResident, s)) * *iteration;
    partials = std::max(partials, partial_bytes(shape, tile, 4));
    staged = std::max(staged, staged_bytes(cores, shape, tile, 4));
    if (cluster > 1) received = std::max<int64_t>(received, 4 * shape.partial_rows * tile.R);
  }
  shape.partials = static_cast<int>(at);
  at = round_up(at + partials, 16);
  shape.staged = static_cast<int>(at);
  at += staged;
  shape.received = static_cast<int>(at);
  at += received;
  const int64_t bias_bytes = q.backward ? 0 : 2 * info.gates * units * 4;
  shape.bias = static_cast<int>(at);
  // ResidentForward::run_cell relies on the parameters' lying right behind the biases.
  shape.params = static_cast<int>(at + bias_bytes);
  at += bias_bytes + info.params * units * 4;
  if (at > int64_t(1) << 30) return std::nullopt;
  shape.shared_bytes = static_cast<int>(at);
  return shape;
}

// A streamed block may have any number of sequences that the kernels can count in an int.
constexpr int64_t kMostBlockRows = int64_t(1) << 30;

// The layout of a streamed block, or nothing if it has no room. The weights that have no room in
// registers and shared memory are streamed, those of the last stage only if no others are left.
inline std::optional<BlockShape> make_streamed_shape(const PlanRequest& q, Cores cores,
                                                     int64_t unit_blocks, int64_t units,
                                                     int64_t rows, int64_t group) {
  const CellInfo& info = info_of(q.cell);
  const int64_t value_bytes = static_cast<int64_t>(size_of(q.dtype));
  const int64_t real_bytes = std::max<int64_t>(value_bytes, 4);
  const int64_t proj_units = info.projects ? ceil_div(q.P, unit_blocks) : units;
  if (std::max(units, proj_units) * group > kPairs * kThreads || rows > kMostBlockRows)
    return std::nullopt;
  BlockShape shape = {};
  shape.units = static_cast<int>(units);
  shape.proj_units = static_cast<int>(proj_units);
  shape.rows = static_cast<int>(rows);
  shape.group = static_cast<int>(group);
  shape.rows_pad = static_cast<int>(cores == Cores::kMma ? round_up(rows, 8) : rows);
  shape.partial_rows = static_cast<int>(cores == Cores::kMma ? round_up(group, 8) : group);
  shape.cluster = 1;
  int64_t iteration[kMaxStages] = {}, held[kMaxStages] = {}, weights = 0, partials = 0, staged = 0;
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const int64_t from_units = stage.from_hidden ? proj_units : units;
    const int64_t columns = stage.projects ? q.P : stage.gates * q.H;
    const int64_t R = q.backward ? from_units : stage.projects ? proj_units : stage.gates * units;
    const int64_t K = q.backward ? columns : stage.from_hidden ? q.P : q.H;
    ProductTile& tile = shape.tile[s];
    const auto bytes = fill_tile(cores, R, K, 1, value_bytes, tile);
    if (!bytes) return std::nullopt;
    iteration[s] = *bytes;
    held[s] = std::min(tile.steps, held_of(cores, q.dtype, Regime::kStreamed, s));
    weights += (tile.steps - held[s]) * iteration[s];
    partials = std::max(partials, round_up(partial_bytes(shape, tile, real_bytes), 16));
    staged = std::max(staged, staged_bytes(cores, shape, tile, real_bytes));
  }
  constexpr int64_t kRing = int64_t(kRingBytes) * kThreads;
  int64_t room = static_cast<int64_t>(q.device.shared_per_block) - partials - staged;
  if (weights > room) room -= kRing;  // for stage 0
  int64_t at = 0, streamed = 0;
  for (int s = info.stages - 1; s >= 0; --s) {
    ProductTile& tile = shape.tile[s];
    const bool fits = (tile.steps - held[s]) * iteration[s] <= room;
    if (!fits && s > 0) room -= kRing;
    if (room < 0) return std::nullopt;
    tile.on_chip = fits ? tile.steps : static_cast<int>(held[s] + room / iteration[s]);
    const int64_t here = (tile.on_chip - held[s]) * iteration[s];
    tile.weights = static_cast<int>(at);
    at += here;
    room -= here;
    if (!fits) {
      tile.ring = static_cast<int>(at);
      at += kRing;
    }
    tile.streamed = static_cast<int>(streamed);
    streamed += (tile.steps - tile.on_chip) * iteration[s];
    if (streamed > int64_t(1) << 30) return std::nullopt;
  }
  shape.streamed_bytes = static_cast<int>(streamed);
  shape.partials = static_cast<int>(at);
  shape.staged = static_cast<int>(at + partials);
  shape.shared_bytes = static_cast<int>(at + partials + staged);
  return shape;
}

// How often a block goes through its weights in a step.
inline int64_t passes_of(Cores cores, const BlockShape& shape) {
  const int64_t at_once = cores == Cores::kMma ? kMmaRows : kFmaRows;
  const int64_t groups = shape.rows / shape.group, rest = shape.rows % shape.group;
  return groups * ceil_div(shape.group, at_once) + ceil_div(rest, at_once);
}

// Rough figures for the choice among grids, a clock and a multiprocessor: what L2 and
// memory deliver (an H100 by its vendor's and others' measurements), and shared memory.
constexpr double kL2BytesPerClock = 23;
constexpr double kMemoryBytesPerClock = 13;
constexpr double kSharedBytesPerClock = 128;
// We assume that mma.sync, which the resident and the streamed kernels use, does no more per clock
// than on sm_80. The higher rates of the cards in estimate.h for sm_90 and sm_100 need instructions
// that only these architectures have; NVIDIA's own matrix products use them.
constexpr double kMmaHalfFlops = 2048;
constexpr double kMmaTf32Flops = 1024;

// The clocks that a block needs for a step, without waiting for others. It reads the sources once,
// and its weights once for each group of sequences that is multiplied at once.
inline double clocks_of_step(const PlanRequest& q, Cores cores, const BlockShape& shape,
                             int64_t blocks) {
  const CellInfo& info = info_of(q.cell);
  const double value_bytes = static_cast<double>(size_of(q.dtype));
  const double rate = cores == Cores::kMma
                          ? (q.dtype == Dtype::kFloat32 ? kMmaTf32Flops : kMmaHalfFlops)
                          : (q.dtype == Dtype::kFloat64 ? 128 : 256);
  const double passes = static_cast<double>(passes_of(cores, shape));
  double sources = 0, operations = 0, shared = 0;
  for (int s = 0; s < info.stages; ++s) {
    const ProductTile& tile = shape.tile[s];
    sources += static_cast<double>(shape.rows_pad) * tile.K_part * value_bytes;
    operations += 2.0 * shape.rows_pad * tile.ld * tile.K_part;
    shared += static_cast<double>(tile.R) * tile.K_part * value_bytes;
  }
  const bool in_l2 = shape.streamed_bytes * blocks <= static_cast<int64_t>(q.device.l2_bytes);
  const double streamed = passes * shape.streamed_bytes;
  return std::max(
      {sources / kL2BytesPerClock + streamed / (in_l2 ? kL2BytesPerClock : kMemoryBytesPerClock),
       passes * shared / kSharedBytesPerClock, operations / rate});
}

}  // namespace fusedrnn::cuda
