// FUSEDRNN_LOG=1 prints a line on standard error for each pass over a layer.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "layer.h"

namespace fusedrnn {

inline bool logs() {
  static const char* wanted = std::getenv("FUSEDRNN_LOG");
  return wanted && *wanted == '1';
}

// engine: the engine and the processor or instruction set it uses. pass: for instance
// "forward for training" or "backward". plan: the engine's decision in words.
inline void log_pass(const Layer& layer, const std::string& engine, const char* pass,
                     const std::string& plan) {
  const Sequences& seq = layer.sequences;
  const auto number = [](int64_t n) { return static_cast<long long>(n); };
  std::fprintf(stderr, "fusedrnn: %s %s %s T=%lld N=%lld I=%lld H=%lld P=%lld D=%lld: %s\n",
               engine.c_str(), layer.info().name, pass, number(seq.T), number(seq.N),
               number(layer.I), number(layer.H), number(layer.P), number(layer.D), plan.c_str());
}

}  // namespace fusedrnn
