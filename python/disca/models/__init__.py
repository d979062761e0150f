# SPDX-License-Identifier: Apache-2.0
"""Video diffusion transformers, the cache predictor and the discriminator."""

from disca.models.condition import Condition
from disca.models.configs import DiTConfig, hunyuan_video_1_0, hunyuan_video_1_5
from disca.models.discriminator import Discriminator
from disca.models.dit import DiT, load_dit
from disca.models.host import Block, Host
from disca.models.predictor import Predictor, load_predictor
from disca.models.predictor_step import CapturedStep, PredictorStep
from disca.models.state import State

__all__ = [
    "Block",
    "CapturedStep",
    "Condition",
    "DiT",
    "DiTConfig",
    "Discriminator",
    "Host",
    "Predictor",
    "PredictorStep",
    "State",
    "hunyuan_video_1_0",
    "hunyuan_video_1_5",
    "load_dit",
    "load_predictor",
]
