#include "image.h"

#include <cstring>
#include <stdexcept>

#include "memory.h"

namespace emulator {
namespace {

// The layout of a fat binary, as fatbinary writes it.
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};
struct Entry {
  uint16_t kind, attributes;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, options_offset;
  uint16_t minor, major;
  uint32_t architecture;
};
constexpr uint32_t kMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;

}  // namespace

std::vector<PtxImage> ptx_images(const void* fat_binary) {
  std::vector<PtxImage> images;
  const auto* header = static_cast<const Header*>(fat_binary);
  if (header->magic != kMagic) return images;
  const char* at = static_cast<const char*>(fat_binary) + header->header_bytes;
  for (const char* end = at + header->bytes; at < end;) {
    Entry entry;
    std::memcpy(&entry, at, sizeof(entry));
    if (entry.kind == kPtx) {
      std::string_view text(at + entry.header_bytes, entry.bytes);
      text = text.substr(0, text.find('\0'));
      if (text.find(".version") == std::string_view::npos) text = {};
      images.push_back({static_cast<int>(entry.architecture), text});
    }
    at += entry.header_bytes + entry.bytes;
  }
  return images;
}

bool Image::load(int compute_capability) {
  if (loaded_) return module_ != nullptr;
  loaded_ = true;
  PtxImage best;
  for (const PtxImage& i : ptx_images(fat_binary_)) {
    if (i.architecture <= compute_capability && i.architecture > best.architecture) best = i;
  }
  if (!best.architecture) return false;
  if (best.text.empty()) throw std::runtime_error("the PTX is compressed: compile with --compress-mode=none");
  module_ = std::make_unique<Module>(parse(best.text));
  for (const Variable& v : module_->variables) {
    if (v.space == Space::shared) continue;
    std::vector<uint8_t>& bytes = variables_[v.name];
    bytes.assign(std::max<int64_t>(v.size, 1) + v.align, 0);
    std::memcpy(reinterpret_cast<void*>(address(v.name)), v.initial.data(), v.initial.size());
    Memory::instance().add(reinterpret_cast<void*>(address(v.name)), v.size, false);
  }
  for (const Variable& v : module_->variables) {
    for (const Variable::Pointer& p : v.pointers) {
      const uint64_t value = address(p.symbol) + p.addend;
      std::memcpy(reinterpret_cast<void*>(address(v.name) + p.at), &value, sizeof(value));
    }
  }
  return true;
}

uint64_t Image::address(const std::string& name) const {
  const auto found = variables_.find(name);
  if (found == variables_.end()) return 0;
  uint64_t align = 1;
  for (const Variable& v : module_->variables) {
    if (v.name == name) align = v.align;
  }
  return (reinterpret_cast<uint64_t>(found->second.data()) + align - 1) / align * align;
}

const Program* Image::program(const std::string& kernel, int compute_capability) {
  if (!load(compute_capability)) return nullptr;
  const auto known = programs_.find(kernel);
  if (known != programs_.end()) return &known->second;
  const auto function = module_->functions.find(kernel);
  if (function == module_->functions.end() || !function->second.is_entry) return nullptr;
  Program made = decode(*module_, function->second, [this](const std::string& name) { return address(name); });
  return &programs_.emplace(kernel, std::move(made)).first->second;
}

void* Image::variable(const std::string& name, int compute_capability) {
  return load(compute_capability) ? reinterpret_cast<void*>(address(name)) : nullptr;
}

}  // namespace emulator
