# SPDX-License-Identifier: Apache-2.0
"""The error of attention's tangent does not depend on what all keys' tangents have in common."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from benchmarks import attention_centres as centres
from disca_kernels import attention, attention_jvp, attention_tangent, why_not
from disca_kernels.ops.attention.cases_drift import (
    DRIFTS,
    KINDS,
    DriftCase,
    exact_tangent,
    relative_error,
    uncentred_tangent,
)

BF16, F16 = torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = [
    backend
    for backend in ("eager", "cpu", "triton", "cuda")
    if (backend != "triton" or DEVICE == "cuda")
    and not why_not("attention", backend, torch.empty(1, 1, 1, 128, device=DEVICE, dtype=BF16))
]
INTERPRETED = DEVICE == "cpu" and not why_not("attention", "triton", torch.empty(1, 1, 1, 32))
WAYS = ["fused", "func.jvp", "over a value"]
# About twice the error of an attention that makes the same roundings and is centred exactly.
LIMITS = {BF16: 4.5e-3, F16: 5.6e-4}
TOLERATED = 2.0
HARMED = [kind for kind in KINDS if kind != "attend"]
kinds = pytest.mark.parametrize("kind", KINDS)
ways = pytest.mark.parametrize("way", WAYS)
natives = pytest.mark.parametrize("backend", NATIVE)
dtypes = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])


def tangent(case: DriftCase, way: str, backend: str, **options: object) -> tuple[Tensor, Tensor]:
    """Return o_dot by one of the ways to it, and the exact one."""
    primals, tangents = case.operands(device=DEVICE)
    exact = exact_tangent(primals, tangents, **options)
    options["backend"] = backend
    if way == "fused":
        return attention_jvp(primals, tangents, **options)[1], exact
    if way == "func.jvp":
        return jvp(lambda *x: attention(*x, **options), primals, tangents)[1], exact
    o, lse = attention(*primals, **options, return_lse=True)
    return attention_tangent(primals, tangents, o, lse, **options)[0], exact


def assert_flat(errors: list[float], limit: float) -> None:
    """The criterion: no drift costs more than twice the error at drift 0, the first of these."""
    assert max(errors) <= TOLERATED * errors[0], errors
    assert max(errors) <= limit, errors


def errors_of(case: DriftCase, way: str, backend: str, **options: object) -> list[float]:
    return [relative_error(*tangent(case.at(d), way, backend, **options)) for d in DRIFTS]


@dtypes
@natives
@ways
@kinds
def test_drift_does_not_cost_accuracy(
    kind: str, way: str, backend: str, dtype: torch.dtype
) -> None:
    case = DriftCase(kind, n_q=48, n_k=1024, dtype=dtype)
    assert_flat(errors_of(case, way, backend), LIMITS[dtype])


@pytest.mark.skipif(not INTERPRETED, reason="Triton does not run in its interpreter here")
@ways
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, BF16) for kind in KINDS), ("plain", F16), ("local", F16)]
)
def test_drift_does_not_cost_accuracy_in_the_interpreter(
    kind: str, dtype: torch.dtype, way: str
) -> None:
    case = DriftCase(kind, n_q=16, n_k=300, head_dim=32, dtype=dtype)
    drifts = (0, 16, 256) if way == "fused" else (0, 256)
    errors = [relative_error(*tangent(case.at(d), way, "triton")) for d in drifts]
    assert_flat(errors, LIMITS[dtype])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", HARMED)
def test_the_usual_formula_fails_the_same_check(kind: str, dtype: torch.dtype) -> None:
    errors = []
    for drift in (0, 16):
        primals, tangents = DriftCase(kind, drift, 48, 1024, dtype=dtype).operands()
        exact = exact_tangent(primals, tangents)
        errors.append(relative_error(uncentred_tangent(primals, tangents), exact))
    with pytest.raises(AssertionError):
        assert_flat(errors, limit=1.0)


@natives
@ways
def test_the_mean_of_the_values_does_not_cost_accuracy(way: str, backend: str) -> None:
    """A rounding error weighs v - o, not v."""
    errors = [
        relative_error(*tangent(DriftCase("plain", 16, 48, 1024, value_mean=mean), way, backend))
        for mean in (0.0, 3.0)
    ]
    assert errors[1] <= 1.25 * errors[0], errors


MASKED = {
    "causal, 100 queries see nothing": (
        DriftCase("growing", n_q=300, n_k=200, head_dim=64),
        {"causal": True},
    ),
    "blocks": (DriftCase("text", n_q=200, n_k=512, head_dim=64), {"block_causal": 48}),
    "blocks before the first key": (
        DriftCase("plain", n_q=200, n_k=150, head_dim=32),
        {"block_causal": 48},
    ),
    "lengths": (
        DriftCase("growing", n_q=48, n_k=512, head_dim=64),
        {"kv_lengths": torch.tensor([131], device=DEVICE)},
    ),
}


@natives
@ways
@pytest.mark.parametrize("name", MASKED)
def test_drift_does_not_cost_accuracy_under_a_mask(name: str, way: str, backend: str) -> None:
    case, options = MASKED[name]
    assert_flat(errors_of(case, way, backend, **options), LIMITS[BF16])


@pytest.mark.skipif(not INTERPRETED, reason="Triton does not run in its interpreter here")
@ways
@pytest.mark.parametrize("name", ["blocks before the first key", "lengths"])
def test_drift_does_not_cost_accuracy_under_a_mask_in_the_interpreter(name: str, way: str) -> None:
    case, options = MASKED[name]
    case = replace(case, n_q=100, n_k=max(case.n_k // 2, 150), head_dim=32)
    errors = [relative_error(*tangent(case.at(d), way, "triton", **options)) for d in (0, 256)]
    assert_flat(errors, LIMITS[BF16])


@dtypes
@natives
@pytest.mark.parametrize("kind", ["plain", "local"])
def test_drift_does_not_cost_accuracy_over_32k_keys(
    kind: str, backend: str, dtype: torch.dtype
) -> None:
    case = DriftCase(kind, n_q=8, n_k=32768, head_dim=64, dtype=dtype)
    for way in WAYS:
        errors = [relative_error(*tangent(case.at(d), way, backend)) for d in (0, 16, 256)]
        assert_flat(errors, LIMITS[dtype])


@dtypes
@kinds
def test_the_rule_is_flat_with_the_roundings_of_a_gpu(kind: str, dtype: torch.dtype) -> None:
    """What the kernels do, where this machine has no hardware to run them on."""
    errors = []
    for drift in DRIFTS:
        operands = DriftCase(kind, drift, 64, 1024, dtype=dtype).operands()
        errors.append(relative_error(centres.checked_tangent(*operands), exact_tangent(*operands)))
    assert_flat(errors, LIMITS[dtype])


@pytest.mark.parametrize(
    ("kind", "drift", "repeated"), [("local", 256, True), ("text", 256, False)]
)
def test_the_check_sees_a_bad_centre_and_no_other(kind: str, drift: int, repeated: bool) -> None:
    operands = DriftCase(kind, drift, 64, 1024).operands()
    exact = exact_tangent(*operands)
    first = centres.sampled_tangent(*operands)
    harmed = relative_error(first.o_dot, exact) > LIMITS[BF16]
    assert (first.miss > centres.TAU) == harmed == repeated


@natives
def test_the_tangent_of_the_log_sum_exp_is_the_mean(backend: str) -> None:
    primals, tangents = DriftCase("text", 16, 48, 512, 64).operands(device=DEVICE)
    lse_dot = attention_jvp(primals, tangents, return_lse=True, backend=backend)[3]
    q, k, _, q_dot, k_dot, _ = (x.cpu().double() for x in (*primals, *tangents))
    s_dot = q_dot @ k.mT + q @ k_dot.mT
    exact = ((q @ k.mT / 8).softmax(-1) * s_dot / 8).sum(-1)
    # The sums are float32 over weights that are not rounded to bfloat16.
    torch.testing.assert_close(lse_dot.cpu().double(), exact, rtol=1e-4, atol=1e-4)
