# SPDX-License-Identifier: Apache-2.0
"""Attention: the log-sum-exp, padding, what computes the value, and what is refused."""

import os

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import BackendError, attention, attention_jvp, attention_tangent
from disca_kernels.ops.attention.cases import AttentionCase, Operands
from disca_kernels.ops.attention.reference import attention_jvp_reference, attention_reference
from tests.ops.attention_calls import BACKENDS, CASES, DEVICE, double, options, tangents_by

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
cases = pytest.mark.parametrize("case", CASES, ids=str)
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("poison", [1e3, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_keys_beyond_the_length_have_no_influence(
    dtype: torch.dtype, poison: float, backend: str
) -> None:
    """Whatever padding holds; a weight of zero times NaN would be NaN."""
    case = AttentionCase(2, 2, 37, 70, 16, dtype, lengths=(1, 40))
    operands = case.operands(device=DEVICE)
    kwargs = {**options(case, operands), "backend": backend}
    keys = tuple(x.clone() for x in (*operands.primals[1:], *operands.tangents[1:]))
    for x in keys:
        x[0, :, 1:], x[1, :, 40:] = poison, -poison
    poisoned = operands._replace(
        primals=(operands.primals[0], *keys[:2]), tangents=(operands.tangents[0], *keys[2:])
    )

    def everything(operands: Operands) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
        o = attention(*leaves, **kwargs)
        gradients = torch.autograd.grad(o, leaves, operands.cotangent)
        ways = (tangents_by(way, operands, **kwargs) for way in ("pair", "func.jvp", "over"))
        return (o.detach(), *gradients, *(x for pair in ways for x in pair))

    clean, results = everything(operands), everything(poisoned)
    torch.testing.assert_close(results, clean, rtol=0, atol=0)
    for gradient in results[2:4]:
        assert gradient[0, :, 1:].eq(0).all()
        assert gradient[1, :, 40:].eq(0).all()


@backends
@cases
def test_log_sum_exp_and_its_derivatives(case: AttentionCase, backend: str) -> None:
    operands = case.operands(device=DEVICE)
    kwargs = options(case, operands)
    weight = torch.randn(operands.primals[0].shape[:3], generator=torch.Generator().manual_seed(2))
    weight = weight.to(DEVICE)

    def results(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], function, pair):
        leaves = tuple(x.detach().requires_grad_() for x in primals)
        o, lse = function(*leaves, **kwargs, return_lse=True)
        wide = weight.to(lse.dtype)
        loss = (lse * wide).masked_fill(lse.isneginf(), 0.0).sum() + (o * o).sum().to(lse.dtype)
        _, _, lse_of_pair, lse_dot = pair(leaves, tangents, **kwargs, return_lse=True)
        loss_of_pair = (lse_of_pair * wide).masked_fill(lse_of_pair.isneginf(), 0.0).sum()
        return (
            lse.detach(),
            *torch.autograd.grad(loss, leaves),
            lse_of_pair.detach(),
            lse_dot,
            *torch.autograd.grad(loss_of_pair, leaves[:2]),
        )

    expected = results(
        double(operands.primals), double(operands.tangents),
        attention_reference, attention_jvp_reference,
    )  # fmt: skip
    actual = results(
        operands.primals, operands.tangents,
        lambda *x, **o: attention(*x, **o, backend=backend),
        lambda *x, **o: attention_jvp(*x, **o, backend=backend),
    )  # fmt: skip
    names = ["lse", "dq", "dk", "dv", "lse of the pair", "lse_dot", "dq of lse", "dk of lse"]
    # A tile sums D products one after another.
    limit = (4 * torch.finfo(case.dtype).eps + 1e-6) * max(1.0, case.head_dim / 128)
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == (F32 if "d" not in name or "dot" in name else case.dtype), name
        assert torch.equal(a.isneginf(), e.isneginf()), name
        kept = e.isfinite()
        error = (a.double() - e)[kept].norm() / e[kept].norm().clamp_min(1e-30)
        assert error < limit, (name, error)
    forward, tangent = jvp(
        lambda *x: attention(*x, **kwargs, return_lse=True, backend=backend),
        operands.primals, operands.tangents,
    )  # fmt: skip
    torch.testing.assert_close(forward[1], actual[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tangent[1], actual[5], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_value_may_come_from_another_attention(
    dtype: torch.dtype, causal: bool, backend: str
) -> None:
    """PyTorch's value, this backend's gradient and tangent."""
    case = AttentionCase(2, 4, 33, 33, 24, dtype, causal=causal, key_heads=2)
    operands = case.operands(device=DEVICE)
    kwargs = {"causal": causal, "primal": "sdpa", "backend": backend}
    leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
    o, lse = attention(*leaves, **kwargs, return_lse=True)
    gradients = torch.autograd.grad(o, leaves, operands.cotangent)
    o_dot = jvp(lambda *x: attention(*x, **kwargs), operands.primals, operands.tangents)[1]

    wide = tuple(x.double().requires_grad_() for x in operands.primals)
    exact = attention_jvp_reference(wide, double(operands.tangents), causal=causal, return_lse=True)
    exact_gradients = torch.autograd.grad(exact[0], wide, operands.cotangent.double())
    limit = 4 * torch.finfo(dtype).eps
    pairs = zip((o, o_dot, lse, *gradients), (*exact[:3], *exact_gradients), strict=True)
    for actual, expected in pairs:
        assert (actual - expected).norm() / expected.norm() < limit


def test_another_attention_needs_no_choice_of_backend() -> None:
    """Sequences so short that "auto" would otherwise take eager."""
    operands = AttentionCase(1, 2, 6, 6, 8).operands(device=DEVICE)
    o = attention(*operands.primals, primal="sdpa")
    torch.testing.assert_close(o, attention_reference(*operands.primals))


@backends
def test_nan_in_a_query_or_key_is_not_lost(backend: str) -> None:
    operands = AttentionCase(1, 1, 5, 9, 8).operands(device=DEVICE)
    (q, k, v), tangents = operands.primals, operands.tangents
    poisoned = q.clone()
    poisoned[:, :, 2, 3] = torch.nan
    for kwargs in ({"backend": backend}, {"backend": backend, "return_lse": True}):
        results = attention(poisoned, k, v, **kwargs)
        for x in results if isinstance(results, tuple) else (results,):
            assert x[:, :, 2].isnan().all()
            assert x[:, :, [0, 1, 3, 4]].isfinite().all()
    o, o_dot, lse, lse_dot = attention_jvp((poisoned, k, v), tangents, **kwargs)
    for x in (o, o_dot, lse, lse_dot):
        assert x[:, :, 2].isnan().all()
        assert x[:, :, :2].isfinite().all()
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.no_grad():
        leaves[1][:, :, 4] = torch.nan
    o = attention(*leaves, backend=backend)
    gradients = torch.autograd.grad(o, leaves, operands.cotangent)
    assert all(x.isnan().all() for x in gradients)


@backends
@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 2, 0)])
def test_keys_without_a_query_have_no_gradient(shape: tuple[int, int, int], backend: str) -> None:
    batch, heads, n_q = shape
    q = torch.zeros(batch, heads, n_q, 8, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(batch, 2, 4, 8, device=DEVICE).requires_grad_() for _ in range(2))
    dk, dv = torch.autograd.grad(attention(q, k, v, backend=backend).sum(), (k, v))
    assert dk.eq(0).all()
    assert dv.eq(0).all()


