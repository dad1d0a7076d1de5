// The plan: how a layer runs on a device. It is a pure function of sizes and limits, so it can be
// tested and printed without a GPU. By default a layer is resident or streamed, whichever fits and
// needs the fewer clocks for a step by rough figures (block_shape.h), and per step if both need
// more than kMostLoopClocks. A measurement of such a layer on the card goes before that
// (measured.h). The estimate of time (estimate.h) is printed, but it does not influence the plan.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include "block_shape.h"

namespace fusedrnn::cuda {

struct Plan {
  Regime regime = Regime::kPerStep;
  std::string why_per_step;  // the reason why the layer is neither resident nor streamed
  Cores cores = Cores::kFma;
  BlockShape shape = {};
  bool words = false;     // whether the exchange has words, and no barrier
  bool as_one = false;    // whether a cluster arrives at the barrier as one
  Dim3 grid;              // [unit blocks, row blocks, D]
  int blocks_per_sm = 0;  // blocks that one multiprocessor runs together
  double clocks = 0;      // of a step on a multiprocessor, by the rough figures
  std::string measured;   // the card and the day of the measurement that the plan follows, if any
  size_t exchange_bytes[kMaxStages] = {};
  size_t arrival_bytes = 0;
  size_t streamed_bytes = 0;  // weights of all blocks that are streamed

  // The memory that must be zero at first.
  size_t workspace_bytes() const { return exchange_bytes[0] + exchange_bytes[1] + arrival_bytes; }
};

// Whether what was asked for cannot run. Then why_per_step says why.
inline bool is_refused(const std::optional<Regime>& regime, const PlanChoice& choice,
                       const Plan& plan) {
  return (regime && plan.regime != *regime) || (choice.any() && plan.regime == Regime::kPerStep);
}
inline bool is_refused(const PlanRequest& q, const Plan& plan) {
  return is_refused(q.regime, q.choice, plan);
}

inline std::string text(const char* format, auto... values) {
  char line[256];
  std::snprintf(line, sizeof(line), format, values...);
  return line;
}

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
  for (size_t i = 0; i < kClusterSizes.size(); ++i)
    line(("blocks_in_clusters_of_" + std::to_string(kClusterSizes[i])).c_str(),
         device.cluster_blocks[i]);
  return text;
}

// Sets the sizes of the workspace of a plan with a grid.
inline void set_workspace(const PlanRequest& q, Plan& plan) {
  const int64_t blocks = q.D * plan.grid.y;
  for (int s = 0; s < info_of(q.cell).stages; ++s)
    plan.exchange_bytes[s] =
        static_cast<size_t>(2 * blocks * plan.shape.rows_pad * plan.shape.tile[s].K_pad) *
        (plan.words ? sizeof(uint64_t) : size_of(q.dtype));
  plan.arrival_bytes = static_cast<size_t>(blocks) * kArrivalStride * sizeof(unsigned);
  plan.streamed_bytes =
      static_cast<size_t>(blocks) * plan.grid.x * static_cast<size_t>(plan.shape.streamed_bytes);
}

// How many blocks run together, one on each multiprocessor.
inline int64_t blocks_at_once(const Device& device, int64_t cluster) {
  for (size_t i = 0; i < kClusterSizes.size(); ++i)
    if (cluster == kClusterSizes[i]) return device.cluster_blocks[i];
  return device.sms;
}

// How the units and the sequences of a layer are cut into blocks.
struct Cut {
  int64_t unit_blocks, units;  // units of a block
  int64_t row_blocks, rows;    // sequences of a block
};

