# SPDX-License-Identifier: Apache-2.0
"""The C++ CPU kernels of attention: every instruction set, threads, memory, what they refuse."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import _ext
from disca_kernels.ops.attention.cases import AttentionCase, attention_in_dtype
from disca_kernels.ops.attention.reference import (
    attention_jvp_reference,
    attention_mask,
    attention_reference,
    repeat_heads,
    resolve_block,
)
from disca_kernels.testing import assert_within_budget
from tests.ops.attention_calls import CASES, double, options

if _ext.why_not():
    pytest.skip(str(_ext.why_not()), allow_module_level=True)

from disca_kernels.ops.attention import cpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# More than one block of keys and tile of queries, and widths that fill no vector or panel.
TILED = [
    AttentionCase(1, 2, 100, 390, 19),
    AttentionCase(2, 2, 195, 230, 40, key_heads=1, causal=True, lengths=(200, 7)),
    AttentionCase(1, 3, 98, 400, 72, BF16, block_causal=64, lengths=(393,)),
    AttentionCase(1, 2, 193, 210, 33, BF16),
    AttentionCase(1, 2, 100, 200, 128, F16, lengths=(193,)),
]
isas = pytest.mark.parametrize("isa", cpu.isas())


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def chosen(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DISCA_CPU_ISA", isa)
    return isa


def settings(case: AttentionCase) -> tuple[int, float]:
    return resolve_block(case.causal, case.block_causal), case.head_dim**-0.5


def launch_all(case: AttentionCase, poison: bool = False) -> dict[str, Tensor]:
    """Run every launcher; `poison` puts NaN where no query may look."""
    operands = case.operands()
    (q, *kv), (q_dot, *kv_dot) = operands.primals, operands.tangents
    block, scale = settings(case)
    if poison and operands.kv_lengths is not None:
        padding = torch.arange(case.n_k) >= operands.kv_lengths[:, None]
        kv, kv_dot = (
            [x.masked_fill(padding[:, None, :, None], torch.nan) for x in y] for y in (kv, kv_dot)
        )
    primals, tangents = (q, *kv), (q_dot, *kv_dot)
    mask = operands.kv_lengths, block, scale
    o, lse, rest = cpu.launch_fwd(*primals, *mask, wide=True)
    dlse = torch.linspace(-1, 1, lse.numel()).view(lse.shape)
    results: dict[str, Tensor] = {"o": o, "lse": lse}
    if rest is not None:
        results["rest"] = rest
    for name, with_rest in (("rounded", None), ("wide", rest)):
        pair = cpu.launch_tangent(primals, tangents, o, with_rest, lse, *mask)
        results |= {f"o_dot over {name} o": pair[0], f"lse_dot over {name} o": pair[1]}
    fused = cpu.launch_jvp(primals, tangents, *mask)
    results |= dict(zip(("o of jvp", "lse of jvp", "o_dot", "lse_dot"), fused, strict=True))
    for name, extra in (("", None), (" with dlse", dlse)):
        gradients = cpu.launch_bwd(operands.cotangent, extra, primals, o, lse, *mask)
        results |= {f"d{x}{name}": g for x, g in zip("qkv", gradients, strict=True)}
    return results


def eager(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp with every step rounded to the dtype."""
    o = attention_in_dtype(q, k, v, **kwargs)
    block = resolve_block(kwargs["causal"], kwargs["block_causal"])
    mask = attention_mask(q.shape[2], k.shape[2], kwargs["kv_lengths"], block, q.device)
    scores = (q @ repeat_heads(q.shape[1], k)[0].mT) * q.shape[-1] ** -0.5
    if mask is None:
        return o, scores.logsumexp(-1)
    lse = scores.masked_fill(~mask, torch.finfo(q.dtype).min).logsumexp(-1)
    return o, lse.masked_fill(~mask.any(-1), -torch.inf)


def expected_of(case: AttentionCase, wide: bool) -> dict[str, Tensor]:
    """The same by autograd, in float64 or by eager in the case's dtype."""
    operands = case.operands()
    kwargs = options(case, operands)
    primals, tangents, cotangent = operands.primals, operands.tangents, operands.cotangent

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attention_reference(*x, **kwargs, return_lse=True) if wide else eager(*x, **kwargs)

    if wide:
        primals, tangents, cotangent = double(primals), double(tangents), cotangent.double()
    (o, lse), (o_dot, lse_dot) = jvp(function, primals, tangents)
    results = {"o": o, "o of jvp": o} | dict.fromkeys(("lse", "lse of jvp"), lse)
    results |= {f"o_dot{x}": o_dot for x in ("", " over rounded o", " over wide o")}
    results |= {f"lse_dot{x}": lse_dot for x in ("", " over rounded o", " over wide o")}
    dlse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view(lse.shape)
    leaves = [x.detach().requires_grad_() for x in primals]
    for name, extra in (("", torch.zeros_like(dlse)), (" with dlse", dlse)):
        o, lse = function(*leaves)
        extra = extra.masked_fill(lse.isinf(), 0.0)
        gradients = torch.autograd.grad((o, lse), leaves, (cotangent, extra))
        results |= {f"d{x}{name}": g for x, g in zip("qkv", gradients, strict=True)}
    # Kernels keep statistics in float32.
    return {
        name: x if wide or not name.startswith("lse") else x.float() for name, x in results.items()
    }


