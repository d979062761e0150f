# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from disca_kernels import qk_norm_rope, qk_norm_rope_jvp
from disca_kernels.ops.qk_norm_rope.cases import QkNormRopeCase, qk_norm_rope_in_dtype
from disca_kernels.ops.qk_norm_rope.reference import (
    qk_norm_rope_jvp_reference,
    qk_norm_rope_reference,
)
from disca_kernels.testing import assert_within_budget
from tests.ops.battery import DEVICE, Battery, Subject, backends, runs

OP = "qk_norm_rope"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)
BF16, FP16 = torch.bfloat16, torch.float16


class TestQkNormRope(Battery):
    # Head widths that fill no vector and no tile, heads that fill no group, tokens that fill no
    # tile; all, some and none of the tokens turned.
    subject = Subject(
        OP,
        qk_norm_rope,
        qk_norm_rope_jvp,
        qk_norm_rope_reference,
        [
            QkNormRopeCase(2, 3, 2, 6, rope_tokens=2, n_context=2),
            QkNormRopeCase(2, 5, 3, 10, rope_tokens=4, interleaved=False, n_context=3),
            QkNormRopeCase(1, 37, 5, 48),
            QkNormRopeCase(1, 1, 5, 22),
            QkNormRopeCase(2, 4, 6, 72, rope_tokens=3, interleaved=False),
            QkNormRopeCase(2, 5, 2, 16, rope_tokens=0, n_context=1),
            QkNormRopeCase(2, 5, 3, 20, weighted=False),
            QkNormRopeCase(1, 3, 2, 514),
            QkNormRopeCase(2, 19, 5, 24, BF16, rope_tokens=11, n_context=7),
            QkNormRopeCase(1, 18, 2, 64, BF16, interleaved=False, wide=True),
            QkNormRopeCase(2, 7, 3, 34, FP16, wide=True, n_context=2),
            QkNormRopeCase(2, 7, 2, 40, FP16, interleaved=False),
            QkNormRopeCase(1, 150, 6, 50, rope_tokens=140, n_context=19),
        ],
    )


@pytest.mark.parametrize("interleaved", [True, False])
def test_reference_is_what_blocks_write(interleaved):
    case = QkNormRopeCase(2, 6, 3, 12, torch.float64, 4, interleaved, n_context=3)
    primals = case.operands().primals
    expected = qk_norm_rope_in_dtype(*primals, **case.options)
    torch.testing.assert_close(qk_norm_rope_reference(*primals, **case.options), expected)


