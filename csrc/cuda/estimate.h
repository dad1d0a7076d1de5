// The analytic model behind a printed plan: how long a pass should take on a card, and which
// resource limits it. We measured none of its figures, and no decision depends on it.
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

// A card with its vendor's figures. The fields *_flops count operations per clock and
// multiprocessor: a multiplication and an addition are two.
struct Card {
  const char* name;         // the short name, which --arch takes
  const char* driver_name;  // the name that torch.cuda.get_device_name returns
  Device device;            // without its name
  double ghz;               // boost clock
  double hbm_gb_s;          // memory bandwidth
  double fma_flops;         // float32 on the ordinary cores: twice the number of cores
  double half_flops;        // 16-bit matrix products with float32 sums, dense
  double tf32_flops;        // 0 if the card has no TF32
  double double_flops;      // float64 matrix products
};

// A device with the limits that its compute capability fixes, after the table of technical
// specifications in the CUDA C++ Programming Guide.
constexpr Device device_of(int capability, int sms, size_t l2_mb) {
  const bool server = capability == 90 || capability == 100;
  const int threads = capability == 75 ? 1024 : capability == 80 || server ? 2048 : 1536;
  const size_t kib = capability == 75 ? 64 : capability == 80 ? 164 : server ? 228 : 100;
  const size_t reserved = capability == 75 ? 0 : 1024;
  // The blocks of a cluster run on the multiprocessors of one processing cluster. An H100 has 16 or
  // 18 in each; we assume that 16 of them hold clusters, on every card that has clusters.
  const auto in_clusters = [&](int cluster) {
    return capability < 90 ? 0 : cluster == 2 ? sms / 2 * 2 : sms / 16 * 16;
  };
  return {.capability = capability,
          .sms = sms,
          .threads_per_sm = threads,
          .registers_per_sm = 65536,
          .shared_per_block = kib * 1024 - reserved,
          .shared_per_sm = kib * 1024,
          .shared_reserved = reserved,
          .l2_bytes = l2_mb * 1000 * 1000,
          .cluster_blocks = {in_clusters(2), in_clusters(4), in_clusters(8)}};
}

// The cards in the order of their compute capability. An architecture names the first card that has
// it (sm_89 is the RTX 4090). The numbers of multiprocessors, clocks, bandwidths and caches are
// from NVIDIA's whitepapers and datasheets. The rates follow from the peak TFLOPS there, which are
// multiprocessors * clock * rate:
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
     .device = device_of(75, 40, 4),
     .ghz = 1.59,
     .hbm_gb_s = 320,
     .fma_flops = 128,
     .half_flops = 1024,
     .tf32_flops = 0,
     .double_flops = 4},
    {.name = "A100",
     .driver_name = "NVIDIA A100-SXM4-40GB",
     .device = device_of(80, 108, 40),
     .ghz = 1.41,
     .hbm_gb_s = 1555,
     .fma_flops = 128,
     .half_flops = 2048,
     .tf32_flops = 1024,
     .double_flops = 128},
    {.name = "A100 80GB",
     .driver_name = "NVIDIA A100-SXM4-80GB",
     .device = device_of(80, 108, 40),
     .ghz = 1.41,
     .hbm_gb_s = 2039,
     .fma_flops = 128,
     .half_flops = 2048,
     .tf32_flops = 1024,
     .double_flops = 128},
    {.name = "RTX 3090",
     .driver_name = "NVIDIA GeForce RTX 3090",
     .device = device_of(86, 82, 6),
     .ghz = 1.70,
     .hbm_gb_s = 936,
     .fma_flops = 256,
     .half_flops = 512,
     .tf32_flops = 256,
     .double_flops = 4},
    {.name = "RTX 4090",
     .driver_name = "NVIDIA GeForce RTX 4090",
     .device = device_of(89, 128, 72),
     .ghz = 2.52,
     .hbm_gb_s = 1008,
     .fma_flops = 256,
     .half_flops = 512,
     .tf32_flops = 256,
     .double_flops = 4},
    {.name = "L4",
     .driver_name = "NVIDIA L4",
     .device = device_of(89, 58, 48),
     .ghz = 2.04,
     .hbm_gb_s = 300,
     .fma_flops = 256,
     .half_flops = 1024,
     .tf32_flops = 512,
     .double_flops = 4},
    {.name = "H100",
     .driver_name = "NVIDIA H100 80GB HBM3",
     .device = device_of(90, 132, 50),
     .ghz = 1.83,
     .hbm_gb_s = 3350,
     .fma_flops = 256,
     .half_flops = 4096,
     .tf32_flops = 2048,
     .double_flops = 256},
    {.name = "H200",
     .driver_name = "NVIDIA H200",
     .device = device_of(90, 132, 60),
     .ghz = 1.83,
     .hbm_gb_s = 4800,
     .fma_flops = 256,
     .half_flops = 4096,
     .tf32_flops = 2048,
     .double_flops = 256},
    {.name = "B200",
     .driver_name = "NVIDIA B200",
     .device = device_of(100, 148, 126),
     .ghz = 1.86,
     .hbm_gb_s = 7700,
     .fma_flops = 256,
     .half_flops = 8192,
     .tf32_flops = 4096,
     .double_flops = 128},
    {.name = "RTX 5090",
     .driver_name = "NVIDIA GeForce RTX 5090",
     .device = device_of(120, 170, 96),
     .ghz = 2.41,
     .hbm_gb_s = 1792,
     .fma_flops = 256,
     .half_flops = 512,
     .tf32_flops = 256,
     .double_flops = 4},
}};

