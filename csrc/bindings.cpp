// SPDX-License-Identifier: Apache-2.0
// The module disca_kernels._C. Operations take addresses, sizes, strides and a stream handle as
// integers, so that one binary works with every version of torch.

#include <pybind11/pybind11.h>

#include "adaln_modulate/adaln_modulate.h"
#include "attention/attention.h"
#include "attention/attention_cuda_bindings.h"
#include "cache_read/cache_read.h"
#include "common/checks.h"
#include "gated_residual/gated_residual.h"
#include "gated_residual_adaln/gated_residual_adaln.h"
#include "gelu_tanh/gelu_tanh.h"
#include "qk_norm_rope/qk_norm_rope.h"
#include "swiglu/swiglu.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return disca::concat("clang ", __clang_version__);
#elif defined(__GNUC__)
  return disca::concat("gcc ", __VERSION__);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = DISCA_VERSION;
  info["compiler"] = compiler();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(DISCA_HAS_X86_LEVELS)
  info["cpu_targets"] = "x86-64-v4, x86-64-v3, x86-64";
#else
  info["cpu_targets"] = "baseline";
#endif
#if defined(DISCA_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = DISCA_CUDA_VERSION;
  info["cuda_architectures"] = DISCA_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of disca_kernels; use them through disca_kernels.ops.";
  m.def("build_info", &build_info, "What this binary was built from and for.");
  disca::register_adaln_modulate(m);
  disca::register_attention(m);
  disca::register_cache_read(m);
  disca::register_gated_residual(m);
  disca::register_gated_residual_adaln(m);
  disca::register_gelu_tanh(m);
  disca::register_swiglu(m);
  disca::register_attention_cuda(m);
  disca::register_qk_norm_rope(m);
}
