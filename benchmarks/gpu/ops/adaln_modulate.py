# SPDX-License-Identifier: Apache-2.0
"""adaln_modulate at the widths of video DiTs: value, gradients, value with tangent."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from benchmarks.gpu.model import Implementation, Op, Results, Run, own
from benchmarks.gpu.rivals import gradients
from benchmarks.slices import Part
from disca_kernels import adaln_modulate, adaln_modulate_jvp
from disca_kernels.ops.adaln_modulate.cases import (
    AdalnModulateCase,
    Operands,
    adaln_modulate_in_dtype,
)
from disca_kernels.ops.adaln_modulate.reference import adaln_modulate_reference

MODES = ("jvp", "fwd", "bwd")
CASES = {
    "second": [AdalnModulateCase(1, 32768, 3072, torch.bfloat16)],
    "third": [
        AdalnModulateCase(2, 8192, 1536, torch.bfloat16, torch.float32),
        AdalnModulateCase(1, 8192, 3072, torch.bfloat16, per_token=True),
    ],
    "quick": [AdalnModulateCase(1, 4096, 3072, torch.bfloat16)],
    "dry": [AdalnModulateCase(2, 5, 33, torch.bfloat16, torch.float32)],
}
_NAMES = {"fwd": ("y",), "jvp": ("y", "y_dot"), "bwd": ("dx", "dshift", "dscale")}


def draw(case: AdalnModulateCase, device: torch.device, seed: int) -> Operands:
    """Draw normal operands."""
    return case.operands(seed, device)


def _run(mode: str, function: Callable[..., Tensor], pair: Callable, operands: Operands) -> Run:
    primals, tangents, cotangent = operands
    if mode == "fwd":
        return lambda: (function(*primals),)
    if mode == "jvp":
        return lambda: pair(primals, tangents)
    return gradients(function, primals, cotangent)


def _jvp_of(function: Callable[..., Tensor]) -> Callable[[Results, Results], Results]:
    return lambda primals, tangents: jvp(function, primals, tangents)


def _ours(case: AdalnModulateCase, mode: str, operands: Operands, backend: str) -> Run:
    def value(*primals: Tensor) -> Tensor:
        return adaln_modulate(*primals, backend=backend)

    def pair(primals: Results, tangents: Results) -> Results:
        return adaln_modulate_jvp(primals, tangents, backend=backend)

    return _run(mode, value, pair, operands)


def _eager(case: AdalnModulateCase, mode: str, operands: Operands) -> Run:
    return _run(mode, adaln_modulate_in_dtype, _jvp_of(adaln_modulate_in_dtype), operands)


def _compiled(case: AdalnModulateCase, mode: str, operands: Operands) -> Run:
    torch.compiler.reset()
    pair = torch.compile(_jvp_of(adaln_modulate_in_dtype))
    return _run(mode, torch.compile(adaln_modulate_in_dtype), pair, operands)


def expected(case: AdalnModulateCase, mode: str, operands: Operands) -> list[Part]:
    """Compute the results of a mode in float64."""
    primals, tangents, cotangent = operands
    wide = Operands(
        tuple(x.double() for x in primals), tuple(x.double() for x in tangents), cotangent.double()
    )
    reference: Any = adaln_modulate_reference
    results = _run(mode, reference, _jvp_of(reference), wide)()
    return [Part(name, result.detach()) for name, result in zip(_NAMES[mode], results, strict=True)]


def implementations() -> list[Implementation]:
    """Return our backends and PyTorch's ways."""
    return [
        *(own("adaln_modulate", name, MODES, _ours) for name in ("triton", "cuda", "cpu")),
        Implementation("eager", MODES, _eager),
        Implementation("torch.compile", MODES, _compiled, tiers=("second",), compiled=True),
    ]


OP = Op("adaln_modulate", MODES, CASES, draw, implementations, expected)
