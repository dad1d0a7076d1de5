// Registers share a slot if their lives do not overlap. The life of a register reaches from its
// first write to its last read over all paths.
#include <algorithm>
#include <queue>

#include "program.h"

namespace ptxvm {

namespace {

template <class F>
void each_read(const Instruction& i, F f) {
  const auto take = [&](Operand o) {
    if (o.bank == Operand::kRegister && o.index != 0) f(o.index);
  };
  if (i.guard >= 0) f(static_cast<uint32_t>(i.guard));
  take(i.address);
  for (int k = 0; k < i.count; ++k) take(i.in[k]);
  if (!i.has_vectors()) return;
  for (size_t k = 0; k < i.lists->size(); ++k) {
    const bool written =
        (k == 0 && i.result == Result::kVector) || static_cast<int>(k) == i.second_out;
    if (!written)
      for (Operand o : i.vector(k)) take(o);
  }
}

template <class F>
void each_write(const Instruction& i, F f) {
  const auto give = [&](Operand o) {
    if (o.index != 0) f(o.index);
  };
  if (i.result == Result::kScalar) give(i.out);
  if (i.result == Result::kVector)
    for (Operand o : i.vector(0)) give(o);
  if (i.second_out >= 0)
    for (Operand o : i.vector(i.second_out)) give(o);
}

// Instructions [begin, end) that always run one after another: no branch leads into them or out of
// them except at their ends. `next` holds the runs that may follow.
struct Run {
  uint32_t begin, end;
  std::vector<uint32_t> next;
};

bool may_jump(const Instruction& i) { return i.target >= 0; }

std::vector<Run> runs_of(const Kernel& kernel) {
  const std::vector<Instruction>& code = kernel.code;
  std::vector<bool> first(code.size() + 1, false);
  first[0] = true;
  const auto targets = [&](const Instruction& i) {
    // A branch by table has an operand, its index; a plain branch has none.
    const bool table = i.count > 0;
    return table ? kernel.branch_tables[i.target] : std::vector<int>{i.target};
  };
  for (size_t k = 0; k < code.size(); ++k) {
    if (!may_jump(code[k])) continue;
    first[k + 1] = true;
    for (int to : targets(code[k])) first[to] = true;
  }
  std::vector<Run> runs;
  std::vector<uint32_t> run_at(code.size() + 1);
  for (uint32_t k = 0; k < code.size(); ++k) {
    if (first[k]) runs.push_back({k, k, {}});
    run_at[k] = runs.size() - 1;
    runs.back().end = k + 1;
  }
  for (Run& run : runs) {
    const Instruction& last = code[run.end - 1];
    if (may_jump(last))
      for (int to : targets(last)) run.next.push_back(run_at[to]);
    // An instruction that ends the thread is treated like any other. That can only lengthen lives.
    if ((!may_jump(last) || last.guard >= 0) && run.end < code.size())
      run.next.push_back(run_at[run.end]);
  }
  return runs;
}

using Bits = std::vector<uint64_t>;
bool has(const Bits& bits, uint32_t k) { return bits[k / 64] >> (k % 64) & 1; }
void put(Bits& bits, uint32_t k) { bits[k / 64] |= 1ull << (k % 64); }

// The life of a register, from its first to its last point in the code. Reads of instruction k
// count as point 2 k and its writes as point 2 k + 1.
struct Life {
  uint32_t from = ~0u, to = 0;
  void cover(uint32_t at) {
    from = std::min(from, at);
    to = std::max(to, at);
  }
};

std::vector<Life> lives_of(const Kernel& kernel) {
  const std::vector<Run> runs = runs_of(kernel);
  std::vector<Life> lives(kernel.registers);
  // A register lives beyond one run only if some run reads it before writing it. Only these are
  // numbered, and followed from run to run.
  constexpr uint32_t kLocal = ~0u;
  std::vector<uint32_t> number(kernel.registers, kLocal), outer;
  std::vector<uint32_t> written_in(kernel.registers, kLocal);
  for (uint32_t r = 0; r < runs.size(); ++r)
    for (uint32_t k = runs[r].begin; k < runs[r].end; ++k) {
      const Instruction& i = kernel.code[k];
      each_read(i, [&](uint32_t reg) {
        lives[reg].cover(2 * k);
        if (written_in[reg] != r && number[reg] == kLocal) {
          number[reg] = outer.size();
          outer.push_back(reg);
        }
      });
      each_write(i, [&](uint32_t reg) {
        lives[reg].cover(2 * k + 1);
        // If its guard is false, the instruction writes nothing and the old value lives on.
        if (i.guard < 0) {
          written_in[reg] = r;
        } else if (written_in[reg] != r && number[reg] == kLocal) {
          number[reg] = outer.size();
          outer.push_back(reg);
        }
      });
    }
  const size_t words = outer.size() / 64 + 1;
  std::vector<Bits> reads(runs.size(), Bits(words)), writes = reads, alive = reads, after = reads;
  for (uint32_t r = 0; r < runs.size(); ++r)
    for (uint32_t k = runs[r].begin; k < runs[r].end; ++k) {
      const Instruction& i = kernel.code[k];
      const auto read = [&](uint32_t reg) {
        const uint32_t n = number[reg];
        if (n != kLocal && !has(writes[r], n)) put(reads[r], n);
      };
      each_read(i, read);
      each_write(i, [&](uint32_t reg) {
        if (i.guard >= 0) {
          read(reg);
        } else if (number[reg] != kLocal) {
          put(writes[r], number[reg]);
        }
      });
    }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t r = runs.size(); r-- > 0;)
      for (size_t w = 0; w < words; ++w) {
        uint64_t out = 0;
        for (uint32_t next : runs[r].next) out |= alive[next][w];
        const uint64_t in = reads[r][w] | (out & ~writes[r][w]);
        changed |= in != alive[r][w];
        after[r][w] = out;
        alive[r][w] = in;
      }
  }
  for (uint32_t r = 0; r < runs.size(); ++r)
    for (uint32_t n = 0; n < outer.size(); ++n) {
      if (has(alive[r], n)) lives[outer[n]].cover(2 * runs[r].begin);
      if (has(after[r], n)) lives[outer[n]].cover(2 * runs[r].end - 1);
    }
  // Special registers are set before the first instruction.
  for (const auto& special : kernel.special) lives[special.first].cover(0);
  return lives;
}

}  // namespace