@isas
@pytest.mark.parametrize("case", [*CASES, *TILED], ids=str)
def test_every_launcher_is_within_budget(case: AttentionCase, chosen: str) -> None:
    actual, exact, yardstick = launch_all(case), expected_of(case, True), expected_of(case, False)
    rest = actual.pop("rest", None)
    assert actual.keys() == exact.keys()
    # Eager has an instruction that multiplies and adds with one rounding; the baseline has not.
    factor = 3.0 if chosen == "baseline" else 2.0
    for name, result in actual.items():
        label = f"attention {name} ({chosen})"
        assert_within_budget(result, exact[name], yardstick[name], name=label, factor=factor)
    if rest is not None:
        narrow = actual["o"].double() - exact["o"]
        assert (narrow + rest.double()).norm() < narrow.norm() * 0.75


@isas
@pytest.mark.parametrize("case", TILED, ids=str)
def test_keys_beyond_the_length_may_hold_anything(case: AttentionCase, chosen: str) -> None:
    clean, poisoned = launch_all(case), launch_all(case, poison=True)
    for name, result in clean.items():
        assert torch.equal(result, poisoned[name]), name
        assert result.isfinite().all(), name


@isas
@pytest.mark.parametrize("case", [TILED[1], TILED[3]], ids=str)
def test_the_bits_do_not_depend_on_the_threads(case: AttentionCase, chosen: str) -> None:
    two = launch_all(case)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for name, result in launch_all(case).items():
            assert torch.equal(result, two[name]), name


@isas
def test_value_is_the_same_with_and_without_a_tangent(chosen: str) -> None:
    for case in (TILED[1], TILED[2]):
        results = launch_all(case)
        assert torch.equal(results["o"], results["o of jvp"])
        assert torch.equal(results["lse"], results["lse of jvp"])


def test_every_instruction_set_of_the_processor_is_there() -> None:
    names = cpu.isas()
    assert names[-1] == "baseline"
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if flags.get("avx512_bf16"):
        assert names == ["avx512_bf16", "avx512", "avx2", "baseline"]


@isas
def test_weights_have_the_accuracy_of_float32(chosen: str) -> None:
    """One channel and values that tell the keys apart lay P open, down to where it is 0."""
    q, k = torch.tensor([1.0]).view(1, 1, 1, 1), torch.linspace(-100, 0, 200).view(1, 1, 200, 1)
    columns = []
    for j in range(200):
        v = torch.zeros(1, 1, 200, 1)
        v[:, :, j] = 1
        columns.append(cpu.launch_fwd(q, k, v, None, 0, 1.0)[0].item())
    p, exact = torch.tensor(columns).double(), k.double().flatten().softmax(0)
    # The score itself is rounded, which moves a weight by its logarithm times half a unit.
    allowed = exact * 2**-24 * (8 + 2 * k.double().flatten().abs()) + 2**-126
    assert ((p - exact).abs() <= allowed).all()
    assert p[0] == 0
    assert p[40] > 0


@isas
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_hugely_negative_scores_and_outliers(dtype: torch.dtype, chosen: str) -> None:
    case = AttentionCase(1, 1, 100, 400, 16, dtype)
    q, k, v = case.operands().primals
    q = torch.ones_like(q)
    k = -100 * k.abs()
    k[:, :, 300] = 0  # in the second block: what came before it weighs nothing
    o, lse, _ = cpu.launch_fwd(q, k, v, None, 0, 2.0)
    assert torch.equal(o, v[:, :, 300:301].expand_as(o))
    assert torch.equal(lse, torch.zeros_like(lse))
    o, *_, lse_dot = cpu.launch_jvp((q, k, v), (None, k, None), None, 0, 2.0)
    assert torch.equal(o, v[:, :, 300:301].expand_as(o))
    assert torch.equal(lse_dot, torch.zeros_like(lse_dot))


