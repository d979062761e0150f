# SPDX-License-Identifier: Apache-2.0
"""Launchers of the CUDA C++ kernel of attention for compute capability 9.0 (Hopper).

The kernel computes value and tangent in one pass. **It has never run on a device**: no figure or
test of ours comes from one. It compiles without spills, and a test runs it on an emulated machine
(docs/ops/attention.md says what that shows and what it does not). So it is there for
`backend="cuda"` alone, and `backend="auto"` does not choose it.

What it does not compute is Triton's (`operators.py`), so that the value of
`attention_jvp(..., backend="cuda")` has its gradient, from the same lse.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from disca_kernels import _ext
from disca_kernels.backend import BackendError
from disca_kernels.operands import address, dtype_name
from disca_kernels.ops.attention.layout import dense
from disca_kernels.triton_common.descriptors import descriptor_strides

HEAD_DIM = 128
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
_Operand = tuple[int, tuple[int, ...], tuple[int, ...]]


def reasons(q: Tensor, *_: Tensor | None) -> list[str]:
    """Return what keeps the kernel from these operands; `disca_kernels.backend` says the rest.

    Args:
        q: [B, H, Nq, D] queries. Dtype, D and device of the others are those of q.

    Returns:
        One sentence for each reason, none if the kernel can run.
    """
    found = []
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if capability != CAPABILITY:
            wanted, got = (".".join(map(str, c)) for c in (CAPABILITY, capability))
            found.append(f"needs compute capability {wanted} exactly, {q.device} has {got}")
    if _ext.why_not() is None and _ext.load().build_info()["cuda"]:
        if not hasattr(_ext.load(), "attention_jvp_cuda"):
            found.append("disca_kernels._C was built without sm_90a (it needs nvcc 12.3 or newer)")
        if find_spec("triton") is None:
            found.append("needs the package triton for the passes that it leaves to it")
    if q.dtype not in DTYPES:
        found.append(f"needs bfloat16 or float16, got {dtype_name(q)}")
    if q.shape[-1] != HEAD_DIM:
        found.append(f"needs head dimension {HEAD_DIM}, got {q.shape[-1]}")
    return found


def _loadable(x: Tensor) -> Tensor:
    """Return `x`, or a copy if the copy engine cannot reach its rows."""
    if descriptor_strides(x) is not None:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _operand(x: Tensor | None) -> _Operand | None:
    """Describe [B, heads, N, D] for C++."""
    if x is None:
        return None
    strides = descriptor_strides(x)
    assert strides is not None, "an operand that the copy engine cannot reach"
    return x.data_ptr(), tuple(x.shape[:3]), tuple(strides[:3])


def launch_jvp(
    primals: Primals, tangents: Tangents, kv_lengths: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, lse, o_dot and lse_dot from one pass over the keys.

    Args:
        primals: q [B, H, Nq, 128], k and v [B, Hk, Nk, 128]. One whose strides or address are not
            multiples of 16 bytes, or that repeats elements, is copied.
        tangents: of the shape and dtype of their primals; None stands for zero and costs nothing.
        kv_lengths: [B] integers, clamped to 0 .. Nk, or None.
        block: 0; the kernel has no causal mask.
        scale: factor of the scores.

    Returns:
        o and o_dot in the dtype of q, lse and lse_dot [B, H, Nq] in float32.

    Raises:
        BackendError: `block` is not 0.
        RuntimeError: the device has another compute capability, or the driver refused the launch.
    """
    if block:
        raise BackendError(
            "attention: backend='cuda' was requested and cannot run: its kernel has no causal "
            "mask. Would work: 'triton', 'eager'."
        )
    q, k, v = map(_loadable, primals)
    dots = tuple(None if x is None else _loadable(x) for x in tangents)
    o, o_dot = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    lse, lse_dot = (
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2)
    )
    if o.numel() == 0 or k.numel() == 0:
        return o.zero_(), lse.fill_(-torch.inf), o_dot.zero_(), lse_dot.zero_()
    if not any(x is not None for x in dots):
        from disca_kernels.ops.attention.triton import launch_fwd

        o, lse, _ = launch_fwd(q, k, v, kv_lengths, block, scale)
        return o, lse, o_dot.zero_(), lse_dot.zero_()
    lengths = None if kv_lengths is None else dense(kv_lengths.to(torch.int64))
    with torch.cuda.device(q.device):
        _ext.load().attention_jvp_cuda(
            dtype=dtype_name(q),
            primals=(_operand(q), _operand(k), _operand(v)),
            tangents=tuple(_operand(x) for x in dots),
            lengths=address(lengths),
            scale=scale,
            o=o.data_ptr(),
            lse=lse.data_ptr(),
            o_dot=o_dot.data_ptr(),
            lse_dot=lse_dot.data_ptr(),
            stream=torch.cuda.current_stream(q.device).cuda_stream,
        )
    return o, lse, o_dot, lse_dot
