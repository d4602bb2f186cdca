// Finds shared-memory races: two warps touch a byte, at least one writes, and no barrier orders them. Each warp has a
// vector clock, as in FastTrack (Flanagan and Freund, PLDI 2009): what it knows to have happened in every other warp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

enum class Access : uint8_t { read, write, atomic };

using VectorClock = std::vector<uint32_t>;  // by warp

class Races {
 public:
  Races(int warps, size_t bytes) : warps_(warps), known_(warps, VectorClock(warps, 0)), last_(3 * warps * bytes) {
    start_block();
  }

  struct Record {
    uint32_t clock = 0;
    int position = -1;  // in the program
  };
  struct Conflict {
    int warp = -1;  // -1: none
    int position = -1;
    size_t byte = 0;
  };

  // Everything of the blocks before has happened; their records need not be erased.
  void start_block() {
    uint32_t now = 0;
    for (const VectorClock& k : known_) now = std::max(now, *std::max_element(k.begin(), k.end()));
    for (int w = 0; w < warps_; ++w) {
      std::fill(known_[w].begin(), known_[w].end(), now);
      ++known_[w][w];
    }
  }

  Conflict touch(int warp, size_t begin, size_t bytes, Access access, int position) {
    const VectorClock& known = known_[warp];
    for (size_t byte = begin; byte < begin + bytes; ++byte) {
      Record* records = &last_[3 * warps_ * byte];  // [access][warp]
      for (int other = 0; other < 3; ++other) {
        if (static_cast<Access>(other) == access && access != Access::write) continue;  // two reads, two atomics
        for (int w = 0; w < warps_; ++w) {
          const Record& r = records[other * warps_ + w];
          if (r.clock > known[w] && w != warp) return {w, r.position, byte};
        }
      }
      records[static_cast<int>(access) * warps_ + warp] = {known[warp], position};
    }
    return {};
  }

  // A barrier gathers what the arriving warps know and hands it to those that wait.
  void release(int warp, VectorClock& barrier) {
    barrier.resize(warps_, 0);
    for (int w = 0; w < warps_; ++w) barrier[w] = std::max(barrier[w], known_[warp][w]);
    ++known_[warp][warp];
  }
  void acquire(int warp, const VectorClock& barrier) {
    for (int w = 0; w < warps_; ++w) known_[warp][w] = std::max(known_[warp][w], barrier[w]);
  }

 private:
  int warps_;
  std::vector<VectorClock> known_;
  std::vector<Record> last_;
};

}  // namespace emulator
