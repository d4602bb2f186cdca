// What an object compiled by nvcc registers: fat binaries with PTX, kernels and variables by name.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

namespace emulator {

struct PtxImage {
  int architecture = 0;  // 80 for sm_80
  std::string_view text;  // empty: compressed
};
std::vector<PtxImage> ptx_images(const void* fat_binary);

// A fat binary and what was registered with it. Its PTX is parsed when a kernel is first used.
class Image {
 public:
  explicit Image(const void* fat_binary) : fat_binary_(fat_binary) {}

  // nullptr where the image has no PTX for the device, or no such kernel.
  const Program* program(const std::string& kernel, int compute_capability);
  void* variable(const std::string& name, int compute_capability);

 private:
  bool load(int compute_capability);
  uint64_t address(const std::string& name) const;

  const void* fat_binary_;
  bool loaded_ = false;
  std::unique_ptr<Module> module_;
  std::map<std::string, std::vector<uint8_t>> variables_;
  std::map<std::string, Program> programs_;
};

struct Kernel {
  Image* image;
  std::string name;
  int64_t dynamic_shared_limit = -1;  // bytes, once the attribute has been set
};

}  // namespace emulator
