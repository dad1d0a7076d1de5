// The parser: it turns the text of a PTX module into kernels and variables.
#include <cctype>
#include <cstring>
#include <set>
#include <sstream>
#include <stdexcept>

#include "program.h"
#include "statement.h"
#include "text.h"

namespace ptxvm {

namespace {

class Parser {
 public:
  explicit Parser(const std::string& text)
      : text_(without_comments(text)), module_(std::make_unique<Module>()) {}

  std::unique_ptr<Module> run() {
    std::string head;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\n' && is_line_directive(trimmed(head))) {
        line_directive(trimmed(head));
        head.clear();
      } else if (c == ';') {
        module_variable(trimmed(head));
        head.clear();
      } else if (c == '{' && head.find('=') == std::string::npos) {
        next();
        const size_t entry = head.find(".entry");
        if (entry == std::string::npos) {
          skip_braces();
        } else {
          kernel(head.substr(entry + 6));
        }
        head.clear();
        continue;
      } else {
        head += c;
      }
      next();
    }
    return std::move(module_);
  }

 private:
  [[noreturn]] void fail(const std::string& what, int line) const {
    throw std::runtime_error("PTX line " + std::to_string(line) + ": " + what);
  }

  char next() {
    if (text_[at_] == '\n') ++line_;
    return text_[at_++];
  }

  void skip_braces() {
    for (int depth = 1; depth > 0;) {
      const char c = next();
      depth += (c == '{') - (c == '}');
    }
  }

  // Whether s is a directive that ends with its line, without a semicolon.
  static bool is_line_directive(const std::string& s) {
    for (const char* name : {".version", ".target", ".address_size", ".file", ".loc"})
      if (starts(s, name)) return true;
    return false;
  }

  void line_directive(const std::string& s) {
    if (starts(s, ".file")) {
      const size_t from = s.find('"'), to = s.rfind('"');
      module_->files[std::stoi(s.substr(5))] = s.substr(from + 1, to - from - 1);
    } else if (starts(s, ".target")) {
      if (const size_t sm = s.find("sm_"); sm != std::string::npos)
        module_->target = std::stoi(s.substr(sm + 3));
    } else if (starts(s, ".loc")) {
      source_ = {};
      std::istringstream(s.substr(4)) >> source_.file >> source_.line;
      if (const size_t inlined = s.find("inlined_at"); inlined != std::string::npos)
        std::istringstream(s.substr(inlined + 10)) >> source_.outer_file >> source_.outer_line;
    }
  }

  void module_variable(const std::string& s) {
    if (s.empty() || s.find(".func") != std::string::npos) return;
    const Declaration d = declaration(s);
    if (d.space == "shared") {
      shared_[d.name] = d;
    } else if (d.space == "global" || d.space == "const") {
      auto variable = std::make_unique<Variable>();
      variable->name = d.name;
      variable->bytes.resize(d.bytes());
      unsigned char* to = variable->bytes.data();
      if (!d.initial.empty()) {
        const bool list = d.initial[0] == '{';
        const std::string values = list ? d.initial.substr(1, d.initial.rfind('}') - 1) : d.initial;
        for (const std::string& value : split(values, ',')) {
          const uint64_t number = literal(value);
          std::memcpy(to, &number, d.element);
          to += d.element;
        }
      }
      module_->variables[d.name] = std::move(variable);
    }
  }

  // --- Kernels -----------------------------------------------------------------------------------

  void kernel(const std::string& head) {
    const size_t open = head.find('(');
    kernel_ = {};
    kernel_.name = trimmed(head.substr(0, open));
    registers_.assign(1, {});
    scopes_.assign(1, {});
    scope_ = 0;
    branches_.clear();
    symbols_.clear();
    constants_.clear();
    specials_.clear();
    table_branches_.clear();
    tables_.clear();
    source_ = {};
    kernel_.registers = 1;  // register 0 takes results that no instruction reads
    if (open != std::string::npos) {
      const size_t close = head.find(')', open);
      parameters(head.substr(open + 1, close - open - 1));
      directives(head.substr(close + 1));
    }
    collect_body();
    lay_out_shared();
    for (const Line& line : body_) instruction(line);
    Statement end;
    end.opcode = "ret";
    end.text = "(end)";
    add(end, line_, source_);
    for (const Branch& b : branches_)
      kernel_.code[b.place].target = target(b.place, b.label, b.scope);
    for (const Branch& b : table_branches_) {
      kernel_.code[b.place].target = kernel_.branch_tables.size();
      kernel_.branch_tables.emplace_back();
      for (const std::string& label : tables_[b.label])
        kernel_.branch_tables.back().push_back(target(b.place, label, b.scope));
    }
    for (size_t i = 0; i < kernel_.code.size(); ++i) kernel_.code[i].place = i;
    share_registers(kernel_);
    module_->kernels[kernel_.name] = std::move(kernel_);
  }

