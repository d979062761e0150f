# SPDX-License-Identifier: Apache-2.0
"""Calls that would silently drop a tangent, and so raise."""

from __future__ import annotations

import torch
from torch import Tensor

from disca_kernels.dual.registry import add_handler, refusing_handler, spellings

_NUMBER = refusing_handler(
    "gives a plain Python or NumPy value, which cannot carry a tangent. Keep it a tensor, or call "
    "x.detach() first if the tangent is meant to end there."
)
_RAW = refusing_handler(
    "gives access to the value behind the tangent. Call x.detach() first if the tangent is meant "
    "to end there."
)
_COPY = refusing_handler("cannot be done inside dual.jvp. Return the tensor, or use x.detach().")
_BACKWARD = refusing_handler(
    "would need second derivatives, which dual.jvp does not compute; use torch.func.jvp."
)
_RANDOM = refusing_handler(
    "draws random numbers from it, which has no derivative. Call x.detach() first if that is meant."
)

_REFUSED = {
    _NUMBER: "item tolist numpy __array__ __float__ __int__ __index__ __complex__",
    _RAW: "data_ptr untyped_storage storage __dlpack__ as_subclass",
    _COPY: "__deepcopy__ __reduce__ __reduce_ex__ new_tensor retain_grad",
    _BACKWARD: "backward",
    _RANDOM: "bernoulli multinomial poisson normal",
}

for _handler, _names in _REFUSED.items():
    for _name in _names.split():
        for _func in spellings(_name):
            add_handler(_func, _handler)
for _attribute in (Tensor.data, Tensor.__cuda_array_interface__):
    add_handler(_attribute.__get__, _RAW)
add_handler(torch.autograd.grad, _BACKWARD)