// Calls body for each cut with at most `at_once` blocks of a direction. For each number of
// sequences of a block, that is the cut with the most blocks, whose blocks have the fewest units.
// Blocks of different sequences have copies of the same weights, and a block waits only for the
// blocks of its own sequences. A block has at least kLeastRows sequences, unless others were asked
// for. Clusters are filled up with blocks that have no units.
template <class Body>
void for_cuts(const PlanRequest& q, Cores cores, int64_t at_once, int64_t cluster,
              const Body& body) {
  const PlanChoice& choice = q.choice;
  const int64_t least = least_units(cores, q.backward, info_of(q.cell).gates, cluster);
  for (int64_t row_blocks = 1; row_blocks <= std::min(q.N, at_once); ++row_blocks) {
    const int64_t rows = ceil_div(q.N, row_blocks);
    if (ceil_div(q.N, rows) != row_blocks) continue;  // the last block would have no sequences
    if (choice.rows ? rows != *choice.rows : row_blocks > 1 && rows < kLeastRows) continue;
    const int64_t most = at_once / row_blocks / cluster * cluster;
    if (most == 0) break;
    const int64_t fewest = ceil_div(q.H, most);
    const int64_t units = choice.units ? *choice.units : std::max(fewest, std::min(q.H, least));
    if (units < fewest || units > q.H) continue;
    body(Cut{round_up(ceil_div(q.H, units), cluster), units, row_blocks, rows});
  }
}

inline void set_grid(const PlanRequest& q, Cores cores, const Cut& cut, const BlockShape& shape,
                     Plan& plan) {
  plan.cores = cores;
  plan.shape = shape;
  plan.grid = {static_cast<unsigned>(cut.unit_blocks), static_cast<unsigned>(cut.row_blocks),
               static_cast<unsigned>(q.D)};
}

// The registers of a thread. For kernels with clusters we take all that it can have: no more than
// one of their blocks runs on a multiprocessor anyway.
inline int registers_of(const PlanRequest& q, Cores cores) {
  if (q.choice.has_clusters()) return 255;
  return cores == Cores::kMma ? q.registers_mma : q.registers_fma;
}

// Looks for the grid whose blocks all run together, `per_sm` on each multiprocessor, and need the
// fewest clocks for a step, and returns whether there is one.
inline bool fit_resident(const PlanRequest& q, Cores cores, int per_sm, Plan& plan) {
  const int registers = registers_of(q, cores);
  std::optional<double> fewest;
  const int64_t cluster = q.choice.cluster.value_or(1);
  const int64_t at_once = per_sm * blocks_at_once(q.device, cluster) / q.D;
  for_cuts(q, cores, at_once, cluster, [&](const Cut& cut) {
    const auto shape = make_shape(q, cores, cut.units, cut.rows, cluster);
    if (!shape || blocks_per_sm(q.device, registers, shape->shared_bytes) < per_sm) return;
    const int64_t blocks = cut.unit_blocks * cut.row_blocks * q.D;
    const double clocks = clocks_of_step(q, cores, *shape, blocks) *
                          static_cast<double>(ceil_div(blocks, q.device.sms));
    if (fewest && clocks >= *fewest) return;
    fewest = clocks;
    set_grid(q, cores, cut, *shape, plan);
  });
  if (!fewest) return false;
  plan.regime = Regime::kResident;
  plan.clocks = *fewest;
  plan.words = q.choice.words.value_or(false);
  plan.as_one = q.choice.as_one.value_or(false);
  plan.blocks_per_sm = per_sm;
  set_workspace(q, plan);
  return true;
}

inline bool fit_resident(const PlanRequest& q, Cores cores, Plan& plan) {
  const int registers = registers_of(q, cores);
  int per_sm = blocks_per_sm(q.device, registers, 0);
  // How many blocks of clusters run together is known for one block a multiprocessor.
  if (q.choice.has_clusters()) per_sm = std::min(per_sm, 1);
  for (; per_sm > 0; --per_sm)
    if (fit_resident(q, cores, per_sm, plan)) return true;
  return false;
}

// Whether the products may run on tensor cores.
inline bool uses_tensor_cores(const PlanRequest& q) {
  return q.device.capability >= 80 && q.N >= kLeastRows && q.dtype != Dtype::kFloat64 &&
         (q.dtype != Dtype::kFloat32 || q.allow_tf32);
}

// Whether the weights leave room for at least a few sequences: one on the ordinary cores, or
// kLeastRows on the tensor cores.
inline bool weights_fit(PlanRequest q) {
  Plan unused;
  q.N = 1;
  if (fit_resident(q, Cores::kFma, unused)) return true;
  q.N = kLeastRows;
  return uses_tensor_cores(q) && fit_resident(q, Cores::kMma, unused);
}

