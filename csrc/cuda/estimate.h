// The analytic model behind a printed plan: what a pass should take on an architecture, and which
// term limits it. Nothing here was measured by us and nothing is decided by it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace fusedrnn::cuda {

// A card with its vendor's figures. Operations are multiplications and additions, per clock and
// multiprocessor.
struct Card {
  const char* name;         // for people and --arch
  const char* driver_name;  // the name that torch.cuda.get_device_name returns
  Device device;
  double ghz;       // boost clock
  double hbm_gb_s;  // memory bandwidth
  double l2_mb;
  double fma_flops;     // float32 on the ordinary cores: twice their number
  double half_flops;    // 16-bit matrix products with float32 sums, dense
  double tf32_flops;    // 0 where there are none
  double double_flops;  // float64 matrix products
};

// Limits that a compute capability fixes: CUDA C++ Programming Guide, table of technical
// specifications.
constexpr Device device_of(int capability, int sms) {
  const bool server = capability == 90 || capability == 100;
  const int threads = capability == 75 ? 1024 : capability == 80 || server ? 2048 : 1536;
  const size_t kib = capability == 75 ? 64 : capability == 80 ? 164 : server ? 228 : 100;
  const size_t reserved = capability == 75 ? 0 : 1024;
  return {.capability = capability,
          .sms = sms,
          .threads_per_sm = threads,
          .registers_per_sm = 65536,
          .shared_per_block = kib * 1024 - reserved,
          .shared_per_sm = kib * 1024,
          .shared_reserved = reserved};
}

