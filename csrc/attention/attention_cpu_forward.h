// SPDX-License-Identifier: Apache-2.0
// Value, value and tangent, and tangent alone: one task is one tile of queries of one head.
#pragma once

#include "attention/attention_cpu_row.h"

namespace disca {
namespace attention {
namespace DISCA_ISA {
namespace {

// How S_dot is centred where a tile sees more than one block of keys: by its mean over kSample
// keys, spread evenly, with the weights that they have among themselves. If what that missed the
// mean by turns out to have added more than kTau roundings of the result, the tile runs again with
// the mean (docs/ops/attention_accuracy.md).
constexpr std::int64_t kSample = 64;
constexpr float kTau = 1.5f;

template <class E>
struct ForwardLayout : Layout<E> {
  explicit ForwardLayout(const ForwardParams& p) : Layout<E>(p.problem) {
    const std::int64_t keys = this->n_blocks * this->transposed_block;
    const std::int64_t values = this->n_blocks * this->natural_block;
    v = keys;
    k_dot = v + values;
    v_dot = k_dot + (p.k_dot.data != nullptr ? keys : 0);
    sample = v_dot + (p.v_dot.data != nullptr ? values : 0);
    sample_dot = sample + this->depth * kSample;
    variance = sample_dot + this->depth * kSample;
    has_s_dot = p.q_dot.data != nullptr || p.k_dot.data != nullptr;
    has_sample = has_s_dot && this->n_blocks > 1;
    head_elements = has_sample ? variance + 1 : sample;
  }
  bool has_s_dot, has_sample;
  // Offsets into the scratch of a head; the keys are at 0. The sample is keys, tangents of keys
  // and, as a float, the variance of the values: the mean squared distance from their mean.
  std::int64_t v, k_dot, v_dot, sample, sample_dot, variance, head_elements;
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
  bool has_t;
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
    has_t = layout.has_s_dot || p.v_dot.data != nullptr;
    pack(p.q, buffers.q);
    if (p.q_dot.data != nullptr) pack(p.q_dot, buffers.q_dot);
  }

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