// A layer runs per step if a step of a resident or streamed kernel has more clocks than this (10 us
// at 1.8 GHz) by the rough figures. In that time the host of the per-step regime starts the kernels
// of a step, whose products are tiled for many sequences. If a regime or a choice was asked for,
// there is no limit.
constexpr double kMostLoopClocks = 18000;

// A layer that could be resident is streamed only if its step has fewer clocks by this factor. The
// rough figures leave out the states, which a streamed layer has in memory: a block of 512 values
// reads and writes 4 KB of c, about 320 clocks, and waits some 700 clocks for the first of them.
// That is a quarter of a step of 4000 clocks. No GPU has measured it.
constexpr double kStreamedGain = 1.25;

// Below this number of clocks of a resident step (1 us at 1.8 GHz) no streamed plan is sought: the
// barrier, which both have, takes as long, and the search would cost the host time in each call.
constexpr double kQuickClocks = 1800;

// Looks for the streamed grid, with a block for each multiprocessor at most, that needs the fewest
// clocks for a step, and returns whether there is one.
inline bool fit_streamed(const PlanRequest& q, Cores cores, Plan& plan) {
  std::optional<double> fewest;
  for_cuts(q, cores, q.device.sms / q.D, 1, [&](const Cut& cut) {
    for (int64_t group = kPairs * kThreads; group >= 1; group /= 2) {
      if (group >= 2 * cut.rows) continue;
      // The tensor cores read the rows of a group up to a multiple of 8.
      if (cores == Cores::kMma && group < 8 && group < cut.rows) break;
      // Units that were not asked for are spread evenly, as a projection's outputs are.
      const int64_t units = q.choice.units ? cut.units : ceil_div(q.H, cut.unit_blocks);
      const auto shape = make_streamed_shape(q, cores, cut.unit_blocks, units, cut.rows,
                                             std::min(group, cut.rows));
      if (!shape) continue;
      const double clocks =
          clocks_of_step(q, cores, *shape, cut.unit_blocks * cut.row_blocks * q.D);
      if (fewest && clocks >= *fewest) continue;
      fewest = clocks;
      set_grid(q, cores, cut, *shape, plan);
    }
  });
  if (!fewest) return false;
  plan.regime = Regime::kStreamed;
  plan.clocks = *fewest;
  plan.blocks_per_sm = 1;
  set_workspace(q, plan);
  return true;
}

// Whether there are resident kernels for the dtype and the cell.
inline bool has_resident_kernel(const PlanRequest& q) {
  return q.dtype != Dtype::kFloat64 && !info_of(q.cell).projects;
}

// Calls fit_on with the cores that the products may run on, the tensor cores first, until it
// returns true, and returns whether it did.
template <class FitOn>
bool fit_on_either(const PlanRequest& q, const FitOn& fit_on) {
  // Only the resident kernels on the ordinary cores take words.
  const bool words = q.choice.words.value_or(false);
  if (words && q.choice.has_clusters()) return false;
  const auto may = [&](Cores cores) {
    return q.choice.cores.value_or(cores) == cores && !(words && cores == Cores::kMma);
  };
  return (uses_tensor_cores(q) && may(Cores::kMma) && fit_on(Cores::kMma)) ||
         (may(Cores::kFma) && fit_on(Cores::kFma));
}

// Looks for a grid in a regime whose time loop is in a kernel, and returns whether there is one. If
// a regime or a choice was asked for, the first that fits is taken, resident before streamed.
inline bool fit(const PlanRequest& q, Plan& plan) {
  const bool asked = q.regime || q.choice.any();
  const auto quick = [&](const Plan& found) { return asked || found.clocks <= kMostLoopClocks; };
  Plan streamed;
  const bool resident =
      q.regime.value_or(Regime::kResident) == Regime::kResident && has_resident_kernel(q) &&
      fit_on_either(q, [&](Cores on) { return fit_resident(q, on, plan) && quick(plan); });
  if (resident && (asked || plan.clocks <= kQuickClocks)) return true;
  const bool may_stream = q.regime.value_or(Regime::kStreamed) == Regime::kStreamed &&
                          !q.choice.words.value_or(false) && !q.choice.has_clusters();
  if (may_stream &&
      fit_on_either(q,
                    [&](Cores on) { return fit_streamed(q, on, streamed) && quick(streamed); }) &&
      (!resident || streamed.clocks * kStreamedGain < plan.clocks)) {
    plan = streamed;
    return true;
  }
  return resident;
}

