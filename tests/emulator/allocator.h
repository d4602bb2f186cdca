// Torch's CPU memory under the emulator's eyes: every allocation is known with its exact bounds.
#pragma once

namespace emulator {

void install_allocator();  // for all allocations from now on; there is no way back

}  // namespace emulator
