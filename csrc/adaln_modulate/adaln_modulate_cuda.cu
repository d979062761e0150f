// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of adaptive layer-norm modulation. A block owns whole rows and keeps them in
// registers, up to kItems elements a thread, so that a row is read once however often its mean,
// variance and normalised values are needed.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "adaln_modulate/adaln_modulate.h"
#include "common/checks.h"

namespace disca {
namespace adaln_modulate {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 32;  // kThreads * kItems = 8192 channels
constexpr int kMaxChannels = kThreads * kItems;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Loaded and stored with instructions of up to 16 bytes, which rows are aligned to.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T values[kVec];
};

// Item i of a thread is channel (i / kVec * kThreads + threadIdx.x) * kVec + i % kVec: neighbouring
// threads touch neighbouring packs. Items beyond the row are not touched.
template <int kVec>
__device__ int channel_of(int i) {
  return (i / kVec * kThreads + static_cast<int>(threadIdx.x)) * kVec + i % kVec;
}

// [C] -> kItems registers, zero beyond the row
template <int kVec, typename T>
__device__ void load_row(const T* row, int C, float (&items)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; i += kVec) {
    const int c = channel_of<kVec>(i);
    if (c < C) {
      const auto pack = *reinterpret_cast<const Pack<T, kVec>*>(row + c);
#pragma unroll
      for (int j = 0; j < kVec; ++j) items[i + j] = to_float(pack.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) items[i + j] = 0.0f;
    }
  }
}

template <int kVec, typename T>
__device__ void store_row(T* row, int C, const float (&items)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; i += kVec) {
    const int c = channel_of<kVec>(i);
    if (c >= C) continue;
    Pack<T, kVec> pack;
#pragma unroll
    for (int j = 0; j < kVec; ++j) pack.values[j] = from_float<T>(items[i + j]);
    *reinterpret_cast<Pack<T, kVec>*>(row + c) = pack;
  }
}

// Sums two values over the block, in a fixed order; every thread gets both sums.
__device__ float2 block_sum(float2 v) {
  __shared__ float2 warp_sums[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, offset);
    v.y += __shfl_xor_sync(0xffffffffu, v.y, offset);
  }
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  float2 total = {0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total.x += warp_sums[w].x;
    total.y += warp_sums[w].y;
  }
  __syncthreads();  // the next call writes warp_sums again
  return total;
}

// Normalises a row in place, zero beyond it, and returns 1 / standard deviation.
template <int kVec>
__device__ float normalise(float (&x)[kItems], int C, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum += x[i];
  const float mean = block_sum({sum, 0.0f}).x / C;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    x[i] = channel_of<kVec>(i) < C ? x[i] - mean : 0.0f;
    squares += x[i] * x[i];
  }
  const float rstd = rsqrtf(block_sum({squares, 0.0f}).x / C + eps);
#pragma unroll
  for (int i = 0; i < kItems; ++i) x[i] *= rstd;
  return rstd;
}

template <typename T>
__device__ const T* row_of(const Rows& rows, std::int64_t b, std::int64_t n) {
  return static_cast<const T*>(rows.data) + b * rows.stride_b + n * rows.stride_n;
}

// One block a row.
template <typename X, typename M, int kVec>
__global__ void __launch_bounds__(kThreads) fwd_kernel(ForwardParams p) {
  const int C = static_cast<int>(p.shape.n_channels);
  const std::int64_t i_row = blockIdx.x, b = i_row / p.shape.n_tokens, n = i_row % p.shape.n_tokens;
  float x_hat[kItems], modulation[kItems];
  load_row<kVec>(row_of<X>(p.x, b, n), C, x_hat);
  normalise<kVec>(x_hat, C, p.shape.eps);
  load_row<kVec>(row_of<M>(p.scale, b, n), C, modulation);
#pragma unroll
  for (int i = 0; i < kItems; ++i) x_hat[i] *= 1.0f + modulation[i];
  load_row<kVec>(row_of<M>(p.shift, b, n), C, modulation);
#pragma unroll
  for (int i = 0; i < kItems; ++i) x_hat[i] += modulation[i];
  store_row<kVec>(static_cast<X*>(p.y) + i_row * C, C, x_hat);
}

