// SPDX-License-Identifier: Apache-2.0
// Gradients. A head's keys are cut into chunks; the task of a chunk owns its dK and dV and sums dQ
// over its keys into a part of its own, and the parts are added in order. The cut depends on the
// shapes alone, so the result has the same bits on any number of threads.
#pragma once

#include "attention/attention_cpu_tile.h"

namespace disca {
namespace attention {
namespace DISCA_ISA {
namespace {

// Tasks that all heads together should give, and the most chunks of one head, which bound the
// memory of the parts.
constexpr std::int64_t kWantedTasks = 64;
constexpr std::int64_t kMaxChunks = 8;
// Rounding lse to float32 moves all weights of a row together. With this few rows in a sum that
// shows beside eager float32, so the weights are summed anew; with more it averages out.
constexpr std::int64_t kFewQueries = 512;

template <class E>
struct BackwardLayout : Layout<E> {
  explicit BackwardLayout(const Problem& p) : Layout<E>(p) {
    const std::int64_t wanted = ceil_div(kWantedTasks, most(p.n_batch * p.n_kv_heads, 1));
    chunk_blocks = ceil_div(this->n_blocks, least(wanted, kMaxChunks));
    chunk_blocks = most(chunk_blocks, 1);
    n_chunks = ceil_div(this->n_blocks, chunk_blocks);
    tiles = this->group * this->n_tiles;
    rows_tile = this->tile_rows * this->depth;
    natural_tile = this->tile_rows / Element<E>::kPerStep * this->width;
    part_tile = this->tile_rows * this->width;
    std::int64_t next = 0;
    const auto take = [&](std::int64_t elements) {
      const std::int64_t start = next;
      next += round_up(elements, kTileKeys);
      return start;
    };
    k_transposed = take(this->n_blocks * this->transposed_block);
    v_transposed = take(this->n_blocks * this->transposed_block);
    k = take(this->n_blocks * this->natural_block);
    q_rows = take(tiles * rows_tile);
    do_rows = take(tiles * rows_tile);
    q = take(tiles * natural_tile);
    d_o = take(tiles * natural_tile);
    statistics = take(tiles * this->tile_rows * 4);
    parts = take(n_chunks * tiles * part_tile);
    head_elements = next;
    next = 0;
    s = take(this->tile_rows * kTileKeys);
    dp = take(this->tile_rows * kTileKeys);
    p_transposed = take(this->tile_rows * kTileKeys / 2);
    ds_transposed = take(this->tile_rows * kTileKeys / 2);
    ds = take(this->tile_rows * kTileKeys / 2);
    dk = take(kTileKeys * this->width);
    dv = take(kTileKeys * this->width);
    thread_elements = next;
  }
  std::int64_t chunk_blocks, n_chunks, tiles;      // tiles: of queries, over the heads of a group
  std::int64_t rows_tile, natural_tile, part_tile;  // elements of one tile
  // Offsets into the scratch of a head.
  std::int64_t k_transposed, v_transposed, k, q_rows, do_rows, q, d_o, statistics, parts;
  std::int64_t head_elements;
  // Offsets into the scratch of a thread.
  std::int64_t s, dp, p_transposed, ds_transposed, ds, dk, dv, thread_elements;
};

// What the weights of a row of queries need: P = factor * 2^(s - base), both from the log-sum-exp,
// delta = rowsum(dO * O) - dlse, and what rounding lse may have moved the weights by, relatively.
struct RowStatistics {
  float base, factor, delta, doubt;
};

template <class E>
void pack_query_tile(const BackwardParams& p, const BackwardLayout<E>& layout, std::int64_t b,
                     std::int64_t h, std::int64_t tile, float* head_scratch) {
  const Problem& problem = p.problem;
  const std::int64_t first = tile % layout.n_tiles * kTileQueries;
  const std::int64_t rows = least(problem.n_queries - first, kTileQueries);
  E* packed = reinterpret_cast<E*>(head_scratch);
  const Source q = block_of(p.q, problem.dtype, b, h, first, rows);
  const Source d_o = block_of(p.d_o, problem.dtype, b, h, first, rows);
  const std::int64_t dim = layout.dim, n = round_up(rows, kRows);
  pack_rows<E>(problem.dtype, q, n, dim, Factors<E>(problem.scale).query,
               packed + layout.q_rows + tile * layout.rows_tile);
  pack_rows<E>(problem.dtype, d_o, n, dim, 1.0, packed + layout.do_rows + tile * layout.rows_tile);
  pack_natural<E>(problem.dtype, q, n, layout.tile_rows, dim,
                  packed + layout.q + tile * layout.natural_tile);
  pack_natural<E>(problem.dtype, d_o, n, layout.tile_rows, dim,
                  packed + layout.d_o + tile * layout.natural_tile);
  auto* statistics = reinterpret_cast<RowStatistics*>(head_scratch + layout.statistics) +
                     tile * layout.tile_rows;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t index = row_index(problem, b, h, first + r);
    const double lse = p.lse[index] * kLog2E;
    // Without weight: +inf makes every weight 0.
    const float base = lse == -kInfinity ? kInfinity : Base::above(static_cast<float>(lse));
    statistics[r].base = base;
    statistics[r].factor = 0;
    if (base < kInfinity) statistics[r].factor = static_cast<float>(__builtin_exp2(base - lse));
    statistics[r].doubt = static_cast<float>((1 + (lse < 0 ? -lse : lse)) * 0x1p-23);
    float delta = p.dlse == nullptr ? 0.0f : -p.dlse[index];
    const Source o = block_of(p.o, problem.dtype, b, h, first + r, 1);
    with_type(problem.dtype, [&](auto tag) {
      using X = decltype(tag);
      const X* o_row = static_cast<const X*>(o.data);
      const X* do_row = static_cast<const X*>(d_o.data) + r * d_o.stride;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t d = 0; d < dim; ++d) sum += to_float(o_row[d]) * to_float(do_row[d]);
      delta += sum;
    });
    statistics[r].delta = delta;
  }
}

// Task t < n_blocks packs a block of keys, the others a tile of queries.
template <class E>
void pack_backward(const void* params, std::int64_t head, std::int64_t task, float* head_scratch,
                   float*) {
  const BackwardParams& p = *static_cast<const BackwardParams*>(params);
  const BackwardLayout<E> layout(p.problem);
  const std::int64_t b = head / p.problem.n_kv_heads, h = head % p.problem.n_kv_heads;
  if (task >= layout.n_blocks) {
    const std::int64_t tile = task - layout.n_blocks;
    const std::int64_t h_query = h * layout.group + tile / layout.n_tiles;
    return pack_query_tile<E>(p, layout, b, h_query, tile, head_scratch);
  }
  const std::int64_t start = task * kTileKeys;
  const std::int64_t n = least(valid_keys(p.problem, b) - start, kTileKeys);
  if (n <= 0) return;
  const Dtype dtype = p.problem.dtype;
  const Source k = block_of(p.k, dtype, b, h, start, n), v = block_of(p.v, dtype, b, h, start, n);
  E* packed = reinterpret_cast<E*>(head_scratch);
  const std::int64_t offset = task * layout.transposed_block;
  const std::int64_t padded = round_up(n, kPanel);
  pack_transposed<E>(dtype, k, padded, layout.dim, packed + layout.k_transposed + offset);
  pack_transposed<E>(dtype, v, padded, layout.dim, packed + layout.v_transposed + offset);
  pack_natural<E>(dtype, k, padded, kTileKeys, layout.dim,
                  packed + layout.k + task * layout.natural_block);
}

// Replaces scores by weights P, and dP by dS = P * (dP - delta); columns from n on become 0.
template <class E>
inline void gradient_row(const RowStatistics& row, float* s, float* dp, std::int64_t n,
                         std::int64_t n_padded, float factor) {
  const Base base(row.base);
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec weight = base.weight(load(s + i), factor) * row.factor;
    Vec ds = weight * (load(dp + i) - row.delta);
    if (i + kVec > n) {
      weight = first_lanes(weight, n - i, 0.0f);
      ds = first_lanes(ds, n - i, 0.0f);
    }
    store(s + i, weight);
    store(dp + i, ds);
  }
  for (std::int64_t i = round_up(n, kVec); i < n_padded; i += kVec) {
    store(s + i, Vec{});
    store(dp + i, Vec{});
  }
}

#if defined(__AVX512BF16__)
// Two rows of floats as pairs [n]: element j is (low[j], high[j]).
inline void interleave(const float* low, const float* high, std::int64_t n, Pair* out) {
  for (std::int64_t i = 0; i < n; i += kVec) {
    const IntVec both = rounded_bits(load(low + i)) | rounded_bits(load(high + i)) << 16;
    __builtin_memcpy(out + i, &both, sizeof both);
  }
}
#endif

template <class E>
struct Chunk {
  const BackwardParams& params;
  const Problem& problem;
  const BackwardLayout<E> layout;
  const E* packed;
  float *part, *scratch;
  RowStatistics* statistics;
  Factors<E> factors;
  std::int64_t b, h, n_valid;

