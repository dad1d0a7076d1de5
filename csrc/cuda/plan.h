// The plan: how a layer runs on a device. It is a pure function of sizes and limits, so it can be
// tested and printed without a GPU. By default a layer is resident if that fits, else streamed if
// that fits, else it runs per step. The estimate of time (estimate.h) is printed, but it does not
// influence the plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>

#include "args.h"
#include "launcher.h"

namespace fusedrnn::cuda {

enum class Regime { kPerStep, kResident, kStreamed };
enum class Cores { kFma, kMma };

inline const char* name_of(Regime regime) {
  return regime == Regime::kPerStep    ? "per_step"
         : regime == Regime::kResident ? "resident"
                                       : "streamed";
}

// The regime of this name. An empty name leaves the choice to the plan. `what` is the argument's
// name in the error.
inline std::optional<Regime> regime_named(const std::string& name, const char* what = "regime") {
  if (name.empty()) return std::nullopt;
  for (const Regime regime : {Regime::kPerStep, Regime::kResident, Regime::kStreamed})
    if (name == name_of(regime)) return regime;
  throw std::invalid_argument(std::string(what) + " must be resident, streamed or per_step, got '" +
                              name + "'");
}

struct PlanRequest {
  CellKind cell;
  Dtype dtype;
  int64_t T, N, I, H, P, D;
  bool backward;
  bool allow_tf32;
  std::optional<Regime> regime;  // the regime that was asked for, if any
  Device device;
  int registers_fma = 255;  // registers of a thread, in the resident kernel of either product
  int registers_mma = 255;
};

struct Plan {
  Regime regime = Regime::kPerStep;
  std::string why_per_step;  // the reason why the layer is neither resident nor streamed
  Cores cores = Cores::kFma;
  BlockShape shape = {};
  Dim3 grid;              // [unit blocks, row blocks, D]
  int blocks_per_sm = 0;  // blocks that one multiprocessor runs together
  size_t exchange_bytes[kMaxStages] = {};
  size_t arrival_bytes = 0;
  size_t streamed_bytes = 0;  // weights of all blocks that are streamed