void share_registers(Kernel& kernel) {
  const std::vector<Life> lives = lives_of(kernel);
  std::vector<uint32_t> order;
  for (uint32_t reg = 1; reg < kernel.registers; ++reg)
    if (lives[reg].from != ~0u) order.push_back(reg);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return lives[a].from < lives[b].from; });
  std::vector<uint32_t> slot(kernel.registers, 0), free;
  using Ending = std::pair<uint32_t, uint32_t>;  // the end of a register's life, and its slot
  std::priority_queue<Ending, std::vector<Ending>, std::greater<>> in_use;
  uint32_t slots = 1;  // slot 0 takes results that no instruction reads
  for (uint32_t reg : order) {
    while (!in_use.empty() && in_use.top().first < lives[reg].from) {
      free.push_back(in_use.top().second);
      in_use.pop();
    }
    if (free.empty()) free.push_back(slots++);
    slot[reg] = free.back();
    free.pop_back();
    in_use.emplace(lives[reg].to, slot[reg]);
  }
  const auto move = [&](Operand& o) {
    if (o.bank == Operand::kRegister) o.index = slot[o.index] & 0x3fffffff;
  };
  for (Instruction& i : kernel.code) {
    if (i.guard >= 0) i.guard = static_cast<int32_t>(slot[i.guard]);
    move(i.out);
    move(i.address);
    for (Operand& o : i.in) move(o);
    if (i.has_vectors())
      for (std::vector<Operand>& list : *i.lists)
        for (Operand& o : list) move(o);
  }
  for (auto& special : kernel.special) special.first = slot[special.first];
  kernel.registers = slots;
}

}  // namespace ptxvm
