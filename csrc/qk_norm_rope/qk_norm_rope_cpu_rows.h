// SPDX-License-Identifier: Apache-2.0
// The kernels of qk_norm_rope_cpu.h. A file that includes this defines DISCA_ISA, the name of their
// namespace, and is compiled for that instruction set.
#pragma once

#include "common/simd.h"
#include "qk_norm_rope/qk_norm_rope_cpu.h"

namespace disca {
namespace qk_norm_rope {
namespace DISCA_ISA {
namespace {

using namespace ::disca::DISCA_ISA;

constexpr int kSums = 4;

enum class Turn { kNot, kNeighbours, kHalves };

// (b, a, d, c, ...) of (a, b, c, d, ...).
DISCA_ALWAYS_INLINE Vec swapped(Vec v) {
  typedef std::uint64_t Pairs __attribute__((vector_size(4 * kVec)));
  const Pairs pairs = (Pairs)v;
  return (Vec)((pairs << 32) | (pairs >> 32));
}

template <typename Sums>
DISCA_ALWAYS_INLINE float total(const Sums& sums) {
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// What one token's rows are turned by: of neighbours a cosine and a sine for each channel, those of
// first channels negative; of halves one for each pair.
struct Angles {
  const float* cos;
  const float* sin;
};

// value(i, part) of a row: its channels from i on.
#define DISCA_CHANNELS [&](std::int64_t i, auto part) __attribute__((always_inline))

// Stores a row whose channels value(i, part) returns, turned.
template <Turn kTurn, typename T, typename Value>
DISCA_ALWAYS_INLINE void store_turned(T* y, std::int64_t D, const Angles& angles,
                                      const Value& value) {
  if (kTurn == Turn::kHalves) {
    const std::int64_t half = D / 2;
    sweep<1>(half, DISCA_STEP {
      (void)slot;
      const Vec a = value(i, part), b = value(half + i, part);
      const Vec cos = load(angles.cos + i, part), sin = load(angles.sin + i, part);
      store(y + i, a * cos - b * sin, part);
      store(y + half + i, a * sin + b * cos, part);
    });
    return;
  }
  sweep<1>(D, DISCA_STEP {
    (void)slot;
    Vec v = value(i, part);
    if (kTurn == Turn::kNeighbours) {
      v = v * load(angles.cos + i, part) + swapped(v) * load(angles.sin + i, part);
    }
    store(y + i, v, part);
  });
}

// One row of queries or keys of one head; what is absent is nullptr.
template <typename T>
struct Row {
  const T *x, *x_dot;
  const float *weight, *weight_dot;
  T *y, *y_dot;
};

template <Turn kTurn, typename T>
DISCA_ALWAYS_INLINE void forward_row(const Row<T>& row, std::int64_t D, float eps,
                                     const Angles& angles) {
  const T *x = row.x, *x_dot = row.x_dot;
  const float *weight = row.weight, *weight_dot = row.weight_dot;
  Vec squares[kSums] = {}, products[kSums] = {};
  if (x_dot != nullptr) {
    sweep<kSums>(D, DISCA_STEP {
      const Vec v = load(x + i, part);
      squares[slot] += v * v;
      products[slot] += v * load(x_dot + i, part);
    });
  } else {
    sweep<kSums>(D, DISCA_STEP {
      const Vec v = load(x + i, part);
      squares[slot] += v * v;
    });
  }
  const float width = static_cast<float>(D);
  const float rstd = 1.0f / __builtin_sqrtf(total(squares) / width + eps);
  const Vec factor = broadcast(rstd);
  if (row.y != nullptr) {
    store_turned<kTurn>(row.y, D, angles, DISCA_CHANNELS {
      return load(x + i, part) * factor * load(weight + i, part);
    });
  }
  if (row.y_dot == nullptr) return;
  const Vec along = broadcast(rstd * rstd * (total(products) / width));
  if (x_dot != nullptr && weight_dot != nullptr) {
    store_turned<kTurn>(row.y_dot, D, angles, DISCA_CHANNELS {
      const Vec v = load(x + i, part);
      const Vec v_dot = load(x_dot + i, part) - v * along;
      return (v_dot * load(weight + i, part) + v * load(weight_dot + i, part)) * factor;
    });
  } else if (x_dot != nullptr) {
    store_turned<kTurn>(row.y_dot, D, angles, DISCA_CHANNELS {
      const Vec v_dot = load(x_dot + i, part) - load(x + i, part) * along;
      return v_dot * factor * load(weight + i, part);
    });
  } else {
    store_turned<kTurn>(row.y_dot, D, angles, DISCA_CHANNELS {
      return load(x + i, part) * factor * load(weight_dot + i, part);
    });
  }
}

template <typename T>
DISCA_ALWAYS_INLINE T* row_of(const Packed& rows, std::int64_t b, std::int64_t n,
                              std::int64_t offset) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<T*>(rows.data) + b * rows.stride_b + n * rows.stride_n + offset;
}

template <typename T>
DISCA_ALWAYS_INLINE T* row_of(const Heads& rows, std::int64_t b, std::int64_t h, std::int64_t n) {
  if (rows.data == nullptr) return nullptr;
  return static_cast<T*>(rows.data) + b * rows.stride_b + h * rows.stride_h + n * rows.stride_n;
}

// Zeros where there is nothing to copy.
template <typename T>
DISCA_ALWAYS_INLINE void copy_row(const T* from, T* to, std::int64_t D) {
  const std::size_t bytes = static_cast<std::size_t>(D) * sizeof(T);
  from == nullptr ? __builtin_memset(to, 0, bytes) : __builtin_memcpy(to, from, bytes);
}

// The tokens of one task, and their angles in scratch [2, kTokens, D] where pairs are neighbours.
struct Block {
  const Shape& s;
  const Constants& c;
  std::int64_t b, first, last;
  float* scratch;