  Chunk(const BackwardParams& p, std::int64_t head, std::int64_t chunk, float* head_scratch,
        float* thread_scratch)
      : params(p),
        problem(p.problem),
        layout(p.problem),
        packed(reinterpret_cast<const E*>(head_scratch)),
        part(head_scratch + layout.parts + chunk * layout.tiles * layout.part_tile),
        scratch(thread_scratch),
        statistics(reinterpret_cast<RowStatistics*>(head_scratch + layout.statistics)),
        factors(p.problem.scale),
        b(head / p.problem.n_kv_heads),
        h(head % p.problem.n_kv_heads),
        n_valid(valid_keys(p.problem, b)) {}

  void run(std::int64_t chunk) {
    for (std::int64_t i = 0; i < layout.tiles * layout.part_tile; i += kVec) store(part + i, Vec{});
    const std::int64_t end = least((chunk + 1) * layout.chunk_blocks, layout.n_blocks);
    for (std::int64_t block = chunk * layout.chunk_blocks; block < end; ++block) {
      const std::int64_t start = block * kTileKeys;
      const std::int64_t n = most(least(n_valid - start, kTileKeys), 0);
      float *dk = scratch + layout.dk, *dv = scratch + layout.dv;
      for (std::int64_t i = 0; i < round_up(n, kRows) * layout.width; i += kVec) {
        store(dk + i, Vec{});
        store(dv + i, Vec{});
      }
      for (std::int64_t tile = 0; tile < layout.tiles; ++tile) query_tile(block, tile);
      store_block(params.dk, dk, start, n, problem.scale);
      store_block(params.dv, dv, start, n, 1.0);
    }
  }

