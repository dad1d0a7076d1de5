// An instruction as it is written in the PTX: the parser's result and the decoder's input.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace ptxvm {

struct Argument {
  enum Form { kScalar, kVector, kAddress, kName };
  Form form = kScalar;
  Operand value;
  std::vector<Operand> list;  // a and b of {a, b}, or p of a|p
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

// Sets all fields of `instruction` except its guard and its branch target. The handler of an
// unknown instruction raises the fault "unsupported".
void decode(const Statement& statement, Kernel& kernel, Instruction& instruction);

}  // namespace ptxvm
