# SPDX-License-Identifier: Apache-2.0
"""Linear maps of one tensor or of a list: shapes, views, indexing, conversions, sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from disca_kernels.dual.registry import (
    add_handler,
    constant_handler,
    linear_handler,
    list_handler,
    rule,
    spellings,
)
from disca_kernels.dual.tensor import TangentError, tangent

#: Functions that are linear in their first argument: the same call on the tangent.
LINEAR = """
    reshape reshape_as permute transpose swapaxes swapdims movedim moveaxis t adjoint
    chunk tensor_split unsafe_chunk split split_with_sizes unsafe_split unbind
    hsplit vsplit dsplit expand expand_as broadcast_to squeeze unsqueeze flatten unflatten ravel
    narrow select index_select gather take take_along_dim masked_select unfold diagonal
    tril triu flip fliplr flipud rot90 roll repeat repeat_interleave tile
    contiguous clone view_as_real real imag conj resolve_conj resolve_neg
    neg negative positive __neg__ __pos__ sum mean cumsum trace
    __getitem__ __reversed__ pixel_shuffle pixel_unshuffle
"""

#: Linear as well, unless the new type cannot hold a tangent: then the call raises.
CONVERSIONS = """
    to type_as float double half bfloat16 cpu cuda long int short char bool byte
"""

#: Linear in a list of tensors.
LISTS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")

#: Attributes that are views.
VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "real", "imag")

for _name in (*LINEAR.split(), *CONVERSIONS.split()):
    for _func in spellings(_name):
        add_handler(_func, linear_handler, family=_name)
for _name in LISTS:
    for _func in spellings(_name):
        add_handler(_func, list_handler, family=_name)
for _name in VIEW_ATTRIBUTES:
    add_handler(getattr(Tensor, _name).__get__, linear_handler, family=_name)


def _type_handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # x.type() asks for the name of the type, x.type(dtype) converts.
    asks = len(args) == 1 and not kwargs
    return (constant_handler if asks else linear_handler)(func, args, kwargs)


add_handler(Tensor.type, _type_handler, family="type")


@rule(Tensor.view)
def _view(out: Tensor, input: Any, *shape: Any, **kwargs: Any) -> Any:
    x_dot = tangent(input)
    if x_dot is None:
        return None
    if out.dtype != x_dot.dtype:
        raise TangentError(
            f"torch.Tensor.view to {out.dtype} reads the bits of a {x_dot.dtype} tensor that "
            "carries a tangent. Call x.detach() first if that is meant."
        )
    # The tangent may have other strides than the value, where only a copy has the new shape.
    return x_dot.reshape(out.shape)


@rule(Tensor.view_as)
def _view_as(out: Tensor, input: Any, other: Any) -> Any:
    return _view(out, input)


@rule(torch.view_as_complex)
def _view_as_complex(out: Tensor, input: Any) -> Tensor:
    return torch.view_as_complex(tangent(input).contiguous())


@rule(functional.pad)
def _pad(
    out: Tensor, input: Any, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    return functional.pad(tangent(input), pad, mode)
