// One decoder for each family of instructions. A decoder returns the handler of an instruction and
// sets the fields of `i` that the handler reads. It returns null if the instruction is not of its
// family or not known.
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
Handler pick_cluster(const Statement& s, Instruction& i);
Handler pick_mbarrier(const Statement& s, Instruction& i);
Handler pick_bulk(const Statement& s, Instruction& i);

// Sets i.detail (and i.unordered) to the comparison that a modifier names. Returns false if the
// modifier names no comparison.
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

// Writes the result of a comparison to the predicate p, and its opposite to q if the instruction
// has p|q. Both are combined with a third predicate if the instruction names one.
void set_comparison(Thread& t, const Instruction& i, bool holds);

}  // namespace ptxvm
