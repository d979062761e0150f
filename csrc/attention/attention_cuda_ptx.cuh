// SPDX-License-Identifier: Apache-2.0
// The machine of attention_cuda_kernel.h on a device of compute capability 9.0, about one PTX
// instruction a function. The instructions are those of sm_90a, which later devices lack.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "attention/attention_cuda_kernel.h"

namespace disca {
namespace attention_hopper {

// Accumulators in an assembly template, and the array elements that they stand for.
#define DISCA_D32                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"            \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
#define DISCA_D64                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"            \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"   \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"   \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
#define DISCA_F4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define DISCA_F16(d, i) \
  DISCA_F4(d, i), DISCA_F4(d, (i) + 4), DISCA_F4(d, (i) + 8), DISCA_F4(d, (i) + 12)
#define DISCA_F32(d, i) DISCA_F16(d, i), DISCA_F16(d, (i) + 16)
#define DISCA_F64(d) DISCA_F32(d, 0), DISCA_F32(d, 32)

// D = A B + (add ? D : 0). The numbers at the end are the signs of A and B and, for operands in
// shared memory, whether their rows lie along K (0) or along M or N (1).
#define DISCA_SS(type, d, a, b, add)                                                           \
  asm volatile(                                                                                \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                         \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " DISCA_D32                \
      "%32, %33, add, 1, 1, 0, 0;\n}\n"                                                        \
      : DISCA_F32(d, 0)                                                                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define DISCA_RS(type, d, a, b)                                                                \
  asm volatile(                                                                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " DISCA_D64               \
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                               \
      : DISCA_F64(d)                                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename Element>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<__nv_bfloat16> = true;

struct Ptx {
  using TensorMap = CUtensorMap;

  DISCA_DEVICE static int thread() { return static_cast<int>(threadIdx.x); }
  DISCA_DEVICE static int block() { return static_cast<int>(blockIdx.x); }
  // Broadcast, so that the compiler knows that a warp agrees on it.
  DISCA_DEVICE static int warp_group() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  }
  DISCA_DEVICE static std::uint32_t shared_base() {
    extern __shared__ char disca_shared[];
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(disca_shared));
  }

  DISCA_DEVICE static float infinity() { return __int_as_float(0x7f800000); }
  DISCA_DEVICE static float max(float a, float b) { return fmaxf(a, b); }
  DISCA_DEVICE static float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  DISCA_DEVICE static float divide(float a, float b) { return __fdividef(a, b); }
  DISCA_DEVICE static float log2(float x) { return __log2f(x); }
  DISCA_DEVICE static float shuffle_xor(float x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }
  // Two elements in one register, the first in its lower half.
  template <typename E>
  DISCA_DEVICE static std::uint32_t pack(float first, float second) {
    std::uint32_t both;
    if constexpr (kIsBfloat16<E>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    }
    return both;
  }

  template <int kRegisters>
  DISCA_DEVICE static void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
  template <int kRegisters>
  DISCA_DEVICE static void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }

  DISCA_DEVICE static void block_sync() { __syncthreads(); }
  DISCA_DEVICE static void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }
  DISCA_DEVICE static void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }

  DISCA_DEVICE static void barrier_init(std::uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
  }
  // Makes the initialised barriers visible to the copy engine.
  DISCA_DEVICE static void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async_proxy();
  }
  DISCA_DEVICE static void arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
  }
  // One arrival of a warp whose lanes have all finished with what the barrier guards.
  DISCA_DEVICE static void release(std::uint32_t barrier, int lane) {
    if (lane == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    }
  }
  // Returns once the phase of this parity is over.
  DISCA_DEVICE static void wait(std::uint32_t barrier, std::uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
  }

  DISCA_DEVICE static void tensor_load(std::uint32_t target, const TensorMap& map,
                                       std::uint32_t barrier, int column, int row, int head,
                                       int i_b) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(i_b)
        : "memory");
  }
  DISCA_DEVICE static void store_zeros(std::uint32_t address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
  }
  // Makes ordinary stores to shared memory visible to the matrix units.
  DISCA_DEVICE static void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  // Keeps the compiler from moving accesses to registers that products in flight own.
  template <int kCount>
  DISCA_DEVICE static void pin(float (&d)[kCount]) {
    DISCA_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }
  template <int kCount>
  DISCA_DEVICE static void pin(std::uint32_t (&d)[kCount]) {
    DISCA_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
  }
  // Orders earlier accesses to these registers before the products that follow.
  template <typename... Arrays>
  DISCA_DEVICE static void fence(Arrays&... d) {
    (pin(d), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  DISCA_DEVICE static void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  // Waits until at most kPending groups of products are in flight.
  template <int kPending, typename... Arrays>
  DISCA_DEVICE static void wait_groups(Arrays&... d) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (pin(d), ...);
  }

  // d = A B + (add ? d : 0) with A [64, 16] and B [16, 64] in shared memory, rows along K.
  template <typename E>
  DISCA_DEVICE static void multiply_ss(float (&d)[32], std::uint64_t a, std::uint64_t b, bool add) {
    if constexpr (kIsBfloat16<E>) {
      DISCA_SS("bf16", d, a, b, add);
    } else {
      DISCA_SS("f16", d, a, b, add);
    }
  }
  // d += A B with A [64, 16] in registers and B [16, 128] in shared memory, rows along N.
  template <typename E>
  DISCA_DEVICE static void multiply_rs(float (&d)[64], const std::uint32_t* a, std::uint64_t b) {
    if constexpr (kIsBfloat16<E>) {
      DISCA_RS("bf16", d, a, b);
    } else {
      DISCA_RS("f16", d, a, b);
    }
  }
};

#undef DISCA_D32
#undef DISCA_D64
#undef DISCA_F4
#undef DISCA_F16
#undef DISCA_F32
#undef DISCA_F64
#undef DISCA_SS
#undef DISCA_RS

}  // namespace attention_hopper
}  // namespace disca
