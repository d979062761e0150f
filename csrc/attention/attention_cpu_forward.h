// SPDX-License-Identifier: Apache-2.0
// Value, value and tangent, and tangent alone: one task is one tile of queries of one head.
#pragma once

#include "attention/attention_cpu_tile.h"

namespace disca {
namespace attention {
namespace DISCA_ISA {
namespace {

// What the tangent-only pass tolerates of its centre, see Tile::tangent_alone.
constexpr float kTau = 1.0f;
constexpr float kKappa = 1.0f;

// The running state of one row of queries.
struct Row {
  float base = -kInfinity;  // see Base; scores are in base 2
  float l = 0;              // sum of the weights 2^(s - base)
  float c = 0;              // weighted mean of the scores' tangents
  float alpha = 1;          // by which the last block scaled the sums
  float moved = 0;          // by which the last block moved c
  float m1 = 0, m2 = 0;     // tangent alone: weighted sums of s_dot - c and its square
  std::int32_t has_centre = 0;
};

template <class E>
struct ForwardLayout : Layout<E> {
  explicit ForwardLayout(const ForwardParams& p) : Layout<E>(p.problem) {
    const std::int64_t keys = this->n_blocks * this->transposed_block;
    const std::int64_t values = this->n_blocks * this->natural_block;
    v = keys;
    k_dot = v + values;
    v_dot = k_dot + (p.k_dot.data != nullptr ? keys : 0);
    head_elements = v_dot + (p.v_dot.data != nullptr ? values : 0);
  }
  // Offsets into the scratch of a head; the keys are at 0.
  std::int64_t v, k_dot, v_dot, head_elements;
};

// The scratch of a thread, cut up.
template <class E>
struct Buffers {
  Buffers(const Layout<E>& layout, float* scratch) : next(scratch) {
    q = reinterpret_cast<E*>(take(layout.tile_rows * layout.depth));
    q_dot = reinterpret_cast<E*>(take(layout.tile_rows * layout.depth));
    s = take(kRows * kTileKeys);
    s_dot = take(kRows * kTileKeys);
    p = reinterpret_cast<E*>(s);
    h = reinterpret_cast<E*>(s_dot);
    if (Element<E>::kPerStep > 1) {
      p = reinterpret_cast<E*>(take(kRows * kTileKeys / Element<E>::kPerStep));
      h = reinterpret_cast<E*>(take(kRows * kTileKeys / Element<E>::kPerStep));
    }
    o = take(layout.tile_rows * layout.width);
    t = take(layout.tile_rows * layout.width);
  }

  float* take(std::int64_t floats) {
    float* start = next;
    next += round_up(floats, kTileKeys);
    return start;
  }

  // Enough for all of them, each rounded up.
  static std::int64_t floats(const Layout<E>& layout) {
    return 2 * layout.tile_rows * (layout.depth + layout.width) + (4 * kRows + 8) * kTileKeys;
  }

