// The decoder: it finds the handler of an instruction and fills in its operands.
#include <cctype>
#include <set>

#include "handlers.h"

namespace ptxvm {

namespace {

void unknown(Machine& m, Thread& t, const Instruction&) {
  m.fault("unsupported", t, "the interpreter does not know this instruction");
}

const std::map<std::string, uint32_t>& flag_names() {
  static const std::map<std::string, uint32_t> kNames = {
      {"ftz", kFlushDenormals},
      {"sat", kSaturate},
      {"relu", kRelu},
      {"NaN", kPropagateNan},
      {"rm", kRoundDown},
      {"rz", kRoundZero},
      {"rp", kRoundUp},
      {"rni", kIntegerNearest},
      {"rzi", kIntegerZero},
      {"rmi", kIntegerDown},
      {"rpi", kIntegerUp},
      {"rna", kTiesAway},
      {"hi", kHigh},
      {"wide", kWide},
      {"trans", kTranspose},
      {"nc", kNonCoherent},
      {"acquire", kAcquire},
      {"release", kRelease},
      {"acq_rel", kAcquire | kRelease},
      {"wrap", kWrap},
      {"l", kLeft},
      {"arrive", kArrive},
      {"sc", kSequential},
      {"shared::cluster", kAnyBlock},
      {"aligned", kAligned},
  };
  return kNames;
}

Space space_of(const Statement& s) {
  for (const std::string& m : s.modifiers) {
    if (m.rfind("shared", 0) == 0) return Space::kShared;
    if (m == "local") return Space::kLocal;
    if (m.rfind("param", 0) == 0) return Space::kParameter;
  }
  return Space::kGlobal;
}

Scope scope_of(const Statement& s) {
  static const std::set<std::string> kMemory = {"ld", "st", "atom", "red", "fence", "membar"};
  if (!kMemory.count(s.opcode)) return Scope::kWeak;
  const bool named =
      s.opcode == "atom" || s.opcode == "red" || s.opcode == "fence" || s.opcode == "membar";
  if (s.has("volatile") || s.has("mmio")) return Scope::kDevice;
  if (!named && !s.has("relaxed") && !s.has("acquire") && !s.has("release")) return Scope::kWeak;
  return s.has("cta") ? Scope::kBlock : s.has("cluster") ? Scope::kCluster : Scope::kDevice;
}

bool has_result(const Statement& s) {
  static const std::set<std::string> kNone = {
      "st",    "red",    "bra", "brx",      "ret",       "exit",      "trap",           "call",
      "fence", "membar", "cp",  "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard"};
  if (s.opcode == "bar" || s.opcode == "barrier") return s.has("red");
  if (s.opcode == "mbarrier")
    return s.has("arrive") || s.has("arrive_drop") || s.has("test_wait") || s.has("try_wait") ||
           s.has("pending_count");
  return !kNone.count(s.opcode);
}

void add_list(Instruction& i, const std::vector<Operand>& list) {
  if (!i.lists) i.lists = std::make_unique<std::vector<std::vector<Operand>>>();
  i.lists->push_back(list);
}

void take_arguments(const Statement& s, Instruction& i) {
  bool result = has_result(s);
  int addresses = 0;
  for (const Argument& a : s.arguments) {
    switch (a.form) {
      case Argument::kScalar:
        if (result) {
          i.out = a.value;
          i.result = Result::kScalar;
          if (!a.list.empty()) {
            i.second_out = 0;
            add_list(i, a.list);
          }
        } else if (i.count < 4) {
          i.in[i.count++] = a.value;
        }
        break;
      case Argument::kVector:
        if (result) i.result = Result::kVector;
        add_list(i, a.list);
        break;
      case Argument::kAddress:
        if (addresses > 0) {
          i.in[i.count++] = a.value;
          (addresses == 1 ? i.second_offset : i.third_offset) = static_cast<int32_t>(a.offset);
        } else {
          i.address = a.value;
          i.offset = static_cast<int32_t>(a.offset);
        }
        ++addresses;
        break;
      case Argument::kName:
        break;
    }
    result = false;
  }
}

}  // namespace

bool is_known(const Instruction& i) { return i.run != unknown; }

bool comparison_named(const std::string& name, Instruction& i) {
  static const std::map<std::string, Compare> kNames = {
      {"eq", Compare::kEq}, {"ne", Compare::kNe}, {"lt", Compare::kLt},   {"le", Compare::kLe},
      {"gt", Compare::kGt}, {"ge", Compare::kGe}, {"lo", Compare::kLt},   {"ls", Compare::kLe},
      {"hi", Compare::kGt}, {"hs", Compare::kGe}, {"num", Compare::kNum}, {"nan", Compare::kNan},
  };
  auto found = kNames.find(name);
  if (found == kNames.end() && name.size() == 3 && name.back() == 'u') {
    found = kNames.find(name.substr(0, 2));
    i.unordered = true;
  }
  if (found == kNames.end()) return false;
  i.detail = static_cast<uint8_t>(found->second);
  return true;
}

void set_comparison(Thread& t, const Instruction& i, bool holds) {
  bool opposite = !holds;
  if (i.logic != Logic::kNone) {
    const bool other = t.truth(i.in[2]);
    const auto combine = [&](bool x) {
      return i.logic == Logic::kAnd ? x && other : i.logic == Logic::kOr ? x || other : x != other;
    };
    holds = combine(holds);
    opposite = combine(opposite);
  }
  t.set(i.out, holds);
  if (i.second_out >= 0) t.set(i.vector(i.second_out)[0], opposite);
}

void decode(const Statement& s, Kernel& kernel, Instruction& i) {
  bool typed = false;
  for (const std::string& m : s.modifiers) {
    Type type;
    if (type_named(m, type)) {
      if (!typed) i.type = type;
      i.from = type;
      typed = true;
    } else if (const auto flag = flag_names().find(m); flag != flag_names().end()) {
      i.flags |= flag->second;
    }
  }
  // Vector types such as u16x2 and f32x2 are not known.
  for (const std::string& m : s.modifiers) {
    Type type;
    if (m.size() > 3 && m[m.size() - 2] == 'x' && std::isdigit(m[1]) && !type_named(m, type)) {
      i.run = unknown;
      return;
    }
  }
  i.space = space_of(s);
  i.scope = scope_of(s);
  take_arguments(s, i);
  const bool bulk = s.has("bulk") || (s.opcode == "st" && s.has("async"));
  kernel.copies_bulk |= bulk;
  kernel.copies_async |= s.opcode == "cp" && !bulk;
  for (const auto pick : {pick_data, pick_integer, pick_float, pick_convert, pick_control,
                          pick_warp, pick_cluster, pick_mbarrier, pick_bulk})
    if (Handler handler = pick(s, i)) {
      i.run = handler;
      return;
    }
  i.run = unknown;
}

}  // namespace ptxvm
