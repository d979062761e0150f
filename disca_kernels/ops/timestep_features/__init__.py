# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal features of the diffusion time with a band-limited tangent."""

from disca_kernels.ops.timestep_features.api import timestep_features, timestep_features_jvp

__all__ = ["timestep_features", "timestep_features_jvp"]
