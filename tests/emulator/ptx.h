// Reading order: ptx.h (text), program.h (instructions with operands), warp.h (the machine), elementwise.h (from a
// formula to an instruction), then the tables of instructions: integer, bits, floating, predicates, convert, access,
// atomic, flow, barrier, collective, matrix, async. runtime.cpp is where a launch comes in.
//
// A PTX module as its text gives it: functions, variables, instructions by name. Registers and variables are resolved
// by scope; the meaning of an instruction is decoded later (program.h).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  tf32,
  f32,
  f64
};
Type type_named(std::string_view name);  // Type::none where it names no type
int size_of(Type type);                  // bytes in a register or in memory

enum class Space : uint8_t { generic, global, constant, shared, local, param };

struct Term {  // an operand
  enum class Kind : uint8_t { register_, immediate, symbol, variable, address, list, pair, sink };
  Kind kind = Kind::sink;
  bool negated = false;     // !%p
  bool is_real = false;     // a decimal literal such as 1.5, in `bits` as a double
  int index = -1;           // of the register or of the function's variable
  int64_t offset = 0;       // of an address or of symbol+offset
  uint64_t bits = 0;        // of an immediate
  std::string name;         // of a symbol: label, function, module variable or special register
  std::vector<Term> parts;  // of a list {a, b}, a pair a|b, or an address [a, {b, c}]
};

struct Source {  // a .loc: where an instruction comes from, and where that location was inlined (-1: nowhere)
  int file = 0, line = 0, parent = -1;
};

struct Statement {
  std::vector<std::string> tokens;  // the opcode, split at its dots
  Term guard;                       // Kind::sink without one
  std::vector<Term> operands;
  std::string text;
  int source = -1;
  int scope = 0;
};

struct Variable {
  std::string name;
  Space space = Space::generic;
  Type type = Type::none;
  int64_t align = 1, size = 0;  // bytes; size 0: dynamic shared memory
  std::string initial;          // bytes; shorter than size: zeros follow
  struct Pointer {
    int64_t at;
    std::string symbol;
    int64_t addend;
  };
  std::vector<Pointer> pointers;  // initial values that are addresses
};

struct Function {
  std::string name;
  bool is_entry = false, is_defined = false;
  std::array<int, 3> max_block{0, 0, 0};  // .maxntid; 0: no limit
  std::vector<Type> registers;
  std::vector<Variable> variables;  // parameters, results, local and shared variables
  std::vector<int> parameters, results;
  std::vector<Statement> body;
  std::vector<int> scope_parent{-1};
  std::map<std::pair<int, std::string>, int> labels;  // (scope, name) -> position in the body
  std::map<std::string, std::vector<std::string>> branch_targets;

  int label(int scope, const std::string& name) const;  // -1 where there is none
};

struct Module {
  std::string target;  // "sm_80"
  std::map<int, std::string> files;
  std::vector<Source> sources;
  std::map<std::string, Function> functions;
  std::vector<Variable> variables;

  // "file:line" parts of the innermost frame in this project's own sources: not in a toolkit's include folder.
  std::pair<std::string, int> location(int source) const;
};

Module parse(std::string_view text);  // throws std::runtime_error on text that is no PTX

}  // namespace emulator
