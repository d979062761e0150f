# SPDX-License-Identifier: Apache-2.0
"""What an operation tells the harness: cases, inputs, implementations, expected results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.slices import Part
from disca_kernels import BackendError, why_not

Results = tuple[Tensor, ...]
Run = Callable[[], Results]
Prepare = Callable[[Any, str, Any], Run]
"""(case, mode, operands) -> the call that is timed; what it needs beforehand happens here."""


class Unavailable(Exception):
    """An implementation that is not installed, or that does not do this case."""


class Case(Protocol):
    """One shape of an operation, from its cases.py."""

    @property
    def dtype(self) -> torch.dtype: ...

    def flops(self, mode: str) -> int: ...

    def bytes_moved(self, mode: str) -> int: ...


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: in the results.
        modes: what it can do.
        prepare: see `Prepare`; raises Unavailable with the reason.
        ours: whether it is an implementation of this package.
        tiers: the tiers in which it is tried, None for all of them.
        compiled: whether it is compiled for many seconds, so that it waits for the others.
    """

    name: str
    modes: tuple[str, ...]
    prepare: Prepare
    ours: bool = False
    tiers: tuple[str, ...] | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Op:
    """An operation: all that the harness needs to know of it.

    Attributes:
        name: of the operation.
        modes: in the order in which they are measured.
        cases: tier to the cases that are measured in it; tier "dry" is for a machine without GPU.
        draw: (case, device, seed) to fresh random operands.
        implementations: ours, PyTorch's and those of installed packages.
        expected: (case, mode, operands) to the exact results.
    """

    name: str
    modes: tuple[str, ...]
    cases: dict[str, list[Any]]
    draw: Callable[[Any, torch.device, int], Any]
    implementations: Callable[[], list[Implementation]]
    expected: Callable[[Any, str, Any], list[Part]]


def own(
    op: str, backend: str, modes: tuple[str, ...], prepare: Callable[..., Run]
) -> Implementation:
    """Return one of our backends; `prepare` takes it as a fourth argument."""

    def prepare_backend(case: Any, mode: str, operands: Any) -> Run:
        reasons = why_not(op, backend, *operands.primals)
        if reasons:
            raise Unavailable("; ".join(reasons))
        try:
            run = prepare(case, mode, operands, backend)
            run()  # a limit that depends on more than the operands shows only now
        except BackendError as refusal:
            raise Unavailable(str(refusal)) from None
        return run

    return Implementation(f"disca {backend}", modes, prepare_backend, ours=True)
