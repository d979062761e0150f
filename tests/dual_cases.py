# SPDX-License-Identifier: Apache-2.0
"""Inputs for every function that has a tangent rule, by the name of its family.

A case is the list of positional arguments, or a pair of it and keyword arguments. A ``Var`` stands
for a tensor that may carry a tangent; everything else is a constant of the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disca_kernels import (
    adaln_modulate,
    attention,
    cache_read,
    gated_residual,
    gated_residual_adaln,
    gelu_tanh,
    mean_velocity_step,
    qk_norm_rope,
    swiglu,
    timestep_features,
)


class Var:
    """A random tensor of a shape, drawn when the case runs."""

    def __init__(self, *shape: int, kind: str = "normal") -> None:
        self.shape, self.kind = shape, kind

    def draw(self) -> Tensor:
        if self.kind == "complex":
            return torch.randn(self.shape, dtype=torch.complex128)
        x = torch.randn(self.shape, dtype=torch.float64)
        if self.kind == "positive":
            return x.abs() + 0.5
        if self.kind == "contiguous" or not self.shape:
            return x
        # A slice of a larger tensor, transposed in memory: nothing may rely on strides.
        wide = torch.randn(*reversed([n + 1 for n in self.shape]), dtype=torch.float64)
        return wide.permute(*reversed(range(wide.dim())))[tuple(slice(n) for n in self.shape)]


X, P, Z = Var(3, 4), Var(3, 4, kind="positive"), Var(3, 4, kind="complex")
CUBE, ROW = Var(2, 3, 4), Var(4)
INDEX = torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2], [2, 0, 0, 1]])
PICK = torch.tensor([2, 0])
ANGLES = torch.arange(6, dtype=torch.float64).view(3, 2)
MASK = torch.tensor([[True, False, True, True]])


def same(names: tuple[str, ...], cases: list[Any]) -> dict[str, list[Any]]:
    """The same cases for several names."""
    return dict.fromkeys(names, cases)


Case = list[Any] | tuple[list[Any], dict[str, Any]]

_UNARY = {
    "exp": [X], "expm1": [X], "log": [P], "log1p": [P], "sin": [X], "cos": [X], "sqrt": [P],
    "rsqrt": [P], "reciprocal": [P], "square": [X], "sigmoid": [X], "tanh": [X], "relu": [X],
    "silu": [X], "abs": [X], "absolute": [X], "neg": [X], "negative": [X], "positive": [X],
    "__neg__": [X], "__pos__": [X], "contiguous": [X], "clone": [X], "t": [X], "trace": [X],
    "flatten": [CUBE], "ravel": [CUBE], "unbind": [CUBE], "squeeze": [Var(3, 1, 4)],
    "T": [X], "mT": [CUBE], "H": [X], "mH": [CUBE], "adjoint": [CUBE], "fliplr": [X],
    "flipud": [X], "__reversed__": [CUBE], "view_as_real": [Z],
    "view_as_complex": [Var(3, 4, 2, kind="contiguous")],
    "real": [Z], "imag": [Z], "conj": [Z], "resolve_conj": [Z], "resolve_neg": [X],
    "double": [X], "float": [X], "cpu": [X], "diagonal": [CUBE], "tril": [X], "triu": [X],
}  # fmt: skip

_CONVOLUTIONS: dict[str, list[Case]] = {
    f"conv{'_transpose' if transposed else ''}{n}d": [
        [Var(2, 4, *[5] * n), Var(*((4, 3) if transposed else (3, 4)), *[2] * n)],
        [Var(2, 4, *[5] * n), Var(*((4, 3) if transposed else (3, 4)), *[2] * n), Var(3)],
        ([Var(2, 4, *[5] * n), Var(*((4, 3) if transposed else (6, 2)), *[3] * n)],
         {"bias": Var(6), "stride": 2, "padding": 1, "groups": 2}),
    ]
    for n in (1, 2, 3)
    for transposed in (False, True)
}  # fmt: skip

#: Families in which the spellings of a function take different arguments.
BY_FUNCTION: dict[Callable[..., Any], list[Case]] = {
    torch.where: [[MASK, X, X], [MASK, X, ROW], [MASK, X, 2.0], [MASK, 0.0, X]],
    Tensor.where: [[X, MASK, X], [X, MASK, 2.0]],
    Tensor.__rsub__: [[X, 2.0], [X, ROW]],
    torch.split: [[X, 2, 1], [X, [1, 3], -1]],
    torch.reshape: [[CUBE, (4, 6)]],
    F.unfold: [[Var(1, 2, 4, 4), 2]],
    torch.layer_norm: [[CUBE, [4], ROW, ROW, 1e-5], [CUBE, [3, 4], None, None, 1e-3]],
    torch.dropout: [[X, 0.5, False]],
    F.dropout: [[X, 0.5, False], [X, 0.0, True], [X, 1.0, True]],
    torch.softmax: [[X, -1], [X, 0]],
    F.softmax: [[X, -1], ([X], {"dim": 0}), [X]],
}

CASES: dict[str, list[Case]] = {
    **{name: [args] for name, args in _UNARY.items()},
    **_CONVOLUTIONS,
    "gelu": [[X], ([X], {"approximate": "tanh"})],
    "softplus": [[X], [X, 2.0, 1.0]],
    **same(("clamp", "clip"), [[X, -0.5, 0.5], ([X], {"max": 0.3}), [X, ROW]]),
    **same(("clamp_min", "clamp_max"), [[X, 0.1]]),
    **same(
        ("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "mul", "multiply", "__mul__",
         "__rmul__"),
        [[X, X], [X, ROW], [ROW, X], [X, 2.5], [Var(3, 1), Var(1, 4)], [Z, Z]],
    ),
    **same(
        ("div", "divide", "true_divide", "__truediv__", "__div__"),
        [[X, P], [X, 2.5], [X, Var(3, 1)]],
    ),
    **same(("__rdiv__", "__rtruediv__"), [[P, 2.5]]),
    "rsub": [[X, 2.0], [X, ROW], ([X, ROW], {"alpha": 3})],
    "pow": [[P, 2], [P, 3], [P, 0.5], [P, 1], [P, 0], [P, X], [P, -1.5]],
    "__pow__": [[P, 2], [P, X]],
    "__rpow__": [[X, 2.0]],
    "addcmul": [[X, X, ROW], ([X, X, X], {"value": 0.3})],
    "lerp": [[X, X, 0.3], [X, ROW, X]],
    **same(("maximum", "minimum"), [[X, X], [X, ROW]]),
    "masked_fill": [[X, MASK, 0.5], [X, MASK, Var()]],
    "linear": [[CUBE, Var(5, 4)], [CUBE, Var(5, 4), Var(5)]],
    **same(("matmul", "__matmul__"), [[CUBE, Var(4, 5)], [X, ROW], [ROW, Var(4, 2)]]),
    "__rmatmul__": [[Var(4, 5), CUBE]],
    "mm": [[X, Var(4, 2)]], "bmm": [[CUBE, Var(2, 4, 5)]], "mv": [[X, ROW]], "dot": [[ROW, ROW]],
    "outer": [[ROW, Var(3)]],
    "addmm": [[Var(3, 5), X, Var(4, 5)], ([Var(5), X, Var(4, 5)], {"beta": 2, "alpha": 0.5})],
    "baddbmm": [[Var(2, 3, 5), CUBE, Var(2, 4, 5)], ([Var(5), CUBE, Var(2, 4, 5)], {"beta": 0.5})],
    "einsum": [["bij,jk->bik", CUBE, Var(4, 5)], ["i,j,k->ijk", ROW, Var(3), Var(2)], ["ij->j", X]],
    "embedding": [[INDEX, Var(5, 6)], ([INDEX, Var(5, 6)], {"padding_idx": 0})],
    "layer_norm": [[CUBE, [4]], [CUBE, (4,), ROW, ROW], ([CUBE, [3, 4]], {"weight": X})],
    "rms_norm": [[CUBE, [4]], [CUBE, (4,), ROW], [CUBE, [3, 4], X, 1e-2]],
    "batch_norm": [
        [CUBE, None, None, Var(3), Var(3), True],
        [CUBE, torch.zeros(3).double(), torch.ones(3).double() * 2, Var(3), None, False],
    ],
    "instance_norm": [[CUBE], ([CUBE], {"weight": Var(3), "bias": Var(3)})],
    "softmax": [[X, -1], ([X], {"dim": 0})],
    "log_softmax": [[X, -1], ([X], {"dim": 0})],
    "reshape": [[CUBE, (4, 6)], [CUBE, -1]],
    "view": [[Var(24, kind="contiguous"), 4, 6], [Var(4, 6, kind="contiguous"), (2, -1)]],
    "view_as": [[Var(12), torch.zeros(3, 4)]],
    "reshape_as": [[CUBE, torch.zeros(4, 6)]], "expand_as": [[ROW, torch.zeros(3, 4)]],
    "permute": [[CUBE, (2, 0, 1)]],
    **same(("transpose", "swapaxes", "swapdims"), [[CUBE, 0, -1]]),
    **same(("movedim", "moveaxis"), [[CUBE, 0, -1], [CUBE, (0, 1), (1, 0)]]),
    **same(("chunk", "unsafe_chunk", "tensor_split"), [[X, 2, 1]]),
    "split": [[X, 2, -1], [X, [1, 3], 1]],
    "unsafe_split": [[X, 2, 1]], "split_with_sizes": [[X, [1, 3], 1]],
    **same(("hsplit", "vsplit"), [[Var(4, 4), 2]]), "dsplit": [[Var(2, 3, 4), 2]],
    "expand": [[ROW, (3, 4)], [Var(3, 1), (-1, 4)]], "broadcast_to": [[ROW, (3, 4)]],
    "unsqueeze": [[X, 1]], "unflatten": [[X, 1, (2, 2)]], "narrow": [[X, 1, 1, 2]],
    "select": [[X, 1, 2]], "index_select": [[X, 0, PICK]], "gather": [[X, 0, INDEX]],
    "take": [[X, INDEX]], "take_along_dim": [[X, INDEX, 0]], "masked_select": [[X, MASK]],
    "unfold": [[ROW, 0, 2, 1]], "flip": [[X, (0, 1)]], "rot90": [[X, 1, (0, 1)]],
    "roll": [[X, 1, 0], [X, (1, -1), (0, 1)]], "repeat": [[X, 2, 1]], "tile": [[X, (2, 1)]],
    "repeat_interleave": [[X, 2, 0], [X, 2]],
    "sum": [[X], [X, 1], ([CUBE, (0, 2)], {"keepdim": True})],
    "mean": [[X], [X, -1, True]], "cumsum": [[X, 1]],
    "__getitem__": [
        [CUBE, 1], [CUBE, (slice(None), None, 1)], [CUBE, (Ellipsis, slice(0, 4, 2))],
        [X, PICK], [X, (PICK, PICK)], [X, MASK.expand(3, 4)],
    ],
    "pixel_shuffle": [[Var(1, 4, 2, 2), 2]], "pixel_unshuffle": [[Var(1, 1, 4, 4), 2]],
    "pad": [
        [X, (1, 2)], ([X, (1, 0, 0, 1)], {"value": 3.0}), ([CUBE, (1, 1)], {"mode": "reflect"}),
    ],
    "to": [
        [X, torch.float32], [X, torch.complex128], ([X], {"dtype": torch.float64, "copy": True}),
    ],
    "type_as": [[X, torch.zeros(1)]], "type": [[X, torch.float32]],
    **same(("cat", "concat", "concatenate"), [[[X, X], 0], ([[X, torch.ones(3, 2)]], {"dim": 1})]),
    "stack": [[[X, X, X], 1]],
    **same(("hstack", "vstack", "dstack"), [[[X, X]]]),
    "attention": [[Var(2, 2, 3, 4), Var(2, 2, 5, 4), Var(2, 2, 5, 4)]],
    "adaln_modulate": [
        [CUBE, Var(2, 4), Var(2, 4)], ([CUBE, CUBE, CUBE], {"eps": 1e-3}),
        ([CUBE, Var(2, 4), Var(2, 4), Var(4)], {"bias": Var(4)}),
    ],
    "cache_read": [
        [CUBE, torch.ones(2, 3, 4).double(), Var(5, 8), Var(5)],
        [CUBE, CUBE, torch.ones(5, 8).double()],
    ],
    "gated_residual": [[CUBE, CUBE, Var(2, 4)], [CUBE, torch.ones(2, 3, 4).double(), CUBE]],
    "gelu_tanh": [[CUBE, ROW, Var(2, 2, 3, 5)], [CUBE]],
    "mean_velocity_step": [[CUBE, CUBE, Var(2), Var(2)]],
    "qk_norm_rope": [
        (
            [Var(2, 3, 24), ROW, ROW, ANGLES.cos(), ANGLES.sin(), Var(2, 2, 24), ROW, ROW],
            {"heads": 2},
        ),
        ([Var(2, 3, 24), None, Var(8), None, None], {"heads": 1, "interleaved": False}),
    ],
    "swiglu": [[CUBE, ROW], ([CUBE], {"gate_first": False})],
    "gated_residual_adaln": [
        [CUBE, CUBE, Var(2, 4), Var(2, 4), Var(2, 4)],
        ([CUBE, CUBE, CUBE, Var(2, 4), Var(2, 4)], {"weight": Var(4), "norm": "rms"}),
    ],
    "timestep_features": [[Var(3), 8]],
    "scaled_dot_product_attention": [
        [Var(2, 2, 3, 4), Var(2, 2, 5, 4), Var(2, 2, 5, 4)],
        ([Var(2, 2, 3, 4), Var(2, 2, 3, 4), Var(2, 2, 3, 4)], {"is_causal": True, "scale": 0.3}),
        ([Var(2, 2, 3, 4), Var(2, 2, 5, 4), Var(2, 2, 5, 4)], {"is_causal": True}),
        [Var(2, 2, 3, 4), Var(2, 2, 5, 4), Var(2, 2, 5, 6), Var(3, 5)],
        [Var(3, 4), Var(5, 4), Var(5, 4), torch.tensor([[True, False, True, True, False]])],
        ([Var(1, 4, 3, 4), Var(1, 2, 5, 4), Var(1, 2, 5, 4)], {"enable_gqa": True}),
    ],
}  # fmt: skip

#: Entered in the table for what they refuse, not for a derivative; test_dual_refusals has them.
WITHOUT_A_CASE = {"half", "bfloat16", "cuda", "long", "int", "short", "char", "bool", "byte"}

OURS = (
    *(adaln_modulate, attention, cache_read, gated_residual, gated_residual_adaln, gelu_tanh),
    *(mean_velocity_step, qk_norm_rope, swiglu, timestep_features),
)


class Kept:
    """A tensor that a graph keeps for its backward pass, for as long as the graph lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output would otherwise keep its own graph alive


def live_saved(run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The result of a run, and the sorted sizes in bytes of what its graph keeps."""
    kept: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        entry = Kept(tensor)
        kept.append(weakref.ref(entry))
        return entry

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
        result = run()
    alive = [entry.tensor for entry in (reference() for reference in kept) if entry is not None]
    return result, sorted(x.numel() * x.element_size() for x in alive)
