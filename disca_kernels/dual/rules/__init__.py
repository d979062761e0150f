# SPDX-License-Identifier: Apache-2.0
"""The rules, by kind. Importing this package enters them all in the table."""

from disca_kernels.dual.rules import (  # noqa: F401
    arithmetic,
    attention,
    constants,
    fused,
    layout,
    normalization,
    pointwise,
    products,
    refusals,
)