  // The memory that must be zero at first.
  size_t workspace_bytes() const { return exchange_bytes[0] + exchange_bytes[1] + arrival_bytes; }
};

// Whether the regime that was asked for cannot run. Then why_per_step says why.
inline bool is_refused(const PlanRequest& q, const Plan& plan) {
  return q.regime && plan.regime != *q.regime;
}

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// How many blocks of kThreads threads one multiprocessor runs together. The count is that of
// NVIDIA's cuda_occupancy.h, with which a test compares it. Each of the four schedulers has a
// quarter of the registers. A warp gets registers in units of 256, and a block gets shared memory
// in units of 128 bytes.
inline int blocks_per_sm(const Device& device, int registers, size_t shared_bytes) {
  if (shared_bytes > device.shared_per_block) return 0;
  const int64_t of_warp = round_up(int64_t(registers) * 32, 256);
  const int64_t warps = device.registers_per_sm / 4 / of_warp * 4;
  const int64_t shared = round_up(static_cast<int64_t>(shared_bytes + device.shared_reserved), 128);
  int64_t blocks = std::min<int64_t>(warps / (kThreads / 32), device.threads_per_sm / kThreads);
  if (shared > 0) blocks = std::min(blocks, static_cast<int64_t>(device.shared_per_sm) / shared);
  return static_cast<int>(blocks);
}

// The limits of a device, in lines of `key value`.
inline std::string to_text(const Device& device) {
  std::string text;
  const auto line = [&](const char* key, auto value) {
    text.append(key).append(" ").append(std::to_string(value)).append("\n");
  };
  line("capability", device.capability);
  line("sms", device.sms);
  line("threads_per_sm", device.threads_per_sm);
  line("registers_per_sm", device.registers_per_sm);
  line("shared_per_block", device.shared_per_block);
  line("shared_per_sm", device.shared_per_sm);
  line("shared_reserved", device.shared_reserved);
  line("l2_bytes", device.l2_bytes);
  return text;
}

// The tensor cores are used from this many sequences on, and fit_resident leaves a block this many
// where it has the choice. Either product takes 8 sequences at a time, so a part of it would be
// unused with fewer.
constexpr int64_t kLeastRows = 8;

// The least number of units of a block, unless the layer has fewer. Fewer would leave threads, or
// rows of a tensor core instruction, without work, and would make more blocks wait for each other.
inline int64_t least_units(Cores cores, bool backward, int gates) {
  const int64_t rows = cores == Cores::kMma ? 16 : 8;
  return backward ? rows : ceil_div(rows, gates);
}

// Fills what a tile of R weight rows and K values has in every layout. Returns how many bytes of
// shared memory the weights of an iteration take, or nothing if no kernel has so many rows.
inline std::optional<int64_t> fill_tile(Cores cores, int64_t R, int64_t K, int64_t value_bytes,
                                        ProductTile& tile) {
  tile.R = static_cast<int>(R);
  if (cores == Cores::kFma) {
    if (R > kThreads) return std::nullopt;
    tile.ld = tile.R;
    tile.slices = kThreads / tile.R;
    tile.K_pad = static_cast<int>(round_up(K, 4));
    tile.steps = static_cast<int>(ceil_div(tile.K_pad / 4, tile.slices));
    return kThreads * 4 * value_bytes;
  }
  const int64_t tiles = ceil_div(R, 16), group = 64 / value_bytes;
  if (tiles > kMmaTiles) return std::nullopt;
  // The 4 added columns make the threads of a warp write their sums to different banks.
  tile.ld = static_cast<int>(tiles * 16 + 4);
  tile.slices = kThreads / 32;
  tile.K_pad = static_cast<int>(round_up(K, group));
  tile.steps = static_cast<int>(ceil_div(tile.K_pad / group, tile.slices));
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
  return std::min<int64_t>(shape.group, kFmaRows) * tile.K_pad * real_bytes;
}

// The layout of a resident block of `units` units and `rows` sequences, or nothing if the kernels
// could not run it on any device.
inline std::optional<BlockShape> make_shape(const PlanRequest& q, Cores cores, int64_t units,
                                            int64_t rows) {
  const CellInfo& info = info_of(q.cell);
  const int64_t value_bytes = static_cast<int64_t>(size_of(q.dtype));
  if (units * rows > kPairs * kThreads) return std::nullopt;
  BlockShape shape = {};
  shape.units = shape.proj_units = static_cast<int>(units);
  shape.rows = shape.group = static_cast<int>(rows);
  shape.rows_pad = static_cast<int>(cores == Cores::kMma ? round_up(rows, 8) : rows);
  shape.partial_rows = shape.rows_pad;
  int64_t at = 0, partials = 0, staged = 0;
  for (int s = 0; s < info.stages; ++s) {
    const int64_t gates = info.stage[s].gates;
    const int64_t R = q.backward ? units : gates * units, K = q.backward ? gates * q.H : q.H;
    ProductTile& tile = shape.tile[s];
    const auto iteration = fill_tile(cores, R, K, value_bytes, tile);
    if (!iteration) return std::nullopt;
    tile.on_chip = tile.steps;
    tile.weights = static_cast<int>(at);
    at += std::max(0, tile.steps - held_of(cores, q.dtype, Regime::kResident, s)) * *iteration;
    partials = std::max(partials, partial_bytes(shape, tile, 4));
    staged = std::max(staged, staged_bytes(cores, shape, tile, 4));
  }
  shape.partials = static_cast<int>(at);
  at = round_up(at + partials, 16);
  shape.staged = static_cast<int>(at);
  at += staged;
  const int64_t bias_bytes = q.backward ? 0 : 2 * info.gates * units * 4;
  shape.bias = static_cast<int>(at);
  // ResidentForward::run_cell relies on the parameters' lying right behind the biases.
  shape.params = static_cast<int>(at + bias_bytes);
  at += bias_bytes + info.params * units * 4;
  if (at > int64_t(1) << 30) return std::nullopt;
  shape.shared_bytes = static_cast<int>(at);
  return shape;
}

// Sets the sizes of the workspace of a plan with a grid.
inline void set_workspace(const PlanRequest& q, Plan& plan) {
  const int64_t blocks = q.D * plan.grid.y;
  for (int s = 0; s < info_of(q.cell).stages; ++s)
    plan.exchange_bytes[s] =
        static_cast<size_t>(2 * blocks * plan.shape.rows_pad * plan.shape.tile[s].K_pad) *
        size_of(q.dtype);
  plan.arrival_bytes = static_cast<size_t>(blocks) * kArrivalStride * sizeof(unsigned);
  plan.streamed_bytes =
      static_cast<size_t>(blocks) * plan.grid.x * static_cast<size_t>(plan.shape.streamed_bytes);
}

// Looks for a grid whose blocks all run together, `per_sm` on each multiprocessor, and returns
// whether there is one. The sequences are cut into as few blocks as lead to a grid that fits, which
// gives blocks of the fewest units. Then they are cut further, as long as that needs no more units
// in a block and leaves a block kLeastRows sequences. Blocks of different sequences have copies of
// the same weights, and a block waits only for the blocks of its own sequences.
inline bool fit_resident(const PlanRequest& q, Cores cores, int per_sm, Plan& plan) {
  const CellInfo& info = info_of(q.cell);
  const int registers = cores == Cores::kMma ? q.registers_mma : q.registers_fma;
  const int64_t at_once = per_sm * int64_t(q.device.sms) / q.D;
  bool found = false;
  for (int64_t row_blocks = 1; row_blocks <= std::min(q.N, at_once); ++row_blocks) {
    const int64_t rows = ceil_div(q.N, row_blocks);
    if (ceil_div(q.N, rows) != row_blocks) continue;  // the last block would have no sequences
    const int64_t units = std::max(ceil_div(q.H, at_once / row_blocks),
                                   std::min(q.H, least_units(cores, q.backward, info.gates)));
    if (found && (rows < kLeastRows || units > plan.shape.units)) break;
    const auto shape = make_shape(q, cores, units, rows);
    if (!shape || blocks_per_sm(q.device, registers, shape->shared_bytes) < per_sm) continue;
    found = true;
    plan.regime = Regime::kResident;
    plan.cores = cores;
    plan.shape = *shape;
    plan.grid = {static_cast<unsigned>(ceil_div(q.H, units)), static_cast<unsigned>(row_blocks),
                 static_cast<unsigned>(q.D)};
    plan.blocks_per_sm = per_sm;
    set_workspace(q, plan);
  }
  return found;
}

inline bool fit_resident(const PlanRequest& q, Cores cores, Plan& plan) {
  const int registers = cores == Cores::kMma ? q.registers_mma : q.registers_fma;
  for (int per_sm = blocks_per_sm(q.device, registers, 0); per_sm > 0; --per_sm)
    if (fit_resident(q, cores, per_sm, plan)) return true;
  return false;
}

// Whether the weights leave room for at least a few sequences: one on the ordinary cores, or
// kLeastRows on the tensor cores.
inline bool weights_fit(PlanRequest q, bool tensor_cores) {
  Plan unused;
  q.N = 1;
  if (fit_resident(q, Cores::kFma, unused)) return true;
  q.N = kLeastRows;
  return tensor_cores && fit_resident(q, Cores::kMma, unused);
}

// The layout of a streamed block, or nothing if it has no room. The weights that have no room in
// registers and shared memory are streamed, those of the last stage only if no others are left.
inline std::optional<BlockShape> make_streamed_shape(const PlanRequest& q, Cores cores,
                                                     int64_t unit_blocks, int64_t rows,
                                                     int64_t group) {
  const CellInfo& info = info_of(q.cell);
  const int64_t value_bytes = static_cast<int64_t>(size_of(q.dtype));
  const int64_t real_bytes = std::max<int64_t>(value_bytes, 4);
  const int64_t units = ceil_div(q.H, unit_blocks);
  const int64_t proj_units = info.projects ? ceil_div(q.P, unit_blocks) : units;
  if (units * group > kPairs * kThreads) return std::nullopt;
  BlockShape shape = {};
  shape.units = static_cast<int>(units);
  shape.proj_units = static_cast<int>(proj_units);
  shape.rows = static_cast<int>(rows);
  shape.group = static_cast<int>(group);
  shape.rows_pad = static_cast<int>(cores == Cores::kMma ? round_up(rows, 8) : rows);
  shape.partial_rows = static_cast<int>(cores == Cores::kMma ? round_up(group, 8) : group);
  int64_t iteration[kMaxStages] = {}, held[kMaxStages] = {}, weights = 0, partials = 0, staged = 0;
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const int64_t from_units = stage.from_hidden ? proj_units : units;
    const int64_t columns = stage.projects ? q.P : stage.gates * q.H;
    const int64_t R = q.backward ? from_units : stage.projects ? proj_units : stage.gates * units;
    const int64_t K = q.backward ? columns : stage.from_hidden ? q.P : q.H;
    ProductTile& tile = shape.tile[s];
    const auto bytes = fill_tile(cores, R, K, value_bytes, tile);
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

// Rough figures for the choice among streamed grids, a clock and a multiprocessor: what L2 and
// memory deliver (an H100 by its vendor's and others' measurements), and shared memory.
constexpr double kL2BytesPerClock = 23;
constexpr double kMemoryBytesPerClock = 13;
constexpr double kSharedBytesPerClock = 128;

// A layer is streamed unless a step has more clocks than this (10 us at 1.8 GHz) by the rough
// figures. In that time the host of the per-step regime starts the kernels of a step, whose
// products are tiled for many sequences. If the regime was asked for, there is no limit.
constexpr double kMostStreamedClocks = 18000;

// The clocks that a streamed block needs for a step, without waiting for others. It reads the
// sources once, and its weights once for each group of sequences that is multiplied at once.
inline double clocks_of_step(const PlanRequest& q, Cores cores, const BlockShape& shape,
                             int64_t blocks) {
  const CellInfo& info = info_of(q.cell);
  const double value_bytes = static_cast<double>(size_of(q.dtype));
  const double rate = cores == Cores::kMma ? (q.dtype == Dtype::kFloat32 ? 1024 : 2048)
                                           : (q.dtype == Dtype::kFloat64 ? 128 : 256);
  const double passes = static_cast<double>(passes_of(cores, shape));
  double sources = 0, operations = 0, shared = 0;
  for (int s = 0; s < info.stages; ++s) {
    const ProductTile& tile = shape.tile[s];
    sources += static_cast<double>(shape.rows_pad) * tile.K_pad * value_bytes;
    operations += 2.0 * shape.rows_pad * tile.ld * tile.K_pad;
    shared += static_cast<double>(tile.R) * tile.K_pad * value_bytes;
  }
  const bool in_l2 = shape.streamed_bytes * blocks <= static_cast<int64_t>(q.device.l2_bytes);
  const double streamed = passes * shape.streamed_bytes;
  return std::max(
      {sources / kL2BytesPerClock + streamed / (in_l2 ? kL2BytesPerClock : kMemoryBytesPerClock),
       passes * shared / kSharedBytesPerClock, operations / rate});
}

// Looks for the streamed grid, with a block for each multiprocessor at most, that needs the fewest
// clocks for a step, and returns whether there is one.
inline bool fit_streamed(const PlanRequest& q, Cores cores, Plan& plan) {
  const CellInfo& info = info_of(q.cell);
  const int64_t at_once = q.device.sms / q.D;
  const int64_t least = std::min(q.H, least_units(cores, q.backward, info.gates));
  std::optional<double> fewest;
  for (int64_t row_blocks = 1; row_blocks <= std::min(q.N, at_once); ++row_blocks) {
    const int64_t rows = ceil_div(q.N, row_blocks);
    if (ceil_div(q.N, rows) != row_blocks) continue;  // the last block would have no sequences
    if (rows < kLeastRows && row_blocks > 1) break;
    const int64_t units = std::max(ceil_div(q.H, at_once / row_blocks), least);
    const int64_t unit_blocks = ceil_div(q.H, units);
    for (int64_t group = kPairs * kThreads; group >= 1; group /= 2) {
      if (group >= 2 * rows) continue;
      const auto shape = make_streamed_shape(q, cores, unit_blocks, rows, std::min(group, rows));
      if (!shape) continue;
      const double clocks = clocks_of_step(q, cores, *shape, unit_blocks * row_blocks * q.D);
      if (fewest && clocks >= *fewest) continue;
      fewest = clocks;
      plan.shape = *shape;
      plan.grid = {static_cast<unsigned>(unit_blocks), static_cast<unsigned>(row_blocks),
                   static_cast<unsigned>(q.D)};
    }
  }
  if (!fewest || (!q.regime && *fewest > kMostStreamedClocks)) return false;
  plan.regime = Regime::kStreamed;
  plan.cores = cores;
  plan.blocks_per_sm = 1;
  set_workspace(q, plan);
  return true;
}

// Why a layer that may have any regime, or was asked to be resident, cannot be resident.
inline std::string why_not_resident(const PlanRequest& q, bool tensor_cores) {
  if (q.dtype == Dtype::kFloat64 || info_of(q.cell).projects) {
    const char* what = q.dtype == Dtype::kFloat64 ? "float64" : "a projection";
    return what + std::string(q.regime ? " has no resident kernel"
                                       : " has no resident kernel, and streamed it would be slow");
  }
  const bool weights = !weights_fit(q, tensor_cores);
  return (weights ? "the recurrent weights" : std::to_string(q.N) + " sequences") +
         " do not fit the device's registers and shared memory" + (weights ? "" : ", fewer would") +
         (q.regime ? "" : ", and streamed they would be slow");
}

inline Plan make_plan(const PlanRequest& q) {
  const CellInfo& info = info_of(q.cell);
  Plan plan;
  if (q.regime == Regime::kPerStep) {
    plan.why_per_step = "asked for";
    return plan;
  }
  if (q.T * q.H * info.stages >= int64_t(1) << 31) {
    plan.why_per_step = "T * H is more than a barrier can count";
    return plan;
  }
  const bool tensor_cores = q.device.capability >= 80 && q.N >= kLeastRows &&
                            q.dtype != Dtype::kFloat64 &&
                            (q.dtype != Dtype::kFloat32 || q.allow_tf32);
  if (q.regime != Regime::kStreamed && q.dtype != Dtype::kFloat64 && !info.projects) {
    if (tensor_cores && fit_resident(q, Cores::kMma, plan)) return plan;
    if (fit_resident(q, Cores::kFma, plan)) return plan;
  }
  if (q.regime != Regime::kResident) {
    if (tensor_cores && fit_streamed(q, Cores::kMma, plan)) return plan;
    if (fit_streamed(q, Cores::kFma, plan)) return plan;
  }
  plan = Plan();
  plan.why_per_step = q.regime == Regime::kStreamed
                          ? "a block's part of the layer does not fit its shared memory"
                          : why_not_resident(q, tensor_cores);
  return plan;
}

inline std::string product_name(Cores cores, Dtype dtype) {
  return std::string(cores == Cores::kMma ? "mma_" : "fma_") +
         (cores == Cores::kMma && dtype == Dtype::kFloat32 ? "tf32" : name_of(dtype));
}

// The kernel of a regime that runs the time loop inside a kernel.
inline std::string loop_kernel(Regime regime, bool backward, Cores cores, Dtype dtype) {
  return std::string(regime == Regime::kStreamed ? "streamed_" : "resident_") +
         (backward ? "backward_" : "forward_") + product_name(cores, dtype);
}

inline std::string text(const char* format, auto... values) {
  char line[256];
  std::snprintf(line, sizeof(line), format, values...);
  return line;
}

inline std::string to_text(const Plan& plan) {
  if (plan.regime == Regime::kPerStep)
    return "per step: one product and one pointwise kernel a stage (" + plan.why_per_step + ")";
  const BlockShape& shape = plan.shape;
  const bool streamed = plan.regime == Regime::kStreamed;
  return text("%s, %s: %u x %u x %u blocks (units, sequences, directions) of %d threads, ",
              streamed ? "streamed" : "resident", plan.cores == Cores::kMma ? "mma.sync" : "FMA",
              plan.grid.x, plan.grid.y, plan.grid.z, kThreads) +
         text("each %d units of %d sequences with %d bytes of shared memory, %d a multiprocessor; ",
              shape.units, shape.rows, shape.shared_bytes, plan.blocks_per_sm) +
         (streamed ? text("groups of %d sequences, %d bytes of weights of a block come from L2; ",
                          shape.group, shape.streamed_bytes)
                   : "") +
         text("workspace %zu bytes", plan.workspace_bytes() + plan.streamed_bytes);
}

}  // namespace fusedrnn::cuda