// By compute capability; the first of each stands for it (sm_89 is the RTX 4090). Multiprocessors,
// clocks, bandwidths, caches and rates: NVIDIA's whitepapers and datasheets, the rates by their
// peak TFLOPS, multiprocessors * clock * rate:
//   T4         Turing architecture: float32 8.1, float16 65
//   A100       A100 architecture, SXM: float32 19.5, float64 19.5 (tensor cores), TF32 156, 16-bit
//              312; its datasheet has 40 GB with 1555 GB/s and 80 GB with 2039
//   RTX 3090   GA102 architecture: float32 35.6, TF32 35.6, 16-bit 71
//   RTX 4090   Ada architecture: float32 82.6, TF32 82.6, 16-bit 165.2
//   L4         its datasheet: float32 30.3, TF32 60, 16-bit 121 (half of its figures, which are for
//              sparse matrices); 58 multiprocessors and 48 MB of L2 as the driver says
//   H100       H100 architecture, SXM: float32 66.9 and float64 66.9 at 1.98 GHz, TF32 494.7 and
//              16-bit 989.4 at 1.83 GHz; twice A100's float32 a clock (Hopper Tuning Guide)
//   H200       its datasheet, SXM: H100's rates, and 4.8 TB/s; 60 MB of L2 as the driver says
//   B200       HGX B200 datasheet, one of its GPUs: float32 75, float64 37, TF32 1125, 16-bit 2250;
//              as the driver says: 148 multiprocessors, 126 MB of L2, and a bus of 7680 bits at
//              4 GHz, which is 7.7 TB/s
//   RTX 5090   RTX Blackwell architecture: float32 104.8, TF32 104.8, 16-bit 209.5
inline constexpr std::array<Card, 10> kCards = {{
    {.name = "T4",
     .driver_name = "Tesla T4",
     .device = device_of(75, 40),
     .ghz = 1.59,
     .hbm_gb_s = 320,
     .l2_mb = 4,
     .fma_flops = 128,
     .half_flops = 1024,
     .tf32_flops = 0,
     .double_flops = 4},
    {.name = "A100",
     .driver_name = "NVIDIA A100-SXM4-40GB",
     .device = device_of(80, 108),
     .ghz = 1.41,
     .hbm_gb_s = 1555,
     .l2_mb = 40,
     .fma_flops = 128,
     .half_flops = 2048,
     .tf32_flops = 1024,
     .double_flops = 128},
    {.name = "A100 80GB",
     .driver_name = "NVIDIA A100-SXM4-80GB",
     .device = device_of(80, 108),
     .ghz = 1.41,
     .hbm_gb_s = 2039,
     .l2_mb = 40,
     .fma_flops = 128,
     .half_flops = 2048,
     .tf32_flops = 1024,
     .double_flops = 128},
    {.name = "RTX 3090",
     .driver_name = "NVIDIA GeForce RTX 3090",
     .device = device_of(86, 82),
     .ghz = 1.70,
     .hbm_gb_s = 936,
     .l2_mb = 6,
     .fma_flops = 256,
     .half_flops = 512,
     .tf32_flops = 256,
     .double_flops = 4},
    {.name = "RTX 4090",
     .driver_name = "NVIDIA GeForce RTX 4090",
     .device = device_of(89, 128),
     .ghz = 2.52,
     .hbm_gb_s = 1008,
     .l2_mb = 72,
     .fma_flops = 256,
     .half_flops = 512,
     .tf32_flops = 256,
     .double_flops = 4},
    {.name = "L4",
     .driver_name = "NVIDIA L4",
     .device = device_of(89, 58),
     .ghz = 2.04,
     .hbm_gb_s = 300,
     .l2_mb = 48,
     .fma_flops = 256,
     .half_flops = 1024,
     .tf32_flops = 512,
     .double_flops = 4},
    {.name = "H100",
     .driver_name = "NVIDIA H100 80GB HBM3",
     .device = device_of(90, 132),
     .ghz = 1.83,
     .hbm_gb_s = 3350,
     .l2_mb = 50,
     .fma_flops = 256,
     .half_flops = 4096,
     .tf32_flops = 2048,
     .double_flops = 256},
    {.name = "H200",
     .driver_name = "NVIDIA H200",
     .device = device_of(90, 132),
     .ghz = 1.83,
     .hbm_gb_s = 4800,
     .l2_mb = 60,
     .fma_flops = 256,
     .half_flops = 4096,
     .tf32_flops = 2048,
     .double_flops = 256},
    {.name = "B200",
     .driver_name = "NVIDIA B200",
     .device = device_of(100, 148),
     .ghz = 1.86,
     .hbm_gb_s = 7700,
     .l2_mb = 126,
     .fma_flops = 256,
     .half_flops = 8192,
     .tf32_flops = 4096,
     .double_flops = 128},
    {.name = "RTX 5090",
     .driver_name = "NVIDIA GeForce RTX 5090",
     .device = device_of(120, 170),
     .ghz = 2.41,
     .hbm_gb_s = 1792,
     .l2_mb = 96,
     .fma_flops = 256,
     .half_flops = 512,
     .tf32_flops = 256,
     .double_flops = 4},
}};

inline std::string architecture_of(const Card& card) {
  return "sm_" + std::to_string(card.device.capability);
}

// One line a card: name, architecture and what the driver calls it, between tabs.
inline std::string list_cards() {
  std::string lines;
  for (const Card& card : kCards)
    lines.append(lines.empty() ? "" : "\n")
        .append(card.name)
        .append("\t" + architecture_of(card) + "\t")
        .append(card.driver_name);
  return lines;
}

// A card by its name, or by an architecture as in sm_90 the first of its cards.
inline const Card& card_named(const std::string& name) {
  std::string names;
  for (const Card& card : kCards) {
    if (name == card.name || name == architecture_of(card)) return card;
    names.append(card.name).append(" (" + architecture_of(card) + "), ");
  }
  throw std::invalid_argument("arch must be one of " + names + "got '" + name + "'");
}

inline Dtype dtype_named(const std::string& name) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16})
    if (name == name_of(dtype)) return dtype;
  throw std::invalid_argument("dtype must be f32, f64, f16 or bf16, got '" + name + "'");
}

// "resident", "per_step", or empty for what fits.
inline std::optional<Regime> regime_named(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "resident") return Regime::kResident;
  if (name == "per_step") return Regime::kPerStep;
  throw std::invalid_argument("regime must be resident or per_step, got '" + name + "'");
}

