# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from disca_kernels import BackendError, gated_residual, gated_residual_jvp, why_not
from disca_kernels.ops.gated_residual.cases import GatedResidualCase, gated_residual_in_dtype
from disca_kernels.ops.gated_residual.reference import (
    gated_residual_jvp_reference,
    gated_residual_reference,
)
from tests.ops.battery import DEVICE, Battery, Subject, backends, runs

OP = "gated_residual"
BACKENDS, KERNELS = backends(OP), backends(OP, kernels_only=True)


class TestGatedResidual(Battery):
    # Widths on both sides of a tile; lengths that fill no tile.
    subject = Subject(
        OP,
        gated_residual,
        gated_residual_jvp,
        gated_residual_reference,
        [
            GatedResidualCase(2, 3, 8),
            GatedResidualCase(3, 37, 130),
            GatedResidualCase(1, 1, 17),
            GatedResidualCase(2, 3, 1030),
            GatedResidualCase(1, 5, 1536),
            GatedResidualCase(2, 7, 64, torch.bfloat16),
            GatedResidualCase(2, 19, 96, torch.bfloat16, torch.float32),
            GatedResidualCase(2, 9, 33, torch.float16, torch.float32),
            GatedResidualCase(2, 5, 48, per_token=True),
            GatedResidualCase(2, 18, 129, torch.bfloat16, per_token=True),
            GatedResidualCase(2, 5, 24, torch.bfloat16, torch.float32, per_token=True),
            GatedResidualCase(2, 300, 130),
        ],
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_reference_is_what_a_block_writes(per_token):
    case = GatedResidualCase(2, 6, 40, torch.float64, per_token=per_token)
    primals, tangents, _ = case.operands()
    expected = torch.func.jvp(gated_residual_in_dtype, primals, tangents)
    torch.testing.assert_close(gated_residual_reference(*primals), expected[0])
    torch.testing.assert_close(gated_residual_jvp_reference(primals, tangents), expected)


def test_gradcheck():
    primals = [t.requires_grad_() for t in GatedResidualCase(2, 3, 4, torch.float64).operands()[0]]
    assert torch.autograd.gradcheck(
        gated_residual, primals, check_forward_ad=True, check_batched_grad=True
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_a_gate_of_zero_keeps_every_bit(backend):
    x, y, gate = GatedResidualCase(2, 7, 33, torch.bfloat16).operands(device=DEVICE).primals
    assert torch.equal(gated_residual(x, y, torch.zeros_like(gate), backend=backend), x)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_gradient_of_x_is_not_a_copy(backend):
    x, y, gate = GatedResidualCase(2, 3, 8).operands(device=DEVICE).primals
    x = x.clone().requires_grad_()
    cotangent = torch.ones_like(x)
    (dx,) = torch.autograd.grad(gated_residual(x, y, gate, backend=backend), x, cotangent)
    assert dx.data_ptr() == cotangent.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("per_token", [False, True])
def test_empty(per_token, shape, backend):
    case = GatedResidualCase(*shape, per_token=per_token)
    primals, tangents, (cotangent,) = case.operands(device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in primals]
    out, out_dot = gated_residual_jvp(leaves, tangents, backend=backend)
    assert out.shape == out_dot.shape == shape
    gradients = torch.autograd.grad(out, leaves, cotangent)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", KERNELS)
def test_elements_beyond_the_reach_of_32_bits(backend):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    storage = torch.empty(apart + 64, dtype=torch.bfloat16, device=DEVICE)
    y = storage.as_strided((2, 2, 32), (apart, 32, 1))
    x, plain, gate = GatedResidualCase(2, 2, 32, torch.bfloat16).operands(device=DEVICE).primals
    y.copy_(plain)
    out = gated_residual(x, y, gate, backend=backend)
    assert torch.equal(out, gated_residual(x, plain, gate, backend=backend))


@runs(OP, "triton", torch.empty(1, 1, 1, device=DEVICE))
@pytest.mark.parametrize("programs", [1, 7])
def test_splits_of_the_backward_pass_agree(monkeypatch, programs):
    from disca_kernels.triton_common import rows

    operands = GatedResidualCase(2, 333, 40).operands(device=DEVICE)

    def gradients(function, **options):
        leaves = [t.detach().clone().requires_grad_() for t in operands.primals]
        return torch.autograd.grad(function(*leaves, **options), leaves, operands.cotangents)

    monkeypatch.setattr(rows, "_BACKWARD_PROGRAMS", programs)
    actual = gradients(gated_residual, backend="triton")
    torch.testing.assert_close(actual, gradients(gated_residual_reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8), (2, 8), (2, 8)), r"x must be \[B, N, C\], got \[2, 8\]"),
        (((2, 3, 0), (2, 3, 0), (2, 0)), r"at least one channel, got \[2, 3, 0\]"),
        (
            ((2, 3, 8), (2, 1, 8), (2, 8)),
            r"y must match x, got x .*\[2, 3, 8\] on cpu and y .*\[2, 1, 8\] on cpu; nothing is",
        ),
        (((2, 3, 8), (2, 3, 8), (2, 1, 8)), r"gate must be .* for x \[2, 3, 8\], got \[2, 1, 8\]"),
        (((2, 3, 8), (2, 3, 8), (8,)), r"got \[8\]; nothing is broadcast"),
    ],
)
def test_rejects_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        gated_residual(*(torch.zeros(s) for s in shapes))


