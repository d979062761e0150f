// SPDX-License-Identifier: Apache-2.0
// Value and tangent of attention for compute capability 9.0, head dimension 128, 2-byte elements.
//
// A block of 384 threads owns 128 queries of one head. Its first warpgroup copies tiles of 64 keys
// into a ring of two stages; the other two own 64 queries each and compute
//   S = q k^T,  S_dot = q_dot k^T + q k_dot^T,  P = exp(scale S - m),  H = P (scale S_dot - c),
//   O = P v,  T = H v + P v_dot,
// where m is the running maximum and c the running mean of scale * S_dot, weighted by P. A tile
// moves c first; T is corrected by (c_old - c_new) O and only then are the tile's terms added, so
// that nothing is left to subtract at the end (docs/ops/attention.md).
//
// The code is written against a machine M: attention_cuda_ptx.cuh is the device, tests/emulation
// has one that runs on the host and checks what the device leaves undefined.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DISCA_DEVICE __device__ __forceinline__
#define DISCA_UNROLL _Pragma("unroll")
#define DISCA_NO_UNROLL _Pragma("unroll 1")
#else
#define DISCA_DEVICE inline
#define DISCA_UNROLL
#define DISCA_NO_UNROLL
#endif

namespace disca {
namespace attention_hopper {

constexpr int kHeadDim = 128;
constexpr int kBlockM = 128;  // queries of a block, 64 for each of two warpgroups
constexpr int kBlockN = 64;   // keys of a tile
constexpr int kStages = 2;
constexpr int kThreads = 384;
constexpr int kConsumers = 256;
// 24 * 128 + 240 * 256 registers are those of 384 threads that start with 168.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

// A panel is 64 rows of 64 elements: what one copy brings, 128 bytes a row, the 16-byte chunks of
// row r permuted by r % 8 as the 128-byte swizzle mode does.
constexpr int kPanelRows = 64, kPanelColumns = 64;
constexpr std::uint32_t kPanel = kPanelRows * kPanelColumns * 2;
constexpr int kChunks = kHeadDim / kPanelColumns;
constexpr std::uint32_t kSwizzleAtom = 1024;  // 8 rows

// Which tangents are there; the others are zero, and neither loaded nor multiplied.
template <typename Element_, bool kQDot_, bool kKDot_, bool kVDot_>
struct Variant {
  using Element = Element_;
  static constexpr bool kQDot = kQDot_, kKDot = kKDot_, kVDot = kVDot_, kSDot = kQDot || kKDot;
};

// Offsets in shared memory from a base that is a multiple of kSwizzleAtom.
template <typename V>
struct Layout {
  // [warpgroup][chunk] panels
  static constexpr std::uint32_t kQ = 0;
  static constexpr std::uint32_t kQBytes = 2 * kChunks * kPanel;
  static constexpr std::uint32_t kQDot = kQ + kQBytes;
  // A stage: [chunk] panels of k, of k_dot, of v and of v_dot.
  static constexpr std::uint32_t kStage = kQDot + (V::kQDot ? kQBytes : 0);
  static constexpr std::uint32_t kKDot = kChunks * kPanel;
  static constexpr std::uint32_t kKBytes = (V::kKDot ? 2 : 1) * kChunks * kPanel;
  static constexpr std::uint32_t kV = kKBytes;
  static constexpr std::uint32_t kVDot = kV + kChunks * kPanel;
  static constexpr std::uint32_t kVBytes = (V::kVDot ? 2 : 1) * kChunks * kPanel;
  static constexpr std::uint32_t kStageBytes = kKBytes + kVBytes;
  static constexpr std::uint32_t kBarriers = kStage + kStages * kStageBytes;
  // One barrier for q and, for each stage, full and empty of its k and v parts.
  static constexpr std::uint32_t kQFull = kBarriers;
  static constexpr std::uint32_t kKFull = kBarriers + 8;
  static constexpr std::uint32_t kVFull = kKFull + 8 * kStages;
  static constexpr std::uint32_t kKEmpty = kVFull + 8 * kStages;
  static constexpr std::uint32_t kVEmpty = kKEmpty + 8 * kStages;
  static constexpr std::uint32_t kEnd = kVEmpty + 8 * kStages;
  // What a launch asks for: the base is rounded up to a multiple of kSwizzleAtom.
  static constexpr std::uint32_t kBytes = kEnd + kSwizzleAtom;
};

// Tensors of [B, heads, N, 128] as the copy engine sees them; absent tangents are not touched.
template <typename M>
struct Operands {
  typename M::TensorMap q, k, v, q_dot, k_dot, v_dot;
};

// Outputs are contiguous: o and o_dot [B, H, Nq, 128], lse and lse_dot [B, H, Nq].
struct Problem {
  void *o, *o_dot;
  float *lse, *lse_dot;
  const std::int64_t* lengths;  // [B] or nullptr
  int n_heads, group;           // query heads, query heads that share a key head
  int n_q, n_k;
  float scale;
};

// Named barriers; 0 is that of the whole block.
enum NamedBarrier : int { kTurn = 1, kPadding = 3 };  // kTurn + warpgroup

// A matrix of 64-element rows in shared memory with 128-byte swizzling (mode 1 in bits 62 and 63).
// Offsets are encoded in units of 16 bytes.
DISCA_DEVICE std::uint64_t descriptor(std::uint32_t address, std::uint32_t leading,
                                      std::uint32_t stride) {
  return std::uint64_t{1} << 62 | static_cast<std::uint64_t>(stride >> 4) << 32 |
         static_cast<std::uint64_t>(leading >> 4) << 16 | (address >> 4);
}

// Rows are M or N and hold contiguous elements of K: the leading offset is unused.
DISCA_DEVICE std::uint64_t k_major(std::uint32_t address) {
  return descriptor(address, 16, kSwizzleAtom);
}

// Rows are K and hold contiguous elements of N: the leading offset leads to the next 64 columns.
DISCA_DEVICE std::uint64_t n_major(std::uint32_t address) {
  return descriptor(address, kPanel, kSwizzleAtom);
}

constexpr std::uint64_t kStepKMajor = (16 * 2) >> 4;    // 16 elements along a row
constexpr std::uint64_t kStepNMajor = (16 * 128) >> 4;  // 16 rows

DISCA_DEVICE int valid_keys(const Problem& p, int i_b) {
  if (p.lengths == nullptr) return p.n_k;
  const std::int64_t length = p.lengths[i_b];
  return static_cast<int>(length < 0 ? 0 : length > p.n_k ? p.n_k : length);
}

// Copies 64 rows from `row` on; rows beyond the tensor arrive as 0.
template <typename M>
DISCA_DEVICE void load_rows(const typename M::TensorMap& map, std::uint32_t target,
                            std::uint32_t barrier, int row, int head, int i_b) {
  DISCA_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    M::tensor_load(target + chunk * kPanel, map, barrier, chunk * kPanelColumns, row, head, i_b);
  }
}

template <typename M, typename V>
DISCA_DEVICE void produce(const Operands<M>& x, std::uint32_t base, int first_query, int head,
                          int key_head, int i_b, int n_tiles) {
  using L = Layout<V>;
  M::arrive_expect(base + L::kQFull, (V::kQDot ? 2 : 1) * L::kQBytes);
  DISCA_UNROLL
  for (int group = 0; group < 2; ++group) {
    const std::uint32_t panels = group * kChunks * kPanel;
    const int row = first_query + group * kPanelRows;
    load_rows<M>(x.q, base + L::kQ + panels, base + L::kQFull, row, head, i_b);
    if constexpr (V::kQDot) {
      load_rows<M>(x.q_dot, base + L::kQDot + panels, base + L::kQFull, row, head, i_b);
    }
  }
  DISCA_NO_UNROLL
  for (int tile = 0; tile < n_tiles; ++tile) {
    const int slot = tile % kStages, row = tile * kBlockN;
    // A barrier that was never used answers for the phase before its first, whose parity is 1.
    const std::uint32_t free = (tile / kStages + 1) & 1;
    const std::uint32_t stage = base + L::kStage + slot * L::kStageBytes;
    const std::uint32_t k_full = base + L::kKFull + 8 * slot;
    M::wait(base + L::kKEmpty + 8 * slot, free);
    M::arrive_expect(k_full, L::kKBytes);
    load_rows<M>(x.k, stage, k_full, row, key_head, i_b);
    if constexpr (V::kKDot) {
      load_rows<M>(x.k_dot, stage + L::kKDot, k_full, row, key_head, i_b);
    }
    const std::uint32_t v_full = base + L::kVFull + 8 * slot;
    M::wait(base + L::kVEmpty + 8 * slot, free);
    M::arrive_expect(v_full, L::kVBytes);
    load_rows<M>(x.v, stage + L::kV, v_full, row, key_head, i_b);
    if constexpr (V::kVDot) {
      load_rows<M>(x.v_dot, stage + L::kVDot, v_full, row, key_head, i_b);
    }
  }
}

// A row of a 64-row accumulator lies in the four lanes of a quad.
template <typename M>
DISCA_DEVICE float quad_sum(float x) {
  x += M::shuffle_xor(x, 1);
  return x + M::shuffle_xor(x, 2);
}

template <typename M>
DISCA_DEVICE float quad_max(float x) {
  x = M::max(x, M::shuffle_xor(x, 1));
  return M::max(x, M::shuffle_xor(x, 2));
}

// Element i of a thread's accumulator: column 8 * (i / 4) + 2 * (lane % 4) + i % 2, and row
// lane / 4 + 8 * row_of(i) of the 16 rows of its warp.
DISCA_DEVICE constexpr int row_of(int i) { return i / 2 % 2; }
DISCA_DEVICE int column_of(int i, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// Adds q k^T of 64 queries and 64 keys to the scores, or sets them.
template <typename M, typename V, bool kAdd>
DISCA_DEVICE void start_scores(float (&scores)[32], std::uint32_t q, std::uint32_t k) {
  DISCA_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const std::uint64_t a = k_major(q + chunk * kPanel), b = k_major(k + chunk * kPanel);
    DISCA_UNROLL
    for (int step = 0; step < 4; ++step) {
      M::template multiply_ss<typename V::Element>(scores, a + step * kStepKMajor,
                                                   b + step * kStepKMajor,
                                                   kAdd || chunk + step > 0);
    }
  }
}

// Rows of v and v_dot beyond the valid keys may hold anything, and 0 * NaN is NaN.
template <typename M, typename V>
DISCA_DEVICE void clear_padding(std::uint32_t v, int n_valid, int consumer) {
  constexpr int kPanels = (V::kVDot ? 2 : 1) * kChunks;
  for (int i = consumer; i < (kPanelRows - n_valid) * 8; i += kConsumers) {
    DISCA_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
      M::store_zeros(v + panel * kPanel + (n_valid + i / 8) * 128 + i % 8 * 16);
    }
  }
  M::fence_async_proxy();
  M::named_sync(kPadding, kConsumers);
}

