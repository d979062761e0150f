# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from disca_kernels import (
    BackendError,
    adaln_modulate,
    gated_residual,
    gated_residual_adaln,
    gated_residual_adaln_jvp,
    why_not,
)
from disca_kernels.ops.gated_residual_adaln.cases import (
    GatedResidualAdalnCase,
    gated_residual_adaln_in_dtype,
)
from disca_kernels.ops.gated_residual_adaln.reference import (
    gated_residual_adaln_jvp_reference,
    gated_residual_adaln_reference,
)
from tests.ops.battery import DEVICE, Battery, Subject, backends, runs

OP = "gated_residual_adaln"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)


def subject(*cases):
    return Subject(
        OP,
        gated_residual_adaln,
        gated_residual_adaln_jvp,
        gated_residual_adaln_reference,
        cases,
    )


class TestGatedResidualAdaln(Battery):
    # Widths on both sides of a power of two, of a vector and of a tile; lengths that fill no tile.
    subject = subject(
        GatedResidualAdalnCase(2, 3, 8),
        GatedResidualAdalnCase(3, 37, 130),
        GatedResidualAdalnCase(1, 1, 17),
        GatedResidualAdalnCase(2, 3, 2050),
        GatedResidualAdalnCase(2, 7, 64, torch.bfloat16),
        GatedResidualAdalnCase(2, 19, 96, torch.bfloat16, torch.float32),
        GatedResidualAdalnCase(2, 9, 33, torch.float16, torch.float32),
        GatedResidualAdalnCase(2, 5, 48, per_token=True),
        GatedResidualAdalnCase(2, 5, 48, gate_per_token=True),
        GatedResidualAdalnCase(2, 18, 129, torch.bfloat16, None, True, True),
        GatedResidualAdalnCase(2, 100, 32, offset=100.0),
        GatedResidualAdalnCase(1, 2, 4099),
        GatedResidualAdalnCase(2, 300, 130),
    )


class TestAffine(Battery):
    subject = subject(
        GatedResidualAdalnCase(2, 3, 8, affine=True),
        GatedResidualAdalnCase(3, 21, 130, affine=True),
        GatedResidualAdalnCase(2, 5, 24, affine=True, per_token=True),
        GatedResidualAdalnCase(2, 9, 40, torch.bfloat16, torch.float32, affine=True),
        GatedResidualAdalnCase(2, 7, 64, torch.float16, affine=True),
    )


