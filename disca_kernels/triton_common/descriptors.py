# SPDX-License-Identifier: Apache-2.0
"""Which devices and which tensors can be read through a tensor descriptor."""

from functools import cache

import torch
from torch import Tensor


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Return the compute capability of `device` times ten; the interpreter, on a CPU, is 9.0."""
    return _capability(device) if device.type == "cuda" else 90


def has_descriptors(capability: int, itemsize: int) -> bool:
    """Whether the kernels take tensor descriptors on a device for elements of this size.

    On 12.x, and wherever float32 is multiplied without matrix units, pointers leave more registers.
    """
    return 90 <= capability < 120 and itemsize <= 2


def descriptor_strides(x: Tensor) -> list[int] | None:
    """Return strides by which a tensor descriptor can reach all of `x`, or None if none can.

    The hardware wants a base and strides that are multiples of 16 bytes. A dimension of size 1 is
    never stepped along, so that its stride may be anything. A repeated (expanded) dimension is
    left to pointers.
    """
    unit = 16 // x.element_size()
    if x.numel() == 0 or x.data_ptr() % 16 or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return None
    outer = zip(x.stride()[:-1], x.shape[:-1], strict=True)
    found = [stride if size > 1 else unit * -(-x.shape[-1] // unit) for stride, size in outer]
    if any(stride % unit or stride == 0 for stride in found):
        return None
    return [*found, 1]
