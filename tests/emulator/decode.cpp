#include <algorithm>
#include <bit>
#include <cstdlib>
#include <map>
#include <tuple>

#include "program.h"

namespace emulator {
namespace {

const std::span<const InstructionRow>* const kTables[] = {&kIntegerRows, &kBitRows,    &kFloatRows,  &kPredicateRows,
                                                          &kConvertRows, &kMemoryRows, &kAtomicRows, &kFlowRows,
                                                          &kBarrierRows, &kWarpRows,   &kMatrixRows, &kAsyncRows};

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> words;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(separator, at), text.size());
    if (end > at) words.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

// The number of words of `name` if all of them stand in `tokens` in this order, the first one first, and every other
// token is a type or a modifier; 0 otherwise.
size_t match(const InstructionRow& row, const std::vector<std::string>& tokens) {
  const auto name = split(row.name, '.'), modifiers = split(row.modifiers, ' ');
  if (tokens.front() != name.front()) return 0;
  size_t matched = 1;
  for (size_t i = 1; i < tokens.size(); ++i) {
    if (matched < name.size() && tokens[i] == name[matched]) {
      ++matched;
    } else if (type_named(tokens[i]) == Type::none &&
               std::find(modifiers.begin(), modifiers.end(), tokens[i]) == modifiers.end()) {
      return 0;
    }
  }
  return matched == name.size() ? matched : 0;
}

void read_modifiers(Instruction& in) {
  static const std::map<std::string_view, Rounding> roundings = {
      {"rn", Rounding::nearest}, {"rz", Rounding::zero},     {"rm", Rounding::down},
      {"rp", Rounding::up},      {"rni", Rounding::nearest}, {"rzi", Rounding::zero},
      {"rmi", Rounding::down},   {"rpi", Rounding::up},      {"rna", Rounding::nearest_away}};
  static const std::map<std::string_view, Space> spaces = {
      {"global", Space::global},      {"shared", Space::shared},    {"shared::cta", Space::shared},
      {"const", Space::constant},     {"local", Space::local},      {"param", Space::param},
      {"param::entry", Space::param}, {"param::func", Space::param}};
  for (const std::string& word : in.words) {
    if (const Type type = type_named(word); type != Type::none) in.types.push_back(type);
    if (const auto r = roundings.find(word); r != roundings.end()) {
      in.rounding = r->second;
      in.to_integer = word.size() == 3 && word[2] == 'i';
    }
    // cp.async names two spaces; the first is the destination's.
    if (const auto s = spaces.find(word); s != spaces.end() && in.space == Space::generic) in.space = s->second;
  }
  in.ftz = in.has("ftz");
  in.saturate = in.has("sat");
  in.relu = in.has("relu");
}

class Decoder {
 public:
  Decoder(Program& program, const AddressOf& address) : program_(program), address_(address) {}

  void run(const Function& kernel) {
    program_.kernel = routine(kernel);
    for (size_t i = 0; i < program_.routines.size(); ++i) body(*program_.routines[i]);  // grows with each call found
  }

 private:
  static int64_t allocate(int64_t& end, const Variable& v) {
    const int64_t at = (end + v.align - 1) / v.align * v.align;
    end = at + v.size;
    return at;
  }

  int64_t shared_offset(const Variable& v) {
    if (v.size > 0) return kSharedBase + allocate(program_.static_shared, v);
    program_.dynamic_align = std::max(program_.dynamic_align, v.align);
    return kDynamicShared;
  }

  Routine* routine(const Function& function) {
    for (const auto& known : program_.routines) {
      if (known->function == &function) return known.get();
    }
    auto made = std::make_unique<Routine>();
    made->function = &function;
    made->slots = static_cast<int>(function.registers.size()) + 1;  // the last one swallows results nobody wants
    made->offsets.resize(function.variables.size());
    for (size_t i = 0; i < function.variables.size(); ++i) {
      const Variable& v = function.variables[i];
      const bool of_kernel = function.is_entry && i < function.parameters.size();
      made->offsets[i] = v.space == Space::shared ? shared_offset(v)
                         : of_kernel              ? allocate(program_.parameter_bytes, v)
                                                  : allocate(made->frame_bytes, v);
    }
    made->frame_bytes = (made->frame_bytes + 15) / 16 * 16;
    program_.routines.push_back(std::move(made));
    return program_.routines.back().get();
  }

  void body(Routine& r) {
    routine_ = &r;
    constants_.clear();
    r.entry = static_cast<int>(program_.code.size());
    for (const Statement& s : r.function->body) program_.code.push_back(instruction(s));
    static const Statement end{{"ret"}, {}, {}, "ret"};  // falling off the end is a return
    program_.code.push_back(instruction(end));
  }

  Instruction instruction(const Statement& s) {
    statement_ = &s;
    Instruction in;
    in.statement = &s;
    in.words = s.tokens;
    if (in.words.front() == "barrier") in.words.front() = "bar";  // two names of one instruction
    read_modifiers(in);
    if (s.guard.kind != Term::Kind::sink) in.guard = operand(s.guard, in);
    size_t best = 0;
    for (const auto* table : kTables) {
      for (const InstructionRow& row : *table) {
        const size_t words = match(row, in.words);
        if (words <= best) continue;
        if (const Handler handler = row.select(in)) best = words, in.row = &row, in.run = handler;
      }
    }
    if (!in.run) fail("the emulator has no row for it");
    if (s.tokens.front() == "call") {
      call(in);
    } else {
      for (const Term& t : s.operands) in.operands.push_back(operand(t, in));
    }
    return in;
  }

