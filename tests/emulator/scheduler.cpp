#include <algorithm>
#include <numeric>

#include "warp.h"

namespace emulator {
namespace {

// A warp that spins on memory gives the others their turn after so many instructions.
constexpr uint64_t kTimeSlice = 100'000;

[[noreturn]] void report_stuck(Block& block, int& position) {
  int exited = 0, used = 0;
  std::string text;
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& b = block.barriers[id];
    if (!b.expected) continue;
    ++used;
    text += "barrier " + std::to_string(id) + " has " + std::to_string(b.arrived) + " of " + std::to_string(b.expected) +
            " warps; ";
  }
  const Warp* waiting = nullptr;
  for (const auto& w : block.warps) {
    if (!w->at_barrier()) ++exited;
    if (w->at_barrier() && !waiting) waiting = w.get();
  }
  position = waiting->position();
  text += std::to_string(exited) + " warps have exited";
  waiting->fail(exited || used > 1 ? "divergent_barrier" : "deadlock", text);
}

}  // namespace

Block::Block(Launch& launch) : launch(launch) {
  const size_t bytes = launch.program.static_shared + launch.dynamic_shared;
  const int warp_count = (threads() + kLanes - 1) / kLanes;
  shared.grow(bytes);
  if (launch.options.check_races) races.emplace(warp_count, bytes);
  for (int w = 0; w < warp_count; ++w) warps.push_back(std::make_unique<Warp>(*this, w));
}

void Block::run(uint64_t linear, int& position) {
  const auto& grid = launch.grid;
  index = {static_cast<unsigned>(linear % grid[0]), static_cast<unsigned>(linear / grid[0] % grid[1]),
           static_cast<unsigned>(linear / grid[0] / grid[1])};
  std::fill(shared.unknown.begin(), shared.unknown.end(), 1);
  if (races) races->start_block();
  for (Barrier& b : barriers) b = {};
  for (auto& w : warps) w->start_block();

  std::vector<Warp*> alive;
  for (auto& w : warps) alive.push_back(w.get());
  while (!alive.empty()) {
    std::vector<Warp*> runnable;
    std::copy_if(alive.begin(), alive.end(), std::back_inserter(runnable), [](Warp* w) { return !w->at_barrier(); });
    if (runnable.empty()) report_stuck(*this, position);
    Warp* warp = runnable[launch.random() % runnable.size()];
    try {
      if (warp->run(kTimeSlice) == Warp::Stop::exited) std::erase(alive, warp);
    } catch (const Failure&) {
      position = warp->position();
      throw;
    }
  }
}

void run(Launch& launch, int& position) {
  std::vector<uint64_t> order(static_cast<uint64_t>(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), launch.random);
  Block block(launch);
  for (const uint64_t linear : order) block.run(linear, position);
}

}  // namespace emulator