inline std::string architecture_of(const Card& card) {
  return "sm_" + std::to_string(card.device.capability);
}

// One line for each card: its name, its architecture and the driver's name for it, with tabs
// between them.
inline std::string list_cards() {
  std::string lines;
  for (const Card& card : kCards)
    lines.append(lines.empty() ? "" : "\n")
        .append(card.name)
        .append("\t" + architecture_of(card) + "\t")
        .append(card.driver_name);
  return lines;
}

// The card of this name. An architecture such as sm_90 names the first of its cards.
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

// A request as the command and the tests give it, with names of the dtype, the card and the regime.
struct WordsOfRequest {
  CellKind cell;
  const std::string& dtype;           // f32, f64, f16 or bf16
  const std::vector<int64_t>& sizes;  // T, N, I, H, P, D
  const std::string& arch;            // a card, or an architecture such as sm_90
  bool backward;
  bool allow_tf32;
  // resident, streamed, per_step, or empty, which leaves the choice to the plan
  const std::string& regime;
};

// The request that the words stand for. Throws std::invalid_argument if a name or a size is wrong.
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
  const Card& card = card_named(words.arch);
  Device device = card.device;
  device.name = card.driver_name;
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
          .device = device};
}

// We assume that
// - an arrival, the poll that sees it and the load that follows are three trips to L2, of about
//   0.35 us each;
// - the write of a word, and the poll that sees it, are two;
// - the blocks of a cluster wait for each other 0.2 us (a load from another block's shared memory
//   has a latency of about 180 clocks: Luo et al., Benchmarking and Dissecting the Nvidia Hopper
//   GPU Architecture, 2024), and add up their slices before that in 0.15 us;
// - two dependent launches on one stream are about 2 us apart;
// - L2 serves a multiprocessor 23 bytes per clock (block_shape.h), which is 5.5 TB/s for an H100.
constexpr double kBarrierUs = 1.05;
constexpr double kWordsUs = 0.7;
constexpr double kClusterUs = 0.2;
constexpr double kClusterSumsUs = 0.15;
constexpr double kLaunchUs = 2.0;

