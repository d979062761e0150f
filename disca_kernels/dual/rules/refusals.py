# SPDX-License-Identifier: Apache-2.0
"""Calls that would silently drop a tangent, and so raise."""

from __future__ import annotations

import torch
from torch import Tensor

from disca_kernels.dual.registry import add_handler, refusing_handler, spellings

_DETACH = "Call x.detach() first if the tangent is meant to end there."
_NUMBER = refusing_handler(f"its result is no tensor and has no tangent. {_DETACH}")
_RAW = refusing_handler(f"it reaches for the value behind the tangent. {_DETACH}")
_COPY = refusing_handler("a copy or a file would not keep the tangent. Use x.detach().")
_BACKWARD = refusing_handler(
    "that would need second derivatives, which dual.jvp does not compute. Use torch.func.jvp."
)
_RANDOM = refusing_handler(f"random draws from it have no derivative. {_DETACH}")

_REFUSED = {
    _NUMBER: "item tolist numpy __array__ __float__ __int__ __index__ __complex__",
    _RAW: "data_ptr untyped_storage storage __dlpack__ __dlpack_device__ as_subclass",
    _COPY: "__deepcopy__ __reduce__ __reduce_ex__ new_tensor",
    _BACKWARD: "backward",
    _RANDOM: "bernoulli multinomial poisson normal",
}

for _handler, _names in _REFUSED.items():
    for _name in _names.split():
        for _func in spellings(_name):
            add_handler(_func, _handler)
for _name in ("data", "__cuda_array_interface__"):
    add_handler(getattr(Tensor, _name).__get__, _RAW)
add_handler(torch.autograd.grad, _BACKWARD)
