# SPDX-License-Identifier: Apache-2.0
"""A MeanFlow training step of a DiT: `dual.jvp` against the other ways to get value and tangent.

A step is the pass forward and the backward pass of the value; the teacher's pass is left out. What
"eager" means in the record is named by the mode:

    plain        flow-matching training: no tangent at all
    func_jvp     torch.func.jvp, the tangent detached, over the same network in PyTorch's own
                 operations (over ours nothing of the tangent is kept, so it needs far less memory)
    two_passes   the tangent by a pass without gradients, then a plain pass with gradients, which is
                 how rCM and FastGen do it; the first pass is dual.jvp too, the fastest there is

with "-recomputed" where each block is recomputed in the backward pass (gradient checkpointing),
which torch.func.jvp does not allow. In units of a linear layer's product of one pass, plain
training costs 3, dual.jvp 4 and two passes 5; recomputing adds 1 to each.

Memory is the peak of what PyTorch's allocator handed out during a step.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fused import parameters
from disca.models import Condition, DiT, DiTConfig, blocks
from disca_kernels import dual
from disca_kernels.testing import assert_within_budget
from disca_kernels.testing.memory import allocated_peak

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECOMPUTED = "-recomputed"
MODES = ["plain", "func_jvp", "two_passes", f"plain{RECOMPUTED}", f"two_passes{RECOMPUTED}"]

Velocity = Callable[[Tensor, Tensor], Tensor]
Pass = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class TrainingCase:
    """A DiT and a batch; the text has 4 tokens."""

    batch: int
    grid: tuple[int, int, int]
    hidden: int
    heads: int
    double_blocks: int
    single_blocks: int

    def __str__(self) -> str:
        """Name the case in reports: batch, tokens, width, blocks of both kinds."""
        f, h, w = self.grid
        blocks = f"{self.double_blocks}+{self.single_blocks}"
        return f"b{self.batch}n{f * h * w + 4}c{self.hidden}-{blocks}"

    def build(self, dtype: torch.dtype) -> tuple[DiT, Velocity, tuple[Tensor, Tensor]]:
        """Make the model, its velocity as a function of x and t, and x and t."""
        torch.manual_seed(0)
        f, h, w = self.grid
        width = self.hidden // self.heads
        share = width // 3 // 2 * 2
        settings = DiTConfig(
            in_channels=4, out_channels=4, patch=(1, 2, 2), hidden=self.hidden, heads=self.heads,
            double_blocks=self.double_blocks, single_blocks=self.single_blocks,
            rope_dims=(width - 2 * share, share, share), text_dim=32, text_refiner_depth=0,
            pooled_dim=32, mean_flow=True,
        )  # fmt: skip
        net = DiT(settings)
        with torch.no_grad():
            for parameter in net.parameters():  # no layer may start as zero and hide the rest
                parameter.add_(0.02 * torch.randn_like(parameter))
        net = net.to(DEVICE, dtype)
        condition = Condition(
            text=torch.randn(self.batch, 4, 32),
            text_lengths=torch.full((self.batch,), 3),
            pooled=torch.randn(self.batch, 32),
        ).to(DEVICE, dtype)
        t = torch.linspace(0.1, 0.9, self.batch, dtype=dtype, device=DEVICE)
        x = torch.randn(self.batch, 4, f, 2 * h, 2 * w).to(DEVICE, dtype)
        return net, lambda x, t: net(x, t, t / 2, cond=condition), (x, t)


CASES = [TrainingCase(16, (2, 4, 4), 96, 4, 2, 10), TrainingCase(1, (4, 16, 16), 256, 4, 2, 12)]


@contextmanager
def pytorch_operations() -> Iterator[None]:
    """Let blocks call, for each operation of ours, what one writes in eager PyTorch."""
    names = ("adaln_modulate", "attention", "gated_residual", "gated_residual_adaln", "gelu_tanh")
    with ExitStack() as stack:
        for name in (*names, "qk_norm_rope"):
            cases = import_module(f"disca_kernels.ops.{name}.cases")
            plain = getattr(cases, f"{name}_in_dtype")

            def call(*args: Any, plain: Callable[..., Any] = plain, **options: Any) -> Any:
                options.pop("rope_tokens", None)  # as many as the tables have rows
                return plain(*args, **options)

            stack.enter_context(patch.object(blocks, name, call))
        yield


def passes(velocity: Velocity, primals: tuple[Tensor, Tensor]) -> dict[str, Pass]:
    """Return the ways to compute a tracked value and, but for the first, its tangent."""
    tangents = torch.ones_like(primals[0]), torch.ones_like(primals[1])

    def func_jvp() -> tuple[Tensor, Tensor]:
        with pytorch_operations():
            out, out_dot = torch.func.jvp(velocity, primals, tangents)
        return out, out_dot.detach()

    def two_passes() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out_dot = dual.jvp(velocity, primals, tangents)[1]
        return velocity(*primals), out_dot

    return {
        "plain": lambda: (velocity(*primals), None),
        "func_jvp": func_jvp,
        "two_passes": two_passes,
        "dual": lambda: dual.jvp(velocity, primals, tangents),
    }


@cache
def check(case: TrainingCase) -> None:
    """Hold value and tangent of dual.jvp to those of torch.func.jvp in float64."""
    runs, wide = (passes(*case.build(dtype)[1:]) for dtype in (torch.float32, torch.float64))
    results = zip(runs["dual"](), wide["func_jvp"](), runs["func_jvp"](), strict=True)
    for part in results:
        assert_within_budget(*(x.detach() for x in part), name=str(case))


@pytest.mark.parametrize("impl", ["dual"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", parameters(CASES))
def test_training_step(request, measure, case: TrainingCase, mode: str, impl: str) -> None:
    net, velocity, primals = case.build(torch.float32)
    runs = passes(velocity, primals)
    with FlopCounterMode(display=False) as counter:
        runs["plain"]()
    net.gradient_checkpointing = mode.endswith(RECOMPUTED)

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad(set_to_none=False)  # so that a peak is one of activations
            runs[name]()[0].square().mean().backward()

        return run

    values = sum(parameter.numel() for parameter in net.parameters())
    rival = step(mode.removesuffix(RECOMPUTED))
    measure(
        run=step(impl),
        eager=rival,
        check=lambda: check(case),
        bytes_moved=2 * values * primals[0].element_size(),  # weights read, gradients written
        flops=4 * counter.get_total_flops(),  # value, tangent, and two products of the backward
        device=DEVICE,
    )
    benchmark = request.getfixturevalue("benchmark")
    peaks = {"peak_bytes": step(impl), "eager_peak_bytes": rival}
    benchmark.extra_info.update({k: allocated_peak(run, DEVICE) for k, run in peaks.items()})
