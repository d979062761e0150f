# SPDX-License-Identifier: Apache-2.0
"""Cache policies: which steps of a sampler run the whole network and what replaces the others."""

from disca.cache.disca import LearnedPredictor
from disca.cache.none import NoCache
from disca.cache.policy import CacheReport, Decision, OneTensorCache, Policy
from disca.cache.reuse import Reuse

__all__ = [
    "CacheReport",
    "Decision",
    "LearnedPredictor",
    "NoCache",
    "OneTensorCache",
    "Policy",
    "Reuse",
]