  RowStatistics& row(std::int64_t tile, std::int64_t r) const {
    return statistics[tile * layout.tile_rows + r];
  }

  // Queries in a tile.
  std::int64_t rows_of(std::int64_t tile) const {
    return least(problem.n_queries - tile % layout.n_tiles * kTileQueries, kTileQueries);
  }

  // How many keys of a block a row of a tile sees.
  std::int64_t seen(std::int64_t tile, std::int64_t r, std::int64_t block) const {
    const std::int64_t i = tile % layout.n_tiles * kTileQueries + r;
    const std::int64_t limit = key_limit(problem, i, n_valid) - block * kTileKeys;
    return most(least(limit, kTileKeys), 0);
  }

  // Products of the rows packed at `a` with the first n keys of a block, packed at `keys`.
  void score(std::int64_t a, std::int64_t tile, std::int64_t keys, std::int64_t block,
             std::int64_t n, float* out) const {
    multiply<E, 1, kRows>(packed + a + tile * layout.rows_tile, kRows * layout.depth,
                          ceil_div(rows_of(tile), kRows),
                          packed + keys + block * layout.transposed_block, layout.depth * kPanel,
                          ceil_div(n, kPanel) * 2, layout.depth, out, kTileKeys, false);
  }

  // Adds what a tile of queries gives to dK, dV and dQ.
  void query_tile(std::int64_t block, std::int64_t tile) {
    const std::int64_t rows = rows_of(tile), n = seen(tile, rows - 1, block);
    if (n == 0) return;
    float *s = scratch + layout.s, *dp = scratch + layout.dp;
    score(layout.q_rows, tile, layout.k_transposed, block, n, s);
    score(layout.do_rows, tile, layout.v_transposed, block, n, dp);
    const std::int64_t columns = round_up(round_up(n, kRows), kPanel);
    for (std::int64_t r = 0; r < round_up(rows, kRows); ++r) {
      gradient_row<E>(row(tile, r), s + r * kTileKeys, dp + r * kTileKeys,
                      r < rows ? seen(tile, r, block) : 0, columns, factors.score);
    }
    products(block, tile, round_up(rows, kRows), columns, n);
  }