// What gradient and tangent share: v <- rstd * (v - mean(v) - x_hat * mean(v * x_hat)).
template <int kVec>
__device__ void project(float (&v)[kItems], const float (&x_hat)[kItems], float rstd, int C) {
  float2 sums = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sums.x += v[i];
    sums.y += v[i] * x_hat[i];
  }
  sums = block_sum(sums);
  const float mean = sums.x / C, correlation = sums.y / C;
#pragma unroll
  for (int i = 0; i < kItems; ++i) v[i] = rstd * (v[i] - mean - x_hat[i] * correlation);
}

// One block a row; gradients of a modulation with a row per token.
template <typename X, typename M, int kVec>
__global__ void __launch_bounds__(kThreads) bwd_kernel(BackwardParams p) {
  const int C = static_cast<int>(p.shape.n_channels);
  const std::int64_t i_row = blockIdx.x, b = i_row / p.shape.n_tokens, n = i_row % p.shape.n_tokens;
  float x_hat[kItems], dy[kItems], other[kItems];
  load_row<kVec>(row_of<X>(p.x, b, n), C, x_hat);
  const float rstd = normalise<kVec>(x_hat, C, p.shape.eps);
  load_row<kVec>(row_of<X>(p.dy, b, n), C, dy);
  if (p.dshift != nullptr && p.shape.per_token) {
    store_row<kVec>(static_cast<M*>(p.dshift) + i_row * C, C, dy);
#pragma unroll
    for (int i = 0; i < kItems; ++i) other[i] = dy[i] * x_hat[i];
    store_row<kVec>(static_cast<M*>(p.dscale) + i_row * C, C, other);
  }
  if (p.dx == nullptr) return;
  load_row<kVec>(row_of<M>(p.scale, b, n), C, other);
#pragma unroll
  for (int i = 0; i < kItems; ++i) dy[i] *= 1.0f + other[i];
  project<kVec>(dy, x_hat, rstd, C);
  store_row<kVec>(static_cast<X*>(p.dx) + i_row * C, C, dy);
}

// One block a split of a sample's rows: partial sums of the gradients of a modulation with one row
// per sample. It is not part of bwd_kernel because its sums would double the registers there.
template <typename X, typename M, int kVec>
__global__ void __launch_bounds__(kThreads) bwd_modulation_kernel(BackwardParams p) {
  const int C = static_cast<int>(p.shape.n_channels);
  const std::int64_t b = blockIdx.x / p.n_splits;
  const std::int64_t first = blockIdx.x % p.n_splits * p.rows_per_split;
  const std::int64_t last = min(first + p.rows_per_split, p.shape.n_tokens);
  float sum_dy[kItems] = {}, sum_dy_x_hat[kItems] = {}, x_hat[kItems], dy[kItems];
  for (std::int64_t n = first; n < last; ++n) {
    load_row<kVec>(row_of<X>(p.x, b, n), C, x_hat);
    normalise<kVec>(x_hat, C, p.shape.eps);
    load_row<kVec>(row_of<X>(p.dy, b, n), C, dy);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sum_dy[i] += dy[i];
      sum_dy_x_hat[i] += dy[i] * x_hat[i];
    }
  }
  // [B * n_splits, C]
  const std::int64_t o_partial = static_cast<std::int64_t>(blockIdx.x) * C;
  store_row<kVec>(static_cast<float*>(p.dshift) + o_partial, C, sum_dy);
  store_row<kVec>(static_cast<float*>(p.dscale) + o_partial, C, sum_dy_x_hat);
}

