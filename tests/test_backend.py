# SPDX-License-Identifier: Apache-2.0
"""Choice of backend: explicit requests never fall back, refusals say everything that helps."""

from types import SimpleNamespace

import pytest
import torch

import disca_kernels
from disca_kernels import _ext, backend
from disca_kernels.backend import Backend, BackendError, explain, resolve, use_backend, why_not

CPU_TENSOR = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISCA_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that _C was built, without CUDA."""
    module = SimpleNamespace(build_info=lambda: {"version": "0", "cuda": False})
    monkeypatch.setattr(_ext, "_try_load", lambda: (module, None))


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_try_load", lambda: (None, "disca_kernels._C was not built"))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.usefixtures("built")
def test_auto_on_cpu_prefers_the_extension() -> None:
    assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.CPU
    assert resolve("timestep_features", "auto", CPU_TENSOR) is Backend.EAGER


@pytest.mark.usefixtures("not_built")
def test_auto_on_cpu_without_extension_is_eager() -> None:
    assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.EAGER


@pytest.mark.usefixtures("built")
def test_auto_passes_over_an_unsupported_dtype() -> None:
    assert resolve("adaln_modulate", "auto", CPU_TENSOR.double()) is Backend.EAGER


@pytest.mark.usefixtures("built")
def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("timestep_features", "auto", CPU_TENSOR) is Backend.EAGER
    assert resolve("timestep_features", "triton", CPU_TENSOR) is Backend.TRITON


def test_auto_on_a_device_without_kernels_is_eager() -> None:
    assert resolve("attention", "auto", meta(2)) is Backend.EAGER


@pytest.mark.gpu
def test_auto_on_cuda_is_triton() -> None:
    assert resolve("attention", "auto", CPU_TENSOR.cuda()) is Backend.TRITON


@pytest.mark.usefixtures("built")
def test_absent_operands_are_ignored() -> None:
    assert resolve("adaln_modulate", "auto", None, CPU_TENSOR, None) is Backend.CPU


@pytest.mark.usefixtures("built")
def test_integer_operands_do_not_count_as_unsupported() -> None:
    assert resolve("adaln_modulate", "cpu", CPU_TENSOR, torch.ones(2, dtype=torch.int64))


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("op", "requested", "tensor", "reason"),
    [
        ("timestep_features", "cpu", CPU_TENSOR, "timestep_features has no cpu implementation"),
        ("attention", "triton", CPU_TENSOR, "needs CUDA tensors, got cpu"),
        ("adaln_modulate", "cpu", CPU_TENSOR.double(), "dtype float64 is not supported"),
        ("adaln_modulate", "cpu", meta(2), "needs CPU tensors, got meta"),
        ("adaln_modulate", "cuda", CPU_TENSOR, "built without its CUDA part"),
    ],
)
def test_explicit_never_falls_back(
    op: str, requested: str, tensor: torch.Tensor, reason: str
) -> None:
    with pytest.raises(BackendError) as caught:
        resolve(op, requested, tensor, None)
    message = str(caught.value)
    assert message.startswith(f"{op}: backend='{requested}' was requested and cannot run: ")
    assert reason in message
    name = str(tensor.dtype).removeprefix("torch.")
    assert f"Got: {name} {list(tensor.shape)} on {tensor.device}, None." in message
    assert "Would work: " in message
    assert "'eager'" in message


@pytest.mark.usefixtures("not_built")
@pytest.mark.parametrize("requested", ["cpu", "cuda"])
def test_refusal_says_how_the_extension_is_missing(requested: str) -> None:
    with pytest.raises(BackendError, match="_C was not built"):
        resolve("adaln_modulate", requested, CPU_TENSOR)


def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.LIMITS, ("attention", Backend.TRITON), lambda *_: ["head too big"])
    reasons = why_not("attention", "triton", CPU_TENSOR.double())
    assert len(reasons) == 3
    assert "CUDA tensors" in reasons[0]
    assert "float64" in reasons[1]
    assert reasons[2] == "head too big"


def test_a_limit_makes_auto_pass_on(monkeypatch: pytest.MonkeyPatch, built: None) -> None:
    def narrow(x: torch.Tensor) -> list[str]:
        return ["too wide"] if x.shape[-1] > 3 else []

    monkeypatch.setattr(backend, "LIMITS", {})
    backend.limit("adaln_modulate", Backend.CPU)(narrow)
    assert resolve("adaln_modulate", "auto", torch.ones(2, 3)) is Backend.CPU
    assert resolve("adaln_modulate", "auto", torch.ones(2, 4)) is Backend.EAGER


def test_auto_alone_passes_over_what_does_not_pay(
    monkeypatch: pytest.MonkeyPatch, built: None
) -> None:
    monkeypatch.setattr(backend, "UNPROFITABLE", {})
    backend.unprofitable("adaln_modulate", Backend.CPU)(lambda *_: ["rows are short"])
    assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.EAGER
    assert resolve("adaln_modulate", "cpu", CPU_TENSOR) is Backend.CPU
    assert "cpu: usable; auto passes it over: rows are short" in explain(
        "adaln_modulate", CPU_TENSOR
    )


def test_tensors_on_different_devices() -> None:
    with pytest.raises(BackendError, match="different devices: cpu, meta"):
        resolve("attention", "auto", CPU_TENSOR, meta(2))


def test_context_overrides_environment_and_call_overrides_both(
    monkeypatch: pytest.MonkeyPatch, built: None
) -> None:
    monkeypatch.setenv("DISCA_BACKEND", "triton")
    with pytest.raises(BackendError, match="triton"):
        resolve("adaln_modulate", "auto", CPU_TENSOR)
    with use_backend("eager"):
        assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.EAGER
        assert resolve("adaln_modulate", "cpu", CPU_TENSOR) is Backend.CPU
        with use_backend(Backend.AUTO):
            assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.CPU
        assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.EAGER
    with pytest.raises(BackendError, match="triton"):
        resolve("adaln_modulate", "auto", CPU_TENSOR)


def test_context_is_left_after_an_error(built: None) -> None:
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert resolve("adaln_modulate", "auto", CPU_TENSOR) is Backend.CPU


def test_wrong_names_list_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = "'auto', 'triton', 'cuda', 'cpu', 'eager'; got 'gpu'"
    with pytest.raises(ValueError, match=f"backend must be one of {valid}"):
        resolve("attention", "gpu", CPU_TENSOR)
    with pytest.raises(ValueError, match=valid), use_backend("gpu"):
        pass
    monkeypatch.setenv("DISCA_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"DISCA_BACKEND must be one of {valid}"):
        resolve("attention", "auto", CPU_TENSOR)
    monkeypatch.delenv("DISCA_BACKEND")
    with pytest.raises(ValueError, match="unknown operation 'convolution'; known operations: "):
        resolve("convolution", "auto", CPU_TENSOR)


@pytest.mark.usefixtures("built")
def test_explain_has_a_line_per_backend() -> None:
    lines = explain("adaln_modulate", CPU_TENSOR).splitlines()
    assert lines[0] == "adaln_modulate(float32 [2, 3] on cpu)"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["triton", "cuda", "cpu", "eager"]
    assert lines[3:] == ["  cpu: usable", "  eager: usable"]
    assert "needs CUDA tensors" in lines[1]


def test_public_names() -> None:
    assert {"resolve", "use_backend", "why_not"} <= set(disca_kernels.__all__)
    for name in disca_kernels.__all__:
        assert hasattr(disca_kernels, name)
