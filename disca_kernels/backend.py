# SPDX-License-Identifier: Apache-2.0
"""Choice of the implementation that runs an operation.

An explicit backend never falls back: if it cannot run, :class:`BackendError` says what was asked
for, what came, why it does not fit and what would work. ``"auto"`` takes the first usable entry of
:func:`candidates`; :func:`explain` prints why each of the others was passed over.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum

import torch
from torch import Tensor

from disca_kernels import _ext

ENVIRONMENT_VARIABLE = "DISCA_BACKEND"


class Backend(str, Enum):
    """Names of the implementations that an operation may have; str() gives the value."""

    AUTO = "auto"
    TRITON = "triton"
    CUDA = "cuda"
    CPU = "cpu"
    EAGER = "eager"

    def __str__(self) -> str:
        """Return the value, where an ordinary enumeration would name the member."""
        return str(self.value)


class BackendError(RuntimeError):
    """The requested backend cannot run this call."""


IMPLEMENTATIONS: dict[str, tuple[Backend, ...]] = {
    "adaln_modulate": (Backend.TRITON, Backend.CUDA, Backend.CPU, Backend.EAGER),
    "attention": (Backend.TRITON, Backend.CUDA, Backend.CPU, Backend.EAGER),
    "cache_read": (Backend.TRITON, Backend.CPU, Backend.EAGER),
    "gated_residual": (Backend.TRITON, Backend.CPU, Backend.EAGER),
    "gated_residual_adaln": (Backend.TRITON, Backend.CPU, Backend.EAGER),
    "gelu_tanh": (Backend.TRITON, Backend.CPU, Backend.EAGER),
    "mean_velocity_step": (Backend.TRITON, Backend.EAGER),
    "qk_norm_rope": (Backend.TRITON, Backend.CPU, Backend.EAGER),
    "swiglu": (Backend.TRITON, Backend.CPU, Backend.EAGER),
    "timestep_features": (Backend.TRITON, Backend.EAGER),
}
"""What each operation has: one line per operation."""

Limit = Callable[..., list[str]]

LIMITS: dict[tuple[str, Backend], Limit] = {}
"""Reasons that only the operation itself knows (a head dimension, say); see :func:`limit`."""

UNPROFITABLE: dict[tuple[str, Backend], Limit] = {}
"""Why ``"auto"`` passes a backend over that could run; see :func:`unprofitable`."""

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MINIMUM_CAPABILITY = (8, 0)

_default: ContextVar[Backend | None] = ContextVar("disca_backend", default=None)


def limit(op: str, backend: Backend) -> Callable[[Limit], Limit]:
    """Register a function ``(*tensors) -> list[str]`` with further reasons against a backend."""

    def register(function: Limit) -> Limit:
        LIMITS[op, backend] = function
        return function

    return register


def unprofitable(op: str, backend: Backend) -> Callable[[Limit], Limit]:
    """Register a function ``(*tensors) -> list[str]`` with reasons why ``"auto"`` is better off.

    For operands with which a backend works and was measured to be slower than eager.
    """

    def register(function: Limit) -> Limit:
        UNPROFITABLE[op, backend] = function
        return function

    return register


def _parse(name: str | Backend, source: str) -> Backend:
    try:
        return Backend(name)
    except ValueError:
        valid = ", ".join(repr(b.value) for b in Backend)
        raise ValueError(f"{source} must be one of {valid}; got {name!r}") from None


@contextmanager
def use_backend(name: str | Backend) -> Iterator[None]:
    """Let ``backend="auto"`` mean ``name`` inside the ``with`` block, in this thread or task.

    It takes precedence over the environment variable ``DISCA_BACKEND``; a backend that a call
    names itself takes precedence over both. ``use_backend("auto")`` restores the automatic choice.

    Args:
        name: One of :class:`Backend`.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    token = _default.set(_parse(name, "use_backend(name)"))
    try:
        yield
    finally:
        _default.reset(token)