  // dV += P^T dO, dK += dS^T Q, dQ += dS K
  void products(std::int64_t block, std::int64_t tile, std::int64_t rows,
                [[maybe_unused]] std::int64_t columns,
                std::int64_t n) {
    constexpr int kStride = Layout<E>::kKeySteps;
    constexpr int kPerStep = Element<E>::kPerStep;
    float *s = scratch + layout.s, *dp = scratch + layout.dp;
    const E *p_transposed = reinterpret_cast<E*>(s), *ds_transposed = reinterpret_cast<E*>(dp);
    const E* ds = ds_transposed;
#if defined(__AVX512BF16__)
    if constexpr (kPerStep == 2) {
      Pair* p_pairs = reinterpret_cast<Pair*>(scratch + layout.p_transposed);
      Pair* ds_pairs = reinterpret_cast<Pair*>(scratch + layout.ds_transposed);
      Pair* ds_rows = reinterpret_cast<Pair*>(scratch + layout.ds);
      for (std::int64_t r = 0; r < rows; r += 2) {
        const std::int64_t row = r * kTileKeys, next = row + kTileKeys;
        interleave(s + row, s + next, columns, p_pairs + row / 2);
        interleave(dp + row, dp + next, columns, ds_pairs + row / 2);
        for (std::int64_t i = 0; i < columns; i += kVec) {
          store_operand(ds_rows, row + i, load(dp + row + i));
          store_operand(ds_rows, next + i, load(dp + next + i));
        }
      }
      p_transposed = p_pairs;
      ds_transposed = ds_pairs;
      ds = ds_rows;
    }
#endif
    const std::int64_t vectors = layout.width / kVec, steps = rows / kPerStep;
    const auto gradient = [&](const E* a, std::int64_t values, float* out) {
      multiply<E, 1, kTileKeys>(a, kRows, ceil_div(n, kRows),
                                packed + values + tile * layout.natural_tile,
                                layout.tile_rows / kPerStep * kPanel, vectors, steps, out,
                                layout.width, true);
    };
    gradient(p_transposed, layout.d_o, scratch + layout.dv);
    gradient(ds_transposed, layout.q, scratch + layout.dk);
    multiply<E, kStride, 1>(ds, kRows * kStride, rows / kRows,
                            packed + layout.k + block * layout.natural_block, kStride * kPanel,
                            vectors, ceil_div(n, kPerStep), part + tile * layout.part_tile,
                            layout.width, true);
  }

