# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of attention: on an emulated machine, as machine code, and on a device.

The emulated machine (tests/emulation) runs the kernel's own source. It knows the layouts, barriers
and asynchrony that the PTX ISA documents, and nothing of the device's timing or memory model.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from disca_kernels import attention_jvp, backend
from disca_kernels.ops.attention import cuda
from disca_kernels.ops.attention.cases import AttentionCase, Operands, attention_in_dtype
from disca_kernels.ops.attention.reference import attention_jvp_reference
from disca_kernels.testing import assert_within_budget
from tests.emulation.emulator import (
    COMPILER,
    EmulationError,
    Emulator,
    Timing,
    build,
    compile_machine,
)

F16, BF16 = torch.float16, torch.bfloat16
FULL = (True, True, True)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def library(machine: Path, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return build(tmp_path_factory.mktemp("emulation"), machine)


def install(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launchers reach the emulated machine with tensors in host memory."""
    monkeypatch.setattr(cuda._ext, "load", lambda: emulator)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)


@pytest.fixture
def emulator(library: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    install(library, monkeypatch)
    library.timing = Timing()
    return library


def poisoned(operands: Operands) -> Operands:
    """Return the operands with NaN in every key and value that is not valid."""
    primals, tangents = (tuple(x.clone() for x in xs) for xs in operands[:2])
    for i_b, length in enumerate(operands.kv_lengths.tolist()):
        for x in (*primals[1:], *tangents[1:]):
            x[i_b, :, length:] = torch.nan
    return operands._replace(primals=primals, tangents=tangents)


def select(tangents: tuple[Tensor, ...], present: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(x if here else None for x, here in zip(tangents, present, strict=True))


def assert_agrees(
    actual: tuple[Tensor, ...], operands: Operands, present: tuple[bool, ...] = FULL
) -> None:
    """Compare o, lse, o_dot and lse_dot with float64, by eager's error in the same dtype."""
    o, lse, o_dot, lse_dot = actual
    dots = tuple(
        x if here else torch.zeros_like(x)
        for x, here in zip(operands.tangents, present, strict=True)
    )
    lengths = operands.kv_lengths
    wide = tuple(tuple(x.double() for x in xs) for xs in (operands.primals, dots))
    expected = attention_jvp_reference(*wide, kv_lengths=lengths, return_lse=True)
    eager = jvp(lambda *x: attention_in_dtype(*x, kv_lengths=lengths), operands.primals, dots)
    assert_within_budget(o, expected[0], eager[0], name="o")
    assert_within_budget(o_dot, expected[1], eager[1], name="o_dot")
    # Sums of float32 that no rounding to the operands' dtype enters.
    torch.testing.assert_close(lse.double(), expected[2].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_dot.double(), expected[3].double(), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 2, 130, 200, 128, BF16, key_heads=1),
        AttentionCase(1, 1, 100, 192, 128, F16),
        AttentionCase(3, 2, 65, 150, 128, BF16, key_heads=2, lengths=(0, 150, 65)),
        AttentionCase(2, 4, 1, 64, 128, BF16, key_heads=2, lengths=(1, 64)),
        AttentionCase(1, 1, 129, 1, 128, BF16),
        AttentionCase(1, 1, 64, 700, 128, BF16, lengths=(641,)),
    ],
    ids=str,
)
def test_value_and_tangent_on_the_emulated_machine(case: AttentionCase, emulator: Emulator) -> None:
    operands = case.operands()
    given = operands if case.lengths is None else poisoned(operands)
    scale = case.head_dim**-0.5
    actual = cuda.launch_jvp(given.primals, given.tangents, given.kv_lengths, 0, scale)
    assert_agrees(actual, operands)


@needs_compiler
@pytest.mark.parametrize(
    "present",
    [(q, k, v) for q in (True, False) for k in (True, False) for v in (True, False) if q or k or v],
)
def test_absent_tangents(present: tuple[bool, ...], emulator: Emulator) -> None:
    case = AttentionCase(1, 1, 70, 130, 128, BF16, lengths=(129,))
    operands = case.operands()
    given = poisoned(operands)
    dots = select(given.tangents, present)
    actual = cuda.launch_jvp(given.primals, dots, given.kv_lengths, 0, 128**-0.5)
    assert_agrees(actual, operands, present)