def _requested(requested: str | Backend) -> Backend:
    """Return what the call, the context or the environment asks for, in this order."""
    backend = _parse(requested, "backend")
    if backend is not Backend.AUTO:
        return backend
    return _parse(_ambient(), ENVIRONMENT_VARIABLE)


def _ambient() -> str:
    """Name what the context or the environment asks for, in this order."""
    in_context = _default.get()
    if in_context is not None:
        return in_context.value
    return os.environ.get(ENVIRONMENT_VARIABLE, Backend.AUTO.value)


# What torch.compiler.assume_constant_result sets: a compiler cannot trace a ContextVar, so what is
# in force while it traces is what the compiled function keeps.
_ambient._dynamo_marked_constant = True  # type: ignore[attr-defined]


def candidates(op: str, device: torch.device) -> tuple[Backend, ...]:
    """Return what ``"auto"`` tries for tensors on ``device``, in order of preference."""
    preferred = {"cuda": Backend.TRITON, "cpu": Backend.CPU}.get(device.type)
    implemented = _implementations(op)
    if preferred in implemented:
        return (preferred, Backend.EAGER)
    return (Backend.EAGER,)


def _implementations(op: str) -> tuple[Backend, ...]:
    try:
        return IMPLEMENTATIONS[op]
    except KeyError:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"unknown operation {op!r}; known operations: {known}") from None


