# SPDX-License-Identifier: Apache-2.0
"""Properties of attention over drawn shapes, strides, lengths, masks and absent tangents."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from disca_kernels import attention, attention_jvp, attention_tangent
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference
from tests.ops.attention_calls import BACKENDS, DEVICE

# A call in Triton's interpreter takes tenths of a second.
EXAMPLES = {"triton": 25}
LIMIT = 1e-4


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides."""
    if layout == "sliced":
        full = x.new_full((*x.shape[:3], x.shape[3] + 3), torch.nan)
        full[..., 1 : x.shape[3] + 1] = x
        return full[..., 1 : x.shape[3] + 1]
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "every other":
        full = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), torch.nan)
        full[:, :, ::2] = x
        return full[:, :, ::2]
    return x


LAYOUTS = ["plain", "sliced", "tokens first", "columns", "every other"]


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], tuple[Any, ...], Tensor, dict[str, Any]]:
    """Draw primals, tangents (some absent), a cotangent and options."""
    batch, key_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    n_q, n_k = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    dim = draw(st.sampled_from([1, 8, 15, 16, 24, 33, 64, 72, 96]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(n: int, heads: int) -> Tensor:
        x = torch.randn(batch, heads, n, dim, generator=generator).to(DEVICE)
        return laid_out(x, draw(st.sampled_from(LAYOUTS)))

    sizes = (n_q, key_heads * group), (n_k, key_heads), (n_k, key_heads)
    primals = tuple(tensor(*size) for size in sizes)
    present = draw(st.tuples(*[st.booleans()] * 3))
    tangents = tuple(
        tensor(*size) if here else None for size, here in zip(sizes, present, strict=True)
    )
    options: dict[str, Any] = {
        "block_causal": draw(st.none() | st.integers(1, 90)),
        "scale": draw(st.none() | st.floats(-1, 1)),
    }
    if draw(st.booleans()):
        lengths = [draw(st.integers(0, n_k)) for _ in range(batch)]
        options["kv_lengths"] = torch.tensor(lengths, device=DEVICE)
    return primals, tangents, tensor(n_q, key_heads * group), options


def check_close(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, name
    assert torch.equal(actual.isneginf(), expected.isneginf()), name
    finite = expected.isfinite()
    error = (actual.double() - expected)[finite].abs().max() if finite.any() else torch.zeros(())
    scale = expected[finite].abs().max().clamp_min(1.0) if finite.any() else torch.ones(())
    assert error <= LIMIT * scale, (name, error, scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode_agrees_with_the_reference(backend: str) -> None:
    @settings(
        max_examples=EXAMPLES.get(backend, 100), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls())
    def check(call: tuple[Any, ...]) -> None:
        primals, tangents, cotangent, options = call
        wide = tuple(x.double().requires_grad_() for x in primals)
        wide_dots = tuple(None if x is None else x.double() for x in tangents)
        expected = attention_jvp_reference(wide, wide_dots, **options, return_lse=True)
        o, o_dot, lse, lse_dot = expected
        gradients = torch.autograd.grad(
            attention_reference(*wide, **options), wide, cotangent.double()
        )
        leaves = tuple(x.detach().requires_grad_() for x in primals)
        options["backend"] = backend
        value, value_lse = attention(*leaves, **options, return_lse=True)
        check_close("o", value, o)
        check_close("lse", value_lse, lse)
        actual = torch.autograd.grad(value, leaves, cotangent)
        for name, a, e in zip("qkv", actual, gradients, strict=True):
            check_close(f"d{name}", a, e)
        pair = attention_jvp(primals, tangents, **options, return_lse=True)
        names = "o", "o_dot", "lse", "lse_dot"
        for name, a, e in zip(names, pair, expected, strict=True):
            check_close(f"{name} of the pair", a, e)
        over = attention_tangent(primals, tangents, value.detach(), value_lse.detach(), **options)
        check_close("o_dot over a value", over[0], o_dot)
        check_close("lse_dot over a value", over[1], lse_dot)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tangent_is_linear_and_blind_to_a_shift_of_the_scores(backend: str) -> None:
    """A tangent of q along a direction to which all keys have the same product changes nothing."""
    generator = torch.Generator().manual_seed(4)
    q, k, v, q_dot, k_dot, v_dot = torch.randn(6, 2, 2, 30, 16, generator=generator).to(DEVICE)
    k[..., 0] = 1.0
    shift = torch.zeros_like(q)
    shift[..., 0] = torch.randn(2, 2, 30, generator=generator).to(DEVICE)

    def tangent(*dots: Tensor) -> Tensor:
        return attention_jvp((q, k, v), dots, backend=backend)[1]

    one, other = tangent(q_dot, k_dot, v_dot), tangent(3 * q_dot, 3 * k_dot, 3 * v_dot)
    torch.testing.assert_close(other, 3 * one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tangent(q_dot + shift, k_dot, v_dot), one, rtol=1e-4, atol=1e-5)
    moved = attention_jvp((q, k, v), (shift, None, None), backend=backend, return_lse=True)
    assert moved[1].abs().max() < 1e-4
    torch.testing.assert_close(moved[3], shift[..., 0] / 4, rtol=1e-4, atol=1e-5)
