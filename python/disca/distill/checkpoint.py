# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one safetensors file, written so that a kill at any moment leaves a whole file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from disca.errors import UserError
from disca.files import file_digest

__all__ = [
    "Checkpoint",
    "config_hash",
    "differing_fields",
    "file_digest",
    "load_module",
    "load_tensors",
    "optimizer_tensors",
    "read_json",
    "restore_optimizer",
    "write_json",
    "write_tensors",
    "write_text",
]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: Flat mapping from names such as ``model/<group>/<parameter>`` to tensors.
        metadata: JSON values stored in the file's header: step, config, log offset.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below ``prefix/`` with the prefix removed."""
        start = prefix + "/"
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the hexadecimal SHA-256 of a JSON-able configuration, independent of key order."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """List ``path: old -> new`` for each leaf in which two nested configurations differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in [*old, *(k for k in new if k not in old)]:
            path = f"{prefix}.{key}" if prefix else str(key)
            lines += differing_fields(old.get(key, "absent"), new.get(key, "absent"), path)
        return lines
    return [] if _canonical(old) == _canonical(new) else [f"{prefix}: {old} -> {new}"]


def _commit(temporary: Path, path: Path) -> None:
    """Make ``temporary`` durable, then let it take the place of ``path`` in one step."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (temporary file beside it, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _commit(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete {path.parent} to train it anew"
        ) from error
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, atomically.

    The temporary file lies in the same folder and has a fixed name, so that one left behind by a
    kill is overwritten by the next write and never taken for a checkpoint.

    Args:
        path: Destination.
        tensors: Flat mapping; tensors are copied to contiguous CPU memory.
        metadata: JSON-able values, stored in the header.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry only: safetensors writes several in random order, and equal content should give
    # equal bytes.
    save_file(flat, temporary, {"metadata": _canonical(metadata)})
    # safetensors makes files that nobody else may read.
    temporary.chmod(0o644)
    _commit(temporary, path)


def load_tensors(path: Path) -> Checkpoint:
    """Read a file of :func:`write_tensors` (or any safetensors file, then without metadata).

    Raises:
        UserError: If the file is missing, truncated or no safetensors file; it is named.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(header.get("metadata", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); delete it, or restore it from a copy"
        ) from error
    return Checkpoint(tensors, metadata)


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into a module, strictly by name and shape.

    Args:
        module: Receives the values; its own dtype and device are kept.
        tensors: State by name.
        source: Where the tensors come from, for the message.

    Raises:
        UserError: Naming the source and the tensor that is missing, superfluous or of another
            shape.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    superfluous = sorted(tensors.keys() - expected.keys())
    if missing or superfluous:
        kind, names = ("lacks", missing) if missing else ("has the unknown", superfluous)
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"{source}: {kind} tensor {names[0]!r}{rest}; was it made with another model config?"
        )
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            raise UserError(
                f"{source}: tensor {name!r} has shape {list(tensors[name].shape)}, "
                f"the model of this config needs {list(value.shape)}"
            )
    module.load_state_dict(dict(tensors))


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Flatten an optimiser's state to ``<parameter name>/<state name>`` tensors."""
    flat = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}/{key}"] = value
    return flat


def restore_optimizer(
    optimizers: Sequence[torch.optim.Optimizer],
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str | Path,
) -> None:
    """Put the state of :func:`optimizer_tensors` back, bit for bit, each to its optimiser.

    Raises:
        UserError: If a state tensor belongs to no parameter or does not fit it.
    """
    parameters = dict(module.named_parameters())
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for entry in optimizer.param_groups
        for parameter in entry["params"]
    }
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if (
            parameter is None
            or parameter not in owners
            or (value.dim() > 0 and value.shape != parameter.shape)
        ):
            raise UserError(f"{source}: optimiser state {full_name!r} fits no parameter")
        device = parameter.device if value.dim() > 0 else value.device
        owners[parameter].state[parameter][key] = value.to(device)
