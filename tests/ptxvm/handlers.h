// What decodes an instruction of each family. Each fills in what its handler needs and returns it;
// null where it knows no such instruction.
#pragma once

#include "machine.h"
#include "statement.h"

namespace ptxvm {

Handler pick_integer(const Statement& s, Instruction& i);
Handler pick_float(const Statement& s, Instruction& i);
Handler pick_convert(const Statement& s, Instruction& i);
Handler pick_data(const Statement& s, Instruction& i);
Handler pick_control(const Statement& s, Instruction& i);
Handler pick_warp(const Statement& s, Instruction& i);

// The comparison a modifier names; false where it names none.
bool comparison_named(const std::string& name, Instruction& i);

template <class T>
bool compare(Compare c, T a, T b) {
  switch (c) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return a != b;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    default:
      return a >= b;
  }
}

// Writes a comparison's outcome: p, or p|q, combined with a predicate where there is one.
void set_comparison(Thread& t, const Instruction& i, bool holds);

}  // namespace ptxvm
