// Pieces of PTX text: trimming and splitting, types, literals and declarations.
#include "text.h"

#include <cstring>
#include <map>
#include <set>
#include <sstream>

namespace ptxvm {

bool type_named(const std::string& name, Type& type) {
  static const std::map<std::string, Type> kTypes = {
      {"b8", {Kind::kBits, 8}},       {"u8", {Kind::kUnsigned, 8}},
      {"s8", {Kind::kSigned, 8}},     {"b16", {Kind::kBits, 16}},
      {"u16", {Kind::kUnsigned, 16}}, {"s16", {Kind::kSigned, 16}},
      {"b32", {Kind::kBits, 32}},     {"u32", {Kind::kUnsigned, 32}},
      {"s32", {Kind::kSigned, 32}},   {"b64", {Kind::kBits, 64}},
      {"u64", {Kind::kUnsigned, 64}}, {"s64", {Kind::kSigned, 64}},
      {"f16", {Kind::kFloat, 16}},    {"f32", {Kind::kFloat, 32}},
      {"f64", {Kind::kFloat, 64}},    {"f16x2", {Kind::kFloat, 16, true}},
      {"bf16", {Kind::kBfloat, 16}},  {"bf16x2", {Kind::kBfloat, 16, true}},
      {"tf32", {Kind::kTf32, 32}},    {"pred", {Kind::kPredicate, 1}},
      {"b128", {Kind::kBits, 128}},
  };
  const auto found = kTypes.find(name);
  if (found == kTypes.end()) return false;
  type = found->second;
  return true;
}

std::string trimmed(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "";
  return s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}

bool starts(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : s) {
    if (c == '[' || c == '{' || c == '(') ++depth;
    if (c == ']' || c == '}' || c == ')') --depth;
    if (c == separator && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

std::string without_comments(const std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.compare(i, 2, "//") == 0) {
      while (i < text.size() && text[i] != '\n') ++i;
      out += '\n';
    } else if (text.compare(i, 2, "/*") == 0) {
      for (; i < text.size() && text.compare(i, 2, "*/") != 0; ++i)
        if (text[i] == '\n') out += '\n';
      ++i;
    } else {
      out += text[i];
    }
  }
  return out;
}

Declaration declaration(const std::string& statement) {
  Declaration d;
  std::string left = statement;
  if (const size_t equals = statement.find('='); equals != std::string::npos) {
    left = statement.substr(0, equals);
    d.initial = trimmed(statement.substr(equals + 1));
  }
  std::istringstream words(left);
  std::string word;
  Type type;
  while (words >> word) {
    if (word == ".align") {
      words >> d.align;
    } else if (word == ".shared" || word == ".global" || word == ".const" || word == ".local" ||
               word == ".param") {
      d.space = word.substr(1);
    } else if (word[0] == '.') {
      if (type_named(word.substr(1), type)) d.element = type.bytes();
    } else {
      d.name += word;
    }
  }
  for (size_t at; (at = d.name.find('[')) != std::string::npos;) {
    const size_t end = d.name.find(']', at);
    const std::string size = trimmed(d.name.substr(at + 1, end - at - 1));
    d.open_ended |= size.empty();
    d.count *= size.empty() ? 0 : std::stoull(size);
    d.name.erase(at, end - at + 1);
  }
  if (d.align == 0) d.align = d.element;
  return d;
}

uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

uint64_t literal(const std::string& s) {
  if (s.size() > 2 && s[0] == '0' && std::strchr("fFdD", s[1]))
    return std::stoull(s.substr(2), nullptr, 16);
  const std::string digits = s.back() == 'U' ? s.substr(0, s.size() - 1) : s;
  return digits[0] == '-' ? static_cast<uint64_t>(std::stoll(digits, nullptr, 0))
                          : std::stoull(digits, nullptr, 0);
}

bool is_special_register(const std::string& name) {
  static const std::set<std::string> kNames = {
      "%tid",
      "%ntid",
      "%ctaid",
      "%nctaid",
      "%laneid",
      "%warpid",
      "%nwarpid",
      "%smid",
      "%nsmid",
      "%gridid",
      "%clusterid",
      "%nclusterid",
      "%cluster_ctaid",
      "%cluster_nctaid",
      "%cluster_ctarank",
      "%cluster_nctarank",
      "%is_explicit_cluster",
      "%lanemask_lt",
      "%lanemask_le",
      "%lanemask_gt",
      "%lanemask_ge",
      "%lanemask_eq",
      "%dynamic_smem_size",
      "%total_smem_size",
      "%envreg1",
      "%envreg2",
      "WARP_SZ",
  };
  return kNames.count(name.substr(0, name.find('.'))) > 0;
}

bool is_clock(const std::string& name) {
  return starts(name, "%clock") || starts(name, "%globaltimer");
}

}  // namespace ptxvm
