# SPDX-License-Identifier: Apache-2.0
"""Attention by others: PyTorch's fused backends, installed packages, a kernel file by its path."""

import contextlib
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as fw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.batch import RivalFile
from benchmarks.gpu.model import Implementation, Run, Unavailable
from disca_kernels.ops.attention.cases import AttentionCase, Operands

_TUNED_AT = 4096
"""Tokens at which a rival that tunes itself does so, once; longer sequences keep the choice."""
_MISSING_MODULES = 8


def gradients(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], cotangent: Tensor
) -> Run:
    """Return the call that computes the gradients of a value that was computed beforehand."""
    leaves = [x.detach().requires_grad_() for x in primals]
    value = function(*leaves)
    cotangent = cotangent.to(value.dtype)
    return lambda: torch.autograd.grad(value, leaves, cotangent, retain_graph=True)


def sdpa() -> list[Implementation]:
    """Return PyTorch's fused attention, one entry per backend, which is forced."""
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return [
        Implementation(f"sdpa {name}", ("fwd", "bwd"), _sdpa(backend))
        for name, backend in backends.items()
    ]


def _sdpa(backend: SDPBackend) -> Callable[[Any, str, Operands], Run]:
    def function(*primals: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*primals)

    def prepare(case: AttentionCase, mode: str, operands: Operands) -> Run:
        try:
            function(*operands.primals)
        except RuntimeError as refusal:
            if "No available kernel" in str(refusal) or "No viable backend" in str(refusal):
                raise Unavailable(f"PyTorch has no {backend.name} kernel for this case") from None
            raise
        return _value(mode, function, operands)

    return prepare


def _value(mode: str, function: Callable[..., Tensor], operands: Operands) -> Run:
    if mode == "fwd":
        return lambda: (function(*operands.primals),)
    return gradients(function, operands.primals, operands.cotangent)


def packages() -> list[Implementation]:
    """Return the attention of packages that may be installed."""
    flash = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}
    found = [
        Implementation(name, ("fwd", "bwd"), _flash_attn(module)) for name, module in flash.items()
    ]
    both = ("jvp", "fwd", "bwd")
    return [*found, Implementation("jvp_flash_attention", both, _jvp_flash_attention)]


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from None


def _flash_attn(module: str) -> Callable[[Any, str, Operands], Run]:
    def prepare(case: AttentionCase, mode: str, operands: Operands) -> Run:
        call = _import(module).flash_attn_func

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o = call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            o = o[0] if isinstance(o, tuple) else o
            return o.transpose(1, 2)

        return _value(mode, function, operands)

    return prepare


def _jvp_flash_attention(case: AttentionCase, mode: str, operands: Operands) -> Run:
    attention = _import("jvp_flash_attention.jvp_attention").JVPAttn
    primals = tuple(x.contiguous() for x in operands.primals)
    if mode != "jvp":
        plain = operands._replace(primals=primals)
        return _value(mode, lambda *x: attention.fwd(*x), plain)
    tangents = tuple(x.contiguous() for x in operands.tangents)

    def pair() -> tuple[Tensor, ...]:
        with fw.dual_level():
            duals = (fw.make_dual(x, d) for x, d in zip(primals, tangents, strict=True))
            o, o_dot = fw.unpack_dual(attention.fwd_dual(*duals))
            return o, o_dot

    return pair


class FileRival:
    """A kernel in a file that the command line names."""

    def __init__(self, file: RivalFile, choices: Path) -> None:
        self._file, self._choices = file, choices

    def implementation(self) -> Implementation:
        """Return the entry for the harness."""

        def prepare(case: AttentionCase, mode: str, operands: Operands) -> Run:
            module = load_file(self._file.path)
            call: Any = module
            for attribute in self._file.function.split("."):
                call = getattr(call, attribute)
            self._tune(module, call, case, operands)
            if mode == "bwd":
                *primals, cotangent = self._arranged((*operands.primals, operands.cotangent))
                run = gradients(call, tuple(primals), cotangent)
                return lambda: self._as_bhnd(run())
            return self._run(call, operands)

        modes = ("jvp",) if self._file.mode == "jvp" else ("fwd", "bwd")
        return Implementation(self._file.name, modes, prepare)

    def _run(self, call: Any, operands: Operands) -> Run:
        inputs = self._arranged(operands.primals)
        if self._file.mode == "jvp":
            inputs += self._arranged(operands.tangents)
            return lambda: self._as_bhnd(call(*inputs)[:2])
        return lambda: self._as_bhnd((call(*inputs),))

    def _arranged(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._file.layout == "bhnd":
            return tuple(x.contiguous() for x in tensors)
        return tuple(x.transpose(1, 2).contiguous() for x in tensors)

    def _as_bhnd(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._file.layout == "bhnd":
            return tuple(results)
        return tuple(x.transpose(1, 2) for x in results)

    def _tune(self, module: Any, call: Any, case: AttentionCase, operands: Operands) -> None:
        """Let Triton's autotuner choose at a short length, and keep that for all lengths.

        A kernel whose tuning is keyed by the exact length would otherwise spend minutes at each.
        """
        tuners = [x for x in vars(module).values() if type(x).__name__ == "Autotuner"]
        if not tuners:
            return
        key = f"{self._file.name} d{case.head_dim} {case.dtype}"
        kept: dict[str, Any] = {}
        if self._choices.exists():
            kept = json.loads(self._choices.read_text(encoding="utf-8"))
        if not hasattr(module, "_all_configs"):
            module._all_configs = [list(tuner.configs) for tuner in tuners]
        for tuner, every in zip(tuners, module._all_configs, strict=True):
            tuner.configs = list(every)
        if key not in kept:
            n = min(_TUNED_AT, case.n_q)
            short = operands._replace(
                primals=tuple(x[:, :, :n] for x in operands.primals),
                tangents=tuple(x[:, :, :n] for x in operands.tangents),
            )
            self._run(call, short)()
            kept[key] = [
                every.index(tuner.best_config) if hasattr(tuner, "best_config") else None
                for tuner, every in zip(tuners, module._all_configs, strict=True)
            ]
            self._choices.write_text(json.dumps(kept), encoding="utf-8")
        for tuner, every, index in zip(tuners, module._all_configs, kept[key], strict=True):
            if index is not None:
                tuner.configs = [every[index]]
                print(f"{key}: {tuner.configs[0]}", flush=True)


def load_file(path: Path) -> types.ModuleType:
    """Import a file; modules that it imports and that are not installed become placeholders.

    A forward kernel often shares a file with a backward that needs another package.
    """
    name = f"rival_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    for _ in range(_MISSING_MODULES):
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # the jit compiler looks for it there
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            del sys.modules[name]
            print(f"{path.name}: {error}; a placeholder takes its place", flush=True)
            _place_holder(str(error.name))
        except BaseException:
            del sys.modules[name]
            raise
        else:
            return module
    raise Unavailable(f"{path} needs more than {_MISSING_MODULES} modules that are not installed")


def _place_holder(name: str) -> None:
    """Register a module, and its parents, whose every attribute is a function that raises."""

    def refuse(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    def attribute(wanted: str) -> Callable[..., None]:
        if wanted.startswith("__"):  # what looks for these copes with their absence
            raise AttributeError(wanted)
        return refuse

    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        if full in sys.modules:
            continue
        with contextlib.suppress(ImportError):
            if end < len(parts) and importlib.util.find_spec(full) is not None:
                continue
        module = types.ModuleType(full)
        module.__path__ = []
        module.__getattr__ = attribute  # type: ignore[method-assign]
        sys.modules[full] = module
        if end > 1:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
