# SPDX-License-Identifier: Apache-2.0
"""What only attention's Triton kernels have: two ways to load, two loops, a checked centre."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from disca_kernels.ops.attention import triton as launchers
from disca_kernels.ops.attention import triton_tangent
from disca_kernels.ops.attention.layout import rows
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference
from disca_kernels.ops.attention.tiles import tiles_for
from disca_kernels.triton_common.descriptors import capability, descriptor_strides, has_descriptors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative error that a few roundings of the operands explain.
LIMITS = {F32: 3e-6, F16: 1e-3, BF16: 8e-3}
# B, H, Hk, Nq, Nk, D, dtype, block, lengths
CASES = [
    (2, 4, 2, 70, 150, 72, F16, 0, (0, 131)),
    (1, 2, 1, 150, 330, 40, BF16, 50, (290,)),
    (1, 2, 2, 150, 70, 16, BF16, 1, None),
    (2, 3, 3, 140, 257, 8, F32, 7, (257, 128)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
ways = pytest.mark.parametrize("way", ["descriptors", "pointers"])


class Problem:
    """Operands whose keys beyond the lengths hold NaN, and what the kernels are to return."""

    def __init__(self, case: tuple[Any, ...], way: str = "descriptors") -> None:
        batch, heads, key_heads, n_q, n_k, self.dim, self.dtype, self.block, lengths = case
        self.generator = torch.Generator().manual_seed(0)
        # Three more elements between two rows keep 16-byte loads away.
        self.gap = {"descriptors": 8, "pointers": 3}[way]
        self.lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
        sizes = [(n_q, heads), (n_k, key_heads), (n_k, key_heads)]
        self.primals = tuple(self.draw(batch, *size) for size in sizes)
        self.tangents = tuple(self.draw(batch, *size) for size in sizes)
        self.do = self.draw(batch, n_q, heads)
        self.dlse = torch.randn(batch, heads, n_q, generator=self.generator).to(DEVICE)
        for b, n in enumerate(lengths or ()):
            for x in (*self.primals[1:], *self.tangents[1:]):
                x[b, :, n:] = float("nan")
        self.scale = self.dim**-0.5
        self.options = {"kv_lengths": self.lengths, "scale": self.scale, "return_lse": True}
        self.options["block_causal"] = self.block or None

    def draw(self, batch: int, n: int, heads: int) -> Tensor:
        full = torch.randn(batch, n, heads + 1, self.dim + self.gap, generator=self.generator)
        return full.to(DEVICE, self.dtype)[:, :, 1:, : self.dim].transpose(1, 2)

    @property
    def masks(self) -> tuple[Tensor | None, int, float]:
        return self.lengths, self.block, self.scale

    def expected(self, tangents: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor, ...]:
        """Return o, lse, o_dot and lse_dot in float64."""
        dots = tuple(None if x is None else x.double() for x in tangents or self.tangents)
        primals = tuple(x.double() for x in self.primals)
        o, o_dot, lse, lse_dot = attention_jvp_reference(primals, dots, **self.options)
        return o, lse, o_dot, lse_dot

    def gradients(self) -> tuple[Tensor, ...]:
        leaves = [x.double().nan_to_num().requires_grad_() for x in self.primals]
        o, lse = attention_reference(*leaves, **self.options)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (o * self.do.double()).sum() + (lse * self.dlse.double()).sum()
        return torch.autograd.grad(loss, leaves)


def error(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    difference = (actual.double() - expected)[finite]
    return (difference.norm() / expected[finite].norm().clamp(min=1e-30)).item()


@ways
@cases
def test_value_and_tangent(case: tuple[Any, ...], way: str) -> None:
    problem = Problem(case, way)
    described = launchers._described(problem.primals)
    offered = has_descriptors(capability(problem.do.device), problem.dtype.itemsize)
    assert (described is None) == (way == "pointers" or not offered)
    expected = problem.expected()
    o, lse, rest = launchers.launch_fwd(*problem.primals, *problem.masks, wide=True)
    both = launchers.launch_jvp(problem.primals, problem.tangents, *problem.masks)
    alone = launchers.launch_tangent(
        problem.primals, problem.tangents, o, rest, lse, *problem.masks
    )
    limit = LIMITS[problem.dtype]
    assert max(map(error, (o, lse), expected)) < limit
    assert max(map(error, both, (expected[i] for i in (0, 1, 2, 3)))) < limit
    assert max(map(error, alone, expected[2:])) < limit
    assert (rest is None) == (problem.dtype == F32)
    if rest is not None:
        assert error(o.double() + rest.double(), expected[0]) < limit / 2


@ways
@cases
def test_gradients(case: tuple[Any, ...], way: str) -> None:
    problem = Problem(case, way)
    o, lse, _ = launchers.launch_fwd(*problem.primals, *problem.masks)
    actual = launchers.launch_bwd(problem.do, problem.dlse, problem.primals, o, lse, *problem.masks)
    assert max(map(error, actual, problem.gradients())) < 2 * LIMITS[problem.dtype]


@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("n_keys", [63, 64, 65, 127, 128, 129])
def test_the_masked_loop_takes_over_where_the_keys_end(n_keys: int, dtype: torch.dtype) -> None:
    problem = Problem((1, 1, 1, 3, 150, 16, dtype, 0, (n_keys,)))
    expected = problem.expected()
    actual = launchers.launch_jvp(problem.primals, problem.tangents, *problem.masks)
    assert max(map(error, actual, expected)) < LIMITS[dtype]


@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_absent_tangents(absent: tuple[int, ...]) -> None:
    problem = Problem((1, 2, 1, 20, 150, 16, F32, 0, (140,)))
    dots = tuple(None if i in absent else x for i, x in enumerate(problem.tangents))
    expected = problem.expected(dots)
    o, lse, rest = launchers.launch_fwd(*problem.primals, *problem.masks)
    both = launchers.launch_jvp(problem.primals, dots, *problem.masks)
    alone = launchers.launch_tangent(problem.primals, dots, o, rest, lse, *problem.masks)
    assert max(map(error, both, expected)) < LIMITS[F32]
    assert max(map(error, alone, expected[2:])) < LIMITS[F32]


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    problem = Problem((1, 1, 1, 20, 150, 16, F32, 0, (140,)))
    problem.scale = problem.options["scale"] = scale
    actual = launchers.launch_jvp(problem.primals, problem.tangents, *problem.masks)
    assert max(map(error, actual, problem.expected())) < LIMITS[F32]


def drifting() -> Problem:
    """The first keys, which weigh little, have S_dot around 0, all the others around 40."""
    problem = Problem((1, 1, 1, 70, 512, 64, BF16, 0, None))
    q, k, v = problem.primals
    _, k_dot, _ = problem.tangents
    q[..., 0] = 8.0
    k[:, :, :128, 0] -= 5.0
    v += 1.0
    k_dot[:, :, 128:, 0] += 40.0
    return problem


@pytest.mark.skipif(DEVICE != "cpu", reason="a compiled kernel does not see a changed constant")
@pytest.mark.parametrize("with_rest", [True, False])
def test_a_bad_first_centre_is_noticed_and_corrected(
    with_rest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = drifting()
    expected = problem.expected()
    o, lse, rest = launchers.launch_fwd(*problem.primals, *problem.masks, wide=True)
    rest = rest if with_rest else None

    def tangent() -> tuple[Tensor, Tensor]:
        return launchers.launch_tangent(
            problem.primals, problem.tangents, o, rest, lse, *problem.masks
        )

    o_dot, lse_dot = tangent()
    assert max(error(o_dot, expected[2]), error(lse_dot, expected[3])) < LIMITS[BF16]
    # Without the repetition the error of the centre shows, and the more so without `rest`.
    monkeypatch.setattr(triton_tangent, "KAPPA", tl.constexpr(1e9))
    assert error(tangent()[0], expected[2]) > (3 if with_rest else 20) * error(o_dot, expected[2])


def test_a_good_first_centre_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repetition would change the last bits of ordinary tangents, whose centre needs none."""
    if DEVICE != "cpu":
        pytest.skip("a compiled kernel does not see a changed constant")
    problem = Problem((1, 2, 2, 70, 300, 64, BF16, 0, None))
    o, lse, rest = launchers.launch_fwd(*problem.primals, *problem.masks, wide=True)
    arguments = (problem.primals, problem.tangents, o, rest, lse, *problem.masks)
    kept = launchers.launch_tangent(*arguments)[0]
    monkeypatch.setattr(triton_tangent, "TAU", tl.constexpr(1e9))
    assert torch.equal(launchers.launch_tangent(*arguments)[0], kept)
    monkeypatch.setattr(triton_tangent, "TAU", tl.constexpr(0.0))
    monkeypatch.setattr(triton_tangent, "KAPPA", tl.constexpr(0.0))
    assert not torch.equal(launchers.launch_tangent(*arguments)[0], kept)


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
def test_without_queries_or_keys(n_q: int, n_k: int) -> None:
    problem = Problem((2, 2, 1, n_q, n_k, 8, F32, 0, None))
    o, lse, _ = launchers.launch_fwd(*problem.primals, *problem.masks)
    _, _, o_dot, lse_dot = launchers.launch_jvp(problem.primals, problem.tangents, *problem.masks)
    alone, _ = launchers.launch_tangent(
        problem.primals, problem.tangents, o, None, lse, *problem.masks
    )
    gradients = launchers.launch_bwd(
        problem.do, problem.dlse, problem.primals, o, lse, *problem.masks
    )
    assert (lse == -torch.inf).all()
    for x in (o, o_dot, lse_dot, alone, *gradients):
        assert (x == 0).all()
    assert [x.shape for x in gradients] == [x.shape for x in problem.primals]