  // The instruction that a label names: in the scope of the branch, or in the next one around it.
  int target(size_t place, const std::string& label, int scope) const {
    for (; scope >= 0; scope = scopes_[scope].parent)
      if (const auto found = scopes_[scope].labels.find(label);
          found != scopes_[scope].labels.end())
        return found->second;
    fail("no label " + label, kernel_.origins[place].ptx_line);
  }

  void parameters(const std::string& list) {
    int offset = 0;
    for (const std::string& text : split(list, ',')) {
      const Declaration d = declaration(text);
      offset = round_up(offset, d.align);
      symbols_[d.name] = offset;
      kernel_.parameters.push_back({offset, static_cast<int>(d.bytes())});
      offset += d.bytes();
    }
    kernel_.parameter_bytes = offset;
  }

  // The numbers that follow a directive of the kernel; none if the directive is not there.
  static std::vector<int> numbers_of(const std::string& text, const std::string& directive) {
    const size_t at = text.find(directive);
    if (at == std::string::npos) return {};
    std::string sizes = text.substr(at + directive.size());
    sizes = sizes.substr(0, sizes.find('.'));
    for (char& c : sizes) c = c == ',' ? ' ' : c;
    std::istringstream words(sizes);
    std::vector<int> numbers;
    for (int size; words >> size;) numbers.push_back(size);
    return numbers;
  }

  void directives(const std::string& text) {
    for (const char* name : {".maxntid", ".reqntid"}) {
      int threads = 1;
      const std::vector<int> sizes = numbers_of(text, name);
      for (int size : sizes) threads *= size;
      if (!sizes.empty()) kernel_.max_threads = threads;
    }
    for (int most : numbers_of(text, ".maxclusterrank")) kernel_.max_cluster = most;
    const std::vector<int> blocks = numbers_of(text, ".reqnctapercluster");
    for (size_t k = 0; k < 3 && !blocks.empty(); ++k)
      kernel_.cluster[k] = k < blocks.size() ? blocks[k] : 1;
    kernel_.explicit_cluster = text.find(".explicitcluster") != std::string::npos;
  }

  // One statement of a kernel's body, or a label, or the brace of a scope.
  struct Line {
    std::string text;
    int line;
    SourceLine source;
  };

  void collect_body() {
    body_.clear();
    std::string text;
    int first = line_, scopes = 1, braces = 0;
    while (scopes > 0) {
      const char c = text_[at_];
      if (text.empty() && std::isspace(static_cast<unsigned char>(c))) {
        next();
        first = line_;
        continue;
      }
      if (text.empty() && (c == '{' || c == '}')) {
        scopes += c == '{' ? 1 : -1;
        body_.push_back({std::string(1, c), line_, source_});
        next();
        continue;
      }
      if (text.empty()) first = line_;
      if (c == '\n' && starts(text, ".loc")) {
        line_directive(text);
        text.clear();
        next();
        continue;
      }
      braces += (c == '{') - (c == '}');
      // A colon ends a label, unless it belongs to the double colon of L1::no_allocate.
      const bool label = c == ':' && braces == 0 && text.find_first_of(" \t.") == std::string::npos;
      if (c == ';' || label) {
        body_.push_back({text + (label ? ":" : ""), first, source_});
        text.clear();
        next();
        continue;
      }
      text += next();
    }
  }

