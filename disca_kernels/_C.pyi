# SPDX-License-Identifier: Apache-2.0
# An operand is (address, stride of the batch, stride of the tokens); an absent output is address 0.
# The functions that end in _cuda exist only where build_info()["cuda"] is true.
# Of attention an operand is (address, strides of batch, heads and tokens), an output its address.
from typing import Any

_Rows = tuple[int, int, int]
_Shape = tuple[int, int, int, bool]  # B, N, C, one modulation per token
_Dtypes = tuple[str, str]  # of x and of the modulations

def build_info() -> dict[str, Any]: ...
def adaln_modulate_fwd_cpu(
    shape: _Shape,
    eps: float,
    dtypes: _Dtypes,
    x: _Rows,
    shift: _Rows,
    scale: _Rows,
    y: int,
    threads: int,
) -> None: ...
def adaln_modulate_bwd_cpu(
    shape: _Shape,
    eps: float,
    dtypes: _Dtypes,
    dy: _Rows,
    x: _Rows,
    scale: _Rows,
    dx: int,
    dshift: int,
    dscale: int,
    threads: int,
) -> None: ...
def adaln_modulate_jvp_cpu(
    shape: _Shape,
    eps: float,
    dtypes: _Dtypes,
    primals: tuple[_Rows, _Rows, _Rows],
    tangents: tuple[_Rows | None, _Rows | None, _Rows | None],
    y: int,
    y_dot: int,
    threads: int,
) -> None: ...
def adaln_modulate_fwd_cuda(
    shape: _Shape,
    eps: float,
    dtypes: _Dtypes,
    x: _Rows,
    shift: _Rows,
    scale: _Rows,
    y: int,
    stream: int,
) -> None: ...
def adaln_modulate_bwd_cuda(
    shape: _Shape,
    eps: float,
    dtypes: _Dtypes,
    dy: _Rows,
    x: _Rows,
    scale: _Rows,
    dx: int,
    dshift: int,
    dscale: int,
    rows_per_split: int,
    stream: int,
) -> None: ...
def adaln_modulate_jvp_cuda(
    shape: _Shape,
    eps: float,
    dtypes: _Dtypes,
    primals: tuple[_Rows, _Rows, _Rows],
    tangents: tuple[_Rows | None, _Rows | None, _Rows | None],
    y: int,
    y_dot: int,
    stream: int,
) -> None: ...

_Operand = tuple[int, int, int, int]
_Triple = tuple[_Operand, _Operand, _Operand]
_Tangents = tuple[_Operand | None, _Operand | None, _Operand | None]
# (B, H, H of the keys, Nq, Nk, D), block, scale, dtype, address of [B] int64 lengths or 0
_Problem = tuple[tuple[int, ...], int, float, str, int]

def attention_cpu_isas() -> list[str]: ...
def attention_fwd_cpu(
    problem: _Problem,
    primals: _Triple,
    outputs: tuple[int, int, int],  # o, lse, rest or 0
    isa: str,  # one of attention_cpu_isas(), "" for the first
    threads: int,
) -> None: ...
def attention_jvp_cpu(
    problem: _Problem,
    primals: _Triple,
    tangents: _Tangents,
    outputs: tuple[int, int, int, int],  # o, lse, o_dot, lse_dot
    isa: str,
    threads: int,
) -> None: ...
def attention_tangent_cpu(
    problem: _Problem,
    primals: _Triple,
    tangents: _Tangents,
    known: tuple[_Operand, _Operand | None, int],  # o, rest, lse
    outputs: tuple[int, int],  # o_dot, lse_dot
    isa: str,
    threads: int,
) -> None: ...
def attention_bwd_cpu(
    problem: _Problem,
    d_o: _Operand,
    primals: _Triple,
    known: tuple[_Operand, int, int],  # o, lse, dlse or 0
    outputs: tuple[int, int, int],  # dq, dk, dv
    isa: str,
    threads: int,
) -> None: ...

# Address, sizes of B, heads and N, their strides. Only where the build has code for sm_90a.
_Tensor = tuple[int, tuple[int, int, int], tuple[int, int, int]]

def attention_jvp_cuda(
    *,
    dtype: str,
    primals: tuple[_Tensor, _Tensor, _Tensor],
    tangents: tuple[_Tensor | None, _Tensor | None, _Tensor | None],
    lengths: int,
    scale: float,
    o: int,
    lse: int,
    o_dot: int,
    lse_dot: int,
    stream: int,
) -> None: ...

# Of qk_norm_rope pairs are of queries and keys, or of cosines and sines, addresses of float32, 0
# for what is absent; an output or cotangent is (address, strides of batch, heads and tokens).
_Pair = tuple[int, int]
_Heads = list[tuple[int, ...] | None]

def qk_norm_rope_fwd_cpu(
    shape: tuple[int, int, int, int, int, bool],  # B, N, H, D, rope_tokens, interleaved
    eps: float,
    dtype: str,
    qkv: _Rows,
    qkv_dot: _Rows | None,
    weights: _Pair,
    weight_dots: _Pair,
    tables: _Pair,
    values: _Heads,
    tangents: _Heads,
    threads: int,
) -> None: ...
def qk_norm_rope_bwd_cpu(
    shape: tuple[int, int, int, int, int, bool],
    eps: float,
    dtype: str,
    cotangents: _Heads,
    qkv: _Rows,
    weights: _Pair,
    tables: _Pair,
    dqkv: _Rows | None,
    dweights: _Pair,
    threads: int,
) -> None: ...

# Of cache_read, shape is B, N, C, O; a weight is (address, stride of its rows); pairs are of
# current and cache, or of a primal and its tangent; biases are addresses of float32; outputs y, z,
# y_dot.
def cache_read_cpu(
    shape: tuple[int, ...],
    dtype: str,
    tokens: tuple[_Rows, _Rows],
    tokens_dot: tuple[_Rows | None, _Rows | None],
    weights: tuple[tuple[int, int], tuple[int, int]],
    biases: tuple[int, int],
    outputs: tuple[int, ...],
    threads: int,
) -> None: ...

# Of gelu_tanh and swiglu, shape is that of y without its prefix, dtype that of x; pairs are of a
# primal and its tangent; biases and their gradients are addresses of float32, 0 for none.
_Prefix = tuple[int, ...]  # address, strides of batch, heads and tokens

def gelu_tanh_fwd_cpu(
    shape: tuple[int, ...],
    dtype: str,
    x: _Rows,
    x_dot: _Rows | None,
    biases: _Pair,
    heads: _Pair,  # their number and width
    prefixes: tuple[_Prefix | None, _Prefix | None],
    outputs: _Pair,
    threads: int,
) -> None: ...
def gelu_tanh_bwd_cpu(
    shape: tuple[int, ...],
    dtype: str,
    dy: _Rows,
    x: _Rows,
    bias: int,
    dx: int,
    dbias: int,
    threads: int,
) -> None: ...
def swiglu_fwd_cpu(
    shape: tuple[int, ...],
    dtype: str,
    gate_first: bool,
    x: _Rows,
    x_dot: _Rows | None,
    biases: _Pair,
    outputs: _Pair,
    threads: int,
) -> None: ...
def swiglu_bwd_cpu(
    shape: tuple[int, ...],
    dtype: str,
    gate_first: bool,
    dy: _Rows,
    x: _Rows,
    bias: int,
    dx: int,
    dbias: int,
    threads: int,
) -> None: ...
