# SPDX-License-Identifier: Apache-2.0
"""Settings shared by all tests: threads, the Triton interpreter, poisoned uninitialised memory."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Triton reads this when a kernel module is imported, so it is set before any test can do that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `torch.device("meta")` as a context knows the functions that allocate by identity, collected on
# first use. Collected while they are patched, it would let the real ones allocate real memory.
_device_constructors()

_INTEGER_POISON = {
    torch.uint8: 0xDB,
    torch.int8: -0x5B,
    torch.int16: -0x5BDB,
    torch.int32: -0x5BDBDBDB,
    torch.int64: -0x5BDBDBDBDBDBDBDB,
}


def poison(tensor: Tensor) -> Tensor:
    """Fill uninitialised memory with a value that no correct result contains."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype in _INTEGER_POISON:
        return tensor.fill_(_INTEGER_POISON[tensor.dtype])
    return tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        tensor = allocate(*args, **kwargs)
        return poison(tensor) if caller.startswith("disca_kernels.") else tensor

    return allocate_and_poison


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every ``empty`` that disca_kernels allocates arrive full of NaN.

    An output element that a kernel forgets to write then fails the test instead of holding
    whatever the allocator left there, which is often a plausible number.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, _poisoned(getattr(Tensor, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