// Why a layer that may have any regime, or was asked to be resident, is not resident.
inline std::string why_not_resident(const PlanRequest& q) {
  Plan slow;
  PlanRequest asked = q;
  asked.regime = Regime::kResident;
  if (!q.regime && fit(asked, slow))
    return text("resident a step would take %.0f clocks, and streamed it would be slow too",
                slow.clocks);
  if (!has_resident_kernel(q)) {
    const char* what = q.dtype == Dtype::kFloat64 ? "float64" : "a projection";
    return what + std::string(q.regime ? " has no resident kernel"
                                       : " has no resident kernel, and streamed it would be slow");
  }
  const bool weights = !weights_fit(q);
  return (weights ? "the recurrent weights" : std::to_string(q.N) + " sequences") +
         " do not fit the device's registers and shared memory" + (weights ? "" : ", fewer would") +
         (q.regime ? "" : ", and streamed they would be slow");
}

// Which numbers of units fit with which numbers of sequences of a block, for the message about a
// choice that does not.
inline std::string what_fits(PlanRequest q) {
  std::string text;
  int listed = 0;
  const int64_t most = int64_t(q.device.sms) * (q.device.threads_per_sm / kThreads);
  for (int64_t row_blocks = 1; row_blocks <= std::min(q.N, most) && listed < 6; ++row_blocks) {
    const int64_t rows = ceil_div(q.N, row_blocks);
    if (ceil_div(q.N, rows) != row_blocks) continue;
    q.choice.rows = rows;
    std::optional<int64_t> first, last;
    for (int64_t units = 1; units <= std::min<int64_t>(q.H, kPairs * kThreads); ++units) {
      Plan unused;
      q.choice.units = units;
      if (!fit(q, unused)) continue;
      if (!first) first = units;
      last = units;
    }
    if (!first) continue;
    ++listed;
    text.append(text.empty() ? "" : "; ")
        .append("rows=" + std::to_string(rows) + " with units=" + std::to_string(*first))
        .append(*first == *last ? "" : " to " + std::to_string(*last));
  }
  return text.empty() ? "no choice fits" : "what fits is " + text;
}

// Whether a barrier can count the steps of a layer. At most as many blocks arrive as there are
// units, and those that fill up a cluster.
inline bool barrier_counts(const PlanRequest& q) {
  return q.T * round_up(q.H, q.choice.cluster.value_or(1)) * info_of(q.cell).stages <
         (int64_t(1) << 31) - 1;
}

// Why nothing with clusters can run, or "" if that depends on the sizes.
inline std::string why_no_clusters(const PlanRequest& q) {
  if (!q.choice.has_clusters()) return "";
  if (q.device.cluster_blocks[0] == 0)
    return "this device has no clusters, or the kernels were compiled for less than sm_90";
  if (q.regime == Regime::kStreamed) return "streamed layers have no clusters";
  if (q.choice.words.value_or(false)) return "words have no clusters";
  if (q.dtype == Dtype::kFloat64) return "float64 has no kernels with clusters";
  return info_of(q.cell).projects ? "a projection has no kernels with clusters" : "";
}

// The plan without the table of measurements.
inline Plan plan_by_clocks(const PlanRequest& q) {
  Plan plan;
  if (q.regime == Regime::kPerStep) {
    plan.why_per_step =
        q.choice.any() ? "the per-step regime has no " + to_text(q.choice) : "asked for";
  } else if (!barrier_counts(q)) {
    plan.why_per_step = "T * H is more than a barrier can count";
  } else if (!fit(q, plan)) {
    plan = Plan();
    const std::string why = why_no_clusters(q);
    plan.why_per_step = !why.empty()     ? why
                        : q.choice.any() ? to_text(q.choice) + " does not fit, " + what_fits(q)
                        : q.regime == Regime::kStreamed
                            ? "a block's part of the layer does not fit its shared memory"
                            : why_not_resident(q);
  }
  return plan;
}

