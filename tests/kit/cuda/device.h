// The device that a launcher in Python describes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cuda/launcher.h"

namespace fusedrnn_test {

inline fusedrnn::cuda::Device device_of(const pybind11::object& launcher) {
  const pybind11::object d = launcher.attr("device");
  fusedrnn::cuda::Device device = {};
  device.capability = d.attr("capability").cast<int>();
  device.sms = d.attr("sms").cast<int>();
  device.threads_per_sm = d.attr("threads_per_sm").cast<int>();
  device.registers_per_sm = d.attr("registers_per_sm").cast<int>();
  device.shared_per_block = d.attr("shared_per_block").cast<size_t>();
  device.shared_per_sm = d.attr("shared_per_sm").cast<size_t>();
  device.shared_reserved = d.attr("shared_reserved").cast<size_t>();
  device.l2_bytes = d.attr("l2_bytes").cast<size_t>();
  const auto blocks = d.attr("cluster_blocks").cast<std::array<int, 3>>();
  std::copy(blocks.begin(), blocks.end(), device.cluster_blocks);
  return device;
}

}  // namespace fusedrnn_test