// What a thread carries from tile to tile: its parts of O and T, and for its two rows the maximum
// (in units of log2), the sum of P and the centre.
struct State {
  float o[64] = {}, t[64] = {};
  float m[2], l[2] = {0.0f, 0.0f}, c[2] = {0.0f, 0.0f};
};

// Overwrites the columns beyond the valid keys, which may hold anything.
DISCA_DEVICE void mask(float (&d)[32], float value, int n_valid, int lane) {
  DISCA_UNROLL
  for (int i = 0; i < 32; ++i) {
    if (column_of(i, lane) >= n_valid) d[i] = value;
  }
}

// P of a tile from S, in place; returns in alpha the factor of everything accumulated before.
template <typename M>
DISCA_DEVICE void exponentiate(State& x, float (&s)[32], float (&alpha)[2]) {
  float top[2] = {x.m[0], x.m[1]};
  DISCA_UNROLL
  for (int i = 0; i < 32; ++i) top[row_of(i)] = M::max(top[row_of(i)], s[i]);
  DISCA_UNROLL
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max<M>(top[r]);
    alpha[r] = M::exp2(x.m[r] - top[r]);
    x.m[r] = top[r];
  }
  float sum[2] = {0.0f, 0.0f};
  DISCA_UNROLL
  for (int i = 0; i < 32; ++i) {
    s[i] = M::exp2(s[i] - top[row_of(i)]);
    sum[row_of(i)] += s[i];
  }
  DISCA_UNROLL
  for (int r = 0; r < 2; ++r) x.l[r] = x.l[r] * alpha[r] + quad_sum<M>(sum[r]);
}

