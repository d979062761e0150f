# SPDX-License-Identifier: Apache-2.0
"""Attention at HunyuanVideo's shape: value, gradients, value with tangent, tangent alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from benchmarks.gpu import rivals
from benchmarks.gpu.model import Implementation, Op, Results, Run, own
from benchmarks.plain import plain_attention
from benchmarks.slices import expected_attention
from disca_kernels import attention, attention_jvp, attention_tangent
from disca_kernels.ops.attention.cases import AttentionCase, Operands

MODES = ("jvp", "fwd", "tangent", "bwd")
_HEADS = 24
_SMALL = ("second", "quick", "dry")


def _case(n: int, head_dim: int) -> AttentionCase:
    return AttentionCase(1, _HEADS, n, n, head_dim, torch.bfloat16)


CASES = {
    "first": [_case(16384, 128)],
    "second": [_case(4096, 128), _case(16384, 64)],
    "third": [_case(32768, 128), _case(65536, 128)],
    "fourth": [_case(32768, 64), _case(65536, 64)],
    "quick": [_case(4096, 128)],
    "dry": [AttentionCase(1, 2, 40, 40, 16, torch.bfloat16)],
}


def draw(case: AttentionCase, device: torch.device, seed: int) -> Operands:
    """Draw normal operands on the device, laid out as a model has them: [B, N, H, D]."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(n: int) -> Tensor:
        shape = (case.batch, n, case.heads, case.head_dim)
        x = torch.randn(shape, generator=generator, device=device, dtype=case.dtype)
        return x.transpose(1, 2)

    q, k, v, q_dot, k_dot, v_dot = (normal(n) for n in (case.n_q, case.n_k, case.n_k) * 2)
    return Operands((q, k, v), (q_dot, k_dot, v_dot), normal(case.n_q), None)


def _ours(case: AttentionCase, mode: str, operands: Operands, backend: str) -> Run:
    primals, tangents, cotangent, _ = operands
    if mode == "fwd":
        return lambda: (attention(*primals, backend=backend),)
    if mode == "jvp":
        return lambda: attention_jvp(primals, tangents, backend=backend)
    if mode == "tangent":
        o, lse = attention(*primals, return_lse=True, backend=backend)
        return lambda: attention_tangent(primals, tangents, o, lse, backend=backend)[:1]
    return rivals.gradients(lambda *x: attention(*x, backend=backend), primals, cotangent)


def _plain(function: Callable[..., Tensor]) -> Callable[[Any, str, Operands], Run]:
    """Prepare a differentiable function of q, k and v that knows nothing of tangents."""

    def prepare(case: AttentionCase, mode: str, operands: Operands) -> Run:
        primals, tangents, cotangent, _ = operands
        if mode == "fwd":
            return lambda: (function(*primals),)
        if mode == "jvp":
            return lambda: jvp(function, primals, tangents)
        return rivals.gradients(function, primals, cotangent)

    return prepare


def _compiled(case: AttentionCase, mode: str, operands: Operands) -> Run:
    torch.compiler.reset()
    primals, tangents, cotangent, _ = operands
    if mode == "jvp":

        def pair(primals: Results, tangents: Results) -> Results:
            return jvp(plain_attention, primals, tangents)

        compiled = torch.compile(pair)
        return lambda: compiled(primals, tangents)
    function = torch.compile(plain_attention)
    if mode == "fwd":
        return lambda: (function(*primals),)
    return rivals.gradients(function, primals, cotangent)


def implementations() -> list[Implementation]:
    """Return our backends, PyTorch's ways, and the packages that may be installed."""
    ours = [own("attention", name, MODES, _ours) for name in ("triton", "cuda", "cpu")]
    differentiable = ("jvp", "fwd", "bwd")
    eager = Implementation(
        "eager", differentiable, _plain(plain_attention), tiers=("first", *_SMALL)
    )
    compiled = Implementation(
        "torch.compile", differentiable, _compiled, tiers=("second",), compiled=True
    )
    return [*ours, *rivals.sdpa(), *rivals.packages(), eager, compiled]


OP = Op("attention", MODES, CASES, draw, implementations, expected_attention)
