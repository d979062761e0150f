# SPDX-License-Identifier: Apache-2.0
"""Distil, cache and sample video diffusion transformers with the operations of `disca_kernels`."""

from disca.errors import UserError

__all__ = ["UserError"]