@isas
def test_nan_in_a_key_reaches_the_rows_that_see_it_and_no_other(chosen: str) -> None:
    q, k, v = AttentionCase(1, 1, 150, 150, 24).operands().primals
    k = k.clone()
    k[:, :, 100] = torch.nan
    o, lse, _ = cpu.launch_fwd(q, k, v, None, 1, 0.2)
    assert o[:, :, :100].isfinite().all()
    assert lse[:, :, :100].isfinite().all()
    assert o[:, :, 100:].isnan().all()
    assert lse[:, :, 100:].isnan().all()


@isas
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scale_may_be_zero_or_negative(scale: float, dtype: torch.dtype, chosen: str) -> None:
    operands = AttentionCase(1, 2, 50, 300, 21, dtype).operands()
    primals, tangents = operands.primals, operands.tangents
    o, lse, o_dot, lse_dot = cpu.launch_jvp(primals, tangents, None, 0, scale)
    over = cpu.launch_tangent(primals, tangents, o, None, lse, None, 0, scale)
    exact = attention_jvp_reference(double(primals), double(tangents), scale=scale, return_lse=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 2e-2, "atol": 2e-2}
    expected = tuple(x.float() for x in exact)
    actual = tuple(x.float() for x in (o, o_dot, lse, lse_dot))
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(over[0].float(), expected[1], **tolerance)
    torch.testing.assert_close(over[1], expected[3], **tolerance)


@isas
@pytest.mark.parametrize("present", range(8))
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_absent_tangents_are_zero(dtype: torch.dtype, present: int, chosen: str) -> None:
    operands = AttentionCase(1, 2, 30, 220, 24, dtype).operands()
    primals = operands.primals
    given = tuple(x if present >> i & 1 else None for i, x in enumerate(operands.tangents))
    zeros = tuple(
        torch.zeros_like(x) if x_dot is None else x_dot
        for x, x_dot in zip(primals, given, strict=True)
    )
    for tangents in (given, zeros):
        o, lse, o_dot, lse_dot = cpu.launch_jvp(primals, tangents, None, 0, 0.3)
        over = cpu.launch_tangent(primals, tangents, o, None, lse, None, 0, 0.3)
        if tangents is given:
            first = o_dot, lse_dot, *over
        else:
            torch.testing.assert_close((o_dot, lse_dot, *over), first)
    assert bool(first[0].any()) == bool(first[2].any()) == (present > 0)
    assert bool(first[1].any()) == bool(first[3].any()) == (present & 3 > 0)


@isas
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_tangent_over_a_value_finds_a_centre_that_its_first_keys_hide(
    dtype: torch.dtype, chosen: str
) -> None:
    """Constant keys come first, and the others drift together, which moves every row's mean."""
    operands = AttentionCase(1, 1, 96, 768, 64, dtype).operands(seed=2)
    (q, k, v), (q_dot, k_dot, v_dot) = operands.primals, operands.tangents
    q, v = q + 0.5, v + 2
    k_dot = (k_dot + 16).clone()
    k_dot[:, :, :192] = 0
    primals, tangents = (q, k, v), (torch.zeros_like(q_dot), k_dot, v_dot)
    exact = attention_jvp_reference(double(primals), double(tangents))[1]
    o, lse, rest = cpu.launch_fwd(*primals, None, 0, 0.125, wide=True)
    for known in (rest, None):
        o_dot, _ = cpu.launch_tangent(primals, tangents, o, known, lse, None, 0, 0.125)
        error = (o_dot.double() - exact).norm() / exact.norm()
        assert error < (4e-6 if dtype == F32 else 3.5e-3)


@isas
def test_strides_of_every_kind(chosen: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v, q_dot, k_dot, v_dot, do = torch.randn(7, 2, 4, 26, 12, generator=generator)
    lse = torch.empty(2, 4, 26)
    odd = (
        q.mT.contiguous().mT,  # strided channels
        k[:1].expand(2, -1, -1, -1)[:, :, ::2],  # a repeated sample, every second key
        v.flip(1).flip(1).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)[:, :, ::2],
    )
    dots = q_dot.transpose(1, 2).contiguous().transpose(1, 2), k_dot[:, :, 13:], v_dot[:, :, ::2]
    do = do[..., :1].expand(-1, -1, -1, 12)
    plain = [[x.contiguous() for x in y] for y in (odd, dots)]
    o, lse, *tangent = cpu.launch_jvp(odd, dots, None, 3, 0.3)
    expected = cpu.launch_jvp(*plain, None, 3, 0.3)
    for a, e in zip((o, lse, *tangent), expected, strict=True):
        assert torch.equal(a, e)
    gradients = cpu.launch_bwd(do, None, odd, o.mT.contiguous().mT, lse, None, 3, 0.3)
    wanted = cpu.launch_bwd(do.contiguous(), None, plain[0], o, lse, None, 3, 0.3)
    assert all(torch.equal(a, e) for a, e in zip(gradients, wanted, strict=True))


