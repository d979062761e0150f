// SPDX-License-Identifier: Apache-2.0
// Launches the kernel of attention_cuda_kernel.h. It is compiled for sm_90a alone.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "attention/attention_cuda.h"
#include "attention/attention_cuda_kernel.h"
#include "attention/attention_cuda_ptx.cuh"
#include "common/checks.h"

namespace disca {
namespace attention_hopper {
namespace {

template <typename V>
__global__ void __launch_bounds__(kThreads, 1)
    jvp_kernel(const __grid_constant__ Operands<Ptx> operands, const Problem problem) {
  value_and_tangent<Ptx, V>(operands, problem);
}

void check_cuda(cudaError_t error, const char* action) {
  if (error != cudaSuccess) {
    throw std::runtime_error(
        concat("attention_jvp: ", action, " failed: ", cudaGetErrorString(error)));
  }
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: linked, the module would not load without a driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince,
                                              cudaEnableDefault, &found),
             "looking for cuTensorMapEncodeTiled");
#else
  check_cuda(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
      "looking for cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(
        "attention_jvp: the driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
  }
  return reinterpret_cast<Encode>(function);
}

// Boxes of 64 rows of 64 elements, the panels of the kernel; what is outside the tensor reads as 0.
CUtensorMap tensor_map(const Tensor& t, CUtensorMapDataType dtype) {
  static const Encode encode = find_encode();
  CUtensorMap map{};
  if (t.data == nullptr) return map;
  cuuint64_t sizes[4] = {kHeadDim}, strides[3];
  for (int i = 0; i < 3; ++i) {
    sizes[1 + i] = static_cast<cuuint64_t>(t.sizes[2 - i]);
    strides[i] = static_cast<cuuint64_t>(t.strides[2 - i]) * 2;
  }
  const cuuint32_t box[4] = {kPanelColumns, kPanelRows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map, dtype, 4, const_cast<void*>(t.data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(concat("attention_jvp: cuTensorMapEncodeTiled failed with error ",
                                    static_cast<int>(result)));
  }
  return map;
}

template <typename V>
void launch(const Operands<Ptx>& operands, const Problem& problem, unsigned blocks,
            cudaStream_t stream) {
  static_assert(Layout<V>::kBytes <= 227 * 1024, "more shared memory than a block can have");
  check_cuda(cudaFuncSetAttribute(jvp_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(Layout<V>::kBytes)),
             "asking for shared memory");
  jvp_kernel<V><<<blocks, kThreads, Layout<V>::kBytes, stream>>>(operands, problem);
  check_cuda(cudaGetLastError(), "the launch");
}

template <typename Element>
void dispatch(const Operands<Ptx>& operands, const Problem& problem, const JvpParams& p,
              unsigned blocks, cudaStream_t stream) {
  const auto has = [&p](int i) { return p.operands[3 + i].data != nullptr; };
  const auto with = [&](auto q, auto k, auto v) {
    launch<Variant<Element, q(), k(), v()>>(operands, problem, blocks, stream);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (has(0) && has(1)) return has(2) ? with(yes, yes, yes) : with(yes, yes, no);
  if (has(0)) return has(2) ? with(yes, no, yes) : with(yes, no, no);
  if (has(1)) return has(2) ? with(no, yes, yes) : with(no, yes, no);
  check(has(2), "at least one tangent must be present");
  with(no, no, yes);
}

void check_device() {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "asking for the compute capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "asking for the compute capability");
  if (major != 9 || minor != 0) {
    throw std::runtime_error(
        concat("attention_jvp needs compute capability 9.0, the device has ", major, ".", minor));
  }
}

}  // namespace

void jvp_cuda(const JvpParams& p, std::uintptr_t stream) {
  check(p.dtype == "bfloat16" || p.dtype == "float16", "dtype must be bfloat16 or float16, got ",
        p.dtype);
  const Tensor &q = p.operands[0], &k = p.operands[1];
  const auto [n_batch, n_heads, n_q] = q.sizes;
  const std::int64_t blocks = (n_q + kBlockM - 1) / kBlockM * n_heads * n_batch;
  check(n_q > 0 && n_heads > 0 && n_batch > 0 && k.sizes[1] > 0 && k.sizes[2] > 0,
        "operands must not be empty");
  check(n_heads % k.sizes[1] == 0, "the ", n_heads, " query heads must be a multiple of the ",
        k.sizes[1], " key heads");
  constexpr std::int64_t kMost = 0x7fffffff - kBlockM;
  check(blocks <= kMost && n_q <= kMost && k.sizes[2] <= kMost,
        "B * H * Nq / 128, Nq and Nk must be below 2^31");
  check_device();
  const bool bfloat16 = p.dtype == "bfloat16";
  Operands<Ptx> operands;
  CUtensorMap* const maps[] = {&operands.q,     &operands.k,     &operands.v,
                               &operands.q_dot, &operands.k_dot, &operands.v_dot};
  for (int i = 0; i < 6; ++i) {
    *maps[i] = tensor_map(p.operands[i], bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  }
  const Problem problem{p.o,
                        p.o_dot,
                        p.lse,
                        p.lse_dot,
                        p.lengths,
                        static_cast<int>(n_heads),
                        static_cast<int>(n_heads / k.sizes[1]),
                        static_cast<int>(n_q),
                        static_cast<int>(k.sizes[2]),
                        p.scale};
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  const auto count = static_cast<unsigned>(blocks);
  if (bfloat16) {
    dispatch<__nv_bfloat16>(operands, problem, p, count, queue);
  } else {
    dispatch<__half>(operands, problem, p, count, queue);
  }
}

}  // namespace attention_hopper
}  // namespace disca
