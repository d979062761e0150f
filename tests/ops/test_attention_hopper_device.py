# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of attention: its machine code, what it refuses, and its first run on a GPU."""

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import attention_jvp, why_not
from disca_kernels.backend import Backend, BackendError, candidates
from disca_kernels.ops.attention import cuda
from disca_kernels.ops.attention.cases import AttentionCase, attention_in_dtype
from disca_kernels.testing import assert_within_budget

F16, BF16 = torch.float16, torch.bfloat16


@pytest.mark.slow
def test_every_variant_keeps_to_its_registers() -> None:
    machine_code = pytest.importorskip("tests.emulation.machine_code", reason="no Triton")
    nvcc = machine_code.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc that knows sm_90a")
    reports, said = machine_code.compile_kernel(nvcc)
    assert len({(r.dtype, r.tangents) for r in reports}) == len(reports) == 14
    # What the compiler says if it ignores setmaxnreg or makes the products wait for each other.
    assert "C75" not in said, said
    for r in reports:
        q, k, v = r.tangents
        count = r.instructions
        assert r.registers == 168, r
        # Those of the two roles fit the register file exactly.
        assert r.highest_register < 240, r
        assert r.stack_bytes == r.local_bytes == count["STL"] + count["LDL"] == 0, r
        # A tile is 8 steps of 16 along D for each kind of score and 4 along the keys for each sum.
        assert count["HGMMA"] == 8 * (1 + q + k) + 4 * (1 + (q or k) + v), r
        # Two chunks of D for each tile of keys, and for two times 64 queries.
        assert count["UTMALDG"] == 2 * (2 + k + v) + 4 * (1 + q), r
        assert count["USETMAXREG"] == 2, r


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (BF16, 64, "needs head dimension 128, got 64"),
        (F16, 256, "needs head dimension 128, got 256"),
        (torch.float32, 128, "needs bfloat16 or float16, got float32"),
    ],
)
def test_reasons(dtype: torch.dtype, head_dim: int, reason: str) -> None:
    q = torch.zeros(1, 1, 4, head_dim, dtype=dtype)
    assert reason in cuda.reasons(q, q, q)


def test_another_compute_capability_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its instructions are those of 9.0 alone, not of what comes after."""
    for capability, wrong in (((9, 0), False), ((8, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        q = torch.zeros(1, 1, 4, 128, dtype=BF16)
        monkeypatch.setattr(Tensor, "device", torch.device("cuda"))
        found = cuda.reasons(q)
        monkeypatch.undo()
        assert any("needs compute capability 9.0 exactly" in r for r in found) is wrong, found


@pytest.mark.parametrize("mask", [{"causal": True}, {"block_causal": 4}])
def test_a_causal_mask_is_refused(mask: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disca_kernels.backend.why_not", lambda *_: [])
    q = torch.zeros(1, 1, 4, 128, dtype=BF16)
    with pytest.raises(BackendError, match=r"no causal mask.*Would work: 'triton', 'eager'"):
        attention_jvp((q, q, q), (q, None, None), **mask, backend="cuda")


def test_auto_never_chooses_it() -> None:
    assert Backend.CUDA not in candidates("attention", torch.device("cuda"))


def test_host_tensors_are_refused() -> None:
    q = torch.zeros(1, 1, 4, 128, dtype=BF16)
    with pytest.raises(BackendError, match="backend='cuda' was requested and cannot run"):
        attention_jvp((q, q, q), (q, q, q), backend="cuda")


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0)])
def test_empty_operands_need_no_kernel(n_q: int, n_k: int) -> None:
    q, k = torch.zeros(2, 1, n_q, 128, dtype=BF16), torch.zeros(2, 1, n_k, 128, dtype=BF16)
    o, lse, o_dot, lse_dot = cuda.launch_jvp((q, k, k), (q, k, k), None, 0, 1.0)
    assert o.shape == o_dot.shape == q.shape
    assert lse.shape == lse_dot.shape == q.shape[:3]
    assert not any(x.any() for x in (o, o_dot, lse_dot))
    assert torch.all(lse == -torch.inf)


@pytest.mark.gpu
@pytest.mark.parametrize("present", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 2, 130, 200, 128, BF16, key_heads=1),
        AttentionCase(3, 2, 65, 150, 128, BF16, lengths=(0, 150, 65)),
        AttentionCase(1, 4, 1000, 3000, 128, F16, key_heads=2, lengths=(2900,)),
    ],
    ids=str,
)
def test_on_a_device(case: AttentionCase, present: tuple[bool, ...]) -> None:
    """The same numbers as the emulated machine's, twice with the same bits."""
    operands = case.operands(device="cuda")
    reasons = why_not("attention", "cuda", *operands.primals)
    if reasons:
        pytest.skip("; ".join(reasons))
    zeros = [torch.zeros_like(x) for x in operands.tangents]
    dots = [x if here else z for x, z, here in zip(operands.tangents, zeros, present, strict=True)]
    given = tuple(x if here else None for x, here in zip(dots, present, strict=True))
    lengths = operands.kv_lengths
    wide = tuple(x.double() for x in operands.primals), tuple(x.double() for x in dots)

    def call() -> tuple[Tensor, ...]:
        return attention_jvp(
            operands.primals, given, kv_lengths=lengths, return_lse=True, backend="cuda"
        )

    o, o_dot, lse, lse_dot = call()
    expected = attention_jvp(*wide, kv_lengths=lengths, return_lse=True, backend="eager")
    eager = jvp(
        lambda *x: attention_in_dtype(*x, kv_lengths=lengths), operands.primals, tuple(dots)
    )
    assert_within_budget(o, expected[0], eager[0], name="o")
    assert_within_budget(o_dot, expected[1], eager[1], name="o_dot")
    torch.testing.assert_close(lse.double(), expected[2].double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse_dot.double(), expected[3].double(), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip((o, o_dot, lse, lse_dot), call(), strict=True))
