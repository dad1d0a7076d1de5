// The interpreter's form of PTX: modules, kernels and decoded instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptxvm {

enum class Kind : uint8_t { kBits, kUnsigned, kSigned, kFloat, kBfloat, kTf32, kPredicate };

struct Type {
  Kind kind = Kind::kBits;
  uint8_t bits = 32;
  bool pair = false;  // f16x2 and bf16x2 hold two numbers in one register

  int bytes() const { return bits < 8 ? 1 : bits / 8; }
  bool is_float() const { return kind == Kind::kFloat || kind == Kind::kBfloat; }
  bool is_signed() const { return kind == Kind::kSigned; }
};

// Returns false if `name`, which has no dot, names no type.
bool type_named(const std::string& name, Type& type);

enum class Space : uint8_t { kGlobal, kShared, kLocal, kParameter };

// Where each space begins among the generic addresses. Addresses of global memory are those of the
// host; the other spaces have windows above them.
constexpr uint64_t kSharedWindow = 1ull << 56;
constexpr uint64_t kLocalWindow = 2ull << 56;
constexpr uint64_t kParameterWindow = 3ull << 56;

// In the window of shared memory, each block's own memory begins at 0. The memory of the block of
// rank r in the cluster begins at (r + 1) * kBlockWindow, for every thread of the cluster.
constexpr uint64_t kBlockWindow = 1 << 24;

// An operand: the index of a register of the thread, or of a constant of the kernel.
struct Operand {
  enum Bank : uint32_t { kRegister, kConstant };
  uint32_t index : 30 = 0;
  uint32_t bank : 1 = kRegister;
  uint32_t negated : 1 = 0;  // !%p

  Operand() = default;
  Operand(uint32_t index, Bank bank) : index(index & 0x3fffffff), bank(bank) {}
};

enum Flag : uint32_t {
  kFlushDenormals = 1 << 0,
  kSaturate = 1 << 1,
  kRelu = 1 << 2,
  kPropagateNan = 1 << 3,
  kRoundDown = 1 << 4,  // rm, rz, rp: rounding of a float result
  kRoundZero = 1 << 5,
  kRoundUp = 1 << 6,
  kIntegerNearest = 1 << 7,  // rni, rzi, rmi, rpi: rounding to an integral value
  kIntegerZero = 1 << 8,
  kIntegerDown = 1 << 9,
  kIntegerUp = 1 << 10,
  kTiesAway = 1 << 11,  // rna
  kHigh = 1 << 12,
  kWide = 1 << 13,
  kTranspose = 1 << 14,
  kNonCoherent = 1 << 15,  // ld.global.nc
  kAcquire = 1 << 16,
  kRelease = 1 << 17,
  kWrap = 1 << 18,
  kLeft = 1 << 19,
  kArrive = 1 << 20,
  kSequential = 1 << 21,  // fence.sc
  kAnyBlock = 1 << 22,    // .shared::cluster
  kAligned = 1 << 23,     // .aligned
};

// Which threads a strong access or a fence is ordered with; kWeak orders nothing.
enum class Scope : uint8_t { kWeak, kBlock, kCluster, kDevice };

enum class Compare : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };
enum class Logic : uint8_t { kNone, kAnd, kOr, kXor };
enum class Atomic : uint8_t { kAdd, kExch, kCas, kInc, kDec, kMin, kMax, kAnd, kOr, kXor };
enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };
enum class Vote : uint8_t { kAny, kAll, kUniform, kBallot };

struct Machine;
struct Thread;
struct Instruction;
using Handler = void (*)(Machine&, Thread&, const Instruction&);

// Where an instruction writes its result: nowhere, to `out`, or to the operands of vector(0).
enum class Result : uint8_t { kNone, kScalar, kVector };

// One decoded instruction. It is kept small because an unrolled kernel has a hundred thousand. `in`
// holds the scalar operands that follow the result, `address` and `offset` the operands in square
// brackets, and `lists` the operands in braces.
struct Instruction {
  Handler run = nullptr;
  int32_t guard = -1;  // predicate register
  bool guard_negated = false;
  Space space = Space::kGlobal;
  Scope scope = Scope::kWeak;
  uint8_t detail = 0;  // a Compare, Atomic, Shuffle or Vote, a count, or the truth table of lop3
  Operand out;
  Operand in[4];
  Operand address;
  int32_t offset = 0;
  uint32_t flags = 0;
  uint32_t place = 0;  // the instruction's index in the kernel's code
  Type type, from;
  Logic logic = Logic::kNone;
  Result result = Result::kNone;
  bool unordered = false;  // the comparison is also true for NaN
  int8_t second_out = -1;  // index in `lists` of a second result; -1 if there is none
  uint8_t count = 0;       // number of scalar operands in `in`
  int32_t target = -1;
  // Offsets of a second and a third address, whose bases are among `in`.
  int32_t second_offset = 0, third_offset = 0;
  std::unique_ptr<std::vector<std::vector<Operand>>> lists;

  // The bytes of one access of PTX's memory model. A vector is several accesses, in any order.
  int width() const { return type.pair ? 4 : type.bytes(); }
  bool has_vectors() const { return lists != nullptr; }
  const std::vector<Operand>& vector(size_t k) const { return (*lists)[k]; }
};

struct SourceLine {
  int file = 0, line = 0;
  int outer_file = 0, outer_line = 0;  // the call, if the line's function was inlined
};

// The text and lines of an instruction, for error messages.
struct Origin {
  std::string text;
  int ptx_line = 0;
  SourceLine source;
};

struct Parameter {
  int offset = 0, size = 0;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<Instruction> code;
  std::vector<Origin> origins;
  std::vector<std::vector<int>> branch_tables;
  std::vector<uint64_t> constants;
  uint32_t registers = 0;
  // Special registers, whose value never changes during a thread: the register and its name.
  std::vector<std::pair<uint32_t, std::string>> special;
  uint64_t shared_bytes = 0;  // of static shared memory
  uint64_t local_bytes = 0;
  uint64_t scratch_bytes = 0;  // of the .param variables of calls
  int max_threads = 0;         // .maxntid; 0 if there is none
  int max_cluster = 0;         // .maxclusterrank; 0 if there is none
  uint32_t cluster[3] = {};    // .reqnctapercluster; zeros if there is none
  bool explicit_cluster = false;
  bool copies_async = false;  // cp.async
  bool copies_bulk = false;   // cp.async.bulk and st.async
};

// A .global or .const variable of the module.
struct Variable {
  std::string name;
  std::vector<unsigned char> bytes;
  uint64_t address() const { return reinterpret_cast<uint64_t>(bytes.data()); }
};

struct Module {
  std::map<std::string, Kernel> kernels;
  std::map<std::string, std::unique_ptr<Variable>> variables;
  std::map<int, std::string> files;  // .file directives
  int target = 0;                    // 80 for sm_80
};

// Lets registers share a slot if their values are never needed at the same time. nvcc's PTX has
// tens of thousands of registers for each thread, and few of them are live at a time.
void share_registers(Kernel& kernel);

// Whether the interpreter can run the instruction.
bool is_known(const Instruction& i);

// Throws std::runtime_error with the line of a syntax that it cannot read. An unknown instruction
// is no error here: it stops a thread that reaches it.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptxvm
