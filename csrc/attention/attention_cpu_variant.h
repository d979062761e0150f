// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set. A file that includes this defines DISCA_ISA, the namespace
// they go into, and is compiled for that instruction set.

#include "attention/attention_cpu_backward.h"
#include "attention/attention_cpu_forward.h"

#define DISCA_QUOTE(name) #name
#define DISCA_STRING(name) DISCA_QUOTE(name)

namespace disca {
namespace attention {
namespace DISCA_ISA {

extern const Kernels kernels = {DISCA_STRING(DISCA_ISA), forward_job, backward_job};

}  // namespace DISCA_ISA
}  // namespace attention
}  // namespace disca
