// A kernel ready to run: instructions with their handler, and operands resolved to rows of registers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ptx.h"

namespace emulator {

class Warp;
struct Instruction;
using Mask = uint32_t;  // one bit per lane
using Handler = void (*)(Warp&, const Instruction&, Mask);

// Which lanes an instruction runs for.
enum class Lanes : uint8_t {
  present,  // those that are at it together
  members,  // those named by the member mask, its last operand, once all have arrived
  warp,     // the whole warp, once all have arrived
  flow,     // like `present`, and the handler moves their program counters
};

// One instruction of the PTX manual. `name` is made of those words of the opcode that distinguish it; the other words
// must be types that `select` has a handler for, or be listed in `modifiers`.
struct InstructionRow {
  const char* name;
  const char* modifiers;
  Handler (*select)(const Instruction&);  // nullptr where the types do not fit
  Lanes lanes = Lanes::present;
};
extern const std::span<const InstructionRow> kIntegerRows, kBitRows, kFloatRows, kPredicateRows, kConvertRows,
    kMemoryRows, kAtomicRows, kFlowRows, kBarrierRows, kWarpRows, kMatrixRows, kAsyncRows;

template <auto handler>
Handler always(const Instruction&) {
  return handler;
}

enum class Rounding : uint8_t { nearest, zero, down, up, nearest_away };

struct Operand {
  int slot = -1;             // row of registers; constants and special registers have rows as well
  int width = 8;             // bytes of the register
  bool negated = false;      // !%p
  int64_t offset = 0;        // of an address
  std::vector<Operand> parts;  // of a list or a pair
};

struct Routine;

struct Instruction {
  const InstructionRow* row = nullptr;
  Handler run = nullptr;
  std::vector<Type> types;
  std::vector<Operand> operands;
  Operand guard;  // slot -1 without one
  Rounding rounding = Rounding::nearest;
  bool to_integer = false;  // cvt.rni, .rzi, .rmi, .rpi
  bool ftz = false, saturate = false, relu = false;
  Space space = Space::generic;
  std::vector<int> targets;  // of a branch: positions in the program
  const Routine* callee = nullptr;
  struct Copy { int64_t from, to, size; };
  std::vector<Copy> arguments, results;  // of a call: from one frame to another
  std::vector<std::string> words;
  const Statement* statement = nullptr;

  Type type() const { return types.empty() ? Type::none : types.front(); }
  Type source_type() const { return types.empty() ? Type::none : types.back(); }
  bool has(std::string_view word) const;
};

struct Thread;
using Special = uint64_t (*)(const Thread&);

struct Constant {  // fills a row when a frame is made
  int slot;
  uint64_t bits;
  bool in_frame = false;      // bits + where the thread's frame lies in local memory
  Special special = nullptr;  // a special register
};

struct Routine {
  const Function* function;
  int entry = -1;
  int slots = 0;
  int64_t frame_bytes = 0;
  std::vector<int64_t> offsets;  // of the function's variables: in the frame, in shared memory or among the parameters
  std::vector<Constant> constants;
};

struct Program {
  const Module* module;
  const Routine* kernel;
  std::vector<std::unique_ptr<Routine>> routines;
  std::vector<Instruction> code;
  int64_t static_shared = 0, dynamic_align = 16;  // bytes
  int64_t parameter_bytes = 0;
};

struct Undecodable {  // thrown by decode
  std::string message;
  const Module* module;
  const Statement* statement;
};

using AddressOf = std::function<uint64_t(const std::string&)>;  // of a variable of the module; 0 where there is none
Program decode(const Module& module, const Function& kernel, const AddressOf& address);

Special special_register(std::string_view name);  // nullptr for a name that is none

// Addresses of the windows of generic addressing. Global addresses are the host's own, below 2^47.
constexpr uint64_t kSharedWindow = 1ull << 56, kLocalWindow = 2ull << 56, kParameterWindow = 3ull << 56;
constexpr uint64_t kWindowMask = 0xffull << 56;
constexpr int64_t kSharedBase = 1024;  // shared address of a block's first byte

}  // namespace emulator