  float* next;
  E *q, *q_dot, *p, *h;  // packed queries; weights, and weights times tangents, as operands
  float *s, *s_dot;      // [kRows, kTileKeys]
  float *o, *t;          // [tile_rows, width]
};

// Replaces the scores of a row by weights, s_dot by weights * (s_dot - c), and updates the state.
// Columns from n on count as not there; weights are cleared up to n_padded.
template <class E, bool kTangent>
inline void online_row(Row& row, float* s, float* s_dot, E* p, E* h, std::int64_t n,
                       std::int64_t n_padded, const Factors<E>& factors) {
  row.alpha = 1;
  row.moved = 0;
  clear_operand(p, round_up(n, kVec), n_padded);
  if (kTangent) clear_operand(h, round_up(n, kVec), n_padded);
  if (n == 0) return;
  Vec top = broadcast(-kInfinity);
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec x = load(s + i);
    if (i + kVec > n) x = first_lanes(x, n - i, -kInfinity);
    top = maximum(top, x);
  }
  const float largest = horizontal_max(top) * factors.score;
  if (largest > row.base) {
    const float above = Base::above(largest);
    row.alpha = exp2(broadcast(row.base - above), 0)[0];
    row.base = above;
  }
  const Base base(row.base);
  Vec sum = {}, weighted = {};
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec weight = base.weight(load(s + i), factors.score);
    if (i + kVec > n) weight = first_lanes(weight, n - i, 0.0f);
    sum += weight;
    store_operand(p, i, weight);
    if (kTangent) {
      Vec d = load(s_dot + i) * factors.tangent - row.c;
      if (i + kVec > n) d = first_lanes(d, n - i, 0.0f);
      weighted += weight * d;
      store(s_dot + i, d);
      if (Element<E>::kPerStep > 1) store(s + i, weight);
    }
  }
  row.l = row.l * row.alpha + horizontal_sum(sum);
  if (!kTangent) return;
  row.moved = row.l == 0 ? 0.0f : horizontal_sum(weighted) / row.l;
  row.c += row.moved;
  for (std::int64_t i = 0; i < n; i += kVec) {
    store_operand(h, i, load(s + i) * (load(s_dot + i) - row.moved));
  }
}

// The weights of a row from its known log-sum-exp, up to a factor that their sum undoes; centred by
// row.c, which the first block sets.
template <class E, bool kTangent>
inline void known_row(Row& row, float* s, float* s_dot, E* p, E* h, std::int64_t n,
                      std::int64_t n_padded, const Factors<E>& factors) {
  clear_operand(p, round_up(n, kVec), n_padded);
  if (kTangent) clear_operand(h, round_up(n, kVec), n_padded);
  const Base base(row.base);
  Vec sum = {}, weighted = {};
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec weight = base.weight(load(s + i), factors.score);
    if (i + kVec > n) weight = first_lanes(weight, n - i, 0.0f);
    sum += weight;
    store_operand(p, i, weight);
    if (kTangent) {
      Vec s_dot_i = load(s_dot + i) * factors.tangent;
      if (i + kVec > n) s_dot_i = first_lanes(s_dot_i, n - i, 0.0f);
      weighted += weight * s_dot_i;
      store(s_dot + i, s_dot_i);
      if (Element<E>::kPerStep > 1) store(s + i, weight);
    }
  }
  const float weights = horizontal_sum(sum);
  row.l += weights;
  if (!kTangent) return;
  if (!row.has_centre && n > 0) {
    row.c = weights > 0 ? horizontal_sum(weighted) / weights : 0.0f;
    row.has_centre = 1;
  }
  Vec m1 = {}, m2 = {};
  for (std::int64_t i = 0; i < n; i += kVec) {
    const Vec d = load(s_dot + i) - row.c;
    const Vec product = load(s + i) * d;
    m1 += product;
    m2 += product * d;
    store_operand(h, i, product);
  }
  row.m1 += horizontal_sum(m1);
  row.m2 += horizontal_sum(m2);
}

// Rows `row` to `row` + kRows of a tile against the first n keys of a block.
struct Part {
  std::int64_t block, row, n;
};

template <class E>
struct Tile {
  const ForwardParams& params;
  const Problem& problem;
  const ForwardLayout<E> layout;
  const E* packed;
  Buffers<E> buffers;
  Factors<E> factors;
  std::int64_t b, h, first, rows, n_valid;
  Row state[kTileQueries];

  Tile(const ForwardParams& p, std::int64_t head, std::int64_t task, const float* head_scratch,
       float* thread_scratch)
      : params(p),
        problem(p.problem),
        layout(p),
        packed(reinterpret_cast<const E*>(head_scratch)),
        buffers(layout, thread_scratch),
        factors(p.problem.scale) {
    const std::int64_t h_kv = head % problem.n_kv_heads;
    b = head / problem.n_kv_heads;
    h = h_kv * layout.group + task / layout.n_tiles;
    // The last tiles see the most keys, so they go first.
    first = (layout.n_tiles - 1 - task % layout.n_tiles) * kTileQueries;
    rows = least(problem.n_queries - first, kTileQueries);
    n_valid = valid_keys(problem, b);
    pack(p.q, buffers.q);
    if (p.q_dot.data != nullptr) pack(p.q_dot, buffers.q_dot);
  }

  bool has_s_dot() const { return params.q_dot.data != nullptr || params.k_dot.data != nullptr; }

  std::int64_t limit(std::int64_t row) const {
    return row < rows ? key_limit(problem, first + row, n_valid) : 0;
  }

  void pack(const Operand& x, E* out) {
    const Source source = block_of(x, problem.dtype, b, h, first, rows);
    pack_rows<E>(problem.dtype, source, round_up(rows, kRows), layout.dim, factors.query, out);
  }

  void score(const E* q, const Part& part, std::int64_t keys, float* s, bool accumulate) {
    multiply<E, 1, kRows>(q + part.row * layout.depth, 0, 1,
                          packed + keys + part.block * layout.transposed_block,
                          layout.depth * kPanel, ceil_div(part.n, kPanel) * 2, layout.depth, s,
                          kTileKeys, accumulate);
  }

  // s, and s_dot where it is not zero.
  void scores(const Part& part) {
    score(buffers.q, part, 0, buffers.s, false);
    const bool has_q_dot = params.q_dot.data != nullptr;
    if (has_q_dot) score(buffers.q_dot, part, 0, buffers.s_dot, false);
    if (params.k_dot.data != nullptr) {
      score(buffers.q, part, layout.k_dot, buffers.s_dot, has_q_dot);
    }
  }