def test_tangents_may_be_laid_out_unlike_their_primals() -> None:
    problem = Problem((1, 2, 1, 20, 70, 40, F32, 0, None), "pointers")
    expected = problem.expected()
    q_dot, k_dot, v_dot = problem.tangents
    dots = (q_dot.contiguous(), k_dot.mT.contiguous().mT, v_dot)
    actual = launchers.launch_jvp(problem.primals, dots, *problem.masks)
    assert max(map(error, actual, expected)) < LIMITS[F32]


def test_descriptor_strides() -> None:
    x = torch.empty(2, 5, 3, 72, dtype=BF16).transpose(1, 2)
    assert descriptor_strides(x) == [1080, 72, 216, 1]
    assert descriptor_strides(x[:1, :, :, :40]) == [40, 72, 216, 1]
    assert descriptor_strides(x[..., 8:]) == [1080, 72, 216, 1]
    # A base or a step that is no multiple of 16 bytes, repeated rows, strided elements, nothing.
    assert descriptor_strides(x[..., 4:]) is None
    assert descriptor_strides(torch.empty(1, 2, 5, 36, dtype=BF16)) is None
    assert descriptor_strides(x[:, :1].expand(-1, 4, -1, -1)) is None
    assert descriptor_strides(x.mT) is None
    assert descriptor_strides(x[:, :, :0]) is None


def test_rows_that_32_bit_offsets_do_not_reach_are_copied() -> None:
    def with_stride(stride: int) -> Tensor:
        return torch.empty_strided((1, 1, 2, 8), (stride, stride, stride, 1), device="meta")

    near, far = with_stride(2**23 - 1), with_stride(2**23)
    assert rows(near) is near
    assert rows(far).stride(-2) == 8
    tallest = max(max(t.block_m, t.block_n) for t in tiles_for(90, 128, 2, descriptors=False))
    assert tallest * near.stride(-2) < 2**31