  Block(const Shape& shape, const Constants& constants, std::int64_t task, float* scratch)
      : s(shape), c(constants), scratch(scratch) {
    const std::int64_t blocks = ceil_div(s.n_tokens, kTokens);
    b = task / blocks;
    first = task % blocks * kTokens;
    last = least(first + kTokens, s.n_tokens);
    if (!s.interleaved) return;
    const std::int64_t half = s.head_dim / 2;
    for (std::int64_t n = first; n < least(last, s.rope_tokens); ++n) {
      float* cos = scratch + (n - first) * s.head_dim;
      float* sin = cos + kTokens * s.head_dim;
      for (std::int64_t i = 0; i < half; ++i) {
        cos[2 * i] = cos[2 * i + 1] = c.cos[n * half + i];
        sin[2 * i] = -c.sin[n * half + i];
        sin[2 * i + 1] = c.sin[n * half + i];
      }
    }
  }

  DISCA_ALWAYS_INLINE Turn turn(std::int64_t n) const {
    if (n >= s.rope_tokens) return Turn::kNot;
    return s.interleaved ? Turn::kNeighbours : Turn::kHalves;
  }

  DISCA_ALWAYS_INLINE Angles angles(std::int64_t n) const {
    if (n >= s.rope_tokens) return {nullptr, nullptr};
    if (!s.interleaved) return {c.cos + n * (s.head_dim / 2), c.sin + n * (s.head_dim / 2)};
    const float* cos = scratch + (n - first) * s.head_dim;
    return {cos, cos + kTokens * s.head_dim};
  }
};

// body(TurnTag<kTurn>{}) for what is known only as the kernel runs.
template <Turn kTurn>
struct TurnTag {
  static constexpr Turn value = kTurn;
};

template <typename Body>
DISCA_ALWAYS_INLINE void with_turn(Turn turn, const Body& body) {
  switch (turn) {
    case Turn::kNot: return body(TurnTag<Turn::kNot>{});
    case Turn::kNeighbours: return body(TurnTag<Turn::kNeighbours>{});
    case Turn::kHalves: return body(TurnTag<Turn::kHalves>{});
  }
}

template <typename T>
void forward_block(const ForwardParams& p, const Block& block) {
  const std::int64_t H = p.shape.n_heads, D = p.shape.head_dim, b = block.b;
  for (std::int64_t part = 0; part < 2; ++part) {
    const bool moves = p.x_dot.data != nullptr || p.weight_dots[part] != nullptr;
    for (std::int64_t h = 0; h < H; ++h) {
      for (std::int64_t n = block.first; n < block.last; ++n) {
        const std::int64_t offset = (part * H + h) * D;
        T* y_dot = row_of<T>(p.y_dot[part], b, h, n);
        const Row<T> row = {row_of<T>(p.x, b, n, offset),
                            row_of<T>(p.x_dot, b, n, offset),
                            p.constants.weights[part],
                            p.weight_dots[part],
                            row_of<T>(p.y[part], b, h, n),
                            moves ? y_dot : nullptr};
        if (y_dot != nullptr && !moves) copy_row<T>(nullptr, y_dot, D);
        with_turn(block.turn(n), [&](auto tag) __attribute__((always_inline)) {
          forward_row<decltype(tag)::value>(row, D, p.shape.eps, block.angles(n));
        });
      }
    }
  }
  for (std::int64_t h = 0; h < H; ++h) {
    for (std::int64_t n = block.first; n < block.last; ++n) {
      const std::int64_t offset = (2 * H + h) * D;
      if (T* y = row_of<T>(p.y[2], b, h, n)) copy_row<T>(row_of<T>(p.x, b, n, offset), y, D);
      if (T* y_dot = row_of<T>(p.y_dot[2], b, h, n)) {
        copy_row<T>(row_of<T>(p.x_dot, b, n, offset), y_dot, D);
      }
    }
  }
}

void forward(const ForwardParams& p, std::int64_t task, float* scratch) {
  const Block block(p.shape, p.constants, task, scratch);
  with_type(p.shape.dtype, [&](auto tag) { forward_block<decltype(tag)>(p, block); });
}

// With g the cotangent turned back, which goes to scratch, and h = g * weight:
// dx = rstd * (h - x_hat * mean(h * x_hat)); the weight's gradient is g * x_hat.
template <Turn kTurn, typename T>
DISCA_ALWAYS_INLINE void backward_row(const T* dy, const T* x, const float* weight, T* dx,
                                      float* sums, float* g, std::int64_t D, float eps,
                                      const Angles& angles) {
  Vec squares[kSums] = {}, products[kSums] = {};
  sweep<kSums>(D, DISCA_STEP {
    const Vec v = load(x + i, part);
    squares[slot] += v * v;
  });
  const float width = static_cast<float>(D);
  const float rstd = 1.0f / __builtin_sqrtf(total(squares) / width + eps);
  const Vec factor = broadcast(rstd);
  if (kTurn == Turn::kHalves) {
    const std::int64_t half = D / 2;
    sweep<1>(half, DISCA_STEP {
      (void)slot;
      const Vec a = load(dy + i, part), b = load(dy + half + i, part);
      const Vec cos = load(angles.cos + i, part), sin = load(angles.sin + i, part);
      store(g + i, a * cos + b * sin, part);
      store(g + half + i, b * cos - a * sin, part);
    });
  } else {
    sweep<1>(D, DISCA_STEP {
      (void)slot;
      Vec v = load(dy + i, part);
      if (kTurn == Turn::kNeighbours) {
        v = v * load(angles.cos + i, part) - swapped(v) * load(angles.sin + i, part);
      }
      store(g + i, v, part);
    });
  }
  if (sums != nullptr) {
    sweep<1>(D, DISCA_STEP {
      (void)slot;
      const Vec share = load(g + i, part) * (load(x + i, part) * factor);
      store(sums + i, load(sums + i, part) + share, part);
    });
  }
  if (dx == nullptr) return;
  sweep<kSums>(D, DISCA_STEP {
    products[slot] += load(g + i, part) * load(weight + i, part) * load(x + i, part);
  });
  const Vec along = broadcast(rstd * rstd * (total(products) / width));
  sweep<1>(D, DISCA_STEP {
    (void)slot;
    const Vec h = load(g + i, part) * load(weight + i, part);
    store(dx + i, (h - load(x + i, part) * along) * factor, part);
  });
}

DISCA_ALWAYS_INLINE void add_row(const float* share, float* sums, std::int64_t D) {
  sweep<1>(D, DISCA_STEP {
    (void)slot;
    store(sums + i, load(sums + i, part) + load(share + i, part), part);
  });
}

// The gradients of the weights are added up over the tokens of a head first, in own, and then over
// the heads: short chains of additions lose less to rounding.
template <typename T>
void backward_block(const BackwardParams& p, const Block& block, float* sums, float* g,
                    float* own) {
  const std::int64_t H = p.shape.n_heads, D = p.shape.head_dim, b = block.b;
  for (std::int64_t part = 0; part < 3; ++part) {
    const bool summed = sums != nullptr && part < 2 && p.dy[part].data != nullptr;
    for (std::int64_t h = 0; h < H; ++h) {
      if (summed) __builtin_memset(own, 0, static_cast<std::size_t>(D) * sizeof(float));
      for (std::int64_t n = block.first; n < block.last; ++n) {
        const std::int64_t offset = (part * H + h) * D;
        const T* dy = row_of<T>(p.dy[part], b, h, n);
        T* dx = row_of<T>(p.dx, b, n, offset);
        if (part == 2 || dy == nullptr) {
          if (dx != nullptr) copy_row<T>(dy, dx, D);
          continue;
        }
        with_turn(block.turn(n), [&](auto tag) __attribute__((always_inline)) {
          backward_row<decltype(tag)::value>(
              dy, row_of<T>(p.x, b, n, offset), p.constants.weights[part], dx,
              summed ? own : nullptr, g, D, p.shape.eps, block.angles(n));
        });
      }
      if (!summed) continue;
      add_row(own, sums + part * D, D);
    }
  }
}

void backward(const BackwardParams& p, std::int64_t task, float* scratch) {
  const std::int64_t D = p.shape.head_dim;
  const Block block(p.shape, p.constants, task, scratch);
  float* sums = p.sums == nullptr ? nullptr : p.sums + task * 2 * D;
  float* g = scratch + 2 * kTokens * D;
  with_type(p.shape.dtype,
            [&](auto tag) { backward_block<decltype(tag)>(p, block, sums, g, g + D); });
}

}  // namespace

extern const Kernels kernels = {forward, backward};

}  // namespace DISCA_ISA
}  // namespace qk_norm_rope
}  // namespace disca