  // sum (+)= weights * values; `values` is V's offset or V_dot's.
  void weigh(const E* weights, const Part& part, std::int64_t values, float* sum, bool accumulate) {
    constexpr int kStride = Layout<E>::kKeySteps;
    multiply<E, kStride, 1>(weights, 0, 1, packed + values + part.block * layout.natural_block,
                            kStride * kPanel, layout.width / kVec,
                            ceil_div(part.n, Element<E>::kPerStep), sum + part.row * layout.width,
                            layout.width, accumulate);
  }

  // t (+)= h V + p V_dot
  void weigh_tangents(const Part& part) {
    const bool accumulate = part.block > 0;
    if (has_s_dot()) weigh(buffers.h, part, layout.v, buffers.t, accumulate);
    if (params.v_dot.data != nullptr) {
      weigh(buffers.p, part, layout.v_dot, buffers.t, accumulate || has_s_dot());
    }
  }

  // Calls body(part) for every part of the tile, a group's rows against a block's keys, so that the
  // scores between two products stay in the first-level cache.
  template <class Body>
  void each_part(const Body& body) {
    const std::int64_t stop = limit(rows - 1);
    for (std::int64_t start = 0; start < stop; start += kTileKeys) {
      for (std::int64_t row = 0; row < rows; row += kRows) {
        body(Part{start / kTileKeys, row, least(stop - start, kTileKeys)});
      }
    }
  }

  template <class Function>
  void each_row(const Part& part, const Function& function) {
    constexpr std::int64_t kStride = Layout<E>::kKeySteps;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t seen = limit(part.row + r) - part.block * kTileKeys;
      function(state[part.row + r], buffers.s + r * kTileKeys, buffers.s_dot + r * kTileKeys,
               buffers.p + r * kStride, buffers.h + r * kStride, most(least(seen, part.n), 0),
               round_up(part.n, kPanel), factors);
    }
  }

  // Brings the sums of a row into the units that its weights have now, and T to the new centre.
  void rescale(std::int64_t r, bool with_t) {
    const float alpha = state[r].alpha, moved = state[r].moved;
    if (alpha == 1.0f && moved == 0.0f) return;
    float *o = buffers.o + r * layout.width, *t = buffers.t + r * layout.width;
    for (std::int64_t i = 0; i < layout.width; i += kVec) {
      const Vec scaled = load(o + i) * alpha;
      store(o + i, scaled);
      if (with_t) store(t + i, load(t + i) * alpha - scaled * moved);
    }
  }

  // One pass over the keys: O, and T = P V_dot + (P * (S_dot - c)) V with the centre c that moves.
  template <bool kTangent>
  void online() {
    const bool with_t = has_s_dot() || params.v_dot.data != nullptr;
    each_part([&](const Part& part) {
      scores(part);
      each_row(part, online_row<E, kTangent>);
      for (std::int64_t r = 0; part.block > 0 && r < kRows; ++r) rescale(part.row + r, with_t);
      weigh(buffers.p, part, layout.v, buffers.o, part.block > 0);
      weigh_tangents(part);
    });
    for (std::int64_t r = 0; r < rows; ++r) {
      const Row& row = state[r];
      const std::int64_t index = row_index(problem, b, h, first + r);
      finish(buffers.o + r * layout.width, row.l, index, params.o, params.rest);
      params.lse[index] = row.l == 0 ? -kInfinity
                                     : static_cast<float>((row.base + log2_of(row.l)) * kLn2);
      if (params.o_dot == nullptr) continue;
      finish(buffers.t + r * layout.width, with_t ? row.l : 0.0f, index, params.o_dot, nullptr);
      params.lse_dot[index] = row.c;
    }
  }

  // Divides a row of sums by the sum of the weights, 0 if there was none, and stores it.
  void finish(float* sums, float l, std::int64_t index, void* out, void* rest) {
    for (std::int64_t i = 0; i < layout.dim; ++i) sums[i] = l == 0 ? 0.0f : sums[i] / l;
    store_row(sums, layout.dim, problem.dtype, index * layout.dim, out, rest);
  }

  template <bool kTangent>
  void accumulate_known() {
    each_part([&](const Part& part) {
      scores(part);
      each_row(part, known_row<E, kTangent>);
      weigh_tangents(part);
    });
  }

