# SPDX-License-Identifier: Apache-2.0
"""The specialisations of the qk_norm_rope kernels whose machine code is checked without a GPU."""

from disca_kernels.testing.codegen import KernelSpec

# The tensors of a launch in the kernel's order: of qkv's dtype, of the weights', or partial sums.
_ROWS = {
    "fwd": ("qkv", "q", "k", "v"),
    "bwd": ("dq", "dk", "dv", "qkv", "dqkv"),
    "jvp": ("qkv", "qkv_dot", "q", "k", "v", "q_dot", "k_dot", "v_dot"),
}
_WEIGHTS = ("q_weight", "k_weight")
_COMPANIONS = {
    "fwd": _WEIGHTS,
    "bwd": _WEIGHTS,
    "jvp": (*_WEIGHTS, "q_weight_dot", "k_weight_dot"),
}
_SUMS = {"fwd": (), "bwd": ("dq_weight", "dk_weight"), "jvp": ()}
_STRIDES = {
    "fwd": "xb xn yb yh",
    "bwd": "qb qh qn kb kh kn vb vh vn xb xn",
    "jvp": "xb xn xdb xdn yb yh",
}
# HunyuanVideo's block with float32 tables and its text stream, another host's convention, float32.
_SHAPES = [
    ("bf16", "bf16", "fp32", 128, True),
    ("bf16", "bf16", None, 128, True),
    ("bf16", "bf16", "bf16", 64, False),
    ("fp32", "fp32", "fp32", 128, True),
]


def _spec(
    mode: str, dtype: str, weights: str, tables: str | None, head_dim: int, interleaved: bool
) -> KernelSpec:
    """Return one kernel as its launcher calls it."""
    from disca_kernels.ops.qk_norm_rope.triton import HEADS_PER_PROGRAM, tile

    block_n, block_h, num_warps = tile(head_dim, interleaved)
    pointers = dict.fromkeys((f"p_{name}" for name in _ROWS[mode]), f"*{dtype}")
    pointers |= dict.fromkeys((f"p_{name}" for name in _COMPANIONS[mode]), f"*{weights}")
    pointers |= dict.fromkeys((f"p_{name}" for name in _SUMS[mode]), "*fp32")
    if tables is not None:
        pointers |= {"p_cos": f"*{tables}", "p_sin": f"*{tables}"}
    strides = {f"stride_{suffix}": "i32" for suffix in _STRIDES[mode].split()}
    sizes = {"N": "i32", "H": "i32", "rope_tokens": "i32", "eps": "fp32"}
    if mode == "bwd":
        sizes |= {"n_tasks": "i32", "tasks_per_split": "i32"}
    convention = "no" if tables is None else "interleaved" if interleaved else "half-split"
    return KernelSpec(
        kernel="disca_kernels.ops.qk_norm_rope."
        f"triton_{'backward' if mode == 'bwd' else 'forward'}:_qk_norm_rope_{mode}_kernel",
        signature={**pointers, **strides, **sizes},
        constexprs={
            **({} if tables is not None else {"p_cos": None, "p_sin": None}),
            **{"D": head_dim, "HEADS": HEADS_PER_PROGRAM, "INTERLEAVED": interleaved},
            **{"BLOCK_N": block_n, "BLOCK_H": block_h},
        },
        divisible=(*pointers, *strides),
        num_warps=num_warps,
        label=f"{dtype}, weights {weights}, {convention} rotation {tables or ''}, D={head_dim}",
    )


def specs(arch: int) -> list[KernelSpec]:
    """Return what is checked for one compute capability (times ten)."""
    return [_spec(mode, *shape) for mode in _ROWS for shape in _SHAPES]
