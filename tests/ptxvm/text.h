// Pieces of PTX text: trimming and splitting, types, literals and declarations.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace ptxvm {

// s without white space at both ends.
std::string trimmed(const std::string& s);

bool starts(const std::string& s, const char* prefix);

// Splits at each `separator` outside brackets. An empty last part is left out.
std::vector<std::string> split(const std::string& s, char separator);

// Removes comments. Line ends stay, so that line numbers stay right.
std::string without_comments(const std::string& text);

// The declaration of a variable, as in ".shared .align 16 .b8 name[64]", and its initialiser.
struct Declaration {
  std::string space, name, initial;
  uint64_t align = 0, element = 4, count = 1;
  bool open_ended = false;  // extern __shared__: an array without a size

  uint64_t bytes() const { return element * count; }
};

Declaration declaration(const std::string& statement);

uint64_t round_up(uint64_t n, uint64_t to);

// Whether the name is that of a special register whose value never changes during a thread.
bool is_special_register(const std::string& name);

// Whether the name is that of a special register that counts time.
bool is_clock(const std::string& name);

// The bits of a number as PTX writes it: 12, -1, 0x1fU, 0f3F800000 or 0d3FF0000000000000.
uint64_t literal(const std::string& s);

}  // namespace ptxvm
