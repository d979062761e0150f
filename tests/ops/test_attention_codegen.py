# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels compile to for 8.0, 9.0 and 10.0, without a GPU."""

import pytest

from disca_kernels.ops.attention.tiles import Tile, padded_dim, tiles_for
from disca_kernels.testing.codegen import ARCHITECTURES, KernelReport, KernelSpec, compile_kernels

# The shared memory that one program may have: 163 KiB on 8.0, 227 KiB on 9.0 and 10.0.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPERANDS = {
    "fwd_kernel": ("q", "k", "v", "o"),
    "jvp_kernel": ("q", "k", "v", "q_dot", "k_dot", "v_dot", "o", "o_dot"),
    "bwd_kernel_dq": ("q", "k", "v", "o", "do", "dq"),
    "bwd_kernel_dkdv": ("q", "k", "v", "do", "dk", "dv"),
}
# HMMA before 9.0; groups of warps, HGMMA, on 9.0; UTCHMMA on 10.0.
MATRIX = r"HMMA|HGMMA|UTC\w*MMA"


def spec(kernel: str, tile: Tile, head_dim: int, causal: bool) -> KernelSpec:
    backward = "bwd" in kernel
    pointers = {f"p_{name}": "*bf16" for name in OPERANDS[kernel]}
    pointers |= {f"p_{name}": "*fp32" for name in ("lse", *("delta",) * backward)}
    pointers |= {"p_lengths": "*i64"}
    strides = {f"stride_{x}{y}": "i32" for x in "qkv" + "d" * backward for y in "bhn"}
    constants = {
        "D": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": causal,
        **({"KNOWN_LSE": False} if kernel == "jvp_kernel" else {}),
    }
    return KernelSpec(
        kernel=f"disca_kernels.ops.attention.triton:_attention_{kernel}",
        signature={**pointers, **strides, "H": "i32", "NQ": "i32", "NK": "i32", "scale": "fp32"},
        constexprs=constants,
        divisible=(*pointers, *strides),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def compiled(arch: int, head_dim: int) -> list[KernelReport]:
    tiles = tiles_for(arch, head_dim, itemsize=2)
    specs = [
        spec(kernel, tile, head_dim, causal=head_dim == 64)
        for kernel, tile in zip(OPERANDS, tiles, strict=True)
    ]
    return compile_kernels(specs, [arch])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_fit_the_device_and_spill_nothing(arch: int, head_dim: int) -> None:
    for report in compiled(arch, head_dim):
        assert report.spills == report.stack_bytes == report.local_bytes == 0, report
        assert report.shared_bytes <= SHARED_BYTES[arch], report
        assert report.count(MATRIX) > 0, report


def test_the_common_devices_multiply_with_their_own_units() -> None:
    """The tiles of 9.0 reach its warp-group unit, which plain HMMA would not."""
    fwd, jvp, dq, dkdv = compiled(90, 128)
    for report in (fwd, jvp, dq, dkdv):
        assert report.count("HGMMA") > report.count("HMMA"), report
