# SPDX-License-Identifier: Apache-2.0
"""A pass with its tangent through a DiT: dual.jvp against torch.func.jvp and the plain forward.

Time is the forward pass and the backward pass of the value together, the cost of a training
iteration. Memory is what the graph keeps for the backward pass.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from disca.models import Condition, DiT, DiTConfig
from disca_kernels import dual
from disca_kernels.testing import assert_within_budget

BATCH, FRAMES, SIZE = 16, 8, 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(dtype: torch.dtype) -> tuple[DiT, Callable[..., Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    settings = DiTConfig(
        in_channels=1, out_channels=1, patch=(4, 4, 4), hidden=96, heads=4, double_blocks=2,
        single_blocks=10, rope_dims=(8, 8, 8), text_dim=32, text_refiner_depth=0, pooled_dim=32,
        mean_flow=True,
    )  # fmt: skip
    net = DiT(settings)
    with torch.no_grad():
        for parameter in net.parameters():  # no layer may start as zero and hide the rest
            parameter.add_(0.02 * torch.randn_like(parameter))
    net = net.to(DEVICE, dtype)
    condition = Condition(
        text=torch.randn(BATCH, 4, 32, dtype=dtype, device=DEVICE),
        text_lengths=torch.full((BATCH,), 3, device=DEVICE),
        pooled=torch.randn(BATCH, 32, dtype=dtype, device=DEVICE),
        guidance=None,
    )
    t = torch.linspace(0.1, 0.9, BATCH, dtype=dtype, device=DEVICE)
    x = torch.randn(BATCH, 1, FRAMES, SIZE, SIZE, dtype=dtype, device=DEVICE)
    return net, lambda x, t: net(x, t, t / 2, cond=condition), (x, t)


def passes(velocity: Callable[..., Tensor], primals: tuple[Tensor, Tensor]) -> dict[str, Callable]:
    tangents = torch.ones_like(primals[0]), torch.ones_like(primals[1])

    def func_jvp() -> tuple[Tensor, Tensor]:
        out, out_dot = torch.func.jvp(velocity, primals, tangents)
        return out, out_dot.detach()

    return {
        "plain": lambda: (velocity(*primals), None),
        "func": func_jvp,
        "dual": lambda: dual.jvp(velocity, primals, tangents),
    }


def kept_bytes(run: Callable[[], tuple[Tensor, Tensor | None]]) -> int:
    """Bytes packed for the backward pass, the transient graph of a tangent included."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return total


@pytest.mark.parametrize("rival", ["plain", "func"])
def test_dual(request, measure, rival: str) -> None:
    net, velocity, primals = build(torch.float32)
    wide_velocity, wide_primals = build(torch.float64)[1:]
    runs, wide = passes(velocity, primals), passes(wide_velocity, wide_primals)

    def trained(name: str) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad()
            runs[name]()[0].square().mean().backward()

        return run

    def check() -> None:
        exact = wide["func"]()
        for i, part in enumerate(("value", "tangent")):
            actual, eager = runs["dual"]()[i], runs["func"]()[i]
            assert_within_budget(actual.detach(), exact[i].detach(), eager.detach(), name=part)

    with FlopCounterMode(display=False) as counter:
        runs["plain"]()
    saved = {name: kept_bytes(run) for name, run in runs.items()}
    measure(
        run=trained("dual"),
        eager=trained(rival),
        check=check,
        bytes_moved=2 * saved["plain"],  # written by the forward pass, read by the backward pass
        flops=4 * counter.get_total_flops(),  # value, tangent, and two products of the backward
        device=DEVICE,
    )
    request.getfixturevalue("benchmark").extra_info["saved_bytes"] = saved