@needs_compiler
def test_the_tangent_is_as_accurate_with_a_common_drift(emulator: Emulator) -> None:
    """What centring is for: all keys' tangents move alike, and o_dot is the same."""
    case = AttentionCase(1, 1, 64, 300, 128, BF16)
    q, k, v = case.operands().primals
    q_dot, k_dot, v_dot = (x / 4 for x in case.operands(seed=1).tangents)
    errors = []
    for drift in (0, 64):
        moved = k_dot + drift
        actual = cuda.launch_jvp((q, k, v), (q_dot, moved, v_dot), None, 0, 128**-0.5)[2]
        wide = (
            tuple(x.double() for x in (q, k, v)),
            tuple(x.double() for x in (q_dot, moved, v_dot)),
        )
        expected = attention_jvp_reference(*wide)[1]
        errors.append(float((actual.double() - expected).norm() / expected.norm()))
    assert errors[1] < 2 * errors[0], errors


@needs_compiler
@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_any_scale(scale: float, emulator: Emulator) -> None:
    operands = AttentionCase(1, 1, 64, 100, 128, BF16).operands()
    actual = cuda.launch_jvp(operands.primals, operands.tangents, None, 0, scale)
    wide = tuple(tuple(x.double() for x in xs) for xs in operands[:2])
    expected = attention_jvp_reference(*wide, scale=scale, return_lse=True)
    for i, j in enumerate((0, 2, 1, 3)):
        error = (actual[i].double() - expected[j]).norm()
        assert error <= 4e-3 * expected[j].norm() + 1e-6, (i, error)


@needs_compiler
def test_the_result_does_not_depend_on_timing(emulator: Emulator) -> None:
    operands = AttentionCase(1, 1, 70, 330, 128, BF16, lengths=(329,)).operands()
    results = []
    for timing in (
        Timing(1, lazy_products=False, copy_probability=1.0, stall_probability=0.0),
        Timing(2, lazy_products=True, copy_probability=0.02, stall_probability=0.6),
        Timing(3, lazy_products=True, copy_probability=1.0, stall_probability=0.9),
    ):
        emulator.timing = timing
        lengths = operands.kv_lengths
        results.append(cuda.launch_jvp(operands.primals, operands.tangents, lengths, 0, 0.1))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_operands_out_of_the_copy_engines_reach_are_copied(emulator: Emulator) -> None:
    """Its strides are multiples of 16 bytes, and it repeats nothing."""
    case = AttentionCase(2, 2, 20, 40, 128, BF16)
    operands = case.operands()
    q, k, v = operands.primals
    odd = torch.zeros(2, 2, 40, 132, dtype=BF16)[..., 3:131].copy_(k)
    strided = torch.zeros(2, 2, 20, 256, dtype=BF16)[..., ::2].copy_(q)
    repeated = v[:1, :1].expand(2, 2, 40, 128)
    lengths = torch.tensor([[40, 7], [33, 7]], dtype=torch.int32)[:, 0]
    actual = cuda.launch_jvp((strided, odd, repeated), operands.tangents, lengths, 0, 128**-0.5)
    same = operands._replace(primals=(q, k, repeated.contiguous()), kv_lengths=lengths)
    assert_agrees(actual, same)


@needs_compiler
def test_lengths_beyond_the_keys_are_clamped(emulator: Emulator) -> None:
    operands = AttentionCase(2, 1, 20, 40, 128, BF16).operands()
    lengths = torch.tensor([-(2**40), 2**40])
    actual = cuda.launch_jvp(operands.primals, operands.tangents, lengths, 0, 128**-0.5)
    assert_agrees(actual, operands._replace(kv_lengths=torch.tensor([0, 40])))