class TestRms(Battery):
    subject = subject(
        GatedResidualAdalnCase(2, 3, 8, norm="rms", affine=True, per_token=True),
        GatedResidualAdalnCase(2, 5, 48, norm="rms"),
        GatedResidualAdalnCase(3, 21, 130, norm="rms", affine=True),
        GatedResidualAdalnCase(2, 9, 40, torch.bfloat16, torch.float32, norm="rms", affine=True),
        GatedResidualAdalnCase(2, 7, 33, torch.float16, norm="rms"),
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
def test_reference_is_what_a_block_writes(per_token, norm):
    case = GatedResidualAdalnCase(2, 6, 40, torch.float64, None, per_token, False, True, norm)
    primals, tangents, _ = case.operands()
    present = [i for i, t in enumerate(tangents) if t is not None]

    def function(*leaves):
        return gated_residual_adaln_in_dtype(*leaves, norm=norm)

    expected = torch.func.jvp(
        function, tuple(primals[i] for i in present), tuple(tangents[i] for i in present)
    )
    torch.testing.assert_close(gated_residual_adaln_reference(*primals, norm=norm), expected[0])
    actual = gated_residual_adaln_jvp_reference(primals, tangents, norm=norm)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(affine):
    case = GatedResidualAdalnCase(2, 3, 4, torch.float64, affine=affine)
    primals = [None if t is None else t.requires_grad_() for t in case.operands().primals]
    assert torch.autograd.gradcheck(
        gated_residual_adaln, primals, check_forward_ad=True, check_batched_grad=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_is_the_two_operations_in_one(norm, dtype, backend):
    """x_new to the bit, and h is the modulation of the x_new that is returned."""
    case = GatedResidualAdalnCase(2, 7, 96, dtype, norm=norm)
    x, y, gate, shift, scale, *_ = case.operands(device=DEVICE).primals
    x_new, h = gated_residual_adaln(x, y, gate, shift, scale, norm=norm, backend=backend)
    assert torch.equal(x_new, gated_residual(x, y, gate, backend=backend))
    expected = adaln_modulate(x_new, shift, scale, norm=norm, backend=backend)
    torch.testing.assert_close(h, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_keeps_the_new_tokens_and_not_the_old(backend):
    case = GatedResidualAdalnCase(2, 7, 96)
    saved, operands = [], case.operands(device=DEVICE)
    leaves = [t.detach().clone().requires_grad_() for t in operands.primals[:5]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x_new, _ = gated_residual_adaln(*leaves, backend=backend)
    kept = {t.data_ptr() for t in saved}
    assert x_new.data_ptr() in kept
    assert leaves[0].data_ptr() not in kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_alone(backend, bad):
    case = GatedResidualAdalnCase(2, 6, 40)
    x, *others = case.operands(device=DEVICE).primals[:5]
    clean, x = gated_residual_adaln(x, *others, backend=backend), x.clone()
    x[1, 2, 3] = bad
    x_new, h = gated_residual_adaln(x, *others, backend=backend)
    assert h[1, 2].isnan().all()
    x_new[1, 2, 3], h[1, 2] = clean[0][1, 2, 3], clean[1][1, 2]
    assert torch.equal(x_new, clean[0])
    assert torch.equal(h, clean[1])


@pytest.mark.parametrize("backend", KERNELS)
def test_eps_may_be_zero(backend):
    """No row outside a tile's mask may join the sums: its deviation would be zero."""
    primals = GatedResidualAdalnCase(2, 5, 24).operands(device=DEVICE).primals[:5]

    def gradients(function, **options):
        leaves = [t.detach().clone().requires_grad_() for t in primals]
        x_new, h = function(*leaves, eps=0.0, **options)
        return torch.autograd.grad((x_new * h).sum(), leaves)

    actual = gradients(gated_residual_adaln, backend=backend)
    expected = gradients(gated_residual_adaln_reference)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_empty(affine, per_token, shape, backend):
    case = GatedResidualAdalnCase(*shape, per_token=per_token, affine=affine)
    primals, tangents, cotangents = case.operands(device=DEVICE)
    present = 7 if affine else 5
    leaves = [t.detach().requires_grad_() for t in primals[:present]]
    outputs, dots = gated_residual_adaln_jvp(leaves, tangents[:present], backend=backend)
    assert [t.shape for t in (*outputs, *dots)] == [shape] * 4
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(backend):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=torch.bfloat16, device=DEVICE)
    x = storage.as_strided((2, 2, 32), (apart, 32, 1))
    case = GatedResidualAdalnCase(2, 2, 32, torch.bfloat16)
    plain, *others = case.operands(device=DEVICE).primals
    x.copy_(plain)
    actual = gated_residual_adaln(x, *others, backend=backend)
    expected = gated_residual_adaln(plain, *others, backend=backend)
    assert all(map(torch.equal, actual, expected))


@runs(OP, "triton", torch.empty(1, 1, 1, device=DEVICE))
@pytest.mark.parametrize("programs", [1, 3])
def test_splits_of_the_backward_pass_agree(monkeypatch, programs):
    from disca_kernels.triton_common import rows

    operands = GatedResidualAdalnCase(2, 53, 40, affine=True).operands(device=DEVICE)

    def gradients(function, **options):
        leaves = [t.detach().clone().requires_grad_() for t in operands.primals]
        outputs = function(*leaves, **options)
        return torch.autograd.grad(outputs, leaves, operands.cotangents)

    monkeypatch.setattr(rows, "_BACKWARD_PROGRAMS", programs)
    actual = gradients(gated_residual_adaln, backend="triton")
    expected = gradients(gated_residual_adaln_reference)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


GOOD = ((2, 3, 8), (2, 3, 8), (2, 8), (2, 8), (2, 8))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 8), r"x must be \[B, N, C\], got \[2, 8\]"),
        (1, (2, 4, 8), r"y must match x, got x .*\[2, 3, 8\] on cpu and y .*\[2, 4, 8\]"),
        (2, (2, 7), r"gate must be \[B, C\] = \[2, 8\].*got \[2, 7\]"),
        (3, (1, 8), r"shift must be .*for x \[2, 3, 8\], got \[1, 8\]"),
        (4, (8,), r"scale must be .*got \[8\]; nothing is broadcast"),
        (4, (2, 3, 8), r"must be alike, got shift .*\[2, 8\] on cpu and scale .*\[2, 3, 8\]"),
    ],
)
def test_rejects_shapes(index, shape, message):
    shapes = [*GOOD[:index], shape, *GOOD[index + 1 :]]
    with pytest.raises(ValueError, match=message):
        gated_residual_adaln(*(torch.zeros(s) for s in shapes))