  // s, and s_dot where it is not zero, from keys and tangents of keys at these offsets.
  void scores(const Part& part, std::int64_t keys, std::int64_t tangents) {
    score(buffers.q, part, keys, buffers.s, false);
    const bool has_q_dot = params.q_dot.data != nullptr;
    if (has_q_dot) score(buffers.q_dot, part, keys, buffers.s_dot, false);
    if (params.k_dot.data != nullptr) score(buffers.q, part, tangents, buffers.s_dot, has_q_dot);
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
    if (layout.has_s_dot) weigh(buffers.h, part, layout.v, buffers.t, accumulate);
    if (params.v_dot.data != nullptr) {
      weigh(buffers.p, part, layout.v_dot, buffers.t, accumulate || layout.has_s_dot);
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

  // Centres every row by the sample of keys.
  void centre() {
    const std::int64_t step = most(ceil_div(n_valid, kSample), 1);
    for (std::int64_t first_row = 0; first_row < rows; first_row += kRows) {
      scores(Part{0, first_row, ceil_div(n_valid, step)}, layout.sample, layout.sample_dot);
      for (std::int64_t r = 0; r < least(kRows, rows - first_row); ++r) {
        const std::int64_t n = ceil_div(limit(first_row + r), step);
        if (n == 0) continue;
        const float *s = buffers.s + r * kTileKeys, *s_dot = buffers.s_dot + r * kTileKeys;
        const Base base(Base::above(largest_score(s, n, factors.score)));
        state[first_row + r].c = mean_tangent(base, s, s_dot, n, factors);
        state[first_row + r].has_centre = true;
      }
    }
  }

  // Brings the accumulators of a row to the base that its weights have now.
  void rescale(std::int64_t r) {
    const float alpha = state[r].alpha;
    if (alpha == 1.0f) return;
    float *o = buffers.o + r * layout.width, *t = buffers.t + r * layout.width;
    for (std::int64_t i = 0; i < layout.width; i += kVec) {
      store(o + i, load(o + i) * alpha);
      if (has_t) store(t + i, load(t + i) * alpha);
    }
  }

  // O = P V and T = P V_dot + (P * (S_dot - c)) V in one pass over the keys; known: T alone.
  template <bool kOnline, bool kTangent>
  void accumulate() {
    each_part([&](const Part& part) {
      scores(part, 0, layout.k_dot);
      each_row(part, weigh_row<E, kOnline, kTangent>);
      if (kOnline) {
        for (std::int64_t r = 0; part.block > 0 && r < kRows; ++r) rescale(part.row + r);
        weigh(buffers.p, part, layout.v, buffers.o, part.block > 0);
      }
      weigh_tangents(part);
    });
  }

  void run() {
    const bool known = params.known_lse != nullptr;
    const bool sampled = layout.has_s_dot && limit(rows - 1) > kTileKeys;
    if (sampled) centre();
    for (int attempt = 0; attempt < 2; ++attempt) {
      for (std::int64_t r = 0; r < rows; ++r) {
        state[r].clear_sums();
        state[r].base = known ? known_base(r) : -kInfinity;
      }
      if (!known) {
        layout.has_s_dot ? accumulate<true, true>() : accumulate<true, false>();
      } else if (has_t) {
        layout.has_s_dot ? accumulate<false, true>() : accumulate<false, false>();
      }
      float extra = 0, signal = 0;
      for (std::int64_t r = 0; r < rows; ++r) {
        known ? load_value(r) : finish_value(r);
        if (params.o_dot != nullptr) finish_tangent(r, extra, signal);
      }
      // Written so that NaN and infinity try again.
      if (!sampled || extra <= kTau * kTau * signal) return;
    }
  }

  // The base of the weights that a known log-sum-exp gives, up to a factor that their sum undoes.
  float known_base(std::int64_t r) const {
    const float lse = params.known_lse[row_index(problem, b, h, first + r)];
    // Without weight: +inf makes every weight 0.
    return lse == -kInfinity ? kInfinity : Base::above(static_cast<float>(lse * kLog2E));
  }

  void finish_value(std::int64_t r) {
    const Row& row = state[r];
    float* o = buffers.o + r * layout.width;
    const std::int64_t index = row_index(problem, b, h, first + r);
    // By the sum of the weights that were multiplied: a weight's error counts from the mean then.
    const float l = row.l_rounded;
    for (std::int64_t d = 0; d < layout.dim; ++d) o[d] = l == 0 ? 0.0f : o[d] / l;
    store_row(o, layout.dim, problem.dtype, index * layout.dim, params.o, params.rest);
    params.lse[index] =
        row.l == 0 ? -kInfinity : static_cast<float>((row.base + log2_of(row.l)) * kLn2);
  }

  // Puts the value that is known where a pass that computes it leaves its own.
  void load_value(std::int64_t r) {
    const auto add = [&](const Operand& x, bool accumulate) {
      const Source row = block_of(x, problem.dtype, b, h, first + r, 1);
      load_row(row, problem.dtype, layout.dim, buffers.o + r * layout.width, accumulate);
    };
    add(params.known_o, false);
    if (params.known_rest.data != nullptr) add(params.known_rest, true);
  }

  // Stores o_dot = (T - m1 o) / l of one row, whose value o is there, and lse_dot = c + m1 / l. The
  // first m1 is that of the rounded products, so that the mean of the values drops out of their
  // errors. Adds to `extra` an estimate of the variance that the centre's distance from the mean
  // added to the result, in units of the rounding unit, and to `signal` the square of the result.
  void finish_tangent(std::int64_t r, float& extra, float& signal) {
    Row& row = state[r];
    float *t = buffers.t + r * layout.width, *o = buffers.o + r * layout.width;
    const float inverse = row.l == 0 ? 0.0f : 1.0f / row.l, m1 = row.m1_rounded;
    for (std::int64_t d = 0; m1 != 0 && d < layout.dim; ++d) t[d] -= m1 * o[d];
    for (std::int64_t d = 0; d < layout.dim; ++d) {
      t[d] = has_t && row.l != 0 ? t[d] / row.l : 0.0f;
      signal += t[d] * t[d];
    }
    const std::int64_t index = row_index(problem, b, h, first + r);
    store_row(t, layout.dim, problem.dtype, index * layout.dim, params.o_dot, nullptr);
    const float missed = row.m1 * inverse, n0 = row.n0 * inverse * inverse;
    row.c += missed;
    params.lse_dot[index] = row.c;
    if (layout.has_sample) {
      const float variance = reinterpret_cast<const float*>(packed)[layout.variance];
      extra += missed * missed * n0 * (1 - n0) * (1 - n0) * variance;
    }
  }
};

// The mean squared distance of n rows from their mean.
inline float variance_of(const Source& x, Dtype dtype, std::int64_t dim) {
  float mean[kMaxHeadDim] = {}, sum = 0;
  const float share = 1.0f / static_cast<float>(x.rows);
  with_type(dtype, [&](auto tag) {
    const auto* first = static_cast<const decltype(tag)*>(x.data);
    for (std::int64_t r = 0; r < x.rows; ++r) {
      for (std::int64_t d = 0; d < dim; ++d) mean[d] += to_float(first[r * x.stride + d]) * share;
    }
    for (std::int64_t r = 0; r < x.rows; ++r) {
      for (std::int64_t d = 0; d < dim; ++d) {
        const float off = to_float(first[r * x.stride + d]) - mean[d];
        sum += off * off;
      }
    }
  });
  return sum * share;
}

template <class E>
void pack_sample(const ForwardParams& p, const ForwardLayout<E>& layout, std::int64_t b,
                 std::int64_t h, E* packed) {
  const Dtype dtype = p.problem.dtype;
  const std::int64_t n = valid_keys(p.problem, b), step = most(ceil_div(n, kSample), 1);
  if (n == 0) return;
  const auto source = [&](const Operand& x) {
    const Source whole = block_of(x, dtype, b, h, 0, 0);
    return Source{whole.data, whole.stride * step, ceil_div(n, step)};
  };
  pack_transposed<E>(dtype, source(p.k), kSample, layout.dim, packed + layout.sample);
  if (p.k_dot.data != nullptr) {
    pack_transposed<E>(dtype, source(p.k_dot), kSample, layout.dim, packed + layout.sample_dot);
  }
  reinterpret_cast<float*>(packed)[layout.variance] = variance_of(source(p.v), dtype, layout.dim);
}

// Task t < n_blocks packs a block of keys, the one after them the sample.
template <class E>
void pack_keys(const void* params, std::int64_t head, std::int64_t block, float* head_scratch,
               float*) {
  const ForwardParams& p = *static_cast<const ForwardParams*>(params);
  const ForwardLayout<E> layout(p);
  const std::int64_t b = head / p.problem.n_kv_heads, h = head % p.problem.n_kv_heads;
  E* packed = reinterpret_cast<E*>(head_scratch);
  if (block == layout.n_blocks) return pack_sample<E>(p, layout, b, h, packed);
  const std::int64_t start = block * kTileKeys;
  const std::int64_t n = least(valid_keys(p.problem, b) - start, kTileKeys);
  if (n <= 0) return;
  const auto source = [&](const Operand& x) {
    return block_of(x, p.problem.dtype, b, h, start, n);
  };
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
  Tile<E>(p, head, task, head_scratch, thread_scratch).run();
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
          {{layout.n_blocks + layout.has_sample, pack_keys<E>},
           {layout.group * layout.n_tiles, forward_tile<E>}}};
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
