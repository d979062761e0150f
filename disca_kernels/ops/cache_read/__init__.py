# SPDX-License-Identifier: Apache-2.0
"""First layer of the cache predictor: SiLU of a linear layer of two token tensors."""

from disca_kernels.ops.cache_read.api import cache_read, cache_read_jvp

__all__ = ["cache_read", "cache_read_jvp"]
