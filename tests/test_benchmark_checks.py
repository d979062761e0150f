# SPDX-License-Identifier: Apache-2.0
"""What stands between a wrong kernel and a speed: the row checks; and what memory is counted."""

import pytest
import torch
from torch import Tensor

from benchmarks import slices
from benchmarks.clock import middle_half, peak_memory
from benchmarks.slices import Part, check_parts, chosen_rows, expected_attention
from disca_kernels.ops.attention.cases import AttentionCase, Operands
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference

CASE = AttentionCase(2, 3, 200, 150, 16)


def exact(mode: str, operands: Operands) -> tuple[Tensor, ...]:
    """Every row of every result in float64."""
    primals = tuple(x.double() for x in operands.primals)
    if mode == "bwd":
        leaves = [x.requires_grad_() for x in primals]
        return torch.autograd.grad(
            attention_reference(*leaves), leaves, operands.cotangent.double()
        )
    tangents = tuple(x.double() for x in operands.tangents)
    o, o_dot = attention_jvp_reference(primals, tangents)[:2]
    return {"fwd": (o,), "jvp": (o, o_dot), "tangent": (o_dot,)}[mode]


@pytest.mark.parametrize("mode", ["fwd", "jvp", "tangent", "bwd"])
def test_rows_agree_with_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_BLOCK", 64)  # several blocks, the last one ragged
    operands = CASE.operands()
    parts = expected_attention(CASE, mode, operands)
    whole = exact(mode, operands)
    assert check_parts(whole, parts, torch.float32) < 1e-6
    assert all(part.expected.shape[2] < x.shape[2] for part, x in zip(parts, whole, strict=True))


def test_rows_are_the_ends_and_some_inside() -> None:
    rows = chosen_rows(1000, 3, torch.device("cpu")).tolist()
    assert rows == sorted(set(rows))
    assert rows[:32] == [*range(32)]
    assert rows[-32:] == [*range(968, 1000)]
    assert chosen_rows(20, 3, torch.device("cpu")).tolist() == [*range(20)]
    assert chosen_rows(1000, 4, torch.device("cpu")).tolist() != rows


def test_masked_case_is_refused() -> None:
    case = AttentionCase(1, 1, 4, 4, 8, causal=True)
    with pytest.raises(ValueError, match="only unmasked attention"):
        expected_attention(case, "fwd", case.operands())


def one_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, -1, 0] = float("nan")
    return x


def one_row(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 5] += 1.0
    return x


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_nan, "y: NaN or infinity"),
        (one_row, "y: relative error"),
        (lambda x: 1.02 * x, "y: relative error"),
        (lambda x: x[:, :-1], "y: shape"),
    ],
)
def test_damage_is_noticed(damage: object, message: str) -> None:
    expected = torch.randn(2, 5000, 4, dtype=torch.float64)
    parts = [Part("y", expected)]
    good = expected.to(torch.bfloat16)
    assert check_parts((good,), parts, torch.bfloat16) < 3e-3
    with pytest.raises(AssertionError, match=message):
        check_parts((damage(good),), parts, torch.bfloat16)  # type: ignore[operator]


def test_missing_result_is_noticed() -> None:
    with pytest.raises(AssertionError, match="0 results"):
        check_parts((), [Part("y", torch.ones(2, 2))], torch.float32)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    size = 1 << 26  # above what the allocator may keep after a free

    def run() -> Tensor:
        first = torch.ones(size // 4)
        second = first + 1
        del first
        return second * 2

    peak = peak_memory(run, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell")
    assert 1.9 * size < peak < 2.5 * size


def test_middle_half() -> None:
    assert middle_half([3.0]) == (3.0, 3.0, 3.0)
    assert middle_half([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