def test_another_attention_says_what_it_cannot_do() -> None:
    case = AttentionCase(2, 2, 5, 7, 8, lengths=(0, 6))
    operands = case.operands(device=DEVICE)
    kwargs = {"primal": "sdpa", "backend": "triton"}
    for change, message in (
        ({"kv_lengths": operands.kv_lengths}, "not given key lengths"),
        ({"block_causal": 4}, "no block-causal mask"),
        ({"causal": True}, "aligned otherwise"),
        ({"backend": "eager"}, "computes value and tangent itself"),
    ):
        with pytest.raises(BackendError, match=message):
            attention(*operands.primals, **{**kwargs, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"o": torch.zeros(2, 2, 5, 9)}, ValueError, r"o must be \[2, 2, 5, 8\].*got \[2, 2, 5, 9"),
        ({"o": torch.zeros(2, 2, 5, 8, dtype=F16)}, TypeError, "o must be torch.float32"),
        ({"lse": torch.zeros(2, 2, 5, 1)}, ValueError, r"lse must be \[2, 2, 5\]"),
        ({"lse": torch.zeros(2, 2, 5, dtype=BF16)}, TypeError, "lse must be torch.float32"),
        ({"lse": None}, TypeError, "lse must be a tensor, got NoneType"),
        ({"tangents": (None, None)}, ValueError, "3 tangents"),
    ],
)
def test_the_tangent_over_a_value_rejects(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    primals, tangents, *_ = AttentionCase(2, 2, 5, 7, 8).operands()
    o, lse = attention(*primals, return_lse=True)
    arguments = {"primals": primals, "tangents": tangents, "o": o, "lse": lse}
    with pytest.raises(error, match=message):
        attention_tangent(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, ValueError, r"must be \[B, H, N, D\]"),
        ({"q": torch.zeros(2, 2, 5, 9)}, ValueError, "same D"),
        ({"v": torch.zeros(2, 2, 6, 8)}, ValueError, "k and v both"),
        ({"q": torch.zeros(2, 3, 5, 8)}, ValueError, "multiple of those of k"),
        ({"q": torch.zeros(3, 2, 5, 8)}, ValueError, "the same batch"),
        ({"q": torch.zeros(2, 2, 5, 8, dtype=F16)}, TypeError, "one dtype"),
        ({"q": torch.zeros(2, 2, 5, 8, dtype=torch.int32)}, TypeError, "must be one of"),
        ({"q": torch.zeros(2, 2, 5, 8, device="meta")}, ValueError, "one device"),
        ({"q": 3}, TypeError, "must be a tensor"),
        ({"kv_lengths": torch.tensor([1, 8])}, ValueError, r"in 0 \.\. 7, got 1 \.\. 8"),
        ({"kv_lengths": torch.tensor([-1, 7])}, ValueError, r"got -1 \.\. 7"),
        ({"kv_lengths": torch.tensor([7])}, ValueError, r"must be \[B\]"),
        ({"kv_lengths": torch.tensor([1.0, 2.0])}, TypeError, "integers"),
        ({"kv_lengths": [1, 2]}, TypeError, "integers"),
        ({"kv_lengths": torch.tensor([1, 2], device="meta")}, ValueError, "kv_lengths is on"),
        ({"causal": 4}, TypeError, "causal must be True or False, got 4"),
        ({"block_causal": 0}, ValueError, "at least 1 token .*got 0"),
        ({"block_causal": 2.0}, TypeError, r"whole number of tokens or None, got 2\.0"),
        ({"block_causal": 4, "causal": True}, ValueError, "exclude each other"),
        ({"scale": "1"}, TypeError, "scale must be a number .*got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite .*got nan"),
        ({"scale": 10**400}, ValueError, "scale must be finite and at most"),
        ({"block_causal": 2**70}, ValueError, "at most 2147483647"),
        ({"return_lse": "no"}, TypeError, "return_lse must be True or False, got 'no'"),
        ({"primal": []}, ValueError, "primal must be one of"),
        ({"q": torch.zeros(2, 2, 5, 8).to_sparse()}, TypeError, "dense tensor, got layout"),
        ({"primal": "fast"}, ValueError, "one of own, sdpa, flash_attn, flash_attn_3, got 'fast'"),
        ({"primal": "flash_attn"}, BackendError, "needs CUDA tensors.*Would work: primal='own'"),
        ({"backend": "fast"}, ValueError, "must be one of"),
    ],
)
def test_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = dict(zip("qkv", AttentionCase(2, 2, 5, 7, 8).operands().primals, strict=True))
    with pytest.raises(error, match=message):
        attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("tangents", "error", "message"),
    [
        ((None, None), ValueError, "3 tangents"),
        ((torch.zeros(2, 2, 5, 9), None, None), ValueError, "q_dot must match q"),
        ((None, None, torch.zeros(2, 2, 7, 8, dtype=F16)), TypeError, "v_dot must have the dtype"),
    ],
)
def test_rejects_tangents(tangents, error: type[Exception], message: str) -> None:
    primals = AttentionCase(2, 2, 5, 7, 8).operands().primals
    with pytest.raises(error, match=message):
        attention_jvp(primals, tangents)


def test_triton_says_which_head_dimensions_it_has() -> None:
    primals = AttentionCase(1, 1, 2, 2, 257).operands(device=DEVICE).primals
    with pytest.raises(BackendError, match=r"257 is above 256.*'eager'"):
        attention(*primals, backend="triton")
    assert attention(*primals).shape == (1, 1, 2, 257)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    primals = AttentionCase(1, 1, 2, 2, 8).operands().primals
    with pytest.raises(BackendError, match="needs CUDA tensors"):
        attention(*primals, backend="triton")