def test_reference_is_a_complex_product():
    case = QkNormRopeCase(2, 6, 3, 12, torch.float64, weighted=False)
    qkv, _, _, cos, sin = case.operands().primals[:5]
    q, k, v = qk_norm_rope_reference(qkv, None, None, cos, sin, **case.options)
    packed = qkv.unflatten(-1, (3, 3, 12)).permute(2, 0, 3, 1, 4)
    for actual, x in ((q, packed[0]), (k, packed[1])):
        normal = torch.nn.functional.rms_norm(x, (12,), eps=1e-6)
        pairs = torch.view_as_complex(normal.unflatten(-1, (6, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
        torch.testing.assert_close(actual, turned)
    assert torch.equal(v, packed[2])


@pytest.mark.parametrize(
    "case",
    [
        QkNormRopeCase(2, 6, 3, 12, torch.float64, 4, n_context=3),
        QkNormRopeCase(2, 6, 3, 12, torch.float64, interleaved=False, weighted=False),
    ],
    ids=str,
)
def test_closed_formula_of_the_reference(case):
    primals, tangents, _ = case.operands()
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def function(*leaves):
        given = list(primals)
        for i, leaf in zip(moving, leaves, strict=True):
            given[i] = leaf
        return qk_norm_rope_reference(*given, **case.options)

    leaves, along = (tuple(ts[i] for i in moving) for ts in (primals, tangents))
    expected = torch.func.jvp(function, leaves, along)
    torch.testing.assert_close(
        qk_norm_rope_jvp_reference(primals, tangents, **case.options), expected
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_copied_to_the_bit(backend):
    case = QkNormRopeCase(2, 5, 3, 10, BF16, rope_tokens=3, n_context=4)
    primals, tangents, _ = case.operands(device=DEVICE)
    (_, _, v), (_, _, v_dot) = qk_norm_rope_jvp(primals, tangents, **case.options, backend=backend)
    for actual, given in ((v, primals), (v_dot, tangents)):
        packed = torch.cat((given[0], given[5]), 1).unflatten(-1, (3, 3, 10))
        assert torch.equal(actual, packed[:, :, 2].transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_tokens_behind_the_tables_do_not_turn(backend, interleaved):
    whole = QkNormRopeCase(2, 9, 3, 12, interleaved=interleaved)
    qkv, q_weight, k_weight, cos, sin = whole.operands(device=DEVICE).primals[:5]

    def call(cos, sin):
        return qk_norm_rope(qkv, q_weight, k_weight, cos, sin, **whole.options, backend=backend)

    some, all_, none = call(cos[:4], sin[:4]), call(cos, sin), call(None, None)
    for x, turned, straight in zip(some, all_, none, strict=True):
        torch.testing.assert_close(x[:, :, :4], turned[:, :, :4])
        torch.testing.assert_close(x[:, :, 4:], straight[:, :, 4:])
    empty = call(cos[:0], sin[:0])
    assert all(map(torch.equal, empty, none))


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_is_a_stream_of_its_own(backend):
    case = QkNormRopeCase(2, 5, 3, 12, rope_tokens=3, n_context=4)
    primals = case.operands(device=DEVICE).primals
    options = {**case.options, "backend": backend}
    joint = qk_norm_rope(*primals, **options)
    first = qk_norm_rope(*primals[:5], **options)
    qkv, q_weight, k_weight = primals[5:]
    second = qk_norm_rope(qkv, q_weight, k_weight, None, None, **options)
    for both, *parts in zip(joint, first, second, strict=True):
        assert torch.equal(both, torch.cat(parts, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_blind_to_the_length_of_a_row(backend):
    """A factor of a power of two on a row changes neither queries nor keys, but for eps."""
    case = QkNormRopeCase(2, 5, 3, 12)
    qkv, *rest = case.operands(device=DEVICE).primals[:5]
    options = {**case.options, "eps": 0.0, "backend": backend}
    q, k, v = qk_norm_rope(qkv, *rest, **options)
    longer = qk_norm_rope(1024 * qkv, *rest, **options)
    assert all(map(torch.equal, longer, (q, k, 1024 * v)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend):
    case = QkNormRopeCase(2, 5, 3, 12, n_context=2)
    primals = case.operands(device=DEVICE).primals
    options = {**case.options, "eps": 0.5}
    wide = [t.cpu().double() for t in primals]
    results = qk_norm_rope(*primals, **options, backend=backend)
    exact = qk_norm_rope_reference(*wide, **options)
    for name, *three in zip(
        "qkv", results, exact, qk_norm_rope_reference(*primals, **options), strict=True
    ):
        assert_within_budget(*three, name=f"{name} with eps")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_zeros(backend):
    case = QkNormRopeCase(1, 3, 2, 8)
    primals, tangents, cotangents = case.operands(device=DEVICE)
    qkv = torch.zeros_like(primals[0]).requires_grad_()
    outputs, dots = qk_norm_rope_jvp((qkv, *primals[1:]), tangents, **case.options, backend=backend)
    assert all(torch.equal(y, torch.zeros_like(y)) for y in outputs)
    (dqkv,) = torch.autograd.grad(outputs, qkv, cotangents)
    assert all(x.isfinite().all() for x in (*dots, dqkv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_a_number_stays_alone(backend):
    case = QkNormRopeCase(2, 6, 3, 10)
    qkv, *rest = case.operands(device=DEVICE).primals[:5]
    clean = qk_norm_rope(qkv, *rest, **case.options, backend=backend)
    qkv = qkv.clone()
    qkv[1, 2, 10] = torch.nan  # the queries of head 1
    q, k, v = qk_norm_rope(qkv, *rest, **case.options, backend=backend)
    assert q[1, 1, 2].isnan().all()
    q[1, 1, 2] = clean[0][1, 1, 2]
    assert all(map(torch.equal, (q, k, v), clean))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens", "context"), [(0, 3, 2), (2, 0, 0), (2, 0, 3)])
def test_empty(batch, tokens, context, backend):
    case = QkNormRopeCase(batch, tokens, 2, 8, n_context=context)
    primals, tangents, _ = case.operands(device=DEVICE)
    leaves = [
        t if t is None or i in (3, 4) else t.detach().requires_grad_()
        for i, t in enumerate(primals)
    ]
    outputs, dots = qk_norm_rope_jvp(leaves, tangents, **case.options, backend=backend)
    assert all(y.shape == (batch, 2, tokens + context, 8) for y in (*outputs, *dots))
    moving = [t for i, t in enumerate(leaves) if t is not None and i not in (3, 4)]
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), moving)
    for leaf, gradient in zip(moving, gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(backend):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 256, dtype=BF16, device=DEVICE)
    qkv = storage.as_strided((2, 2, 48), (apart, 64, 1))
    case = QkNormRopeCase(2, 2, 2, 8, BF16)
    plain, *rest = case.operands(device=DEVICE).primals[:5]
    qkv.copy_(plain)
    actual = qk_norm_rope(qkv, *rest, **case.options, backend=backend)
    expected = qk_norm_rope(plain, *rest, **case.options, backend=backend)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@runs(OP, "cpu")
def test_every_instruction_set(monkeypatch, isa):
    from disca_kernels.ops.attention.cpu import isas

    if isa not in isas():
        pytest.skip(f"this machine has no {isa}")
    case = QkNormRopeCase(2, 19, 3, 26, BF16, rope_tokens=11, n_context=2)
    primals, tangents, cotangents = case.operands()
    leaves = [t if i in (3, 4) else t.detach().requires_grad_() for i, t in enumerate(primals)]
    moving = [t for i, t in enumerate(leaves) if i not in (3, 4)]

    def results():
        outputs, dots = qk_norm_rope_jvp(leaves, tangents, **case.options, backend="cpu")
        return *outputs, *dots, *torch.autograd.grad(outputs, moving, cotangents)

    expected = results()
    monkeypatch.setenv("DISCA_CPU_ISA", isa)
    for actual, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=0.02, atol=0.02)


@runs("qk_norm_rope", "triton")
@pytest.mark.parametrize("programs", [1, 3])
def test_splits_of_the_backward_pass(monkeypatch, programs):
    from disca_kernels.ops.qk_norm_rope import triton as kernels

    case = QkNormRopeCase(2, 70, 5, 16, n_context=3)
    primals, _, cotangents = case.operands(device=DEVICE)
    leaves = [t.detach().requires_grad_() for i, t in enumerate(primals) if i not in (3, 4)]

    def gradients(function):
        given = (*leaves[:3], *primals[3:5], *leaves[3:])
        return torch.autograd.grad(function(*given), leaves, cotangents)

    expected = gradients(lambda *x: qk_norm_rope_reference(*x, **case.options))
    monkeypatch.setattr(kernels, "_BACKWARD_PROGRAMS", programs)
    actual = gradients(lambda *x: qk_norm_rope(*x, **case.options, backend="triton"))
    for gradient, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