  // Gives an address to each shared variable that the body names. Dynamic shared memory follows
  // the static one.
  void lay_out_shared() {
    std::map<std::string, Declaration> mine = shared_;
    std::set<std::string> used;
    for (const Line& line : body_) {
      if (starts(line.text, ".shared")) {
        const Declaration d = declaration(line.text);
        mine[d.name] = d;
      }
      std::string word;
      for (char c : line.text + " ") {
        if (std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%.", c)) {
          word += c;
        } else {
          if (mine.count(word)) used.insert(word);
          word.clear();
        }
      }
    }
    uint64_t top = 0;
    for (const std::string& name : used) {
      const Declaration& d = mine.at(name);
      if (d.open_ended) continue;
      top = round_up(top, d.align);
      symbols_[name] = top;
      top += d.bytes();
    }
    top = round_up(top, 16);
    for (const std::string& name : used)
      if (mine.at(name).open_ended) {
        top = round_up(top, mine.at(name).align);
        symbols_[name] = top;
      }
    kernel_.shared_bytes = top;
  }

  void instruction(const Line& line) {
    const std::string text = trimmed(line.text);
    if (text == "{") {
      registers_.emplace_back();
      scopes_.push_back({scope_, {}});
      scope_ = scopes_.size() - 1;
    } else if (text == "}") {
      if (registers_.size() == 1) return;
      registers_.pop_back();
      scope_ = scopes_[scope_].parent;
    } else if (text.back() == ':') {
      scopes_[scope_].labels[text.substr(0, text.size() - 1)] = kernel_.code.size();
      last_label_ = text.substr(0, text.size() - 1);
    } else if (text[0] == '.') {
      directive(text, line.line);
    } else {
      operation(text, line);
    }
  }

  void directive(const std::string& text, int line) {
    if (starts(text, ".reg")) {
      declare_registers(text.substr(4));
    } else if (starts(text, ".local") || starts(text, ".param")) {
      const Declaration d = declaration(text);
      uint64_t& top = d.space == "local" ? kernel_.local_bytes : kernel_.scratch_bytes;
      top = round_up(top, d.space == "local" ? d.align : 16);
      symbols_[d.name] = d.space == "local" ? top : kScratch + top;
      top += d.bytes();
    } else if (starts(text, ".branchtargets")) {
      tables_[last_label_] = split(text.substr(14), ',');
    } else if (!starts(text, ".shared") && !starts(text, ".pragma") &&
               !starts(text, ".callprototype")) {
      fail("directive " + text + " is not known", line);
    }
  }

  void declare_registers(const std::string& text) {
    std::istringstream words(text);
    std::string type, names;
    words >> type;
    std::getline(words, names);
    for (const std::string& name : split(names, ',')) {
      const size_t range = name.find('<');
      if (range == std::string::npos) {
        registers_.back()[name] = kernel_.registers++;
      } else {
        const int count = std::stoi(name.substr(range + 1));
        for (int i = 0; i < count; ++i)
          registers_.back()[name.substr(0, range) + std::to_string(i)] = kernel_.registers++;
      }
    }
  }

