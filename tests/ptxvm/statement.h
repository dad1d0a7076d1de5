// One instruction as written, between the parser and the decoder.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace ptxvm {

struct Argument {
  enum Form { kScalar, kVector, kAddress, kName };
  Form form = kScalar;
  Operand value;
  std::vector<Operand> list;  // {a, b}, or a|p
  int64_t offset = 0;         // [base + offset]
  std::string name;           // a label or a function
};

struct Statement {
  std::string opcode;                  // "ld"
  std::vector<std::string> modifiers;  // "global", "f32"
  std::vector<Argument> arguments;
  std::string text;

  bool has(const char* modifier) const {
    for (const std::string& m : modifiers)
      if (m == modifier) return true;
    return false;
  }
};

// Sets everything of `instruction` but its guard and its branch target. An instruction that is not
// known gets the handler that says so.
void decode(const Statement& statement, Kernel& kernel, Instruction& instruction);

}  // namespace ptxvm
