# SPDX-License-Identifier: Apache-2.0
"""Forward-mode differentiation with stop-gradient tangents, through unchanged modules.

``dual.jvp(func, primals, tangents)`` computes a value and its directional derivative in one pass.
The value is tracked by autograd as in a plain call; the tangent is not, and nothing of it is kept
for the backward pass. See docs/dual.md.
"""

from disca_kernels.dual import rules as _rules  # noqa: F401  # fills the table of rules
from disca_kernels.dual.registry import rule
from disca_kernels.dual.tensor import DualTensor, TangentError, primal, split, tangent
from disca_kernels.dual.transform import jvp

__all__ = ["DualTensor", "TangentError", "jvp", "primal", "rule", "split", "tangent"]