  void operation(const std::string& whole, const Line& line) {
    std::string text = whole;
    int32_t guard = -1;
    bool negated = false;
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t");
      negated = text[1] == '!';
      const std::string name = text.substr(negated ? 2 : 1, end - (negated ? 2 : 1));
      guard = register_named(name);
      if (guard < 0) fail("no register " + name, line.line);
      text = trimmed(text.substr(end));
    }
    Statement s;
    s.text = whole;
    const size_t end = std::min(text.find_first_of(" \t\n"), text.size());
    std::istringstream words(text.substr(0, end));
    std::getline(words, s.opcode, '.');
    for (std::string word; std::getline(words, word, '.');)
      if (!word.empty()) s.modifiers.push_back(word);
    const std::string rest = trimmed(text.substr(end));
    if (s.opcode == "bra") {
      branches_.push_back({kernel_.code.size(), rest, scope_});
    } else if (s.opcode == "call") {
      s.arguments.push_back({});
      s.arguments.back().form = Argument::kName;
      s.arguments.back().name = rest;
      // The arguments of __assertfail are the message of the fault. No other function is run.
      if (const size_t open = rest.find('('); starts(rest, "__assertfail") && open < rest.size())
        for (const std::string& part : split(rest.substr(open + 1, rest.find(')') - open - 1), ','))
          s.arguments.push_back(argument(part));
    } else if (s.opcode == "brx") {
      const std::vector<std::string> parts = split(rest, ',');
      s.arguments.push_back(argument(parts.at(0)));
      table_branches_.push_back({kernel_.code.size(), parts.at(1), scope_});
    } else {
      try {
        std::vector<std::string> parts = split(rest, ',');
        // The clocks change while a thread runs, so they are read by an instruction of their own.
        if (s.opcode == "mov" && is_clock(parts.at(1))) {
          s.opcode = "clock";
          parts.pop_back();
        }
        for (const std::string& part : parts) s.arguments.push_back(argument(part));
      } catch (const std::exception&) {
        s.opcode = "?";  // decode() takes it for an unknown instruction
      }
    }
    add(s, line.line, line.source);
    kernel_.code.back().guard = guard;
    kernel_.code.back().guard_negated = negated;
  }

  void add(const Statement& statement, int line, const SourceLine& source) {
    kernel_.code.emplace_back();
    kernel_.origins.push_back({statement.text, line, source});
    decode(statement, kernel_, kernel_.code.back());
  }

  // --- Operands ----------------------------------------------------------------------------------

  int32_t register_named(const std::string& name) const {
    for (auto scope = registers_.rbegin(); scope != registers_.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    return -1;
  }

  Operand constant(uint64_t value) {
    const auto [found, fresh] = constants_.emplace(value, kernel_.constants.size());
    if (fresh) kernel_.constants.push_back(value);
    return {found->second, Operand::kConstant};
  }

  Operand special(const std::string& name) {
    const auto [found, fresh] = specials_.emplace(name, kernel_.registers);
    if (fresh) kernel_.special.emplace_back(kernel_.registers++, name);
    return {found->second, Operand::kRegister};
  }

  Operand scalar(const std::string& text) {
    if (text[0] == '!') {
      Operand operand = scalar(trimmed(text.substr(1)));
      operand.negated = true;
      return operand;
    }
    if (text == "_") return {};
    if (const int32_t found = register_named(text); found >= 0)
      return {static_cast<uint32_t>(found), Operand::kRegister};
    if (is_special_register(text)) return special(text);
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-')
      return constant(literal(text));
    if (const auto found = symbols_.find(text); found != symbols_.end())
      return constant(found->second);
    if (const auto found = module_->variables.find(text); found != module_->variables.end())
      return constant(found->second->address());
    throw std::runtime_error("what is " + text + "?");
  }

  Argument argument(const std::string& text) {
    Argument a;
    if (text.empty()) throw std::runtime_error("an operand is missing");
    if (text[0] == '{') {
      a.form = Argument::kVector;
      for (const std::string& part : split(text.substr(1, text.rfind('}') - 1), ','))
        a.list.push_back(scalar(part));
    } else if (text[0] == '[') {
      a.form = Argument::kAddress;
      const std::string inside = trimmed(text.substr(1, text.rfind(']') - 1));
      const size_t sign = inside.find_first_of("+-", 1);
      a.value = scalar(trimmed(inside.substr(0, sign)));
      if (sign != std::string::npos) {
        const std::string number = trimmed(inside.substr(sign + 1));
        a.offset = std::stoll(number, nullptr, 0) * (inside[sign] == '-' ? -1 : 1);
      }
    } else if (const size_t bar = text.find('|'); bar != std::string::npos) {
      a.value = scalar(trimmed(text.substr(0, bar)));
      a.list = {scalar(trimmed(text.substr(bar + 1)))};
    } else {
      a.value = scalar(text);
    }
    return a;
  }

  // The .param variables of calls begin at this address, above the parameters of every kernel.
  static constexpr uint64_t kScratch = 1 << 20;

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  std::unique_ptr<Module> module_;
  std::map<std::string, Declaration> shared_;
  SourceLine source_;

  // The kernel that is being read, and the names in it.
  Kernel kernel_;
  std::vector<Line> body_;
  std::vector<std::map<std::string, uint32_t>> registers_;  // one map for each open scope
  // Labels are known in the braces around them. Inline assembly has the same ones again and again.
  struct LabelScope {
    int parent = -1;
    std::map<std::string, int> labels;
  };
  std::vector<LabelScope> scopes_;
  int scope_ = 0;
  struct Branch {
    size_t place;
    std::string label;
    int scope;
  };
  std::vector<Branch> branches_, table_branches_;
  std::map<std::string, std::vector<std::string>> tables_;
  std::string last_label_;
  std::map<std::string, uint64_t> symbols_;  // parameters, shared and local variables
  std::map<uint64_t, uint32_t> constants_;
  std::map<std::string, uint32_t> specials_;
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptxvm
