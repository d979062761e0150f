# SPDX-License-Identifier: Apache-2.0
"""What qk_norm_rope accepts, what it refuses and what it says."""

import pytest
import torch

from disca_kernels import BackendError, _ext, qk_norm_rope, qk_norm_rope_jvp
from disca_kernels.ops.qk_norm_rope.cases import QkNormRopeCase

CASE = QkNormRopeCase(2, 5, 3, 8, rope_tokens=4, n_context=2)
PRIMALS, TANGENTS, _ = CASE.operands()
NAMES = (
    *("qkv", "q_weight", "k_weight", "cos", "sin"),
    *("context_qkv", "context_q_weight", "context_k_weight"),
)


def call(*, heads=3, rope_tokens=None, eps=1e-6, backend="auto", **changed):
    operands = dict(zip(NAMES, PRIMALS, strict=True)) | changed
    options = {"heads": heads, "rope_tokens": rope_tokens, "eps": eps, "backend": backend}
    return qk_norm_rope(*operands.values(), **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": torch.zeros(5, 72)}, r"qkv must be \[B, N, 3 \* H \* D\], got \[5, 72\]"),
        (
            {"qkv": torch.zeros(2, 5, 70)},
            r"H = 3 and D even.* multiple of 18, got \[2, 5, 70\]",
        ),
        ({"qkv": torch.zeros(2, 5, 63)}, r"D even.* got \[2, 5, 63\]"),
        ({"qkv": torch.zeros(2, 5, 0)}, r"multiple of 18, got \[2, 5, 0\]"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 5}, r"H = 5 .* multiple of 30, got \[2, 5, 72\]"),
        (
            {"heads": 4},
            r"cos must be .* = \[rope_tokens, 3\] for qkv \[2, 5, 72\], got \[4, 4\]",
        ),
        (
            {"q_weight": torch.ones(9)},
            r"q_weight must be \[D\] = \[8\] for qkv \[2, 5, 72\] and 3 heads, got \[9\]",
        ),
        ({"k_weight": torch.ones(1)}, r"k_weight must be \[D\] = \[8\].*got \[1\]"),
        ({"context_k_weight": torch.ones(3, 8)}, r"context_k_weight must .*got \[3, 8\]"),
        ({"cos": None}, "cos and sin come together, got only sin"),
        ({"sin": None}, "cos and sin come together, got only cos"),
        ({"sin": torch.zeros(3, 4)}, r"must be alike, got cos .*\[4, 4\] and sin .*\[3, 4\]"),
        ({"rope_tokens": 3}, "rope_tokens is 3, cos and sin have 4 rows"),
        ({"rope_tokens": 0}, "rope_tokens is 0, cos and sin have 4 rows"),
        ({"cos": None, "sin": None, "rope_tokens": 2}, "rope_tokens is 2, but there are no tables"),
        (
            {"cos": torch.zeros(6, 4), "sin": torch.zeros(6, 4)},
            r"6 tokens would be turned .* qkv \[2, 5, 72\] has 5",
        ),
        (
            {"context_qkv": torch.zeros(1, 2, 72)},
            r"context_qkv must be .*\[2, M, 72\] for qkv \[2, 5, 72\], got \[1, 2, 72\]",
        ),
        ({"context_qkv": torch.zeros(2, 2, 36)}, r"context_qkv must be .*got \[2, 2, 36\]"),
        ({"context_qkv": None}, "context_q_weight was given without context_qkv"),
        ({"q_weight": torch.ones(8, device="meta")}, "q_weight is on meta, qkv is on cpu"),
        ({"sin": torch.ones(4, 4, device="meta")}, "sin is on meta, qkv is on cpu"),
        (
            {"context_qkv": torch.zeros(2, 2, 72, device="meta")},
            "context_qkv is on meta, qkv is on cpu",
        ),
        ({"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
        ({"backend": "tritno"}, "got 'tritno'"),
    ],
)
def test_refuses_values(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": 1.0}, "qkv must be a tensor, got float"),
        ({"cos": 1.0}, "cos must be a tensor or None, got float"),
        ({"qkv": torch.zeros(2, 5, 72, dtype=torch.int32)}, r"one of .*, got torch\.int32"),
        (
            {"q_weight": torch.ones(8, dtype=torch.bfloat16)},
            r"q_weight must have the dtype of qkv \(torch\.float32\) .*, got torch\.bfloat16",
        ),
        ({"cos": torch.ones(4, 4).double()}, r"cos must have .*, got torch\.float64"),
        (
            {"context_qkv": torch.zeros(2, 2, 72).half()},
            r"context_qkv must have the dtype of qkv, torch\.float32, got torch\.float16",
        ),
        ({"heads": 3.0}, "heads must be an integer, got float"),
        ({"rope_tokens": True}, "rope_tokens must be an integer, got bool"),
        ({"eps": "small"}, "eps must be a number, got str"),
    ],
)
def test_refuses_types(changed, message):
    with pytest.raises(TypeError, match=message):
        call(**changed)


