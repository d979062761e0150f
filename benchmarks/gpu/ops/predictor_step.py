# SPDX-License-Identifier: Apache-2.0
"""A predicted step of HunyuanVideo's width: our kernels against PyTorch's on the same modules.

Host embedders, cache read, two single-stream blocks, head and update, from sample to sample. The
rivals run the same modules with every operation of this package in its eager form, where attention
is `scaled_dot_product_attention` with a mask for the text's padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.model import Implementation, Op, Results, Run, Unavailable
from benchmarks.slices import Part
from disca.models import Condition, DiT, DiTConfig, Predictor, PredictorStep
from disca_kernels import use_backend

MODES = ("fwd",)


@dataclass(frozen=True)
class PredictorStepCase:
    """A clip and a width.

    Attributes:
        grid: video tokens (f, h, w); a patch is 1 x 2 x 2 of a latent of 16 channels.
        n_text: text tokens.
        hidden: C.
        heads: H; the rotary shares are those of HunyuanVideo, 1 : 3.5 : 3.5 at a width of 128.
        dtype: of weights, tokens and cache; the sample is float32.
    """

    grid: tuple[int, int, int]
    n_text: int
    hidden: int
    heads: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        """Name the case in reports."""
        name = str(self.dtype).removeprefix("torch.")
        return f"n{self.n_tokens}c{self.hidden}h{self.heads}-{name}"

    @property
    def n_tokens(self) -> int:
        """Video and text tokens."""
        f, h, w = self.grid
        return f * h * w + self.n_text

    def config(self) -> DiTConfig:
        """Return a host whose blocks are never run."""
        width = self.hidden // self.heads
        share = width // 16 * 7
        return DiTConfig(
            in_channels=16, out_channels=16, patch=(1, 2, 2), hidden=self.hidden, heads=self.heads,
            rope_dims=(width - 2 * share, share, share), double_blocks=0, single_blocks=1,
            text_dim=64, text_refiner_depth=0, pooled_dim=64, mean_flow=True,
        )  # fmt: skip

    def flops(self, mode: str) -> int:
        """Count the fusion's two layers, and the linear layers and attention of two blocks."""
        n, c = self.n_tokens, self.hidden
        return 2 * n * (3 * c * c) + 2 * (2 * n * 12 * c * c + 4 * n * n * c)

    def bytes_moved(self, mode: str) -> int:
        """Count the weights once, and tokens and cache in, the sample in and out."""
        weights, tokens = 27 * self.hidden**2, 2 * self.n_tokens * self.hidden
        sample = 2 * 16 * 4 * (self.n_tokens - self.n_text)
        return (weights + tokens) * self.dtype.itemsize + sample * torch.float32.itemsize


class Operands(NamedTuple):
    """The step, what it takes, and both in float32."""

    step: PredictorStep
    given: tuple[Tensor, Tensor, Tensor, Condition, Tensor]


CASES = {
    "second": [PredictorStepCase((8, 32, 32), 256, 3072, 24)],
    "third": [PredictorStepCase((16, 45, 45), 256, 3072, 24)],
    "quick": [PredictorStepCase((4, 16, 16), 64, 1024, 8)],
    "dry": [PredictorStepCase((1, 2, 2), 2, 64, 2)],
}


def draw(case: PredictorStepCase, device: torch.device, seed: int) -> Operands:
    """Make a step with random weights and draw what it takes; t - r is 1, so that u counts."""
    torch.manual_seed(seed)
    with device:
        step = PredictorStep(DiT(case.config()), Predictor(case.config()))
    for parameter in step.parameters():  # no layer may start as zero and hide the rest
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    step.to(case.dtype).requires_grad_(False)
    f, h, w = case.grid
    condition = Condition(
        text=torch.randn(1, case.n_text, 64),
        text_lengths=torch.full((1,), case.n_text - 1),
        pooled=torch.randn(1, 64),
    ).to(device, case.dtype)
    x = torch.randn(1, 16, f, 2 * h, 2 * w).to(device)
    t, r = torch.ones(1, device=device), torch.zeros(1, device=device)
    cache = torch.randn(1, case.n_tokens, case.hidden).to(device, case.dtype)
    return Operands(step, (x, t, r, condition, cache))


def _run(step: Callable[..., Tensor], operands: Operands, backend: str) -> Run:
    def run() -> Results:
        with torch.no_grad(), use_backend(backend):
            return (step(*operands.given),)

    return run


def expected(case: PredictorStepCase, mode: str, operands: Operands) -> list[Part]:
    """Compute the step in float32 from the same weights."""
    x, t, r, condition, cache = operands.given
    step = operands.step.float()
    given = x, t, r, condition.to(dtype=torch.float32), cache.float()
    (result,) = _run(step, Operands(step, given), "eager")()
    operands.step.to(case.dtype)
    return [Part("x_r", result)]


def _ours(case: PredictorStepCase, mode: str, operands: Operands) -> Run:
    return _run(operands.step, operands, "triton")


def _captured(case: PredictorStepCase, mode: str, operands: Operands) -> Run:
    if not operands.given[0].is_cuda:
        raise Unavailable("a CUDA graph needs a CUDA device")
    captured = operands.step.capture(*operands.given)
    return lambda: (captured(*operands.given),)


def _eager(case: PredictorStepCase, mode: str, operands: Operands) -> Run:
    return _run(operands.step, operands, "eager")


def _compiled(case: PredictorStepCase, mode: str, operands: Operands) -> Run:
    torch.compiler.reset()
    step = torch.compile(operands.step, mode="max-autotune", fullgraph=True)
    return _run(step, operands, "eager")


def implementations() -> list[Implementation]:
    """Return our step, alone and as a CUDA graph, and PyTorch's ways."""
    return [
        Implementation("disca triton", MODES, _ours, ours=True),
        Implementation("disca triton, CUDA graph", MODES, _captured, ours=True),
        Implementation("eager", MODES, _eager),
        Implementation(
            "torch.compile max-autotune", MODES, _compiled, tiers=("second",), compiled=True
        ),
    ]


OP = Op("predictor_step", MODES, CASES, draw, implementations, expected)
