// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set. A file that includes this defines DISCA_ISA, the namespace
// they go into, and is compiled for that instruction set.

#include "common/modulated_norm_backward.h"
#include "common/modulated_norm_forward.h"

namespace disca {
namespace modulated_norm {
namespace DISCA_ISA {

extern const Kernels kernels = {forward, backward, add, finish_sample, finish};

}  // namespace DISCA_ISA
}  // namespace modulated_norm
}  // namespace disca
