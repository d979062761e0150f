# SPDX-License-Identifier: Apache-2.0
"""Query and key normalisation, rotary embedding and the change to attention's layout."""

from disca_kernels.ops.qk_norm_rope.api import qk_norm_rope, qk_norm_rope_jvp

__all__ = ["qk_norm_rope", "qk_norm_rope_jvp"]