// A measurement counts for a layer whose N and H are at most this factor away from its own, in
// either direction. It is the square root of 2, so a table with every power of two has an entry for
// every size, and the nearest is the one that most likely has the same cut and the same limit.
constexpr double kMeasuredReach = 1.415;

// The measurement of the layer that is most like the one of the request: the same card, cell,
// dtype, pass and directions, and the least sum of the logarithms of the ratios of N, H and, for a
// cell that projects, P. The first of several that are as near. nullptr if there is none within
// reach.
inline const Measurement* nearest_measurement(const PlanRequest& q) {
  const CellInfo& info = info_of(q.cell);
  const Measurement* nearest = nullptr;
  double least = 0;
  for (const Measurement& m : q.measured) {
    if (m.card != q.device.name || m.cell != info.name || m.dtype != name_of(q.dtype) ||
        (q.dtype == Dtype::kFloat32 && m.tf32 != q.allow_tf32) || m.backward != q.backward ||
        m.D != q.D)
      continue;
    double distance = 0;
    bool within = true;
    const auto compare = [&](int64_t a, int64_t b) {
      const double log = std::abs(std::log(static_cast<double>(a) / static_cast<double>(b)));
      within = within && log <= std::log(kMeasuredReach);
      distance += log;
    };
    compare(q.N, m.N);
    compare(q.H, m.H);
    if (info.projects) compare(q.P, m.P);
    constexpr double kRounding = 1e-9;  // of the logarithms of layers that are as near
    if (!within || (nearest && distance >= least - kRounding)) continue;
    nearest = &m;
    least = distance;
  }
  return nearest;
}

// The request for what was measured.
inline PlanRequest following(PlanRequest q, const Measurement& m) {
  q.regime = regime_named(std::string(m.regime), "a measurement's regime");
  q.choice = choice_named(std::string(m.choice), "a measurement's choice");
  return q;
}

// The plan. If neither a regime nor a choice is asked for, it is that of the nearest measurement,
// if there is one and it fits.
inline Plan make_plan(const PlanRequest& q) {
  const bool asked = q.regime || q.choice.any();
  const Measurement* const m = asked ? nullptr : nearest_measurement(q);
  if (!m) return plan_by_clocks(q);
  PlanRequest as_measured;
  try {
    as_measured = following(q, *m);
  } catch (const std::invalid_argument&) {
    return plan_by_clocks(q);  // a table that was made for other keys
  }
  Plan plan;
  const bool per_step = as_measured.regime == Regime::kPerStep;
  if (!per_step && !(barrier_counts(as_measured) && fit(as_measured, plan)))
    return plan_by_clocks(q);
  plan.measured = std::string(m->card).append(", ").append(m->date);
  if (per_step) plan.why_per_step = "as measured on " + plan.measured;
  return plan;
}

inline std::string product_name(Cores cores, Dtype dtype) {
  return std::string(cores == Cores::kMma ? "mma_" : "fma_") +
         (cores == Cores::kMma && dtype == Dtype::kFloat32 ? "tf32" : name_of(dtype));
}

// The kernel of a regime that runs the time loop inside a kernel, for blocks in clusters or not.
inline std::string loop_kernel(Regime regime, bool clusters, bool backward, Cores cores,
                               Dtype dtype) {
  return std::string(regime == Regime::kStreamed ? "streamed_"
                     : clusters                  ? "clustered_"
                                                 : "resident_") +
         (backward ? "backward_" : "forward_") + product_name(cores, dtype);
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
         (plan.words ? "exchange of words; " : "") +
         (shape.cluster > 1 ? text("clusters of %d blocks share the source%s; ", shape.cluster,
                                   plan.as_one ? " and arrive as one" : "")
                            : "") +
         (streamed ? text("groups of %d sequences, %d bytes of weights of a block come from L2; ",
                          shape.group, shape.streamed_bytes)
                   : "") +
         text("workspace %zu bytes", plan.workspace_bytes() + plan.streamed_bytes) +
         (plan.measured.empty() ? "" : "; as measured on " + plan.measured);
}

}  // namespace fusedrnn::cuda
