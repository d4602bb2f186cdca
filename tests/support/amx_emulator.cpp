// AMX for CPUs without it. Preloaded into a test's process, it catches the illegal instructions and does what the manual
// says they do (Intel SDM volume 2: LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBF16PS): the library's own
// machine code runs, each thread on tiles of its own.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  alignas(64) unsigned char row[kRows][kRowBytes];
};

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

thread_local Tile tiles[kTiles];
thread_local Configuration configuration;

std::atomic<int64_t> products{0}, configured{0}, released{0};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "amx_emulator: %s\n", what);
  std::abort();
}

int rows_of(int tile) {
  if (configuration.palette != 1) fail("a tile instruction without a configuration");
  if (tile >= kTiles || configuration.rows[tile] == 0 || configuration.rows[tile] > kRows) fail("no such tile");
  return configuration.rows[tile];
}

int bytes_of(int tile) {
  const int bytes = configuration.row_bytes[tile];
  if (bytes == 0 || bytes > kRowBytes || bytes % 4) fail("a tile with rows of a wrong length");
  return bytes;
}

// Denormal operands and results are zero, as the instruction has it: set for as long as a handler runs.
class FlushDenormals {
 public:
  FlushDenormals() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
};

float bfloat16_at(const unsigned char* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return std::bit_cast<float>(uint32_t(half) << 16);
}

// sums [m, n] += a [m, 2k] b [k, 2n]: even and odd elements of the depth are added up apart, then together.
void multiply_add(int sums, int a, int b) {
  const int m = rows_of(sums), n = bytes_of(sums) / 4, k = bytes_of(a) / 4;
  if (rows_of(a) != m || rows_of(b) != k || bytes_of(b) / 4 != n) fail("tiles of a product do not fit");
  float right[kRows][2][16];
  for (int s = 0; s < k; ++s) {
    for (int j = 0; j < n; ++j) {
      for (int odd = 0; odd < 2; ++odd) right[s][odd][j] = bfloat16_at(&tiles[b].row[s][4 * j + 2 * odd]);
    }
  }
  for (int i = 0; i < m; ++i) {
    float parts[2][16] = {}, sum[16];
    for (int s = 0; s < k; ++s) {
      for (int odd = 0; odd < 2; ++odd) {
        const float x = bfloat16_at(&tiles[a].row[i][4 * s + 2 * odd]);
        for (int j = 0; j < n; ++j) parts[odd][j] = std::fma(x, right[s][odd][j], parts[odd][j]);
      }
    }
    std::memcpy(sum, tiles[sums].row[i], sizeof(sum));
    for (int j = 0; j < n; ++j) sum[j] += parts[0][j] + parts[1][j];
    std::memcpy(tiles[sums].row[i], sum, sizeof(sum));
  }
  products.fetch_add(1, std::memory_order_relaxed);
}

void zero(int tile) {
  rows_of(tile);
  tiles[tile] = {};
}

void load(int tile, const char* p, int64_t stride) {
  const int rows = rows_of(tile), bytes = bytes_of(tile);
  tiles[tile] = {};
  for (int r = 0; r < rows; ++r) std::memcpy(tiles[tile].row[r], p + r * stride, bytes);
}

void save(int tile, char* p, int64_t stride) {
  const int rows = rows_of(tile), bytes = bytes_of(tile);
  for (int r = 0; r < rows; ++r) std::memcpy(p + r * stride, tiles[tile].row[r], bytes);
}

void configure(const char* p) {
  std::memcpy(&configuration, p, sizeof(configuration));
  for (Tile& tile : tiles) tile = {};
  configured.fetch_add(1, std::memory_order_relaxed);
}

void release() {
  configuration = {};
  released.fetch_add(1, std::memory_order_relaxed);
}

// One instruction in VEX encoding with three prefix bytes.
class Instruction {
 public:
  explicit Instruction(ucontext_t* context)
      : registers_(context->uc_mcontext.gregs), code_(reinterpret_cast<const uint8_t*>(registers_[REG_RIP])) {}

  bool run() {
    constexpr int kMap0F38 = 2;
    if (code_[0] != 0xc4 || (code_[1] & 0x1f) != kMap0F38 || (code_[2] & 0x84)) return false;
    const int prefix = code_[2] & 3, opcode = code_[3], modrm = code_[4];
    const int mode = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
    length_ = 5;
    enum { kNone, k66, kF3, kF2 };
    if (opcode == 0x49 && prefix == kNone && mode != 3 && reg == 0) {
      configure(reinterpret_cast<const char*>(address(nullptr)));
    } else if (opcode == 0x49 && prefix == kNone && modrm == 0xc0) {
      release();
    } else if (opcode == 0x49 && prefix == kF2 && mode == 3 && rm == 0) {
      zero(reg);
    } else if (opcode == 0x4b && prefix == kF2 && mode != 3) {
      int64_t stride;
      const uint64_t base = address(&stride);
      load(reg, reinterpret_cast<const char*>(base), stride);
    } else if (opcode == 0x4b && prefix == kF3 && mode != 3) {
      int64_t stride;
      const uint64_t base = address(&stride);
      save(reg, reinterpret_cast<char*>(base), stride);
    } else if (opcode == 0x5c && prefix == kF3 && mode == 3) {
      multiply_add(reg, rm, ~(code_[2] >> 3) & 7);
    } else {
      return false;
    }
    registers_[REG_RIP] += length_;
    return true;
  }

 private:
  int64_t general(int number) const {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[number]];
  }

  // The memory operand; with `stride`, its index times its scale is that of a tile's rows instead of a part of it.
  uint64_t address(int64_t* stride) {
    const int mode = code_[4] >> 6, rm = code_[4] & 7;
    const int high_base = code_[1] & 0x20 ? 0 : 8, high_index = code_[1] & 0x40 ? 0 : 8;
    int64_t base, index = 0;
    bool only_displacement = false;
    if (rm == 4) {
      const int sib = code_[length_++], index_number = (sib >> 3 & 7) | high_index;
      only_displacement = (sib & 7) == 5 && mode == 0;
      base = only_displacement ? 0 : general((sib & 7) | high_base);
      if (index_number != 4) index = general(index_number) << (sib >> 6);
    } else {
      if (stride || (rm == 5 && mode == 0)) fail("an address of a form that is not expected");
      base = general(rm | high_base);
    }
    if (mode == 1) base += int8_t(code_[length_++]);
    if (mode == 2 || only_displacement) {
      int32_t displacement;
      std::memcpy(&displacement, code_ + length_, 4);
      base += displacement, length_ += 4;
    }
    if (stride) *stride = index;
    return stride ? base : base + index;
  }

  greg_t* registers_;
  const uint8_t* code_;
  int length_ = 0;
};

void on_illegal_instruction(int signal, siginfo_t*, void* context) {
  const FlushDenormals flush;
  auto* const at = static_cast<ucontext_t*>(context);
  if (!Instruction(at).run()) ::signal(signal, SIG_DFL);
  while (Instruction(at).run()) {
    // A signal costs more than an instruction: take those that follow, too.
  }
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" {

void vitkernels_emulates_amx() {}

int64_t amx_products() { return products; }
int64_t amx_open_configurations() { return configured - released; }
}
