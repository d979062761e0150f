# SPDX-License-Identifier: Apache-2.0
"""Cache policies: which steps of a sampler run the whole network and what replaces the others."""

from disca.cache.disca import LearnedPredictor
from disca.cache.none import NoCache
from disca.cache.policy import (
    CachePolicy,
    CacheReport,
    OutputPolicy,
    Policy,
    Resources,
    StepInput,
    StepOutput,
    SubLayerPolicy,
    TokenPolicy,
)
from disca.cache.registry import POLICIES, build_policy, policy_class
from disca.cache.reuse import Reuse
from disca.cache.store import Store

__all__ = [
    "POLICIES",
    "CachePolicy",
    "CacheReport",
    "LearnedPredictor",
    "NoCache",
    "OutputPolicy",
    "Policy",
    "Resources",
    "Reuse",
    "StepInput",
    "StepOutput",
    "Store",
    "SubLayerPolicy",
    "TokenPolicy",
    "build_policy",
    "policy_class",
]