// H of a tile from P and S_dot, in place; moves c and corrects T, which alpha has scaled as O.
template <typename M>
DISCA_DEVICE void centre(State& x, const float (&p)[32], float (&s_dot)[32], float scale) {
  float moved[2] = {0.0f, 0.0f};
  DISCA_UNROLL
  for (int i = 0; i < 32; ++i) {
    s_dot[i] = s_dot[i] * scale - x.c[row_of(i)];
    moved[row_of(i)] += p[i] * s_dot[i];
  }
  DISCA_UNROLL
  for (int r = 0; r < 2; ++r) {
    moved[r] = M::divide(quad_sum<M>(moved[r]), x.l[r]);
    x.c[r] += moved[r];
  }
  DISCA_UNROLL
  for (int i = 0; i < 32; ++i) s_dot[i] = p[i] * (s_dot[i] - moved[row_of(i)]);
  DISCA_UNROLL
  for (int i = 0; i < 64; ++i) x.t[i] -= moved[row_of(i)] * x.o[i];
}

// Columns 16 * step .. + 15 of an accumulator as a left operand, whose layout is the same.
template <typename M, typename V>
DISCA_DEVICE void round_columns(std::uint32_t (&a)[4], const float (&d)[32], int step) {
  DISCA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int j = 8 * step + 2 * i;
    a[i] = M::template pack<typename V::Element>(d[j], d[j + 1]);
  }
}

