# SPDX-License-Identifier: Apache-2.0
"""Reading weight files in the naming that was released, and in the forms that derive from it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from disca.errors import UserError

__all__ = ["canonical_keys", "fill_from", "load_weights", "read_state_dict"]

_WRAPPERS = ("model", "module", "predictor")
_PREFIXES = ("predictor.", "module.predictor.", "module.")
_LISTED = 8

Module = TypeVar("Module", bound=nn.Module)

# Split names of a fused layer, in the order in which their rows are joined.
_FUSED = (
    (re.compile(r"^(double_blocks\.\d+\.(?:img|txt)_attn)_([qkv])\.(weight|bias)$"), "qkv", "_qkv"),
    (
        re.compile(r"^((?:mm_)?single_blocks\.\d+\.linear1)_(q|k|v|mlp)\.(weight|bias)$"),
        ("q", "k", "v", "mlp"),
        "",
    ),
)
_LINEAR2 = re.compile(r"^((?:mm_)?single_blocks\.\d+\.linear2)\.fc\.")


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """Read a weight file: safetensors, or what `torch.save` wrote, as tensors only.

    Args:
        path: the file; `.safetensors` by its ending.

    Returns:
        Names to tensors, or the dictionary that holds such a dictionary.

    Raises:
        UserError: if the file is missing, truncated or not a weight file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is no complete safetensors file: {error}") from error
    except Exception as error:  # torch.load raises whatever its unpickler met
        raise UserError(f"{path} cannot be read as a PyTorch weight file: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return loaded


def canonical_keys(state: Mapping[str, Any], *, split_qkv: bool = False) -> dict[str, Tensor]:
    """Bring a state dictionary to the names of this package.

    Takes the tensors out of nested dictionaries `model`, `module` and `predictor`; strips the
    prefixes `predictor.`, `module.predictor.` and `module.` where all keys have them; joins the
    split tensor-parallel names `*_attn_q/k/v` to `*_attn_qkv` and `linear1_q/k/v/mlp` to `linear1`;
    and renames `linear2.fc` to `linear2`.

    Args:
        state: names to tensors.
        split_qkv: the model keeps q, k and v of double blocks apart (HunyuanVideo-1.5), so they are
            not joined.

    Returns:
        Names to tensors.

    Raises:
        UserError: if a value is no tensor, or a split layer lacks a part.
    """
    while (
        inner := next((k for k in _WRAPPERS if isinstance(state.get(k), Mapping)), None)
    ) is not None:
        state = state[inner]
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{key!r} in the weight file has type {type(value).__name__}, not Tensor"
            )
    tensors = {_LINEAR2.sub(r"\1.", key): value for key, value in state.items()}
    for index, (pattern, parts, suffix) in enumerate(_FUSED):
        if index > 0 or not split_qkv:
            tensors = _join(tensors, pattern, parts, suffix)
    return tensors


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Load a state dictionary, all of it and nothing else.

    Args:
        module: the module to fill.
        state: canonical names to tensors.
        what: name of the module for the message.

    Raises:
        UserError: listing missing keys, unexpected keys and wrong shapes; nothing is loaded then.
    """
    own = module.state_dict()
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    found = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": shapes,
    }
    problems = [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in found.items() if keys]
    if problems:
        raise UserError(f"the weights do not fit this {what}; {'; '.join(problems)}")
    module.load_state_dict(state)


def fill_from(module: Module, state: Mapping[str, Tensor], *, what: str) -> Module:
    """Allocate a module that was built on the meta device and load all of its weights.

    Args:
        module: a module on the meta device; it takes the dtype of the first weight.
        state: canonical names to tensors.
        what: name of the module for the message.

    Returns:
        The module, on the CPU, with storage of its own.

    Raises:
        UserError: as `load_weights`.
    """
    floating = next((value for value in state.values() if value.is_floating_point()), None)
    if floating is not None:
        module.to(dtype=floating.dtype)
    module.to_empty(device="cpu")
    load_weights(module, state, what=what)
    return module


def _join(
    tensors: dict[str, Tensor], pattern: re.Pattern[str], parts: Iterable[str], suffix: str
) -> dict[str, Tensor]:
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in tensors.items():
        match = pattern.match(key)
        if match is None:
            rest[key] = value
        else:
            stem, part, kind = match.groups()
            found.setdefault(f"{stem}{suffix}.{kind}", {})[part] = value
    for key, pieces in found.items():
        lacking = [part for part in parts if part not in pieces]
        if lacking:
            raise UserError(f"the split form of {key} lacks its parts {', '.join(lacking)}")
        rest[key] = torch.cat([pieces[part] for part in parts])
    return rest


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
