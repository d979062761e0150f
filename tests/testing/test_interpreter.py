# SPDX-License-Identifier: Apache-2.0
"""The interpreter's bfloat16, repaired, against PyTorch's."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from disca_kernels.testing.interpreter import _from_bfloat16, _to_bfloat16

_KERNELS = """
# The interpreter reads a kernel's source from its file.
import torch
import triton
import triton.language as tl
from disca_kernels.testing.interpreter import repair_bfloat16

@triton.jit
def cast(p_x, p_y, p_z, N: tl.constexpr):
    o = tl.arange(0, N)
    b_y = tl.load(p_x + o).to(tl.bfloat16)
    tl.store(p_y + o, b_y)
    tl.store(p_z + o, b_y.to(tl.float32))

@triton.jit
def product(p_x, p_y, p_z, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_z + o, tl.dot(tl.load(p_x + o), tl.load(p_y + o)))

repair_bfloat16()
repair_bfloat16()
x = torch.randn(256, generator=torch.Generator().manual_seed(0))
x[::7] = 0.0  # zeros among the others, which a masked tile always has
y, z = torch.empty(256, dtype=torch.bfloat16), torch.empty(256)
cast[(1,)](x, y, z, 256)
assert torch.equal(y, x.bfloat16()), (y - x.bfloat16()).abs().max()
assert torch.equal(z, x.bfloat16().float())
a, b, c = x.view(16, 16).bfloat16(), x.flip(0).view(16, 16).bfloat16(), torch.empty(16, 16)
product[(1,)](a, b, c, 16)
torch.testing.assert_close(c, a.float() @ b.float())
print("equal")
"""


def test_rounds_to_nearest_even_as_pytorch_does() -> None:
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.00390625, 1.01171875, 3.4e38])
    for x in (values[~values.isnan()], special):
        rounded = torch.from_numpy(_to_bfloat16(x.numpy()).view("int16")).view(torch.bfloat16)
        assert torch.equal(rounded, x.bfloat16())
        back = torch.from_numpy(_from_bfloat16(_to_bfloat16(x.numpy())))
        assert torch.equal(back, x.bfloat16().float())
    nan = _to_bfloat16(values[values.isnan()].numpy())
    assert torch.from_numpy(nan.view("int16")).view(torch.bfloat16).isnan().all()


def test_kernels_cast_and_multiply_as_pytorch_does(tmp_path: Path) -> None:
    script = tmp_path / "kernels.py"
    script.write_text(_KERNELS)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *(p for p in sys.path if p)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    finished = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert finished.stdout.strip() == "equal", finished.stderr[-3000:]