  // o_dot = T - delta * O of one row, delta being what the centre missed the mean by. Returns
  // whether that cost accuracy: delta is large beside the spread of S_dot, whose rounding it
  // amplifies, and what it multiplies is large beside the result; with an O that was rounded to
  // two bytes, the latter is enough.
  bool subtract_mean(std::int64_t r) {
    Row& row = state[r];
    float *t = buffers.t + r * layout.width, *o = buffers.o + r * layout.width;
    const std::int64_t i = first + r;
    const float delta = row.l > 0 ? row.m1 / row.l : 0.0f;
    load_row(block_of(params.known_o, problem.dtype, b, h, i, 1), problem.dtype, layout.dim, o,
             false);
    const bool exact = problem.dtype == Dtype::kFloat32 || params.known_rest.data != nullptr;
    if (params.known_rest.data != nullptr) {
      load_row(block_of(params.known_rest, problem.dtype, b, h, i, 1), problem.dtype, layout.dim,
               o, true);
    }
    float o_square = 0, o_dot_square = 0;
    for (std::int64_t d = 0; d < layout.dim; ++d) {
      const float o_dot = (row.l == 0 ? 0.0f : t[d] / row.l) - delta * o[d];
      o_square += o[d] * o[d];
      o_dot_square += o_dot * o_dot;
      o[d] = o_dot;
    }
    const std::int64_t index = row_index(problem, b, h, i);
    store_row(o, layout.dim, problem.dtype, index * layout.dim, params.o_dot, nullptr);
    row.c += delta;
    params.lse_dot[index] = row.c;
    const float spread_square = row.l > 0 ? row.m2 / row.l - delta * delta : 0.0f;
    const bool far = !exact || delta * delta > kTau * kTau * spread_square;
    return far && delta * delta * o_square > kKappa * kKappa * o_dot_square;
  }

  // P from the known log-sum-exp, so nothing is rescaled. S_dot is centred by its mean over the
  // first keys; if some row's mean turns out to have been elsewhere, the tile runs again with it.
  void tangent_alone() {
    const bool with_t = has_s_dot() || params.v_dot.data != nullptr;
    for (std::int64_t r = 0; r < rows; ++r) {
      const float lse = params.known_lse[row_index(problem, b, h, first + r)];
      // Without weight: +inf makes every weight 0.
      state[r].base = lse == -kInfinity ? kInfinity : Base::above(static_cast<float>(lse * kLog2E));
    }
    for (int attempt = 0; attempt < 2; ++attempt) {
      if (with_t) has_s_dot() ? accumulate_known<true>() : accumulate_known<false>();
      bool again = false;
      for (std::int64_t r = 0; r < rows; ++r) {
        again |= subtract_mean(r);
        state[r].l = state[r].m1 = state[r].m2 = 0;
      }
      if (!again) return;
    }
  }
};

template <class E>
void pack_keys(const void* params, std::int64_t head, std::int64_t block, float* head_scratch,
               float*) {
  const ForwardParams& p = *static_cast<const ForwardParams*>(params);
  const ForwardLayout<E> layout(p);
  const std::int64_t b = head / p.problem.n_kv_heads, h = head % p.problem.n_kv_heads;
  const std::int64_t start = block * kTileKeys;
  const std::int64_t n = least(valid_keys(p.problem, b) - start, kTileKeys);
  if (n <= 0) return;
  const auto source = [&](const Operand& x) {
    return block_of(x, p.problem.dtype, b, h, start, n);
  };
  E* packed = reinterpret_cast<E*>(head_scratch);
  E* keys = packed + block * layout.transposed_block;
  E* values = packed + layout.v + block * layout.natural_block;
  const Dtype dtype = p.problem.dtype;
  const std::int64_t padded = round_up(n, kPanel);
  pack_transposed<E>(dtype, source(p.k), padded, layout.dim, keys);
  pack_natural<E>(dtype, source(p.v), padded, kTileKeys, layout.dim, values);
  if (p.k_dot.data != nullptr) {
    pack_transposed<E>(dtype, source(p.k_dot), padded, layout.dim, keys + layout.k_dot);
  }
  if (p.v_dot.data != nullptr) {
    E* tangents = values + layout.v_dot - layout.v;
    pack_natural<E>(dtype, source(p.v_dot), padded, kTileKeys, layout.dim, tangents);
  }
}

template <class E>
void forward_tile(const void* params, std::int64_t head, std::int64_t task, float* head_scratch,
                  float* thread_scratch) {
  const ForwardParams& p = *static_cast<const ForwardParams*>(params);
  Tile<E> tile(p, head, task, head_scratch, thread_scratch);
  if (p.known_lse != nullptr) return tile.tangent_alone();
  tile.has_s_dot() ? tile.template online<true>() : tile.template online<false>();
}

template <class E>
Job forward_job_of(const ForwardParams& p) {
  const ForwardLayout<E> layout(p);
  return {&p,
          p.problem.n_batch * p.problem.n_kv_heads,
          layout.head_elements,
          Buffers<E>::floats(layout),
          layout.group * layout.n_tiles,
          2,
          {{layout.n_blocks, pack_keys<E>}, {layout.group * layout.n_tiles, forward_tile<E>}}};
}

Job forward_job(const ForwardParams& p) {
#if defined(__AVX512BF16__)
  if (p.problem.dtype == Dtype::kBFloat16) return forward_job_of<Pair>(p);
#endif
  return forward_job_of<float>(p);
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace attention
}  // namespace disca