@isas
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty(shape: tuple[int, int, int, int], chosen: str) -> None:
    case = AttentionCase(*shape, 8)
    for name, result in launch_all(case).items():
        if name.startswith("lse") and "dot" not in name:
            assert result.isneginf().all(), name
        else:
            assert result.eq(0).all(), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_lengths_of_any_integer_type_are_clamped(dtype: torch.dtype) -> None:
    q, k, v = AttentionCase(3, 1, 4, 6, 8).operands().primals
    lengths = torch.tensor([100, 0, 3], dtype=dtype)
    actual = cpu.launch_fwd(q, k, v, lengths, 0, 0.3)[:2]
    expected = cpu.launch_fwd(q, k, v, torch.tensor([6, 0, 3]), 0, 0.3)[:2]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    negative = torch.tensor([-5, 6, 6])
    assert cpu.launch_fwd(q, k, v, negative, 0, 0.3)[0][0].eq(0).all()


_PEAK = """
import resource, torch
from disca_kernels.ops.attention import cpu
n, mib = 4096, 2**20
torch.set_num_threads(2)
x = [torch.randn(1, 1, n, 16) for _ in range(7)]
def everything(x):
    o, lse, *_ = cpu.launch_jvp(x[:3], x[3:6], None, 0, 0.25)
    cpu.launch_tangent(x[:3], x[3:6], o, None, lse, None, 0, 0.25)
    cpu.launch_bwd(x[6], None, x[:3], o, lse, None, 0, 0.25)
everything([y[:, :, :64].contiguous() for y in x])  # code and threads, which stay
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
everything(x)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / mib
print(grown)
"""


def test_memory_is_linear_in_the_tokens() -> None:
    """A matrix of scores would be 64 MiB; operands are 1/4 MiB each."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 16


def call(**changes: object) -> None:
    """Call the bound function itself, with a valid call changed in one argument."""
    x, o, lse = torch.zeros(2, 2, 3, 8), torch.empty(2, 2, 3, 8), torch.empty(2, 2, 3)
    operand = (x.data_ptr(), *x.stride()[:3])
    arguments: dict[str, object] = {
        "problem": ((2, 2, 2, 3, 3, 8), 0, 1.0, "float32", 0),
        "primals": (operand, operand, operand),
        "outputs": (o.data_ptr(), lse.data_ptr(), 0),
        "isa": "",
        "threads": 1,
    }
    _ext.load().attention_fwd_cpu(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (((2, 2, 2, 3, 3, 0), 0, 1.0, "float32", 0), r"head dimension must be 1 .. 256, got 0"),
        (((2, 2, 2, 3, 3, 257), 0, 1.0, "float32", 0), r"head dimension .* got 257"),
        (((2, 2, 2, -3, 3, 8), 0, 1.0, "float32", 0), r"must not be negative.* Nq -3"),
        (((2, 3, 2, 3, 3, 8), 0, 1.0, "float32", 0), r"3 query heads must be a multiple.* got 2"),
        (((2, 2, 0, 3, 3, 8), 0, 1.0, "float32", 0), r"2 query heads must be a multiple.* got 0"),
        (((2, 2, 2, 3, 3, 8), -1, 1.0, "float32", 0), r"block must not be negative, got -1"),
        (((2, 2, 2, 3, 3, 8), 0, 1.0, "float64", 0), r"bfloat16 or float16, got float64"),
    ],
)
def test_refuses_a_malformed_problem(problem: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(problem=problem)


def test_refuses_missing_addresses() -> None:
    call()
    x = torch.zeros(2, 2, 3, 8)
    operand, missing = (x.data_ptr(), *x.stride()[:3]), (0, 0, 0, 0)
    with pytest.raises(ValueError, match="k has address 0 for 96 elements"):
        call(primals=(operand, missing, operand))
    with pytest.raises(ValueError, match="lse has address 0 for 12 elements"):
        call(outputs=(x.data_ptr(), 0, 0))


def test_refuses_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = AttentionCase(1, 1, 2, 2, 8).operands().primals
    monkeypatch.setenv("DISCA_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"DISCA_CPU_ISA must be .*baseline here, got 'avx1024'"):
        cpu.launch_fwd(q, k, v, None, 0, 1.0)
