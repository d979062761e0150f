// SPDX-License-Identifier: Apache-2.0
// Python bindings of the CUDA kernel of attention; nothing where it is not built.

#include "attention/attention_cuda_bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "attention/attention_cuda.h"
#include "common/checks.h"

namespace py = pybind11;

namespace disca {

#if defined(DISCA_WITH_ATTENTION_HOPPER)
namespace attention_hopper {
namespace {

// Address, sizes of B, heads and N, and their strides in elements.
using PyTensor =
    std::tuple<std::uintptr_t, std::array<std::int64_t, 3>, std::array<std::int64_t, 3>>;

Tensor tensor(const char* name, const std::optional<PyTensor>& given) {
  if (!given.has_value()) return {};
  const auto& [address, sizes, strides] = *given;
  check(address != 0 && address % 16 == 0, name, " must start on a multiple of 16 bytes");
  for (int i = 0; i < 3; ++i) {
    check(strides[i] > 0 && strides[i] % 8 == 0, name,
          " must have strides that are positive multiples of 8 elements, got ", strides[i]);
  }
  return {reinterpret_cast<const void*>(address), sizes, strides};
}

void jvp(const std::string& dtype, const std::array<PyTensor, 3>& primals,
         const std::array<std::optional<PyTensor>, 3>& tangents, std::uintptr_t lengths,
         float scale, std::uintptr_t o, std::uintptr_t lse, std::uintptr_t o_dot,
         std::uintptr_t lse_dot, std::uintptr_t stream) {
  constexpr const char* kNames[] = {"q", "k", "v", "q_dot", "k_dot", "v_dot"};
  JvpParams p{};
  p.dtype = dtype;
  for (int i = 0; i < 3; ++i) {
    p.operands[i] = tensor(kNames[i], primals[i]);
    p.operands[3 + i] = tensor(kNames[3 + i], tangents[i]);
    check(!tangents[i].has_value() || p.operands[3 + i].sizes == p.operands[i].sizes,
          kNames[3 + i], " must have the shape of ", kNames[i]);
  }
  check(p.operands[1].sizes == p.operands[2].sizes, "k and v must have the same shape");
  check(p.operands[0].sizes[0] == p.operands[1].sizes[0], "q and k must have the same batch");
  check(o != 0 && lse != 0 && o_dot != 0 && lse_dot != 0, "an output is missing");
  p.lengths = reinterpret_cast<const std::int64_t*>(lengths);
  p.scale = scale;
  p.o = reinterpret_cast<void*>(o);
  p.o_dot = reinterpret_cast<void*>(o_dot);
  p.lse = reinterpret_cast<float*>(lse);
  p.lse_dot = reinterpret_cast<float*>(lse_dot);
  jvp_cuda(p, stream);
}

}  // namespace
}  // namespace attention_hopper

void register_attention_cuda(py::module_& m) {
  m.def("attention_jvp_cuda", &attention_hopper::jvp, py::kw_only(), py::arg("dtype"),
        py::arg("primals"), py::arg("tangents"), py::arg("lengths"), py::arg("scale"), py::arg("o"),
        py::arg("lse"), py::arg("o_dot"), py::arg("lse_dot"), py::arg("stream"));
}
#else
void register_attention_cuda(py::module_&) {}
#endif

}  // namespace disca
