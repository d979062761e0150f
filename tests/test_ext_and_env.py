# SPDX-License-Identifier: Apache-2.0
"""The lazy extension loader and the environment report."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import disca_kernels
from disca_kernels import _ext, env
from disca_kernels.backend import IMPLEMENTATIONS


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Let each test load anew, and leave no pretence behind."""
    forget = _ext._try_load.cache_clear
    forget()
    yield
    forget()


def pretend(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[str]:
    """Make the import of _C give a module or raise; return the log of attempts."""
    attempts: list[str] = []

    def import_module(name: str) -> Any:
        attempts.append(name)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(_ext.importlib, "import_module", import_module)
    return attempts


def extension(version: str) -> SimpleNamespace:
    return SimpleNamespace(build_info=lambda: {"version": version, "cuda": False})


def test_load_returns_the_module_and_imports_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = extension(disca_kernels.__version__)
    attempts = pretend(monkeypatch, module)
    assert _ext.load() is module
    assert _ext.load() is module
    assert _ext.why_not() is None
    assert attempts == ["disca_kernels._C"]


def test_absent_extension_says_how_to_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts = pretend(monkeypatch, ModuleNotFoundError("no _C"))
    monkeypatch.setattr(_ext, "__file__", str(tmp_path / "_ext.py"))
    (tmp_path / "_C.pyi").touch()
    for _ in range(2):
        with pytest.raises(_ext.ExtensionError, match=r"_C was not built; build it with .*pip"):
            _ext.load()
    assert len(attempts) == 1


def test_broken_extension_names_file_and_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, ImportError("undefined symbol: foo"))
    monkeypatch.setattr(_ext, "__file__", str(tmp_path / "_ext.py"))
    (tmp_path / "_C.abi3.so").touch()
    with pytest.raises(_ext.ExtensionError, match=r"_C.abi3.so.*undefined symbol: foo"):
        _ext.load()


def test_stale_extension_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, extension("0.0.1"))
    expected = f"built for version 0.0.1, this is {disca_kernels.__version__}"
    assert expected in str(_ext.why_not())
    with pytest.raises(_ext.ExtensionError, match=expected):
        _ext.load()


def test_report_is_complete_and_serialisable() -> None:
    report = env.collect()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["disca-kernels"] == disca_kernels.__version__
    assert {"python", "torch", "triton"} <= set(report["versions"])
    assert {op: tuple(found) for op, found in report["backends"].items()} == {
        op: tuple(str(b) for b in implemented) for op, implemented in IMPLEMENTATIONS.items()
    }


def test_report_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise AssertionError("the report must not raise")

    monkeypatch.setattr(_ext, "_try_load", lambda: (None, "it was not built"))
    monkeypatch.setattr(_ext, "load", refuse)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = env.format_report()
    assert "  error: it was not built" in text
    for name, reason in (("cpu", "it was not built"), ("triton", "no CUDA"), ("eager", "usable")):
        having = ", ".join(op for op, backends in IMPLEMENTATIONS.items() if name in backends)
        assert f"  {name} ({having}): {reason}" in text


def test_report_separates_operations_that_differ() -> None:
    environment: dict[str, Any] = {
        "versions": {"torch": None},
        "machine": {},
        "extension": {},
        "backends": {"a": {"cpu": []}, "b": {"cpu": ["first", "second"]}, "c": {}},
    }
    lines = env.format_report(environment).splitlines()
    assert "  torch: not installed" in lines
    assert lines[-3:] == ["  cpu:", "    a: usable", "    b: first; second"]


def test_compiled_extension_reports_its_build() -> None:
    try:
        module = importlib.import_module("disca_kernels._C")
    except ImportError:
        pytest.skip("disca_kernels._C is not built here")
    info = module.build_info()
    assert info["version"] == disca_kernels.__version__
    assert {"compiler", "openmp", "cpu_targets", "cuda"} <= set(info)
