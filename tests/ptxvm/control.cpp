// Handlers of branches, barriers, fences and the end of a thread.
#include "handlers.h"
#include "numbers.h"

namespace ptxvm {

namespace {

void nothing(Machine&, Thread&, const Instruction&) {}

void branch(Machine&, Thread& t, const Instruction& i) { t.at = i.target; }

void branch_by_table(Machine& m, Thread& t, const Instruction& i) {
  const std::vector<int>& table = m.kernel.branch_tables[i.target];
  const uint32_t index = t.get(i.in[0]);
  if (index >= table.size()) m.fault("out of bounds", t, "a branch behind the end of its table");
  t.at = table[index];
}

void leave(Machine& m, Thread& t, const Instruction&) { m.leave(t); }

void trap(Machine& m, Thread& t, const Instruction&) {
  m.fault("trap", t, "the kernel stopped itself");
}

// The text that a parameter of a call points at; "?" if it points outside the module's variables.
std::string text_given(Machine& m, Thread& t, const Instruction& i, Operand parameter) {
  uint64_t at = 0;
  std::memcpy(&at, m.access(t, i, t.get(parameter), sizeof(at), Use::kRead), sizeof(at));
  for (const auto& [name, variable] : m.module.variables)
    if (at - variable->address() < variable->bytes.size()) return reinterpret_cast<const char*>(at);
  return "?";
}

// The arguments of __assertfail are the message, the file, the line, the function and the size of a
// character.
void failed_assert(Machine& m, Thread& t, const Instruction& i) {
  m.fault("assert", t,
          "a device assert does not hold: " + text_given(m, t, i, i.in[0]) + ", in " +
              text_given(m, t, i, i.in[3]));
}

void called(Machine& m, Thread& t, const Instruction&) {
  m.fault("unsupported", t, "calls are not interpreted: the function must be inlined");
}

// Time is counted in instructions of all threads together.
void clock(Machine& m, Thread& t, const Instruction& i) {
  const bool high = i.flags & kHigh;
  t.set(i.out, low_bits(m.statistics.instructions >> (high ? 32 : 0), i.type.bits));
}

void fence(Machine& m, Thread& t, const Instruction& i) { m.order.fence(t, i.scope); }

enum Reduction : uint8_t { kNone, kCount, kAll, kAny };

// The operands are the barrier's id, then the number of threads if there is one; the last operand
// of bar.red is a predicate.
void barrier(Machine& m, Thread& t, const Instruction& i) {
  const uint32_t id = i.count > 0 ? t.get(i.in[0]) : 0;
  const bool reduces = i.detail != kNone;
  const bool counted = i.count > (reduces ? 2 : 1);
  if (reduces && id < 16) t.home->barriers[id].sum += t.truth(i.in[i.count - 1]);
  m.arrive(t, id, counted ? static_cast<uint32_t>(t.get(i.in[1])) : 0, !(i.flags & kArrive));
}

}  // namespace

Handler pick_control(const Statement& s, Instruction& i) {
  const std::string& op = s.opcode;
  if (op == "bra") return branch;
  if (op == "brx") return branch_by_table;
  if (op == "ret" || op == "exit") return leave;
  if (op == "trap") return trap;
  if (op == "clock") return clock;
  if (op == "call") {
    const std::string& what = s.arguments.at(0).name;
    if (what.find("__assertfail") != std::string::npos) {
      i.space = Space::kParameter;
      return failed_assert;
    }
    // The interpreter does not print what a kernel's printf would.
    return what.find("vprintf") != std::string::npos ? nothing : called;
  }
  if (op == "membar") return fence;
  if (op == "fence") {
    if (s.has("mbarrier_init") || (s.has("proxy") && s.has("async"))) return nullptr;
    return s.has("proxy") ? nothing : fence;
  }
  if (op == "bar" || op == "barrier") {
    if (s.has("warp") || (s.has("cluster"))) return nullptr;
    if (s.has("red")) i.detail = s.has("popc") ? kCount : s.has("and") ? kAll : kAny;
    return barrier;
  }
  if (op == "nanosleep" || op == "griddepcontrol" || op == "pmevent" || op == "setmaxnreg")
    return nothing;
  return nullptr;
}

}  // namespace ptxvm
