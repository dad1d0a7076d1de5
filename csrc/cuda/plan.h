// The plan: how a layer runs on a device. It is a pure function of sizes and limits, so it can be
// tested and printed without a GPU. By default a layer is resident if that fits, and runs per step
// if not. The estimate of time (estimate.h) is printed, but it does not influence the plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include "args.h"
#include "launcher.h"

namespace fusedrnn::cuda {

enum class Regime { kPerStep, kResident };
enum class Cores { kFma, kMma };

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
  std::string why_per_step;  // the reason why the layer is not resident
  Cores cores = Cores::kFma;
  ResidentShape shape = {};
  Dim3 grid;              // [unit blocks, row blocks, D]
  int blocks_per_sm = 0;  // blocks that one multiprocessor runs together
  size_t exchange_bytes[kMaxStages] = {};
  size_t arrival_bytes = 0;

  size_t workspace_bytes() const { return exchange_bytes[0] + exchange_bytes[1] + arrival_bytes; }
};

// Whether the regime that was asked for cannot run. Then why_per_step says why.
inline bool is_refused(const PlanRequest& q, const Plan& plan) {
  return q.regime == Regime::kResident && plan.regime != Regime::kResident;
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

// The layout of a block of `units` units and `rows` sequences, or nothing if the kernels could not
// run it on any device.
inline std::optional<ResidentShape> make_shape(const PlanRequest& q, Cores cores, int64_t units,
                                               int64_t rows) {
  const CellInfo& info = info_of(q.cell);
  const bool backward = q.backward;
  const int64_t H = q.H;
  const int64_t value_bytes = static_cast<int64_t>(size_of(q.dtype));
  if (units * rows > kPairs * kThreads) return std::nullopt;
  ResidentShape shape = {};
  shape.units = static_cast<int>(units);
  shape.rows = static_cast<int>(rows);
  shape.rows_pad = static_cast<int>(cores == Cores::kMma ? round_up(rows, 8) : rows);
  int64_t at = 0, partials = 0, staged = 0;
  for (int s = 0; s < info.stages; ++s) {
    const int64_t gates = info.stage[s].gates;
    const int64_t R = backward ? units : gates * units, K = backward ? gates * H : H;
    ResidentTile& tile = shape.tile[s];
    tile.R = static_cast<int>(R);
    tile.weights = static_cast<int>(at);
    if (cores == Cores::kFma) {
      if (R > kThreads) return std::nullopt;
      tile.ld = tile.R;
      tile.slices = kThreads / tile.R;
      tile.K_pad = static_cast<int>(round_up(K, 4));
      tile.steps = static_cast<int>(ceil_div(tile.K_pad / 4, tile.slices));
      const int64_t in_shared = std::max<int64_t>(0, tile.steps - (s == 0 ? kFmaHeld : 0));
      at += in_shared * kThreads * 4 * value_bytes;
      staged = std::max(staged, std::min<int64_t>(rows, kFmaRows) * tile.K_pad * 4);
    } else {
      const int64_t tiles = ceil_div(R, 16), group = 64 / value_bytes;
      if (tiles > kMmaTiles) return std::nullopt;
      // The 4 added columns make the threads of a warp write their sums to different banks.
      tile.ld = static_cast<int>(tiles * 16 + 4);
      tile.slices = kThreads / 32;
      tile.K_pad = static_cast<int>(round_up(K, group));
      tile.steps = static_cast<int>(ceil_div(tile.K_pad / group, tile.slices));
      const int64_t in_shared = std::max<int64_t>(0, tile.steps - (s == 0 ? kMmaHeld : 0));
      at += in_shared * tile.slices * tiles * 1024;
    }
    partials = std::max(partials, int64_t(tile.slices) * shape.rows_pad * tile.ld * 4);
  }
  shape.partials = static_cast<int>(at);
  at = round_up(at + partials, 16);
  shape.staged = static_cast<int>(at);
  at += staged;
  const int64_t bias_bytes = backward ? 0 : 2 * info.gates * units * 4;
  shape.bias = static_cast<int>(at);
  // ResidentForward::run_cell relies on the parameters' lying right behind the biases.
  shape.params = static_cast<int>(at + bias_bytes);
  at += bias_bytes + info.params * units * 4;
  if (at > int64_t(1) << 30) return std::nullopt;
  shape.shared_bytes = static_cast<int>(at);
  return shape;
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
    const int64_t exchange_rows = 2 * q.D * row_blocks * shape->rows_pad;
    for (int s = 0; s < info.stages; ++s)
      plan.exchange_bytes[s] =
          static_cast<size_t>(exchange_rows * shape->tile[s].K_pad) * size_of(q.dtype);
    plan.arrival_bytes = static_cast<size_t>(q.D * row_blocks) * kArrivalStride * sizeof(unsigned);
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

inline Plan make_plan(const PlanRequest& q) {
  const CellInfo& info = info_of(q.cell);
  Plan plan;
  if (q.regime == Regime::kPerStep) {
    plan.why_per_step = "asked for";
  } else if (q.dtype == Dtype::kFloat64) {
    plan.why_per_step = "float64 has no resident kernel";
  } else if (info.projects) {
    plan.why_per_step = "a projection has no resident kernel";
  } else if (q.T * q.H * info.stages >= int64_t(1) << 31) {
    plan.why_per_step = "T * H is more than a barrier can count";
  } else {
    const bool tensor_cores = q.device.capability >= 80 && q.N >= kLeastRows &&
                              (q.dtype != Dtype::kFloat32 || q.allow_tf32);
    if (tensor_cores && fit_resident(q, Cores::kMma, plan)) return plan;
    if (fit_resident(q, Cores::kFma, plan)) return plan;
    const bool weights = !weights_fit(q, tensor_cores);
    plan.why_per_step = (weights ? "the recurrent weights" : std::to_string(q.N) + " sequences") +
                        " do not fit the device's registers and shared memory" +
                        (weights ? "" : ", fewer would");
  }
  return plan;
}

inline std::string resident_kernel(bool backward, Cores cores, Dtype dtype) {
  return std::string(backward ? "resident_backward_" : "resident_forward_")
      .append(cores == Cores::kMma ? "mma_" : "fma_")
      .append(cores == Cores::kMma && dtype == Dtype::kFloat32 ? "tf32" : name_of(dtype));
}

inline std::string text(const char* format, auto... values) {
  char line[256];
  std::snprintf(line, sizeof(line), format, values...);
  return line;
}

inline std::string to_text(const Plan& plan) {
  if (plan.regime == Regime::kPerStep)
    return "per step: one product and one pointwise kernel a stage (" + plan.why_per_step + ")";
  const ResidentShape& shape = plan.shape;
  return text("resident, %s: %u x %u x %u blocks (units, sequences, directions) of %d threads, ",
              plan.cores == Cores::kMma ? "mma.sync" : "FMA", plan.grid.x, plan.grid.y, plan.grid.z,
              kThreads) +
         text("each %d units of %d sequences with %d bytes of shared memory, %d a multiprocessor; ",
              shape.units, shape.rows, shape.shared_bytes, plan.blocks_per_sm) +
         text("workspace %zu bytes", plan.workspace_bytes());
}

}  // namespace fusedrnn::cuda