def interpreting() -> bool:
    """Whether Triton runs its kernels as Python on host memory."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _capability_reasons(device: torch.device) -> list[str]:
    capability = torch.cuda.get_device_capability(device)
    if capability >= _MINIMUM_CAPABILITY:
        return []
    needed = ".".join(map(str, _MINIMUM_CAPABILITY))
    return [f"needs compute capability {needed} or higher, {device} has {capability}"]


def _triton_reasons(device: torch.device | None) -> list[str]:
    if not _installed("triton"):
        return ["the package triton is not installed"]
    if interpreting():
        return []
    if device is None:
        usable = torch.cuda.is_available()
        return [] if usable else ["no CUDA device is available (and TRITON_INTERPRET is not set)"]
    if device.type != "cuda":
        return [f"needs CUDA tensors, got {device.type} (TRITON_INTERPRET=1 would allow cpu)"]
    return _capability_reasons(device)


def _cuda_reasons(device: torch.device | None) -> list[str]:
    missing = _ext.why_not()
    if missing is not None:
        return [missing]
    if not _ext.load().build_info()["cuda"]:
        return ["disca_kernels._C was built without its CUDA part (no nvcc, or DISCA_CUDA=0)"]
    if device is None:
        return [] if torch.cuda.is_available() else ["no CUDA device is available"]
    if device.type != "cuda":
        return [f"needs CUDA tensors, got {device.type}"]
    return _capability_reasons(device)


def _cpu_reasons(device: torch.device | None) -> list[str]:
    missing = _ext.why_not()
    if missing is not None:
        return [missing]
    if device is not None and device.type != "cpu":
        return [f"needs CPU tensors, got {device.type}"]
    return []


_DEVICE_REASONS = {
    Backend.TRITON: _triton_reasons,
    Backend.CUDA: _cuda_reasons,
    Backend.CPU: _cpu_reasons,
}


def _dtype_reasons(tensors: list[Tensor]) -> list[str]:
    wrong = {t.dtype for t in tensors if t.is_floating_point() and t.dtype not in _KERNEL_DTYPES}
    supported = ", ".join(_name(d) for d in _KERNEL_DTYPES)
    return [
        f"dtype {_name(d)} is not supported (supported: {supported})"
        for d in sorted(wrong, key=str)
    ]


def why_not(op: str, backend: str | Backend, *tensors: Tensor | None) -> list[str]:
    """Return every reason why ``backend`` cannot run ``op`` on these tensors.

    Args:
        op: Name of the operation, a key of :data:`IMPLEMENTATIONS`.
        backend: The backend in question; ``"auto"`` can always run.
        *tensors: What the operation would get; None stands for an absent operand. Without any
            tensor the answer is about this machine alone.

    Returns:
        The reasons, empty when the backend can run.

    Raises:
        ValueError: ``op`` or ``backend`` is unknown.
    """
    chosen = _parse(backend, "backend")
    implemented = _implementations(op)
    present = [t for t in tensors if t is not None]
    if chosen is Backend.AUTO:
        return []
    if chosen not in implemented:
        return [f"{op} has no {chosen} implementation (it has: {', '.join(implemented)})"]
    devices = sorted({str(t.device) for t in present})
    if len(devices) > 1:
        return [f"tensors are on different devices: {', '.join(devices)}"]
    if chosen is Backend.EAGER:
        return []
    reasons = _DEVICE_REASONS[chosen](present[0].device if present else None)
    reasons += _dtype_reasons(present)
    limited = LIMITS.get((op, chosen))
    if limited is not None and present:
        reasons += limited(*tensors)
    return reasons


def resolve(
    op: str, requested: str | Backend, *tensors: Tensor | None, profitable: bool = True
) -> Backend:
    """Choose the backend of one call.

    Args:
        op: Name of the operation, a key of :data:`IMPLEMENTATIONS`.
        requested: What the caller passed as ``backend``.
        *tensors: The operands; None stands for an absent one.
        profitable: Whether ``"auto"`` passes over what :func:`unprofitable` advises against.

    Returns:
        The backend that will run, never ``Backend.AUTO``.

    Raises:
        BackendError: The requested backend cannot run this call; it is never replaced silently.
        ValueError: ``op`` or ``requested`` is unknown.
    """
    backend = _requested(requested)
    if backend is not Backend.AUTO:
        reasons = why_not(op, backend, *tensors)
        if not reasons:
            return backend
        raise BackendError(_refusal(op, backend, reasons, tensors))
    present = [t for t in tensors if t is not None]
    device = present[0].device if present else torch.device("cpu")
    for candidate in candidates(op, device):
        reasons = why_not(op, candidate, *tensors)
        if not reasons and profitable:
            reasons = _passed_over(op, candidate, *tensors)
        if not reasons:
            return candidate
    raise BackendError(_refusal(op, backend, why_not(op, Backend.EAGER, *tensors), tensors))


def explain(op: str, *tensors: Tensor | None) -> str:
    """Return one line per backend of ``op``: usable, or why it is passed over."""
    lines = [f"{op}({_describe(tensors)})"]
    for backend in _implementations(op):
        reasons = why_not(op, backend, *tensors)
        if not reasons:
            passed_over = _passed_over(op, backend, *tensors)
            reasons = ["usable", *(f"auto passes it over: {reason}" for reason in passed_over)]
        lines.append(f"  {backend}: {'; '.join(reasons)}")
    return "\n".join(lines)


def _passed_over(op: str, backend: Backend, *tensors: Tensor | None) -> list[str]:
    """Return why ``"auto"`` does not take a backend that could run."""
    reasons = UNPROFITABLE.get((op, backend))
    return [] if reasons is None or all(t is None for t in tensors) else reasons(*tensors)


def _refusal(
    op: str, backend: Backend, reasons: list[str], tensors: tuple[Tensor | None, ...]
) -> str:
    usable = [b for b in _implementations(op) if not why_not(op, b, *tensors)]
    would_work = ", ".join(repr(b.value) for b in usable) or "no backend for these tensors"
    return (
        f"{op}: backend={backend.value!r} was requested and cannot run: {'; '.join(reasons)}. "
        f"Got: {_describe(tensors)}. Would work: {would_work}."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(tensors: tuple[Tensor | None, ...]) -> str:
    described = [
        "None" if t is None else f"{_name(t.dtype)} {list(t.shape)} on {t.device}" for t in tensors
    ]
    return ", ".join(described) or "no tensors"