def test_rejects_dtypes_norms_and_affine_parts():
    operands = [torch.zeros(s) for s in GOOD]
    with pytest.raises(TypeError, match=r"gate must have the dtype of x .* got torch\.bfloat16"):
        gated_residual_adaln(*operands[:2], operands[2].bfloat16(), *operands[3:])
    with pytest.raises(ValueError, match="'layer' or 'rms', got 'group'"):
        gated_residual_adaln(*operands, norm="group")
    with pytest.raises(ValueError, match="eps must be finite and not negative, got -1"):
        gated_residual_adaln(*operands, eps=-1)
    with pytest.raises(ValueError, match="an RMS norm has no bias"):
        gated_residual_adaln(*operands, torch.ones(8), torch.ones(8), norm="rms")
    with pytest.raises(ValueError, match=r"weight must be \[C\] = \[8\]"):
        gated_residual_adaln(*operands, torch.ones(3))


def test_rejects_tangents():
    operands = tuple(torch.zeros(s) for s in GOOD)
    with pytest.raises(ValueError, match=r"scale_dot must match scale \[2, 8\] on cpu"):
        gated_residual_adaln_jvp(operands, (None, None, None, None, torch.zeros(2, 3, 8)))
    with pytest.raises(ValueError, match="weight_dot was given without weight"):
        gated_residual_adaln_jvp(operands, (*operands, torch.ones(8)))
    with pytest.raises(ValueError, match="5 to 7 primals are needed, got 4"):
        gated_residual_adaln_jvp(operands[:4], operands)


def test_rejects_backends():
    operands = [torch.zeros(s, dtype=torch.float64) for s in GOOD]
    with pytest.raises(BackendError, match="gated_residual_adaln: backend='triton' was requested"):
        gated_residual_adaln(*operands, backend="triton")
    reasons = why_not(OP, "triton", torch.zeros(1, 1, 8200))
    assert "at most 8192 channels fit the registers that share a row, got 8200" in reasons


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_widens_narrow_companions(backend):
    x, *others = GatedResidualAdalnCase(2, 6, 40).operands(device=DEVICE).primals[:5]
    narrow = [t.bfloat16() for t in others]
    wide = [t.float() for t in narrow]
    expected = gated_residual_adaln_jvp((x, *wide), (x, *wide), backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = gated_residual_adaln(x, *narrow, backend=backend)
        pairs = gated_residual_adaln_jvp((x, *narrow), (x, *narrow), backend=backend)
    for actual in ((outputs, expected[1]), pairs):
        for given, wanted in zip(actual, expected, strict=True):
            assert all(map(torch.equal, given, wanted))