struct Estimate {
  // Microseconds of a step. Those of barriers and launches are added to the largest of the other
  // four, which we assume to overlap.
  double barrier = 0, launch = 0, l2 = 0, hbm = 0, cores = 0, shared = 0;
  double outside = 0;  // microseconds of all products outside the time loop
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

// The rate of the products that torch computes with NVIDIA's library.
inline double gemm_flops_of(const PlanRequest& q, const Card& card) {
  if (q.dtype == Dtype::kFloat64) return card.double_flops;
  if (q.dtype == Dtype::kFloat32)
    return q.allow_tf32 && card.tf32_flops > 0 ? card.tf32_flops : card.fma_flops;
  const bool no_tensor_cores = q.dtype == Dtype::kBFloat16 && card.device.capability < 80;
  return no_tensor_cores ? card.fma_flops : card.half_flops;
}

// The rate of float64 on the ordinary cores. Cards with tensor cores for float64 do half of
// double_flops there.
inline double fma_double_flops(const Card& card) {
  return card.double_flops > 4 ? card.double_flops / 2 : card.double_flops;
}

inline Estimate estimate(const PlanRequest& q, const Plan& plan, const Card& card) {
  const CellInfo& info = info_of(q.cell);
  const double value = static_cast<double>(size_of(q.dtype)), real = std::max(value, 4.0);
  const double N = static_cast<double>(q.N), H = static_cast<double>(q.H);
  const double P = static_cast<double>(q.P), D = static_cast<double>(q.D);
  const double I = static_cast<double>(q.I), rows = static_cast<double>(q.T) * N;
  const double columns = info.gates * H;
  const double clock = card.ghz * 1e3;  // clocks per microsecond
  const double of_sm = clock * card.device.sms;
  const double gemm_flops = gemm_flops_of(q, card);
  Estimate e;
  e.steps = static_cast<double>(q.T);
  // The bytes that a step reads and writes for each sequence and direction. Forward reads x W and
  // writes the reserve. Backward reads the reserve and d_y, and writes the deltas.
  const double reserve =
      (info.saves_h ? 0 : info.saved) * H * value + P * value + info.has_c * H * real;
  const double streamed = q.backward ? reserve + (columns + P) * value : columns * real + reserve;
  e.hbm = D * N * streamed / (card.hbm_gb_s * 1e3);
  for (int s = 0; s < info.stages; ++s) {
    const Stage& stage = info.stage[s];
    const double K = stage.from_hidden ? P : H, width = stage.projects ? P : stage.gates * H;
    if (plan.regime == Regime::kPerStep) {
      e.launch += 2 * kLaunchUs * D;
      e.cores += D * 2 * N * K * width / (gemm_flops * of_sm);
      const double weights = D * K * width * value;
      if (weights > static_cast<double>(card.device.l2_bytes)) {
        e.hbm += weights / (card.hbm_gb_s * 1e3);
      } else {
        e.l2 += weights / (kL2BytesPerClock * of_sm);
      }
      continue;
    }
    const ProductTile& tile = plan.shape.tile[s];
    const bool mma = plan.cores == Cores::kMma;
    const double per_sm = std::max(
        1.0, plan.grid.x * plan.grid.y * plan.grid.z / static_cast<double>(card.device.sms));
    const double block_rows = plan.shape.rows_pad;
    const double source = block_rows * tile.K_part * (plan.words ? 8 : value);
    const double R = mma ? static_cast<double>(round_up(tile.R, 16)) : tile.R;
    const double held = held_of(plan.cores, q.dtype, plan.regime, s);
    const double passes = static_cast<double>(passes_of(plan.cores, plan.shape));
    const double flops = q.dtype == Dtype::kFloat64   ? fma_double_flops(card)
                         : !mma                       ? card.fma_flops
                         : q.dtype == Dtype::kFloat32 ? std::min(card.tf32_flops, kMmaTf32Flops)
                                                      : std::min(card.half_flops, kMmaHalfFlops);
    e.barrier += plan.words ? kWordsUs : kBarrierUs;
    if (plan.shape.cluster > 1) e.barrier += kClusterUs * (plan.as_one ? 2 : 1) + kClusterSumsUs;
    e.l2 += per_sm * source / (kL2BytesPerClock * clock);
    const double streamed = 1 - static_cast<double>(tile.on_chip) / tile.steps;
    e.l2 += passes * R * tile.K_part * value * streamed / (kL2BytesPerClock * clock);
    if (plan.streamed_bytes > card.device.l2_bytes)
      e.hbm += passes * R * tile.K_part * value * streamed * plan.grid.x * plan.grid.y *
               plan.grid.z / (card.hbm_gb_s * 1e3);
    e.cores += per_sm * 2 * block_rows * R * tile.K_part / (flops * clock);
    e.shared += per_sm * passes * R * tile.K_part * value * std::max(0.0, 1 - held / tile.steps) /
                (kSharedBytesPerClock * clock);
  }
  // The products outside the time loop are x W in forward, and the gradients of x, W and U in
  // backward.
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

// The plan in words with its estimate, or why the regime that was asked for cannot run.
inline std::string to_text(const PlanRequest& q, const Plan& plan, const Card& card) {
  const std::string head =
      text("%s %s %s on %s (%s): T=%lld N=%lld I=%lld ", info_of(q.cell).name, name_of(q.dtype),
           q.backward ? "backward" : "forward", card.name, architecture_of(card).c_str(),
           static_cast<long long>(q.T), static_cast<long long>(q.N), static_cast<long long>(q.I)) +
      text("H=%lld P=%lld D=%lld\n", static_cast<long long>(q.H), static_cast<long long>(q.P),
           static_cast<long long>(q.D));
  if (is_refused(q, plan)) {
    const std::string asked = q.regime ? name_of(*q.regime) : "the chosen plan";
    return head + asked + ": cannot run, " + plan.why_per_step + "\n";
  }
  return head + to_text(plan) + "\n" + to_text(estimate(q, plan, card)) + "\n";
}

}  // namespace fusedrnn::cuda