// Starts O += P v and T += H v + P v_dot. The accumulator layout of 16 columns of P is that of a
// left operand in registers. Rounding 16 columns at a time lets the rounded ones take the registers
// of those before; all 64 at once would need more than there are.
template <typename M, typename V>
DISCA_DEVICE void start_values(State& x, const float (&p)[32], const float (&h)[32],
                               std::uint32_t v) {
  using E = typename V::Element;
  const std::uint64_t b = n_major(v), b_dot = n_major(v + kChunks * kPanel);
  DISCA_UNROLL
  for (int step = 0; step < 4; ++step) {
    const std::uint64_t o_n = step * kStepNMajor;
    std::uint32_t a[4], a_dot[4];
    round_columns<M, V>(a, p, step);
    M::fence(a);
    M::template multiply_rs<E>(x.o, a, b + o_n);
    if constexpr (V::kVDot) M::template multiply_rs<E>(x.t, a, b_dot + o_n);
    if constexpr (V::kSDot) {
      round_columns<M, V>(a_dot, h, step);
      M::fence(a_dot);
      M::template multiply_rs<E>(x.t, a_dot, b + o_n);
    }
  }
  M::commit();
}

template <typename M, typename V>
DISCA_DEVICE void store(const State& x, const Problem& p, std::int64_t row, bool inside, int lane,
                        int r) {
  if (!inside) return;
  // A row that sees no key; a NaN goes through.
  const bool empty = x.l[r] == 0.0f;
  const float norm = empty ? 0.0f : 1.0f / x.l[r];
  auto* o = static_cast<std::uint32_t*>(p.o) + row * (kHeadDim / 2) + lane % 4;
  auto* o_dot = static_cast<std::uint32_t*>(p.o_dot) + row * (kHeadDim / 2) + lane % 4;
  DISCA_UNROLL
  for (int i = 0; i < 64; i += 4) {
    const int a = i + 2 * r;
    using E = typename V::Element;
    o[i] = M::template pack<E>(x.o[a] * norm, x.o[a + 1] * norm);
    o_dot[i] = M::template pack<E>(x.t[a] * norm, x.t[a + 1] * norm);
  }
  if (lane % 4 == 0) {
    constexpr float kLn2 = 0.69314718055994531f;
    p.lse[row] = empty ? -M::infinity() : (x.m[r] + M::log2(x.l[r])) * kLn2;
    p.lse_dot[row] = x.c[r];
  }
}