def test_rejects_dtypes_devices_and_strangers():
    x, y, gate = GatedResidualCase(2, 3, 8, torch.bfloat16).operands().primals
    with pytest.raises(TypeError, match=r"y must have the dtype of x \(torch\.bfloat16\), got"):
        gated_residual(x, y.float(), gate)
    with pytest.raises(TypeError, match=r"gate must have the dtype of x .* got torch\.float16"):
        gated_residual(x, y, gate.half())
    with pytest.raises(TypeError, match=r"x must be one of .*, got torch\.int64"):
        gated_residual(x.long(), y, gate)
    with pytest.raises(ValueError, match=r"gate is on meta, x is on cpu"):
        gated_residual(x, y, gate.to("meta"))
    with pytest.raises(ValueError, match=r"y must match x, got x .* on cpu and y .* on meta"):
        gated_residual(x, y.to("meta"), gate)
    with pytest.raises(TypeError, match="gate must be a tensor, got float"):
        gated_residual(x, y, 0.5)


def test_rejects_tangents():
    primals, tangents, _ = GatedResidualCase(2, 3, 8).operands()
    with pytest.raises(ValueError, match=r"gate_dot must match gate \[2, 8\] on cpu, got \[2, 7\]"):
        gated_residual_jvp(primals, (*tangents[:2], tangents[2][:, 1:]))
    with pytest.raises(TypeError, match=r"y_dot must have the dtype of y, torch\.float32"):
        gated_residual_jvp(primals, (None, tangents[1].double(), None))
    with pytest.raises(ValueError, match=r"3 primals are needed, got 2; expected \(x, y, gate\)"):
        gated_residual_jvp(primals[:2], tangents)


def test_rejects_backends():
    primals = GatedResidualCase(2, 3, 8, torch.float64).operands().primals
    with pytest.raises(BackendError, match="gated_residual: backend='triton' was requested"):
        gated_residual(*primals, backend="triton")
    assert "gated_residual has no cuda implementation" in why_not(OP, "cuda")[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_widens_narrow_companions(backend):
    x, y, gate = GatedResidualCase(2, 6, 40).operands(device=DEVICE).primals
    narrow = y.bfloat16(), gate.bfloat16()
    wide = [t.float() for t in narrow]
    expected = gated_residual_jvp((x, *wide), (x, None, wide[1]), backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = gated_residual(x, *narrow, backend=backend)
        pair = gated_residual_jvp((x, *narrow), (x, None, narrow[1]), backend=backend)
    assert all(map(torch.equal, pair, expected))
    assert torch.equal(out, expected[0])
