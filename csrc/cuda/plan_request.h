// What a plan is asked for: the sizes of a pass, the limits of the device, and what the caller
// chooses himself.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cells/cells.h"
#include "../layer/dtype.h"
#include "launcher.h"
#include "measured.h"

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

// The parts of a plan that may be chosen for measurements. What is absent is left to the plan.
struct PlanChoice {
  std::optional<Cores> cores;
  std::optional<int64_t> units, rows;  // of a block
  std::optional<bool> words;           // whether the exchange has words, and no barrier
  std::optional<int64_t> cluster;      // blocks of a cluster: 1, 2, 4 or 8
  std::optional<bool> as_one;          // whether a cluster arrives at the barrier as one

  bool any() const { return cores || units || rows || words || cluster || as_one; }
  bool has_clusters() const { return cluster.value_or(1) > 1; }
};

inline const char* name_of(Cores cores) { return cores == Cores::kMma ? "mma" : "fma"; }

// The choice that a text such as "cores=fma,units=8,rows=1,exchange=words" makes. Any of the keys
// may be absent. `what` is the argument's name in errors.
inline PlanChoice choice_named(const std::string& text, const char* what = "choice") {
  const auto wrong = [&](const std::string& expected, const std::string& got) {
    throw std::invalid_argument(std::string(what) + " must be " + expected + ", got '" + got + "'");
  };
  PlanChoice choice;
  if (!text.empty() && text.back() == ',') wrong("without a comma at the end", text);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const size_t equal = std::min(part.find('='), part.size());
    const std::string key = part.substr(0, equal);
    if ((key == "cores" && choice.cores) || (key == "units" && choice.units) ||
        (key == "rows" && choice.rows) || (key == "exchange" && choice.words) ||
        (key == "cluster" && choice.cluster) || (key == "arrive" && choice.as_one))
      wrong("one value for each key", text);
    const std::string value = part.substr(std::min(equal + 1, part.size()));
    if (key == "cores") {
      if (value != "mma" && value != "fma") wrong("cores=mma or cores=fma", part);
      choice.cores = value == "mma" ? Cores::kMma : Cores::kFma;
    } else if (key == "units" || key == "rows") {
      int64_t number = 0;
      const char* const last = value.data() + value.size();
      const auto [stop, error] = std::from_chars(value.data(), last, number);
      if (error != std::errc() || stop != last || number < 1)
        wrong(key + "= and a whole number from 1 on", part);
      (key == "units" ? choice.units : choice.rows) = number;
    } else if (key == "exchange") {
      if (value != "words" && value != "barrier") wrong("exchange=words or exchange=barrier", part);
      choice.words = value == "words";
    } else if (key == "cluster") {
      const std::vector<std::string> sizes = {"1", "2", "4", "8"};
      if (std::find(sizes.begin(), sizes.end(), value) == sizes.end())
        wrong("cluster=1, 2, 4 or 8", part);
      choice.cluster = std::stoi(value);
    } else if (key == "arrive") {
      if (value != "clusters" && value != "blocks") wrong("arrive=clusters or arrive=blocks", part);
      choice.as_one = value == "clusters";
    } else {
      wrong("some of cores=, units=, rows=, exchange=, cluster= and arrive=, with commas between",
            text);
    }
    begin = end + 1;
  }
  if (choice.as_one.value_or(false) && !choice.has_clusters())
    wrong("arrive=clusters only with cluster=2, 4 or 8", text);
  return choice;
}

inline std::string to_text(const PlanChoice& choice) {
  std::string text;
  const auto add = [&](const char* key, const std::string& value) {
    text.append(text.empty() ? "" : ",").append(key).append("=").append(value);
  };
  if (choice.cores) add("cores", name_of(*choice.cores));
  if (choice.units) add("units", std::to_string(*choice.units));
  if (choice.rows) add("rows", std::to_string(*choice.rows));
  if (choice.words) add("exchange", *choice.words ? "words" : "barrier");
  if (choice.cluster) add("cluster", std::to_string(*choice.cluster));
  if (choice.as_one) add("arrive", *choice.as_one ? "clusters" : "blocks");
  return text;
}

struct PlanRequest {
  CellKind cell;
  Dtype dtype;
  int64_t T, N, I, H, P, D;
  bool backward;
  bool allow_tf32;
  std::optional<Regime> regime;  // the regime that was asked for, if any
  Device device;
  // Registers of a thread in the resident kernel of either product, without clusters.
  int registers_fma = 255;
  int registers_mma = 255;
  PlanChoice choice = {};  // what else was asked for
  std::span<const Measurement> measured = kMeasured;
};

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The tensor cores are used from this many sequences on, and fit_resident leaves a block this many
// where it has the choice. Either product takes 8 sequences at a time, so a part of it would be
// unused with fewer.
constexpr int64_t kLeastRows = 8;

// The least number of units of a block, unless the layer has fewer. Fewer would leave threads, or
// rows of a tensor core instruction, without work, and would make more blocks wait for each other.
// A block of a cluster multiplies the weight rows of all its blocks.
inline int64_t least_units(Cores cores, bool backward, int gates, int64_t cluster) {
  const int64_t rows = cores == Cores::kMma ? 16 : 8;
  return ceil_div(rows, cluster * (backward ? 1 : gates));
}

}  // namespace fusedrnn::cuda
