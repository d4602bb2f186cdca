// What the emulator has to say: errors, launches, counters.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulator {

struct Error {
  std::string kind;  // out_of_bounds, misaligned, uninitialised, race, divergent_barrier, deadlock, trap,
                     // unknown_instruction, launch
  std::string kernel, file;
  int line = 0;
  std::string instruction, message;
};

struct Conflicts {  // of one instruction that reads or writes shared memory
  std::string file;
  int line = 0;
  std::string instruction;
  uint64_t accesses = 0, wavefronts = 0, conflicts = 0;  // conflicts: wavefronts beyond what the width needs
};

struct Traffic {  // bytes, in whole 32-byte sectors
  uint64_t total = 0;     // every sector of every instruction of a warp
  uint64_t distinct = 0;  // every sector of a launch once
};

struct Counters {  // of all launches of one kernel
  uint64_t launches = 0;
  std::map<std::string, uint64_t> instructions;  // of warps, by row of the instruction tables
  Traffic read, written;
  std::map<std::string, Conflicts> conflicts;  // by site
};

struct LaunchRecord {
  std::string kernel, symbol;  // readable and mangled name
  std::array<unsigned, 3> grid, block;
  uint64_t shared_bytes = 0;  // static and dynamic
  bool failed = false;
};

struct Options {
  uint64_t seed = 0;  // of the order in which warps and blocks run
  bool check_races = true;
  bool check_uninitialised = true;
  int compute_capability = 80;         // 10 * major + minor: newest PTX that is loaded
  int64_t shared_limit = 99 * 1024;    // bytes a block may have with the attribute
  int multiprocessors = 4;             // what the device says it has
  uint64_t instruction_limit = 1ull << 28;  // of one warp, then it counts as a deadlock
};

struct State {
  Options options;
  std::vector<Error> errors;
  std::vector<LaunchRecord> launches;
  std::map<std::string, Counters> counters;  // by readable kernel name
};
State& state();

// The kernel's name without template arguments and parameters: of vk::gemm<...>(...) vk::gemm.
std::string readable_name(const std::string& symbol);

}  // namespace emulator
