# SPDX-License-Identifier: Apache-2.0
"""Sampling: schedules, lists of full steps, and samplers as functions over a callable."""

from disca.cache.steps import STEP_LISTS, StepList, resolve_full_steps
from disca.sample.samplers import (
    SampleResult,
    Step,
    cached_sample,
    cfg_velocity,
    disca_sample,
    euler,
    mean_velocity,
)
from disca.sample.schedule import check_schedule, flow_shift_schedule

__all__ = [
    "STEP_LISTS",
    "SampleResult",
    "Step",
    "StepList",
    "cached_sample",
    "cfg_velocity",
    "check_schedule",
    "disca_sample",
    "euler",
    "flow_shift_schedule",
    "mean_velocity",
    "resolve_full_steps",
]
