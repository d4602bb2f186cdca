// One instruction a row, on every triple (a, b, c) of inputs: out[row][i]. The test reads the rows from this file.
// Inputs and results are the low bits of 64-bit words; a register of type .bN takes any type of N bits.

#include <cstdint>

namespace {

// A row: the instruction, and the bits of its result and its operands.
#define ROW1(instruction, d, a)                                                                                      \
  asm volatile("{.reg .b" d " d; .reg .b" a " a; cvt.u" a ".u64 a, %1; " instruction " d, a; cvt.u64.u" d " %0, d;}" \
               : "=l"(word)                                                                                          \
               : "l"(x));                                                                                            \
  out[row++ * n + i] = word
#define ROW2(instruction, d, a, b)                                                              \
  asm volatile("{.reg .b" d " d; .reg .b" a " a; .reg .b" b " b; cvt.u" a ".u64 a, %1; cvt.u" b \
               ".u64 b, %2; " instruction " d, a, b; cvt.u64.u" d " %0, d;}"                    \
               : "=l"(word)                                                                     \
               : "l"(x), "l"(y));                                                               \
  out[row++ * n + i] = word
#define ROW3(instruction, d, a, b, c)                                                                           \
  asm volatile("{.reg .b" d " d; .reg .b" a " a; .reg .b" b " b; .reg .b" c " c; cvt.u" a                       \
               ".u64 a, %1; "                                                                                   \
               "cvt.u" b ".u64 b, %2; cvt.u" c ".u64 c, %3; " instruction " d, a, b, c; cvt.u64.u" d " %0, d;}" \
               : "=l"(word)                                                                                     \
               : "l"(x), "l"(y), "l"(z));                                                                       \
  out[row++ * n + i] = word
#define SEVERAL(name, instructions)                                         \
  asm volatile("{" instructions "}" : "=l"(word) : "l"(x), "l"(y), "l"(z)); \
  out[row++ * n + i] = word
#define COMPARE(instruction, a)                                                                             \
  asm volatile("{.reg .pred p; .reg .b" a " a, b; cvt.u" a ".u64 a, %1; cvt.u" a ".u64 b, %2; " instruction \
               " p, a, b; selp.u64 %0, 1, 0, p;}"                                                           \
               : "=l"(word)                                                                                 \
               : "l"(x), "l"(y));                                                                           \
  out[row++ * n + i] = word
#define SEVERAL32(name, instructions)                                                                          \
  asm volatile("{.reg .b32 a, b, c, d; cvt.u32.u64 a, %1; cvt.u32.u64 b, %2; cvt.u32.u64 c, %3; " instructions \
               " cvt.u64.u32 %0, d;}"                                                                          \
               : "=l"(word)                                                                                    \
               : "l"(x), "l"(y), "l"(z));                                                                      \
  out[row++ * n + i] = word

__global__ void arithmetic_kernel(const uint64_t* xs, const uint64_t* ys, const uint64_t* zs, uint64_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint64_t x = xs[i], y = ys[i], z = zs[i];
  uint64_t word;
  int64_t row = 0;
  ROW1("abs.s16", "16", "16");
  ROW1("neg.s16", "16", "16");
  ROW1("abs.s32", "32", "32");
  ROW1("neg.s32", "32", "32");
  ROW1("abs.s64", "64", "64");
  ROW1("neg.s64", "64", "64");
  ROW1("not.b16", "16", "16");
  ROW1("not.b32", "32", "32");
  ROW1("not.b64", "64", "64");
  ROW1("cnot.b32", "32", "32");
  ROW1("popc.b32", "32", "32");
  ROW1("popc.b64", "32", "64");
  ROW1("clz.b32", "32", "32");
  ROW1("clz.b64", "32", "64");
  ROW1("brev.b32", "32", "32");
  ROW1("brev.b64", "64", "64");
  ROW1("bfind.u32", "32", "32");
  ROW1("abs.f32", "32", "32");
  ROW1("neg.f32", "32", "32");
  ROW1("abs.f64", "64", "64");
  ROW1("neg.f64", "64", "64");
  ROW1("abs.f16", "16", "16");
  ROW1("neg.f16", "16", "16");
  ROW1("abs.bf16", "16", "16");
  ROW1("neg.bf16", "16", "16");
  ROW1("abs.f16x2", "32", "32");
  ROW1("neg.bf16x2", "32", "32");
  ROW1("rcp.rn.f32", "32", "32");
  ROW1("sqrt.rn.f32", "32", "32");
  ROW1("rcp.rn.f64", "64", "64");
  ROW1("sqrt.rn.f64", "64", "64");
  ROW1("ex2.approx.f32", "32", "32");
  ROW1("ex2.approx.ftz.f32", "32", "32");
  ROW1("lg2.approx.f32", "32", "32");
  ROW1("lg2.approx.ftz.f32", "32", "32");
  ROW1("rcp.approx.f32", "32", "32");
  ROW1("rcp.approx.ftz.f32", "32", "32");
  ROW1("rcp.approx.ftz.f64", "64", "64");
  ROW1("rsqrt.approx.f32", "32", "32");
  ROW1("rsqrt.approx.ftz.f32", "32", "32");
  ROW1("sqrt.approx.f32", "32", "32");
  ROW1("sqrt.approx.ftz.f32", "32", "32");
  ROW1("sin.approx.f32", "32", "32");
  ROW1("cos.approx.f32", "32", "32");
  ROW1("tanh.approx.f32", "32", "32");
  ROW1("cvt.u16.u8", "16", "16");
  ROW1("cvt.s32.s8", "32", "16");
  ROW1("cvt.u32.u16", "32", "16");
  ROW1("cvt.s32.s16", "32", "16");
  ROW1("cvt.s64.s32", "64", "32");
  ROW1("cvt.u64.u32", "64", "32");
  ROW1("cvt.u32.u64", "32", "64");
  ROW1("cvt.u16.u32", "16", "32");
  ROW1("cvt.s8.s32", "16", "32");
  ROW1("cvt.sat.u8.s32", "16", "32");
  ROW1("cvt.sat.s16.s32", "16", "32");
  ROW1("cvt.sat.u32.s64", "32", "64");
  ROW1("cvt.rn.f32.s32", "32", "32");
  ROW1("cvt.rn.f32.u32", "32", "32");
  ROW1("cvt.rz.f32.s32", "32", "32");
  ROW1("cvt.rn.f32.s64", "32", "64");
  ROW1("cvt.rn.f64.s64", "64", "64");
  ROW1("cvt.rn.f32.u64", "32", "64");
  ROW1("cvt.rn.f64.s32", "64", "32");
  ROW1("cvt.rn.f64.u64", "64", "64");
  ROW1("cvt.rn.f16.s32", "16", "32");
  ROW1("cvt.rn.f16.u16", "16", "16");
  ROW1("cvt.rni.s32.f32", "32", "32");
  ROW1("cvt.rzi.s32.f32", "32", "32");
  ROW1("cvt.rmi.s32.f32", "32", "32");
  ROW1("cvt.rpi.s32.f32", "32", "32");
  ROW1("cvt.rzi.u32.f32", "32", "32");
  ROW1("cvt.rzi.s64.f32", "64", "32");
  ROW1("cvt.rzi.u64.f32", "64", "32");
  ROW1("cvt.rzi.s32.f64", "32", "64");
  ROW1("cvt.rni.s64.f64", "64", "64");
  ROW1("cvt.rzi.s64.f64", "64", "64");
  ROW1("cvt.rzi.u8.f32", "16", "32");
  ROW1("cvt.rzi.s16.f16", "16", "16");
  ROW1("cvt.rni.s32.f16", "32", "16");
  ROW1("cvt.rni.f32.f32", "32", "32");
  ROW1("cvt.rmi.f32.f32", "32", "32");
  ROW1("cvt.rpi.f32.f32", "32", "32");
  ROW1("cvt.rzi.f32.f32", "32", "32");
  ROW1("cvt.rni.f64.f64", "64", "64");
  ROW1("cvt.rzi.f64.f64", "64", "64");
  ROW1("cvt.rmi.f16.f16", "16", "16");
  ROW1("cvt.sat.f32.f32", "32", "32");
  ROW1("cvt.ftz.f32.f32", "32", "32");
  ROW1("cvt.f64.f32", "64", "32");
  ROW1("cvt.rn.f32.f64", "32", "64");
  ROW1("cvt.rz.f32.f64", "32", "64");
  ROW1("cvt.rp.f32.f64", "32", "64");
  ROW1("cvt.rn.f16.f32", "16", "32");
  ROW1("cvt.rz.f16.f32", "16", "32");
  ROW1("cvt.rn.f16.f64", "16", "64");
  ROW1("cvt.f32.f16", "32", "16");
  ROW1("cvt.f64.f16", "64", "16");
  ROW1("cvt.rn.bf16.f32", "16", "32");
  ROW1("cvt.rz.bf16.f32", "16", "32");
  ROW1("cvt.rn.relu.bf16.f32", "16", "32");
  ROW1("cvt.rna.tf32.f32", "32", "32");
  ROW2("add.s16", "16", "16", "16");
  ROW2("sub.s16", "16", "16", "16");
  ROW2("mul.lo.s16", "16", "16", "16");
  ROW2("mul.lo.u16", "16", "16", "16");
  ROW2("mul.wide.s16", "32", "16", "16");
  ROW2("mul.wide.u16", "32", "16", "16");
  ROW2("min.s16", "16", "16", "16");
  ROW2("max.u16", "16", "16", "16");
  ROW2("and.b16", "16", "16", "16");
  ROW2("or.b16", "16", "16", "16");
  ROW2("xor.b16", "16", "16", "16");
  ROW2("shl.b16", "16", "16", "32");
  ROW2("shr.u16", "16", "16", "32");
  ROW2("shr.s16", "16", "16", "32");
  ROW2("add.s32", "32", "32", "32");
  ROW2("sub.s32", "32", "32", "32");
  ROW2("mul.lo.s32", "32", "32", "32");
  ROW2("mul.hi.s32", "32", "32", "32");
  ROW2("mul.hi.u32", "32", "32", "32");
  ROW2("mul.wide.s32", "64", "32", "32");
  ROW2("mul.wide.u32", "64", "32", "32");
  ROW2("div.s32", "32", "32", "32");
  ROW2("div.u32", "32", "32", "32");
  ROW2("rem.s32", "32", "32", "32");
  ROW2("rem.u32", "32", "32", "32");
  ROW2("min.s32", "32", "32", "32");
  ROW2("max.s32", "32", "32", "32");
  ROW2("min.u32", "32", "32", "32");
  ROW2("max.u32", "32", "32", "32");
  ROW2("and.b32", "32", "32", "32");
  ROW2("or.b32", "32", "32", "32");
  ROW2("xor.b32", "32", "32", "32");
  ROW2("shl.b32", "32", "32", "32");
  ROW2("shr.u32", "32", "32", "32");
  ROW2("shr.s32", "32", "32", "32");
  ROW2("add.s64", "64", "64", "64");
  ROW2("sub.s64", "64", "64", "64");
  ROW2("mul.lo.s64", "64", "64", "64");
  ROW2("mul.hi.s64", "64", "64", "64");
  ROW2("mul.hi.u64", "64", "64", "64");
  ROW2("div.s64", "64", "64", "64");
  ROW2("div.u64", "64", "64", "64");
  ROW2("rem.s64", "64", "64", "64");
  ROW2("rem.u64", "64", "64", "64");
  ROW2("min.s64", "64", "64", "64");
  ROW2("max.s64", "64", "64", "64");
  ROW2("max.u64", "64", "64", "64");
  ROW2("and.b64", "64", "64", "64");
  ROW2("or.b64", "64", "64", "64");
  ROW2("xor.b64", "64", "64", "64");
  ROW2("shl.b64", "64", "64", "32");
  ROW2("shr.u64", "64", "64", "32");
  ROW2("shr.s64", "64", "64", "32");
  ROW2("add.f32", "32", "32", "32");
  ROW2("add.rz.f32", "32", "32", "32");
  ROW2("add.rm.f32", "32", "32", "32");
  ROW2("add.rp.f32", "32", "32", "32");
  ROW2("add.ftz.f32", "32", "32", "32");
  ROW2("sub.f32", "32", "32", "32");
  ROW2("mul.f32", "32", "32", "32");
  ROW2("mul.rz.f32", "32", "32", "32");
  ROW2("mul.ftz.f32", "32", "32", "32");
  ROW2("add.sat.f32", "32", "32", "32");
  ROW2("div.rn.f32", "32", "32", "32");
  ROW2("div.approx.f32", "32", "32", "32");
  ROW2("div.full.f32", "32", "32", "32");
  ROW2("min.f32", "32", "32", "32");
  ROW2("max.f32", "32", "32", "32");
  ROW2("min.NaN.f32", "32", "32", "32");
  ROW2("max.NaN.f32", "32", "32", "32");
  ROW2("copysign.f32", "32", "32", "32");
  ROW2("add.f64", "64", "64", "64");
  ROW2("add.rn.f64", "64", "64", "64");
  ROW2("sub.f64", "64", "64", "64");
  ROW2("mul.f64", "64", "64", "64");
  ROW2("mul.rn.f64", "64", "64", "64");
  ROW2("mul.rp.f64", "64", "64", "64");
  ROW2("div.rn.f64", "64", "64", "64");
  ROW2("min.f64", "64", "64", "64");
  ROW2("max.f64", "64", "64", "64");
  ROW2("add.f16", "16", "16", "16");
  ROW2("sub.f16", "16", "16", "16");
  ROW2("mul.f16", "16", "16", "16");
  ROW2("min.f16", "16", "16", "16");
  ROW2("max.NaN.f16", "16", "16", "16");
  ROW2("add.f16x2", "32", "32", "32");
  ROW2("mul.f16x2", "32", "32", "32");
  ROW2("max.f16x2", "32", "32", "32");
  ROW2("min.bf16", "16", "16", "16");
  ROW2("max.NaN.bf16", "16", "16", "16");
  ROW2("max.bf16x2", "32", "32", "32");
  ROW2("max.NaN.bf16x2", "32", "32", "32");
  ROW2("cvt.rn.f16x2.f32", "32", "32", "32");
  ROW2("cvt.rn.bf16x2.f32", "32", "32", "32");
  ROW2("cvt.rz.bf16x2.f32", "32", "32", "32");
  ROW2("cvt.rn.relu.bf16x2.f32", "32", "32", "32");
  ROW3("mad.lo.s16", "16", "16", "16", "16");
  ROW3("mad.lo.s32", "32", "32", "32", "32");
  ROW3("mad.hi.u32", "32", "32", "32", "32");
  ROW3("mad.wide.s32", "64", "32", "32", "64");
  ROW3("mad.wide.u32", "64", "32", "32", "64");
  ROW3("mad.wide.u16", "32", "16", "16", "32");
  ROW3("mad.lo.s64", "64", "64", "64", "64");
  ROW3("prmt.b32", "32", "32", "32", "32");
  ROW3("shf.l.wrap.b32", "32", "32", "32", "32");
  ROW3("shf.r.wrap.b32", "32", "32", "32", "32");
  ROW3("shf.l.clamp.b32", "32", "32", "32", "32");
  ROW3("shf.r.clamp.b32", "32", "32", "32", "32");
  ROW3("bfe.u32", "32", "32", "32", "32");
  ROW3("bfe.s32", "32", "32", "32", "32");
  ROW3("bfe.u64", "64", "64", "32", "32");
  ROW3("dp4a.s32.s32", "32", "32", "32", "32");
  ROW3("dp4a.u32.u32", "32", "32", "32", "32");
  ROW3("sad.u32", "32", "32", "32", "32");
  ROW3("fma.rn.f32", "32", "32", "32", "32");
  ROW3("fma.rz.f32", "32", "32", "32", "32");
  ROW3("fma.rn.ftz.f32", "32", "32", "32", "32");
  ROW3("fma.rm.f32", "32", "32", "32", "32");
  ROW3("fma.rn.f64", "64", "64", "64", "64");
  ROW3("fma.rn.f16", "16", "16", "16", "16");
  ROW3("fma.rn.f16x2", "32", "32", "32", "32");
  ROW3("fma.rn.bf16", "16", "16", "16", "16");
  ROW3("fma.rn.bf16x2", "32", "32", "32", "32");
  ROW3("fma.rn.relu.f16x2", "32", "32", "32", "32");
  COMPARE("setp.eq.s16", "16");
  COMPARE("setp.ne.s16", "16");
  COMPARE("setp.gt.s64", "64");
  COMPARE("setp.eq.s32", "32");
  COMPARE("setp.ne.s32", "32");
  COMPARE("setp.lt.s32", "32");
  COMPARE("setp.le.s32", "32");
  COMPARE("setp.gt.s32", "32");
  COMPARE("setp.ge.s32", "32");
  COMPARE("setp.lt.u32", "32");
  COMPARE("setp.lo.u32", "32");
  COMPARE("setp.ls.u32", "32");
  COMPARE("setp.hi.u32", "32");
  COMPARE("setp.hs.u32", "32");
  COMPARE("setp.ge.u64", "64");
  COMPARE("setp.lt.s64", "64");
  COMPARE("setp.eq.b64", "64");
  COMPARE("setp.gt.s16", "16");
  COMPARE("setp.ne.u16", "16");
  COMPARE("setp.leu.f32", "32");
  COMPARE("setp.eq.f32", "32");
  COMPARE("setp.ne.f32", "32");
  COMPARE("setp.lt.f32", "32");
  COMPARE("setp.le.f32", "32");
  COMPARE("setp.gt.f32", "32");
  COMPARE("setp.ge.f32", "32");
  COMPARE("setp.equ.f32", "32");
  COMPARE("setp.neu.f32", "32");
  COMPARE("setp.ltu.f32", "32");
  COMPARE("setp.gtu.f32", "32");
  COMPARE("setp.geu.f32", "32");
  COMPARE("setp.num.f32", "32");
  COMPARE("setp.nan.f32", "32");
  COMPARE("setp.lt.ftz.f32", "32");
  COMPARE("setp.gt.f64", "64");
  COMPARE("setp.leu.f64", "64");
  COMPARE("setp.lt.f16", "16");
  COMPARE("setp.neu.f16", "16");
  COMPARE("setp.eq.s64", "64");
  COMPARE("setp.ge.s64", "64");
  COMPARE("setp.le.s64", "64");
  COMPARE("setp.ne.s64", "64");
  COMPARE("setp.lt.u64", "64");
  COMPARE("setp.eq.b32", "32");
  COMPARE("setp.ge.u32", "32");
  COMPARE("setp.gt.u32", "32");
  COMPARE("setp.ne.u32", "32");
  COMPARE("setp.eq.f64", "64");
  COMPARE("setp.lt.f64", "64");
  COMPARE("setp.le.f64", "64");
  COMPARE("setp.neu.f64", "64");
  SEVERAL32("lop3.b32", "lop3.b32 d, a, b, c, 0x6a;");
  SEVERAL32("bfi.b32", "bfi.b32 d, a, b, c, 11;");
  SEVERAL32("slct.u32.s32", "slct.u32.s32 d, a, b, c;");
  SEVERAL32("testp.finite.f32", ".reg .pred p; testp.finite.f32 p, a; selp.b32 d, 1, 0, p;");
  SEVERAL32("testp.subnormal.f32", ".reg .pred p; testp.subnormal.f32 p, a; selp.b32 d, 1, 0, p;");
  SEVERAL32("selp.b32", ".reg .pred p; setp.lt.u32 p, a, b; selp.b32 d, b, c, p;");
  SEVERAL32("setp.lt.and.s32",
            ".reg .pred p, q; setp.ge.s32 q, b, c; setp.lt.and.s32 p, a, b, q; selp.b32 d, 1, 0, p;");
  SEVERAL32("setp.lt.or.f32", ".reg .pred p, q; setp.ge.f32 q, b, c; setp.lt.or.f32 p, a, b, !q; selp.b32 d, 1, 0, p;");
  SEVERAL32("setp.gt.u32.both", ".reg .pred p, q; setp.gt.u32 p|q, a, b; selp.b32 d, 1, 0, p; @q add.u32 d, d, 2;");
  SEVERAL32("pred",
            ".reg .pred p, q, r; setp.gt.u32 p, a, b; setp.lt.s32 q, a, c; xor.pred r, p, q; not.pred q, q; and.pred "
            "p, r, q; or.pred p, p, r; selp.b32 d, 1, 0, p; @!p add.u32 d, d, 6;");
  SEVERAL("add.cc",
          ".reg .b32 al, ah, bl, bh; mov.b64 {al, ah}, %1; mov.b64 {bl, bh}, %2; add.cc.u32 al, al, bl; addc.u32 ah, "
          "ah, bh; mov.b64 %0, {al, ah};");
  SEVERAL("sub.cc",
          ".reg .b32 al, ah, bl, bh; mov.b64 {al, ah}, %1; mov.b64 {bl, bh}, %2; sub.cc.u32 al, al, bl; subc.u32 ah, "
          "ah, bh; mov.b64 %0, {al, ah};");
  SEVERAL("mov.b64.halves", ".reg .b32 l, h; mov.b64 {l, h}, %1; mov.b64 %0, {h, l};");
  SEVERAL("mov.b32.halves",
          ".reg .b32 a; .reg .b16 l, h; cvt.u32.u64 a, %1; mov.b32 {l, h}, a; mov.b32 a, {h, l}; cvt.u64.u32 %0, a;");
}

}  // namespace

extern "C" int arithmetic(const uint64_t* xs, const uint64_t* ys, const uint64_t* zs, uint64_t* out, int n) {
  arithmetic_kernel<<<(n + 63) / 64, 64>>>(xs, ys, zs, out, n);
  return cudaGetLastError();
}