  [[noreturn]] void fail(const std::string& what) { throw Undecodable{what, program_.module, statement_}; }

  // call (result), function, (argument, ...);
  void call(Instruction& in) {
    const std::vector<Term>& terms = statement_->operands;
    const bool has_result = terms.front().kind == Term::Kind::list;
    const Term& name = terms.at(has_result ? 1 : 0);
    const auto found = program_.module->functions.find(name.name);
    if (found == program_.module->functions.end()) fail("indirect calls are not emulated");
    const Routine* caller = routine_;
    Routine* callee = routine(found->second);
    in.callee = callee;
    const auto arguments = [&](const std::vector<Term>& outer, const std::vector<int>& inner, bool inward) {
      std::vector<Instruction::Argument> list;
      for (size_t i = 0; i < inner.size() && i < outer.size(); ++i) {
        const int64_t there = callee->offsets[inner[i]], here = caller->offsets[outer[i].index];
        list.push_back({inward ? here : there, inward ? there : here, callee->function->variables[inner[i]].size});
      }
      return list;
    };
    if (has_result) in.results = arguments(terms[0].parts, callee->function->results, false);
    const Term* given = terms.size() > (has_result ? 2u : 1u) ? &terms.back() : nullptr;
    if (given) in.arguments = arguments(given->parts, callee->function->parameters, true);
  }

  Operand operand(const Term& t, Instruction& in) {
    Operand o;
    o.negated = t.negated;
    switch (t.kind) {
      case Term::Kind::sink: o.slot = static_cast<int>(routine_->function->registers.size()); break;
      case Term::Kind::register_:
        o.slot = t.index;
        o.width = size_of(routine_->function->registers[t.index]);
        break;
      case Term::Kind::immediate: o.slot = constant(immediate(t, in.source_type())); break;
      case Term::Kind::variable: o.slot = variable(t); break;
      case Term::Kind::symbol: o.slot = symbol(t, in); break;
      case Term::Kind::address:
        o = operand(t.parts.front(), in);
        o.offset = t.offset;
        break;
      case Term::Kind::list:
      case Term::Kind::pair:
        for (const Term& part : t.parts) o.parts.push_back(operand(part, in));
        o.slot = o.parts.empty() ? -1 : o.parts.front().slot;
        break;
    }
    return o;
  }

  static uint64_t immediate(const Term& t, Type type) {
    if (t.is_real && type == Type::f32)
      return std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(t.bits)));
    return t.bits;
  }

  int constant(uint64_t bits, bool in_frame = false, Special special = nullptr) {
    const auto [known, is_new] = constants_.try_emplace({bits, in_frame, special}, routine_->slots);
    if (is_new) routine_->constants.push_back({routine_->slots++, bits, in_frame, special});
    return known->second;
  }

  int variable(const Term& t) {
    const Variable& v = routine_->function->variables[t.index];
    const int64_t at = routine_->offsets[t.index] + t.offset;
    if (v.space == Space::shared) return constant(at);
    if (v.space == Space::local) return constant(at, true);
    const bool of_kernel =
        routine_->function->is_entry && t.index < static_cast<int>(routine_->function->parameters.size());
    return of_kernel ? constant(kParameterWindow + at) : constant(kLocalWindow + at, true);
  }

  int symbol(const Term& t, Instruction& in) {
    const Function& f = *routine_->function;
    if (const Special special = special_register(t.name)) return constant(0, false, special);
    if (const auto table = f.branch_targets.find(t.name); table != f.branch_targets.end()) {
      for (const std::string& label : table->second)
        in.targets.push_back(routine_->entry + f.label(statement_->scope, label));
      return -1;
    }
    if (const int at = f.label(statement_->scope, t.name); at >= 0) {
      in.targets.push_back(routine_->entry + at);
      return -1;
    }
    for (const Variable& v : program_.module->variables) {
      if (v.name == t.name && v.space == Space::shared) return constant(module_shared(v) + t.offset);
    }
    if (const uint64_t at = address_(t.name)) return constant(at + t.offset);
    fail("unknown name " + t.name);
  }

  // Shared variables of the module, the dynamic one among them, are laid out when a kernel first names them.
  int64_t module_shared(const Variable& v) {
    const auto [known, is_new] = shared_.try_emplace(v.name, 0);
    if (is_new) known->second = shared_offset(v);
    return known->second;
  }

 public:
  // Stands for the start of dynamic shared memory until all static variables are laid out.
  static constexpr int64_t kDynamicShared = int64_t{1} << 48;

 private:
  Program& program_;
  const AddressOf& address_;
  Routine* routine_ = nullptr;
  const Statement* statement_ = nullptr;
  std::map<std::tuple<uint64_t, bool, Special>, int> constants_;
  std::map<std::string, int64_t> shared_;
};

}  // namespace

bool Instruction::has(std::string_view word) const {
  return std::find(words.begin(), words.end(), word) != words.end();
}

Program decode(const Module& module, const Function& kernel, const AddressOf& address) {
  Program program;
  program.module = &module;
  Decoder(program, address).run(kernel);
  const int64_t align = program.dynamic_align;
  program.static_shared = (program.static_shared + align - 1) / align * align;
  for (const auto& r : program.routines) {
    for (Constant& c : r->constants) {
      // Within reach of an offset that the compiler folded into the address.
      const int64_t offset = static_cast<int64_t>(c.bits) - Decoder::kDynamicShared;
      if (!c.in_frame && std::abs(offset) < (int64_t{1} << 24)) c.bits = kSharedBase + program.static_shared + offset;
    }
  }
  return program;
}

}  // namespace emulator
