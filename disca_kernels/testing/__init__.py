# SPDX-License-Identifier: Apache-2.0
"""Error budgets, gradient and tangent drivers, and code-generation checks for kernels."""

from disca_kernels.testing.budget import Budget, assert_within_budget

__all__ = ["Budget", "assert_within_budget"]