// One block a row.
template <typename X, typename M, int kVec>
__global__ void __launch_bounds__(kThreads) jvp_kernel(JvpParams p) {
  const int C = static_cast<int>(p.shape.n_channels);
  const std::int64_t i_row = blockIdx.x, b = i_row / p.shape.n_tokens, n = i_row % p.shape.n_tokens;
  float x_hat[kItems], tangent[kItems] = {}, gain[kItems], other[kItems];
  load_row<kVec>(row_of<X>(p.x, b, n), C, x_hat);
  const float rstd = normalise<kVec>(x_hat, C, p.shape.eps);
  if (p.y != nullptr || p.x_dot.data != nullptr) {
    load_row<kVec>(row_of<M>(p.scale, b, n), C, gain);
#pragma unroll
    for (int i = 0; i < kItems; ++i) gain[i] += 1.0f;
  }
  if (p.y != nullptr) {
    load_row<kVec>(row_of<M>(p.shift, b, n), C, other);
#pragma unroll
    for (int i = 0; i < kItems; ++i) other[i] += x_hat[i] * gain[i];
    store_row<kVec>(static_cast<X*>(p.y) + i_row * C, C, other);
  }
  if (p.x_dot.data != nullptr) {
    load_row<kVec>(row_of<X>(p.x_dot, b, n), C, tangent);
    project<kVec>(tangent, x_hat, rstd, C);
#pragma unroll
    for (int i = 0; i < kItems; ++i) tangent[i] *= gain[i];
  }
  if (p.scale_dot.data != nullptr) {
    load_row<kVec>(row_of<M>(p.scale_dot, b, n), C, other);
#pragma unroll
    for (int i = 0; i < kItems; ++i) tangent[i] += x_hat[i] * other[i];
  }
  if (p.shift_dot.data != nullptr) {
    load_row<kVec>(row_of<M>(p.shift_dot, b, n), C, other);
#pragma unroll
    for (int i = 0; i < kItems; ++i) tangent[i] += other[i];
  }
  store_row<kVec>(static_cast<X*>(p.y_dot) + i_row * C, C, tangent);
}

// Whether every row of an operand starts on a multiple of 16 bytes.
bool aligned(const Rows& rows, std::size_t size) {
  const auto on_boundary = [](std::uintptr_t bytes) { return bytes % 16 == 0; };
  return rows.data == nullptr || (on_boundary(reinterpret_cast<std::uintptr_t>(rows.data)) &&
                                  on_boundary(static_cast<std::uintptr_t>(rows.stride_b) * size) &&
                                  on_boundary(static_cast<std::uintptr_t>(rows.stride_n) * size));
}

bool aligned(const void* contiguous, std::int64_t n_channels, std::size_t size) {
  return aligned({const_cast<void*>(contiguous), n_channels, 0}, size);
}

std::size_t size_of(const std::string& dtype) { return dtype == "float32" ? 4 : 2; }

template <typename X, typename M, typename Body>
void dispatch_vector(bool vector, const Body& body) {
  // Packs of 16 bytes of x; a wider modulation is then read in two.
  constexpr int kVec = 16 / sizeof(X);
  if (vector) {
    body(X{}, M{}, std::integral_constant<int, kVec>{});
  } else {
    body(X{}, M{}, std::integral_constant<int, 1>{});
  }
}

template <typename Body>
void dispatch(const Dtypes& dtypes, bool vector, const Body& body) {
  const bool wide = dtypes.modulation == "float32";
  check(wide || dtypes.modulation == dtypes.x, "modulation dtype must be ", dtypes.x,
        " or float32, got ", dtypes.modulation);
  if (dtypes.x == "float32") return dispatch_vector<float, float>(vector, body);
  if (dtypes.x == "bfloat16") {
    return wide ? dispatch_vector<__nv_bfloat16, float>(vector, body)
                : dispatch_vector<__nv_bfloat16, __nv_bfloat16>(vector, body);
  }
  if (dtypes.x == "float16") {
    return wide ? dispatch_vector<__half, float>(vector, body)
                : dispatch_vector<__half, __half>(vector, body);
  }
  check(false, "dtype must be float32, bfloat16 or float16, got ", dtypes.x);
}