  // Stores the first n rows times a factor, and 0 for the other keys of the block.
  void store_block(void* out, float* rows, std::int64_t start, std::int64_t n, double factor) {
    const std::int64_t stop = least(problem.n_keys - start, kTileKeys);
    const std::int64_t index = (b * problem.n_kv_heads + h) * problem.n_keys + start;
    for (std::int64_t r = 0; r < stop; ++r) {
      float* row = rows + r * layout.width;
      for (std::int64_t d = 0; d < layout.dim; ++d) {
        row[d] = r < n ? static_cast<float>(row[d] * factor) : 0.0f;
      }
      store_row(row, layout.dim, problem.dtype, (index + r) * layout.dim, out, nullptr);
    }
  }
};

// Makes the weights of a tile's rows sum to 1, if they miss it by no more than lse was rounded.
template <class E>
void normalise_tile(const void* params, std::int64_t head, std::int64_t tile, float* head_scratch,
                    float* thread_scratch) {
  const BackwardParams& p = *static_cast<const BackwardParams*>(params);
  const Chunk<E> chunk(p, head, 0, head_scratch, thread_scratch);
  const auto& layout = chunk.layout;
  const std::int64_t rows = chunk.rows_of(tile);
  float sums[kTileQueries] = {};
  for (std::int64_t block = 0; block < layout.n_blocks; ++block) {
    const std::int64_t n = chunk.seen(tile, rows - 1, block);
    if (n == 0) break;
    float* s = thread_scratch + layout.s;
    chunk.score(layout.q_rows, tile, layout.k_transposed, block, n, s);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t seen = chunk.seen(tile, r, block);
      const Base base(chunk.row(tile, r).base);
      Vec sum = {};
      for (std::int64_t i = 0; i < seen; i += kVec) {
        const Vec weight = base.weight(load(s + r * kTileKeys + i), chunk.factors.score);
        sum += i + kVec > seen ? first_lanes(weight, seen - i, 0.0f) : weight;
      }
      sums[r] += horizontal_sum(sum);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    RowStatistics& row = chunk.row(tile, r);
    const float error = sums[r] * row.factor - 1;
    if (error * error <= row.doubt * row.doubt) row.factor = 1 / sums[r];
  }
}

template <class E>
void backward_chunk(const void* params, std::int64_t head, std::int64_t task, float* head_scratch,
                    float* thread_scratch) {
  const BackwardParams& p = *static_cast<const BackwardParams*>(params);
  Chunk<E>(p, head, task, head_scratch, thread_scratch).run(task);
}

// dQ of one tile: the sum of its parts.
template <class E>
void add_parts(const void* params, std::int64_t head, std::int64_t tile, float* head_scratch,
               float*) {
  const BackwardParams& p = *static_cast<const BackwardParams*>(params);
  const Problem& problem = p.problem;
  const BackwardLayout<E> layout(problem);
  const std::int64_t b = head / problem.n_kv_heads;
  const std::int64_t h = head % problem.n_kv_heads * layout.group + tile / layout.n_tiles;
  const std::int64_t first = tile % layout.n_tiles * kTileQueries;
  const std::int64_t rows = least(problem.n_queries - first, kTileQueries);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* sum = head_scratch + layout.parts + tile * layout.part_tile + r * layout.width;
    for (std::int64_t chunk = 1; chunk < layout.n_chunks; ++chunk) {
      const float* part = sum + chunk * layout.tiles * layout.part_tile;
      for (std::int64_t d = 0; d < layout.dim; ++d) sum[d] += part[d];
    }
    for (std::int64_t d = 0; d < layout.dim; ++d) {
      sum[d] = layout.n_chunks == 0 ? 0.0f : static_cast<float>(sum[d] * problem.scale);
    }
    const std::int64_t index = row_index(problem, b, h, first + r);
    store_row(sum, layout.dim, problem.dtype, index * layout.dim, p.dq, nullptr);
  }
}

template <class E>
Job backward_job_of(const BackwardParams& p) {
  const BackwardLayout<E> layout(p.problem);
  const bool few = p.problem.dtype == Dtype::kFloat32 && p.problem.n_queries <= kFewQueries;
  return {&p,
          p.problem.n_batch * p.problem.n_kv_heads,
          // Without keys there is no part, and dQ is written from here all the same.
          layout.head_elements + layout.tiles * layout.part_tile,
          layout.thread_elements,
          layout.n_chunks,
          4,
          {{layout.n_blocks + layout.tiles, pack_backward<E>},
           {few ? layout.tiles : 0, normalise_tile<E>},
           {layout.n_chunks, backward_chunk<E>},
           {layout.tiles, add_parts<E>}}};
}

Job backward_job(const BackwardParams& p) {
#if defined(__AVX512BF16__)
  if (p.problem.dtype == Dtype::kBFloat16) return backward_job_of<Pair>(p);
#endif
  return backward_job_of<float>(p);
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace attention
}  // namespace disca
