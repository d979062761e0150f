# SPDX-License-Identifier: Apache-2.0
# An operand is (address, stride of the batch, stride of the tokens); an absent output is address 0.
# The functions that end in _cuda exist only where build_info()["cuda"] is true.
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