template <typename M, typename V>
DISCA_DEVICE void consume(const Problem& p, std::uint32_t base, int group, int first_query,
                          std::int64_t i_bh, int n_keys, int n_tiles) {
  using L = Layout<V>;
  const float scale_log2 = p.scale * 1.4426950408889634f;
  const int consumer = M::thread() - (kThreads - kConsumers), lane = consumer % 32;
  const std::uint32_t q = base + L::kQ + group * kChunks * kPanel;
  const std::uint32_t q_dot = base + L::kQDot + group * kChunks * kPanel;
  State x;
  x.m[0] = x.m[1] = -M::infinity();
  // The warpgroups start their scores in turn, so that one multiplies while the other works on P.
  if (n_tiles > 0) {
    M::wait(base + L::kQFull, 0);
    if (group == 1) M::named_arrive(kTurn, kConsumers);
  }
  for (int tile = 0; tile < n_tiles; ++tile) {
    const int slot = tile % kStages, n_valid = n_keys - tile * kBlockN;
    const std::uint32_t parity = tile / kStages & 1;
    const std::uint32_t stage = base + L::kStage + slot * L::kStageBytes;
    float s[32], s_dot[32], alpha[2];
    M::wait(base + L::kKFull + 8 * slot, parity);
    M::named_sync(kTurn + group, kConsumers);
    M::fence(s, s_dot);
    start_scores<M, V, false>(s, q, stage);
    M::commit();
    if constexpr (V::kQDot) start_scores<M, V, false>(s_dot, q_dot, stage);
    if constexpr (V::kKDot) start_scores<M, V, V::kQDot>(s_dot, q, stage + L::kKDot);
    if constexpr (V::kSDot) M::commit();
    if (group == 0 || tile + 1 < n_tiles) M::named_arrive(kTurn + 1 - group, kConsumers);
    M::template wait_groups<V::kSDot ? 1 : 0>(s);
    // Before the mask: the scale may be negative or 0.
    DISCA_UNROLL
    for (int i = 0; i < 32; ++i) s[i] *= scale_log2;
    if (n_valid < kBlockN) mask(s, -M::infinity(), n_valid, lane);
    exponentiate<M>(x, s, alpha);
    DISCA_UNROLL
    for (int i = 0; i < 64; ++i) {
      x.o[i] *= alpha[row_of(i)];
      x.t[i] *= alpha[row_of(i)];
    }
    if constexpr (V::kSDot) M::template wait_groups<0>(s_dot);
    M::release(base + L::kKEmpty + 8 * slot, lane);
    if constexpr (V::kSDot) {
      if (n_valid < kBlockN) mask(s_dot, 0.0f, n_valid, lane);
      centre<M>(x, s, s_dot, p.scale);
    }
    M::wait(base + L::kVFull + 8 * slot, parity);
    if (n_valid < kBlockN && n_keys < p.n_k) clear_padding<M, V>(stage + L::kV, n_valid, consumer);
    M::fence(x.o, x.t);
    start_values<M, V>(x, s, s_dot, stage + L::kV);
    M::template wait_groups<0>(x.o, x.t);
    M::release(base + L::kVEmpty + 8 * slot, lane);
  }
  DISCA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + group * kPanelRows + consumer / 32 % 4 * 16 + lane / 4 + 8 * r;
    store<M, V>(x, p, i_bh * p.n_q + query, query < p.n_q, lane, r);
  }
}

// The whole kernel. One block for each 128 queries of a head; those of one head follow each other,
// so that blocks that run together read the same keys.
template <typename M, typename V>
DISCA_DEVICE void value_and_tangent(const Operands<M>& x, const Problem& p) {
  using L = Layout<V>;
  const std::uint32_t base = (M::shared_base() + kSwizzleAtom - 1) / kSwizzleAtom * kSwizzleAtom;
  const int blocks = (p.n_q + kBlockM - 1) / kBlockM;
  const int first_query = M::block() % blocks * kBlockM, i_bh = M::block() / blocks;
  const int head = i_bh % p.n_heads, i_b = i_bh / p.n_heads;
  const int n_keys = valid_keys(p, i_b), n_tiles = (n_keys + kBlockN - 1) / kBlockN;
  if (M::thread() == 0) {
    M::barrier_init(base + L::kQFull, 1);
    for (int slot = 0; slot < kStages; ++slot) {
      M::barrier_init(base + L::kKFull + 8 * slot, 1);
      M::barrier_init(base + L::kVFull + 8 * slot, 1);
      // One arrival of each consuming warp.
      M::barrier_init(base + L::kKEmpty + 8 * slot, kConsumers / 32);
      M::barrier_init(base + L::kVEmpty + 8 * slot, kConsumers / 32);
    }
    M::fence_barrier_init();
  }
  M::block_sync();
  const int group = M::warp_group();
  if (group == 0) {
    M::template give_registers<kProducerRegisters>();
    if (M::thread() == 0 && n_tiles > 0) {
      produce<M, V>(x, base, first_query, head, head / p.group, i_b, n_tiles);
    }
  } else {
    M::template take_registers<kConsumerRegisters>();
    consume<M, V>(p, base, group - 1, first_query, i_bh, n_keys, n_tiles);
  }
}

}  // namespace attention_hopper
}  // namespace disca
