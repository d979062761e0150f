# SPDX-License-Identifier: Apache-2.0
"""One step along a mean velocity."""

from disca_kernels.ops.mean_velocity_step.api import mean_velocity_step, mean_velocity_step_jvp

__all__ = ["mean_velocity_step", "mean_velocity_step_jvp"]