// A request in words, as the command and the tests have it.
struct WordsOfRequest {
  CellKind cell;
  const std::string& dtype;           // f32, f64, f16 or bf16
  const std::vector<int64_t>& sizes;  // T, N, I, H, P, D
  const std::string& arch;            // a card, or an architecture as in sm_90
  bool backward;
  bool allow_tf32;
  const std::string& regime;  // resident, per_step, or empty for what fits
};

// Throws std::invalid_argument.
inline PlanRequest request_named(const WordsOfRequest& words) {
  const std::vector<int64_t>& sizes = words.sizes;
  if (sizes.size() != 6)
    throw std::invalid_argument("sizes must be T, N, I, H, P, D, got " +
                                std::to_string(sizes.size()) + " of them");
  for (const int64_t size : sizes) {
    if (size < 1 || size >= int64_t(1) << 31)
      throw std::invalid_argument("sizes must be positive and below 2^31, got " +
                                  std::to_string(size));
  }
  return {.cell = words.cell,
          .dtype = dtype_named(words.dtype),
          .T = sizes[0],
          .N = sizes[1],
          .I = sizes[2],
          .H = sizes[3],
          .P = sizes[4],
          .D = sizes[5],
          .backward = words.backward,
          .allow_tf32 = words.allow_tf32,
          .regime = regime_named(words.regime),
          .device = card_named(words.arch).device};
}

// Assumed: mma.sync, which the resident kernels use, is as fast a clock as on sm_80. The rates of
// sm_90 and sm_100 above are those of instructions of their own, which vendors' products use.
constexpr double kMmaHalfFlops = 2048;
constexpr double kMmaTf32Flops = 1024;

// Assumed: an arrival, the poll that sees it and the load that follows are three trips to L2 of
// about 0.35 us; two dependent launches on one stream are about 2 us apart; L2 serves 40 of the 64
// bytes per clock that a multiprocessor's port could take.
constexpr double kBarrierUs = 1.05;
constexpr double kLaunchUs = 2.0;
constexpr double kL2BytesPerClock = 40;
constexpr double kSharedBytesPerClock = 128;

struct Estimate {
  // Microseconds of a step: those of barriers or launches, and the largest of the others.
  double barrier = 0, launch = 0, l2 = 0, hbm = 0, cores = 0, shared = 0;
  double outside = 0;  // microseconds of the products outside the time loop, in all
  double steps = 0;

  double step() const { return barrier + launch + std::max({l2, hbm, cores, shared}); }
  double total() const { return steps * step() + outside; }
  const char* limit() const {
    const std::pair<double, const char*> terms[] = {
        {barrier, "barrier"}, {launch, "launches"}, {l2, "L2"},
        {hbm, "memory"},      {cores, "cores"},     {shared, "shared memory"}};
    return std::max_element(std::begin(terms), std::end(terms))->second;
  }
};

// The rate of torch's products, which the vendor's library computes.
inline double gemm_flops_of(const PlanRequest& q, const Card& card) {
  if (q.dtype == Dtype::kFloat64) return card.double_flops;
  if (q.dtype == Dtype::kFloat32)
    return q.allow_tf32 && card.tf32_flops > 0 ? card.tf32_flops : card.fma_flops;
  const bool no_tensor_cores = q.dtype == Dtype::kBFloat16 && card.device.capability < 80;
  return no_tensor_cores ? card.fma_flops : card.half_flops;
}