unsigned grid(std::int64_t blocks, const Shape& s) {
  check(s.n_channels <= kMaxChannels, "n_channels must be at most ", kMaxChannels, ", got ",
        s.n_channels);
  check(blocks <= 0x7fffffff, "B * N must be below 2^31, got ", blocks);
  return static_cast<unsigned>(blocks);
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(concat(kernel, " did not launch: ", cudaGetErrorString(error)));
  }
}

}  // namespace

void fwd_cuda(const ForwardParams& p, const Dtypes& dtypes, std::uintptr_t stream) {
  const unsigned blocks = grid(p.shape.n_batch * p.shape.n_tokens, p.shape);
  if (blocks == 0) return;
  const std::size_t x = size_of(dtypes.x), m = size_of(dtypes.modulation);
  const bool vector = aligned(p.x, x) && aligned(p.shift, m) && aligned(p.scale, m) &&
                      aligned(p.y, p.shape.n_channels, x);
  dispatch(dtypes, vector, [&](auto x_tag, auto m_tag, auto vec) {
    fwd_kernel<decltype(x_tag), decltype(m_tag), vec()>
        <<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(p);
  });
  check_launch("adaln_modulate_fwd");
}

void bwd_cuda(const BackwardParams& p, const Dtypes& dtypes, std::uintptr_t stream) {
  const unsigned rows = grid(p.shape.n_batch * p.shape.n_tokens, p.shape);
  if (rows == 0) return;
  const unsigned splits = grid(p.shape.n_batch * p.n_splits, p.shape);
  const std::size_t x = size_of(dtypes.x), m = size_of(dtypes.modulation);
  const std::size_t sums = p.shape.per_token ? m : sizeof(float);
  const std::int64_t C = p.shape.n_channels;
  const bool vector = aligned(p.dy, x) && aligned(p.x, x) && aligned(p.scale, m) &&
                      aligned(p.dx, C, x) && aligned(p.dshift, C, sums) &&
                      aligned(p.dscale, C, sums) && C * x % 16 == 0;
  const bool partial = p.dshift != nullptr && !p.shape.per_token;
  dispatch(dtypes, vector, [&](auto x_tag, auto m_tag, auto vec) {
    using X = decltype(x_tag);
    using M = decltype(m_tag);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    if (p.dx != nullptr || (p.dshift != nullptr && p.shape.per_token)) {
      bwd_kernel<X, M, vec()><<<rows, kThreads, 0, queue>>>(p);
    }
    if (partial) bwd_modulation_kernel<X, M, vec()><<<splits, kThreads, 0, queue>>>(p);
  });
  check_launch("adaln_modulate_bwd");
}

void jvp_cuda(const JvpParams& p, const Dtypes& dtypes, std::uintptr_t stream) {
  const unsigned blocks = grid(p.shape.n_batch * p.shape.n_tokens, p.shape);
  if (blocks == 0) return;
  const std::size_t x = size_of(dtypes.x), m = size_of(dtypes.modulation);
  const bool vector = aligned(p.x, x) && aligned(p.shift, m) && aligned(p.scale, m) &&
                      aligned(p.x_dot, x) && aligned(p.shift_dot, m) && aligned(p.scale_dot, m) &&
                      aligned(p.y, p.shape.n_channels, x) &&
                      aligned(p.y_dot, p.shape.n_channels, x);
  dispatch(dtypes, vector, [&](auto x_tag, auto m_tag, auto vec) {
    jvp_kernel<decltype(x_tag), decltype(m_tag), vec()>
        <<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(p);
  });
  check_launch("adaln_modulate_jvp");
}

}  // namespace adaln_modulate
}  // namespace disca
