#include <bit>
#include <cstdlib>
#include <utility>

#include "lexer.h"
#include "ptx.h"

namespace emulator {
namespace {

struct TypeName {
  const char* name;
  Type type;
  int size;
};
constexpr TypeName kTypes[] = {
    {"pred", Type::pred, 1},     {"b8", Type::b8, 1},   {"b16", Type::b16, 2},     {"b32", Type::b32, 4},
    {"b64", Type::b64, 8},       {"u8", Type::u8, 1},   {"u16", Type::u16, 2},     {"u32", Type::u32, 4},
    {"u64", Type::u64, 8},       {"s8", Type::s8, 1},   {"s16", Type::s16, 2},     {"s32", Type::s32, 4},
    {"s64", Type::s64, 8},       {"f16", Type::f16, 2}, {"f16x2", Type::f16x2, 4}, {"bf16", Type::bf16, 2},
    {"bf16x2", Type::bf16x2, 4}, {"f32", Type::f32, 4}, {"tf32", Type::tf32, 4},   {"f64", Type::f64, 8},
};

Space space_named(std::string_view name) {
  if (name == ".global") return Space::global;
  if (name == ".const") return Space::constant;
  if (name == ".shared") return Space::shared;
  if (name == ".local") return Space::local;
  if (name == ".param") return Space::param;
  return Space::generic;
}

std::string one_line(std::string_view text) {
  std::string line;
  for (const char c : text) {
    const bool blank = std::isspace(static_cast<unsigned char>(c));
    if (!blank || (!line.empty() && line.back() != ' ')) line.push_back(blank ? ' ' : c);
  }
  return line;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : lexer_(text) {}

  Module run() {
    while (!lexer_.at_end()) directive();
    return std::move(module_);
  }

 private:
  void directive() {
    const std::string_view word = lexer_.peek();
    if (word == ".version" || word == ".address_size") {
      lexer_.next(), lexer_.next();
    } else if (word == ".target") {
      lexer_.next();
      module_.target = lexer_.next();
      while (lexer_.accept(",")) lexer_.next();
    } else if (word == ".file") {
      file();
    } else if (word == ".section") {
      while (lexer_.next() != "}") {
      }
    } else if (word == ".visible" || word == ".extern" || word == ".weak" || word == ".common") {
      lexer_.next();
    } else if (word == ".entry" || word == ".func") {
      function();
    } else if (space_named(word) != Space::generic) {
      module_.variables.push_back(variable());
      lexer_.expect(";");
    } else if (word == ".pragma" || word == ".alias") {
      while (lexer_.next() != ";") {
      }
    } else {
      lexer_.fail("unknown directive");
    }
  }

  void file() {
    lexer_.next();
    const int index = static_cast<int>(integer());
    std::string_view name = lexer_.next();
    module_.files[index] = std::string(name.substr(1, name.size() - 2));
    while (lexer_.accept(",")) lexer_.next();  // time stamp and size
  }

  // .space .align 4 .b8 name[16] = {...}
  Variable variable() {
    Variable v;
    v.space = space_named(lexer_.next());
    int64_t explicit_align = 0, count = 1, element = 0;
    while (lexer_.peek().front() == '.') {
      const std::string_view word = lexer_.next();
      if (word == ".align") {
        explicit_align = integer();
      } else if (word == ".v2" || word == ".v4") {
        count = word[2] - '0';
      } else if (type_named(word.substr(1)) != Type::none) {
        v.type = type_named(word.substr(1));
        element = size_of(v.type);
      }  // else .ptr and the state space it points to
    }
    v.name = lexer_.next();
    v.align = explicit_align ? explicit_align : element * count;
    while (lexer_.accept("[")) {
      count *= lexer_.peek() == "]" ? 0 : integer();
      lexer_.expect("]");
    }
    v.size = count * element;
    if (lexer_.accept("=")) initial_value(v, element);
    return v;
  }

  void initial_value(Variable& v, int64_t element) {
    if (lexer_.accept("{")) {
      do initial_value(v, element);
      while (lexer_.accept(","));
      lexer_.expect("}");
      return;
    }
    Term value = term();
    if (value.kind == Term::Kind::symbol && value.name == "generic") value = term().parts.at(0);
    if (value.kind == Term::Kind::symbol) {
      v.pointers.push_back({static_cast<int64_t>(v.initial.size()), value.name, value.offset});
    }
    for (int64_t i = 0; i < element; ++i) v.initial.push_back(static_cast<char>(value.bits >> (8 * i)));
  }

  void parameter_list(std::vector<int>& indices) {
    if (!lexer_.accept("(")) return;
    while (!lexer_.accept(")")) {
      indices.push_back(declare(variable()));
      lexer_.accept(",");
    }
  }

  void function() {
    Function f;
    function_ = &f;
    scopes_.assign(1, {0, {}});
    f.is_entry = lexer_.next() == ".entry";
    parameter_list(f.results);
    f.name = lexer_.next();
    parameter_list(f.parameters);
    while (lexer_.peek() != "{" && lexer_.peek() != ";") {
      const std::string_view word = lexer_.next();
      if (word != ".maxntid" && word != ".reqntid") continue;
      f.max_block = {static_cast<int>(integer()), 1, 1};
      for (int axis = 1; axis < 3 && lexer_.accept(","); ++axis) f.max_block[axis] = static_cast<int>(integer());
    }
    if (!lexer_.accept(";")) {
      f.is_defined = true;
      lexer_.expect("{");
      source_ = -1;
      while (!scopes_.empty()) statement();
    }
    function_ = nullptr;
    Function& known = module_.functions[f.name];
    if (!known.is_defined) known = std::move(f);
  }

  void statement() {
    const std::string_view word = lexer_.peek();
    if (word == "{") {
      lexer_.next();
      function_->scope_parent.push_back(scopes_.back().id);
      scopes_.push_back({static_cast<int>(function_->scope_parent.size()) - 1, {}});
    } else if (word == "}") {
      lexer_.next();
      scopes_.pop_back();
    } else if (word == ".loc") {
      location();
    } else if (word == ".reg") {
      registers();
    } else if (space_named(word) != Space::generic) {
      declare(variable());
      lexer_.expect(";");
    } else if (word == ".pragma") {
      while (lexer_.next() != ";") {
      }
    } else if (word != ";") {
      label_or_instruction();
    } else {
      lexer_.next();
    }
  }

  // .loc file line column [, function_name label[+offset], inlined_at file line column]
  void location() {
    lexer_.next();
    const auto position = [this] {
      const int file = static_cast<int>(integer()), line = static_cast<int>(integer());
      return std::array<int, 3>{file, line, static_cast<int>(integer())};
    };
    const std::array<int, 3> here = position();
    Source source{here[0], here[1], -1};
    while (lexer_.accept(",")) {
      if (lexer_.next() == "inlined_at") {
        const auto caller = source_at_.find(position());
        if (caller != source_at_.end()) source.parent = caller->second;
      } else {
        lexer_.next();
        if (lexer_.accept("+")) lexer_.next();
      }
    }
    source_ = static_cast<int>(module_.sources.size());
    module_.sources.push_back(source);
    source_at_[here] = source_;
  }

  void registers() {
    lexer_.next();
    const Type type = type_named(lexer_.next().substr(1));
    do {
      const std::string name(lexer_.next());
      if (lexer_.accept("<")) {
        const int64_t count = integer();
        for (int64_t i = 0; i < count; ++i) declare_register(name + std::to_string(i), type);
        lexer_.expect(">");
      } else {
        declare_register(name, type);
      }
    } while (lexer_.accept(","));
    lexer_.expect(";");
  }

  void label_or_instruction() {
    const size_t begin = lexer_.position();
    Statement s;
    s.source = source_;
    s.scope = scopes_.back().id;
    if (lexer_.accept("@")) s.guard = term();
    const std::string opcode(lexer_.next());
    if (lexer_.accept(":")) {
      function_->labels[{s.scope, opcode}] = static_cast<int>(function_->body.size());
      if (lexer_.accept(".branchtargets")) {
        do function_->branch_targets[opcode].emplace_back(lexer_.next());
        while (lexer_.accept(","));
        lexer_.expect(";");
      }
      return;
    }
    for (size_t at = 0; at <= opcode.size();) {
      const size_t dot = std::min(opcode.find('.', at), opcode.size());
      if (dot > at) s.tokens.push_back(opcode.substr(at, dot - at));
      at = dot + 1;
    }
    while (lexer_.peek() != ";") {
      s.operands.push_back(term());
      lexer_.accept(",");
    }
    s.text = one_line(lexer_.slice(begin, lexer_.position()));
    lexer_.expect(";");
    function_->body.push_back(std::move(s));
  }

  Term list(std::string_view closing) {
    Term t;
    t.kind = Term::Kind::list;
    while (!lexer_.accept(closing)) {
      t.parts.push_back(term());
      lexer_.accept(",");
    }
    return t;
  }

  Term term() {
    if (lexer_.accept("{")) return list("}");
    if (lexer_.accept("(")) return list(")");
    if (lexer_.accept("!")) {
      Term t = term();
      t.negated = true;
      return t;
    }
    if (lexer_.accept("[")) {
      Term t = list("]");
      t.kind = Term::Kind::address;
      t.offset = std::exchange(t.parts.at(0).offset, 0);
      return t;
    }
    if (lexer_.peek() == "-" || std::isdigit(static_cast<unsigned char>(lexer_.peek().front()))) return number();
    Term t = resolve(std::string(lexer_.next()));
    if (lexer_.accept("|")) {
      Term pair;
      pair.kind = Term::Kind::pair;
      pair.parts = {t, term()};
      return pair;
    }
    if (lexer_.accept("+")) t.offset = integer();
    return t;
  }

  Term number() {
    Term t;
    t.kind = Term::Kind::immediate;
    const bool negative = lexer_.accept("-");
    std::string word(lexer_.next());
    const char mark = word.size() > 1 && word[0] == '0' ? static_cast<char>(std::tolower(word[1])) : ' ';
    if (mark == 'f' || mark == 'd') {
      t.bits = std::strtoull(word.c_str() + 2, nullptr, 16);
    } else if (mark != 'x' && word.find('.') != std::string::npos) {
      t.is_real = true;
      t.bits = std::bit_cast<uint64_t>(std::strtod(((negative ? "-" : "") + word).c_str(), nullptr));
    } else {
      t.bits = mark == 'b' ? std::strtoull(word.c_str() + 2, nullptr, 2) : std::strtoull(word.c_str(), nullptr, 0);
      if (negative) t.bits = -t.bits;
    }
    return t;
  }
  int64_t integer() { return static_cast<int64_t>(number().bits); }

  struct Scope {
    int id;
    std::map<std::string, Term> names;
  };

  void declare_register(const std::string& name, Type type) {
    Term t;
    t.kind = Term::Kind::register_;
    t.index = static_cast<int>(function_->registers.size());
    function_->registers.push_back(type);
    scopes_.back().names[name] = t;
  }
  int declare(Variable v) {
    Term t;
    t.kind = Term::Kind::variable;
    t.index = static_cast<int>(function_->variables.size());
    scopes_.back().names[v.name] = t;
    function_->variables.push_back(std::move(v));
    return t.index;
  }
  Term resolve(const std::string& name) {
    if (name == "_") return {};
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->names.find(name);
      if (found != scope->names.end()) return found->second;
    }
    Term t;
    t.kind = Term::Kind::symbol;
    t.name = name;
    return t;
  }

  Lexer lexer_;
  Module module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  int source_ = -1;
  std::map<std::array<int, 3>, int> source_at_;
};

}  // namespace

Type type_named(std::string_view name) {
  for (const TypeName& t : kTypes) {
    if (name == t.name) return t.type;
  }
  return Type::none;
}

int size_of(Type type) {
  for (const TypeName& t : kTypes) {
    if (type == t.type) return t.size;
  }
  return 0;
}

int Function::label(int scope, const std::string& name) const {
  for (; scope >= 0; scope = scope_parent[scope]) {
    const auto found = labels.find({scope, name});
    if (found != labels.end()) return found->second;
  }
  return -1;
}

std::pair<std::string, int> Module::location(int source) const {
  if (source < 0) return {"", 0};
  const auto file = [&](int s) {
    const auto found = files.find(sources[s].file);
    return found == files.end() ? std::string() : found->second;
  };
  for (int s = source; s >= 0; s = sources[s].parent) {
    if (file(s).find("/include/") == std::string::npos) return {file(s), sources[s].line};
  }
  return {file(source), sources[source].line};
}

Module parse(std::string_view text) { return Parser(text).run(); }

}  // namespace emulator
