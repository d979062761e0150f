# SPDX-License-Identifier: Apache-2.0
"""Linear maps of one tensor or of a list: shapes, views, indexing, conversions, sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.registry import (
    add_handler,
    conversion_handler,
    linear_handler,
    list_handler,
    rule,
    spellings,
)
from disca_kernels.dual.tensor import tangent

#: Functions that are linear in their first argument: the same call on the tangent.
LINEAR = """
    reshape reshape_as permute transpose swapaxes swapdims movedim moveaxis t adjoint
    chunk tensor_split unsafe_chunk split split_with_sizes unsafe_split unbind
    hsplit vsplit dsplit expand expand_as broadcast_to squeeze unsqueeze flatten unflatten ravel
    narrow select index_select gather take take_along_dim masked_select unfold diagonal
    tril triu flip fliplr flipud rot90 roll repeat repeat_interleave tile
    contiguous clone view_as_real real imag conj resolve_conj resolve_neg
    neg negative positive __neg__ __pos__ sum mean cumsum diff trace nansum
    __getitem__ __reversed__ pixel_shuffle pixel_unshuffle
""".split()

#: Linear as well, but the result may have a type that cannot hold a tangent.
CONVERSIONS = """
    to type type_as float double half bfloat16 cpu cuda long int short char bool byte
""".split()

#: Linear in a list of tensors.
LISTS = "cat concat concatenate stack hstack vstack dstack".split()

#: Attributes that are views.
VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")

for _name in LINEAR:
    for _func in spellings(_name):
        add_handler(_func, linear_handler, family=_name)
for _name in CONVERSIONS:
    for _func in spellings(_name):
        add_handler(_func, conversion_handler, family=_name)
for _name in LISTS:
    for _func in spellings(_name):
        add_handler(_func, list_handler, family=_name)
for _name in VIEW_ATTRIBUTES:
    add_handler(getattr(Tensor, _name).__get__, linear_handler, family=_name)


@rule(Tensor.view)
def _view(out: Tensor, input: Any, *shape: Any, **kwargs: Any) -> Tensor | None:
    x_dot = tangent(input)
    if x_dot is None:
        return None
    if out.dtype != x_dot.dtype:
        return NotImplemented
    # The tangent may have other strides than the value, where only a copy has the new shape.
    return x_dot.reshape(out.shape)


@rule(Tensor.view_as)
def _view_as(out: Tensor, input: Any, other: Any) -> Tensor | None:
    return _view(out, input)


@rule(torch.view_as_complex)
def _view_as_complex(out: Tensor, input: Any) -> Tensor:
    return torch.view_as_complex(tangent(input).contiguous())  # type: ignore[union-attr]


@rule(functional.pad)
def _pad(
    out: Tensor, input: Any, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    return functional.pad(tangent(input), pad, mode)  # type: ignore[arg-type]
