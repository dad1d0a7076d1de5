// The parameters of one direction of a layer: which of them a cell has, their names, their shapes
// and the pointers to them.
#pragma once

#include <cstdint>

#include "../cells/cells.h"

namespace fusedrnn {

// The parameters in the order in which callers give them.
enum class Parameter : int { kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr, kWeightCh, kCount };
constexpr int kParameterCount = static_cast<int>(Parameter::kCount);

struct ParameterInfo {
  const char* name;   // in Python, without the suffix of a layer
  const char* shape;  // sizes by letter
  bool is_bias;       // a layer has all biases or none
};

constexpr ParameterInfo info_of(Parameter parameter) {
  switch (parameter) {
    case Parameter::kWeightIh:
      return {"weight_ih", "[G*H, I]", false};
    case Parameter::kWeightHh:
      return {"weight_hh", "[G*H, P]", false};
    case Parameter::kBiasIh:
      return {"bias_ih", "[G*H]", true};
    case Parameter::kBiasHh:
      return {"bias_hh", "[G*H]", true};
    case Parameter::kWeightHr:
      return {"weight_hr", "[P, H]", false};
    default:
      return {"weight_ch", "[K*H]", false};
  }
}

constexpr bool has(const CellInfo& cell, Parameter parameter) {
  if (parameter == Parameter::kWeightHr) return cell.projects;
  if (parameter == Parameter::kWeightCh) return cell.params > 0;
  return true;
}

// Some of the parameters, in the order of the enum.
struct ParameterList {
  Parameter list[kParameterCount] = {};
  int count = 0;

  constexpr int size() const { return count; }
  constexpr Parameter operator[](int i) const { return list[i]; }
  constexpr const Parameter* begin() const { return list; }
  constexpr const Parameter* end() const { return list + count; }
};

constexpr ParameterList parameters_of(const CellInfo& cell, bool bias) {
  ParameterList parameters;
  for (int i = 0; i < kParameterCount; ++i) {
    const auto p = static_cast<Parameter>(i);
    if (has(cell, p) && (bias || !info_of(p).is_bias)) parameters.list[parameters.count++] = p;
  }
  return parameters;
}

// The values of the size letters in a ParameterInfo's shape.
struct ParameterSizes {
  int64_t G, K, I, H, P;  // K is the number of parameters of each unit
};

struct ParameterShape {
  int64_t size[2] = {1, 1};
  int rank = 1;

  constexpr int64_t values() const { return size[0] * size[1]; }
};

constexpr ParameterShape shape_of(Parameter parameter, const ParameterSizes& sizes) {
  ParameterShape shape;
  for (const char* letter = info_of(parameter).shape; *letter; ++letter) {
    int64_t& size = shape.size[shape.rank - 1];
    switch (*letter) {
      case 'G':
        size *= sizes.G;
        break;
      case 'K':
        size *= sizes.K;
        break;
      case 'I':
        size *= sizes.I;
        break;
      case 'H':
        size *= sizes.H;
        break;
      case 'P':
        size *= sizes.P;
        break;
      case ',':
        ++shape.rank;
        break;
      default:
        break;
    }
  }
  return shape;
}

// Pointers to the parameters of one direction, or to their gradients. Each is contiguous. Value
// is const for parameters. A null bias does not exist, and a null gradient is not wanted.
template <class Value>
struct Parameters {
  Value* w_ih;  // [G*H, I]
  Value* w_hh;  // [G*H, P]
  Value* b_ih;  // [G*H]
  Value* b_hh;  // [G*H]
  Value* w_hr;  // [P, H], of cells that project
  Value* w_ch;  // [K*H], of cells with parameters of each unit

  Value*& operator[](Parameter parameter) {
    switch (parameter) {
      case Parameter::kWeightIh:
        return w_ih;
      case Parameter::kWeightHh:
        return w_hh;
      case Parameter::kBiasIh:
        return b_ih;
      case Parameter::kBiasHh:
        return b_hh;
      case Parameter::kWeightHr:
        return w_hr;
      default:
        return w_ch;
    }
  }
  Value* operator[](Parameter parameter) const { return Parameters(*this)[parameter]; }
};

// Calls zero(pointer, values) for every gradient of one direction that is wanted.
template <class Value, class Zero>
void for_wanted(const CellInfo& cell, const ParameterSizes& sizes,
                const Parameters<Value>& gradients, const Zero& zero) {
  for (const Parameter p : parameters_of(cell, true))
    if (gradients[p]) zero(gradients[p], shape_of(p, sizes).values());
}

}  // namespace fusedrnn