@needs_compiler
def test_a_nan_in_a_valid_key_is_not_hidden(emulator: Emulator) -> None:
    (q, k, v), tangents, *_ = AttentionCase(1, 2, 20, 70, 128, BF16).operands()
    k = k.clone()
    k[0, 1, 3, 5] = torch.nan
    results = cuda.launch_jvp((q, k, v), tangents, None, 0, 128**-0.5)
    for x in results:
        assert x[0, 0].isfinite().all()
        assert x[0, 1].isnan().all()


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not interpret where a GPU is")
def test_the_value_has_a_gradient(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels compute it, from the log-sum-exp of this one."""
    monkeypatch.setitem(backend._DEVICE_REASONS, backend.Backend.CUDA, lambda _: [])
    monkeypatch.setattr(cuda._ext, "why_not", lambda: "emulated")
    operands = AttentionCase(1, 2, 20, 70, 128, BF16, key_heads=1).operands()

    def gradients(chosen: str) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_() for x in operands.primals)
        o, o_dot = attention_jvp(leaves, operands.tangents, backend=chosen)
        assert not o_dot.requires_grad
        return torch.autograd.grad(o, leaves, operands.cotangent)

    for actual, expected in zip(gradients("cuda"), gradients("eager"), strict=True):
        assert float((actual - expected).norm()) < 1e-2 * float(expected.norm())


RELEASE = "    M::release(base + L::kKEmpty + 8 * slot, lane);\n"
WAIT_S = "    M::template wait_groups<V::kSDot ? 1 : 0>(s);\n"
WAIT_S_DOT = "    if constexpr (V::kSDot) M::template wait_groups<0>(s_dot);\n"
# What is changed in the kernel, and the error, or None for a wrong result.
MISTAKES = {
    "a barrier of the wrong phase": (
        {"(tile / kStages + 1) & 1": "tile / kStages & 1"},
        "deadlock",
    ),
    "more arrivals expected than come": (
        {"base + L::kKEmpty + 8 * slot, kConsumers / 32": "base + L::kKEmpty + 8 * slot, 9"},
        "deadlock",
    ),
    "more bytes expected than come": (
        {"M::arrive_expect(v_full, L::kVBytes)": "M::arrive_expect(v_full, L::kVBytes + 16)"},
        "deadlock",
    ),
    "a turn that nobody takes": (
        {"if (group == 0 || tile + 1 < n_tiles) M::named_arrive": "M::named_arrive"},
        "was left with",
    ),
    "a store without a proxy fence": (
        {"  M::fence_async_proxy();\n  M::named_sync": "  M::named_sync"},
        "without a proxy fence",
    ),
    "registers without a fence": ({"M::fence(a_dot);": ""}, "without a wgmma.fence"),
    "strides of the descriptor exchanged": (
        {"descriptor(address, kPanel, kSwizzleAtom)": "descriptor(address, kSwizzleAtom, kPanel)"},
        None,
    ),
    "padding left as it is": ({"n_valid < kBlockN && n_keys < p.n_k": "false"}, None),
    "keys released too early": (
        {WAIT_S: WAIT_S + RELEASE, WAIT_S_DOT + RELEASE: WAIT_S_DOT},
        None,
    ),
    "products not waited for": ({WAIT_S_DOT: ""}, None),
    "T not corrected": ({"x.t[i] -= moved[row_of(i)] * x.o[i]": "x.t[i] -= 0.0f"}, None),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulated_machine_notices(
    mistake: str, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these mistakes in the kernel is an error or a wrong result."""
    changes, message = MISTAKES[mistake]
    install(build(tmp_path, machine, changes), monkeypatch)
    operands = AttentionCase(1, 1, 70, 400, 128, BF16, lengths=(329,)).operands()
    given = poisoned(operands)
    arguments = (given.primals, given.tangents, given.kv_lengths, 0, 128**-0.5)
    if message is not None:
        with pytest.raises(EmulationError, match=message):
            cuda.launch_jvp(*arguments)
    else:
        actual = cuda.launch_jvp(*arguments)
        with pytest.raises(AssertionError):
            assert_agrees(actual, operands)
