#include "launch.h"

#include <cxxabi.h>

#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "report.h"
#include "warp.h"

namespace emulator {
namespace {

constexpr int64_t kDefaultShared = 48 * 1024;  // bytes a block may have without the attribute
constexpr unsigned kMaxThreads = 1024;

cudaError_t error_code(const std::string& kind) {
  if (kind == "out_of_bounds") return cudaErrorIllegalAddress;
  if (kind == "misaligned") return cudaErrorMisalignedAddress;
  if (kind == "trap") return cudaErrorAssert;
  if (kind == "unknown_instruction") return cudaErrorInvalidPtx;
  return cudaErrorLaunchFailure;
}

Error describe(const std::string& kind, const std::string& kernel, const std::string& message, const Module* module,
               const Statement* statement) {
  Error e{kind, readable_name(kernel), "", 0, "", message};
  if (module && statement) {
    std::tie(e.file, e.line) = module->location(statement->source);
    e.instruction = statement->text;
  }
  return e;
}

// Finds the kernel's program; what cannot be decoded is reported once per attempt.
cudaError_t find_program(Kernel& kernel, const Program*& program) {
  try {
    program = kernel.image->program(kernel.name, state().options.compute_capability);
  } catch (const Undecodable& e) {
    Error error = describe("unknown_instruction", kernel.name, e.message, e.module, e.statement);
    state().errors.push_back(error);
    return cudaErrorInvalidPtx;
  } catch (const std::exception& e) {  // text that is no PTX
    state().errors.push_back(describe("launch", kernel.name, e.what(), nullptr, nullptr));
    return cudaErrorInvalidPtx;
  }
  if (program) return cudaSuccess;
  state().errors.push_back(
      describe("launch", kernel.name, "no PTX for a device of this compute capability", nullptr, nullptr));
  return cudaErrorNoKernelImageForDevice;
}

struct Rejection {
  cudaError_t code = cudaSuccess;
  std::string message;
};

Rejection check(const Kernel& kernel, const Program& program, dim3 grid, dim3 block, size_t dynamic_shared) {
  const auto shape = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
    return {cudaErrorInvalidConfiguration, "grid " + shape(grid)};
  }
  if (!threads || threads > kMaxThreads || block.z > 64)
    return {cudaErrorInvalidConfiguration, "block " + shape(block)};
  const auto& limit = program.kernel->function->max_block;
  if (limit[0] && threads > static_cast<uint64_t>(limit[0]) * limit[1] * limit[2]) {
    return {cudaErrorInvalidConfiguration, "block " + shape(block) + " is larger than the kernel's launch bounds"};
  }
  const int64_t total = program.static_shared + static_cast<int64_t>(dynamic_shared);
  const bool allowed = total <= kDefaultShared || static_cast<int64_t>(dynamic_shared) <= kernel.dynamic_shared_limit;
  if (!allowed) {
    return {cudaErrorInvalidValue,
            std::to_string(total) + " bytes of shared memory without the kernel's attribute for it"};
  }
  return {};
}

std::vector<uint8_t> pack_parameters(const Program& program, void** arguments) {
  std::vector<uint8_t> packed(program.parameter_bytes);
  const Routine& kernel = *program.kernel;
  for (size_t i = 0; i < kernel.function->parameters.size(); ++i) {
    const int variable = kernel.function->parameters[i];
    std::memcpy(packed.data() + kernel.offsets[variable], arguments[i], kernel.function->variables[variable].size);
  }
  return packed;
}

void add_counters(const Launch& run, Counters& counters) {
  ++counters.launches;
  for (size_t i = 0; i < run.executed.size(); ++i) {
    const Instruction& in = run.program.code[i];
    if (run.executed[i]) counters.instructions[in.row->name] += run.executed[i];
    const BankUse& use = run.bank_use[i];
    if (!use.accesses) continue;
    const auto [file, line] = run.program.module->location(in.statement->source);
    std::string opcode = in.words.front();
    for (size_t w = 1; w < in.words.size(); ++w) opcode += "." + in.words[w];
    Conflicts& site = counters.conflicts[file + ":" + std::to_string(line) + " " + opcode];
    site.file = file, site.line = line, site.instruction = opcode;
    site.accesses += use.accesses;
    site.wavefronts += use.wavefronts;
    site.conflicts += use.conflicts;
  }
}

bool execute(Launch& launch, const Kernel& kernel, Error& error) {
  Memory& memory = Memory::instance();
  std::fenv_t environment;
  std::feholdexcept(&environment);
  std::fesetenv(FE_DFL_ENV);  // the host may flush denormals
  int position = 0;
  bool succeeded = true;
  memory.start_launch();
  try {
    run(launch, position);
  } catch (const Failure& f) {
    error = describe(f.kind, kernel.name, f.message, launch.program.module, launch.program.code[position].statement);
    succeeded = false;
  }
  memory.finish_launch();
  std::fesetenv(&environment);
  return succeeded;
}

}  // namespace

cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_shared) {
  const std::lock_guard lock(Memory::instance().mutex);
  const Program* program = nullptr;
  if (const cudaError_t error = find_program(kernel, program); error != cudaSuccess) return last_error() = error;
  State& s = state();
  LaunchRecord record{readable_name(kernel.name),
                      kernel.name,
                      {grid.x, grid.y, grid.z},
                      {block.x, block.y, block.z},
                      program->static_shared + dynamic_shared,
                      true};
  const Rejection rejection = check(kernel, *program, grid, block, dynamic_shared);
  if (rejection.code != cudaSuccess) {
    s.errors.push_back(describe("launch", kernel.name, rejection.message, nullptr, nullptr));
    s.launches.push_back(record);
    return last_error() = rejection.code;
  }
  Counters& counters = s.counters[record.kernel];
  Launch run{*program,
             record.grid,
             record.block,
             dynamic_shared,
             pack_parameters(*program, arguments),
             s.options,
             counters,
             std::vector<uint64_t>(program->code.size()),
             std::vector<BankUse>(program->code.size()),
             std::mt19937_64(s.options.seed)};
  Error error;
  record.failed = !execute(run, kernel, error);
  add_counters(run, counters);
  s.launches.push_back(record);
  if (!record.failed) return cudaSuccess;
  s.errors.push_back(error);
  return last_error() = error_code(error.kind);
}

cudaError_t static_shared_bytes(Kernel& kernel, int64_t& bytes) {
  const Program* program = nullptr;
  const cudaError_t error = find_program(kernel, program);
  if (program) bytes = program->static_shared;
  return error;
}

cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

State& state() {
  static State* s = new State;
  return *s;
}

std::string readable_name(const std::string& symbol) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : symbol;
  std::free(demangled);
  // void ns::(anonymous namespace)::kernel<...>(...) -> ns::kernel
  for (size_t at; (at = name.find("(anonymous namespace)::")) != std::string::npos;) name.erase(at, 23);
  name = name.substr(0, name.find_first_of("<("));
  const size_t space = name.rfind(' ');
  return space == std::string::npos ? name : name.substr(space + 1);
}

}  // namespace emulator