def test_refuses_too_many_operands():
    with pytest.raises(TypeError, match=r"at most 8 operands \(qkv, q_weight, .*\), got 9"):
        qk_norm_rope(*PRIMALS, None, heads=3)


def test_the_number_of_turned_tokens_may_be_said():
    said, counted = call(rope_tokens=4), call()
    assert all(map(torch.equal, said, counted))
    none = call(cos=None, sin=None, rope_tokens=0)
    assert all(map(torch.equal, none, call(cos=None, sin=None)))


def test_refuses_tangents():
    def pair(*tangents, primals=PRIMALS):
        return qk_norm_rope_jvp(primals, tangents, **CASE.options)

    with pytest.raises(ValueError, match=r"5 to 8 tangents are needed, got 3; expected \(qkv, "):
        pair(None, None, None)
    with pytest.raises(
        ValueError, match=r"k_weight_dot must match k_weight \[8\] on cpu, got \[4\]"
    ):
        pair(None, None, torch.zeros(4), None, None)
    with pytest.raises(TypeError, match=r"qkv_dot must have the dtype of qkv, torch\.float32"):
        pair(TANGENTS[0].double(), None, None, None, None)
    with pytest.raises(ValueError, match="context_qkv_dot was given without context_qkv"):
        pair(None, None, None, None, None, TANGENTS[5], primals=PRIMALS[:5])
    with pytest.raises(NotImplementedError, match="cos is a constant and cannot have a tangent"):
        pair(None, None, None, torch.zeros_like(PRIMALS[3]), None)


def test_operands_behind_may_be_left_out():
    (q, k, v), dots = qk_norm_rope_jvp(PRIMALS[:5], TANGENTS[:5], **CASE.options)
    assert q.shape == k.shape == v.shape == dots[0].shape == (2, 3, 5, 8)


def test_refuses_tables_that_require_a_gradient():
    cos = PRIMALS[3].clone().requires_grad_()
    for backend in ("eager", "auto"):
        with pytest.raises(NotImplementedError, match=r"cos is a constant .* cos\.detach\(\)"):
            call(cos=cos, backend=backend)
        with torch.no_grad():
            assert torch.equal(call(cos=cos, backend=backend)[0], call(backend=backend)[0])


def test_refuses_backends():
    wide = {name: x.double() for name, x in zip(NAMES, PRIMALS, strict=True)}
    for backend in ("triton", "cuda", "cpu"):
        with pytest.raises(BackendError, match=f"qk_norm_rope: backend='{backend}' was requested"):
            call(**wide, backend=backend)
    assert call(**wide)[0].dtype == torch.float64


NATIVE = {
    **{"shape": (1, 2, 3, 8, 2, True), "eps": 1e-6, "dtype": "float32"},
    **{"qkv": (64, 144, 72), "qkv_dot": None, "weights": (0, 0), "weight_dots": (0, 0)},
    **{"tables": (64, 64), "values": [None] * 3, "tangents": [None] * 3, "threads": 1},
}


@pytest.mark.skipif(_ext.why_not() is not None, reason="disca_kernels._C was not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": (0, 144, 72)}, "qkv has address 0 for 2 rows"),
        ({"qkv_dot": (0, 144, 72)}, "qkv_dot has address 0 for 2 rows"),
        ({"values": [None, (0, 1, 1, 1), None]}, "a value has address 0 for 2 rows"),
        ({"tables": (64, 0)}, "tables have addresses 64 and 0 for 2 tokens"),
        ({"shape": (1, 2, 3, 7, 2, True)}, r"even D > 0\], got \[1, 2, 3, 7\]"),
        ({"shape": (1, -2, 3, 8, 0, True)}, r"N >= 0.*got \[1, -2, 3, 8\]"),
        ({"shape": (1, 2, 3, 8, 3, True)}, "rope_tokens must be 0 to 2, got 3"),
        ({"dtype": "int8"}, "got int8"),
    ],
)
def test_native_code_checks_what_it_would_read(changed, message):
    with pytest.raises(ValueError, match=message):
        _ext.load().qk_norm_rope_fwd_cpu(**(NATIVE | changed))