inline Estimate estimate(const PlanRequest& q, const Plan& plan, const Card& card) {
  const CellInfo& info = info_of(q.cell);
  const double value = static_cast<double>(size_of(q.dtype)), real = std::max(value, 4.0);
  const double N = static_cast<double>(q.N), H = static_cast<double>(q.H);
  const double P = static_cast<double>(q.P), D = static_cast<double>(q.D);
  const double I = static_cast<double>(q.I), rows = static_cast<double>(q.T) * N;
  const double columns = info.gates * H;
  const double clock = card.ghz * 1e3;  // per microsecond
  const double of_sm = clock * card.device.sms;
  const double gemm_flops = gemm_flops_of(q, card);
  Estimate e;
  e.steps = static_cast<double>(q.T);
  // A step reads and writes x W, y and the reserve, besides h. Backward reads and writes the
  // reserve and the deltas.
  const double kept =
      (info.saves_h ? 0 : info.saved) * H * value + P * value + info.has_c * H * real;
  const double streamed = q.backward ? kept + (columns + P) * value : columns * real + kept;
  e.hbm = D * N * streamed / (card.hbm_gb_s * 1e3);
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const double K = stage.from_hidden ? P : H, width = stage.projects ? P : stage.gates * H;
    if (plan.regime == Regime::kPerStep) {
      e.launch += 2 * kLaunchUs * D;
      e.cores += D * 2 * N * K * width / (gemm_flops * of_sm);
      const double weights = D * K * width * value;
      if (weights > card.l2_mb * 1e6) {
        e.hbm += weights / (card.hbm_gb_s * 1e3);
      } else {
        e.l2 += weights / (kL2BytesPerClock * of_sm);
      }
      continue;
    }
    const ResidentTile& tile = plan.shape.tile[s];
    const bool mma = plan.cores == Cores::kMma;
    const double per_sm = std::max(
        1.0, plan.grid.x * plan.grid.y * plan.grid.z / static_cast<double>(card.device.sms));
    const double block_rows = plan.shape.rows_pad;
    const double source = block_rows * tile.K_pad * value;
    const double R = mma ? static_cast<double>(round_up(tile.R, 16)) : tile.R;
    const double held = s == 0 ? (mma ? kMmaHeld : kFmaHeld) : 0;
    const double passes = static_cast<double>(ceil_div(plan.shape.rows, mma ? kMmaRows : kFmaRows));
    const double flops = !mma                         ? card.fma_flops
                         : q.dtype == Dtype::kFloat32 ? std::min(card.tf32_flops, kMmaTf32Flops)
                                                      : std::min(card.half_flops, kMmaHalfFlops);
    e.barrier += kBarrierUs;
    e.l2 += per_sm * source / (kL2BytesPerClock * clock);
    e.cores += per_sm * 2 * block_rows * R * tile.K_pad / (flops * clock);
    e.shared += per_sm * passes * R * tile.K_pad * value * std::max(0.0, 1 - held / tile.steps) /
                (kSharedBytesPerClock * clock);
  }
  // Forward: x W. Backward: d_x and dW, and dU.
  const double inner = q.backward ? 2 * I + P : I;
  e.outside = D * std::max(2 * rows * columns * inner / (gemm_flops * of_sm),
                           rows * (columns + inner) * value / (card.hbm_gb_s * 1e3));
  return e;
}

inline std::string to_text(const Estimate& e) {
  return text(
             "estimate: %.1f us a step (barrier %.1f, launches %.1f, then the longest of L2 %.1f, ",
             e.step(), e.barrier, e.launch, e.l2) +
         text("memory %.1f, cores %.1f, shared memory %.1f), limited by %s; ", e.hbm, e.cores,
              e.shared, e.limit()) +
         text("%.0f us in %.0f steps and %.0f us in products outside: %.0f us", e.steps * e.step(),
              e.steps, e.outside, e.total());
}

// The plan and its estimate in words, or the reason why the regime that was asked for cannot run.
inline std::string to_text(const PlanRequest& q, const Plan& plan, const Card& card) {
  const std::string head =
      text("%s %s %s on %s (%s): T=%lld N=%lld I=%lld ", info_of(q.cell).name, name_of(q.dtype),
           q.backward ? "backward" : "forward", card.name, architecture_of(card).c_str(),
           static_cast<long long>(q.T), static_cast<long long>(q.N), static_cast<long long>(q.I)) +
      text("H=%lld P=%lld D=%lld\n", static_cast<long long>(q.H), static_cast<long long>(q.P),
           static_cast<long long>(q.D));
  if (is_refused(q, plan)) return head + "resident: cannot run, " + plan.why_per_step + "\n";
  return head + to_text(plan) + "\n" + to_text(estimate(q, plan, card)) + "\n";
}

}  // namespace fusedrnn::cuda
