# SPDX-License-Identifier: Apache-2.0
"""The tree obeys its rules, and each rule notices a planted violation."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from disca_kernels.backend import IMPLEMENTATIONS, Backend
from tests.contract import rules
from tests.contract.source import ROOT

Rule = Callable[[Path], list[str]]
RULES = [
    rules.wrong_arrows,
    rules.missing_rooms,
    rules.over_budget,
    rules.missing_package_markers,
    rules.bad_headers,
]

_FOLDERS = ("disca_kernels", "python", "tests", "benchmarks", "csrc", "docs/ops")
_FILES = ("CMakeLists.txt", "CHANGELOG.md", "setup.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources that a test may damage."""
    for folder in _FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "assets", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in _FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_obeys(rule: Rule) -> None:
    complaints = rule(ROOT)
    assert not complaints, "\n".join(["", *complaints])


def plant(path: Path, text: str) -> None:
    """Append text to a file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


OPS = "disca_kernels/ops"


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("disca_kernels/backend.py", "import disca", "knows no model"),
        ("disca_kernels/testing/new.py", "from disca.models import DiT", "knows no model"),
        ("disca_kernels/dual.py", "from disca_kernels import _C", "_ext alone"),
        ("disca_kernels/dual.py", "import triton", "kernels' rooms alone"),
        ("disca_kernels/dual.py", "import disca_kernels.ops.attention.api", "private to it"),
        ("disca_kernels/backend.py", "import disca_kernels.ops.attention", "depend on an op"),
        ("python/disca/new.py", "from disca_kernels import _ext", "public API"),
        ("python/disca/new.py", "from disca_kernels._ext import load", "public API"),
        ("python/disca/new.py", "import disca_kernels.triton_common", "public API"),
        ("python/disca/new.py", "from disca_kernels.ops.attention import api", "not its rooms"),
        ("python/disca/new.py", "def f():\n    import triton.language", "owns no kernel"),
        (f"{OPS}/attention/api.py", "from . import triton", "by the call that needs it"),
        (f"{OPS}/attention/api.py", "import triton", "kernels' rooms alone"),
        (f"{OPS}/attention/function.py", "from .triton import launch_fwd", "by the call that"),
        (f"{OPS}/attention/api.py", "from ..adaln_modulate import api", "another op"),
        (f"{OPS}/attention/api.py", "def f():\n    from ..adaln_modulate import api", "another op"),
        (f"{OPS}/attention/reference.py", "import numpy", "torch and nothing else"),
        (f"{OPS}/attention/reference.py", "from disca_kernels import backend", "torch and nothing"),
        (f"{OPS}/attention/triton.py", "from .function import AttentionFunction", "neither"),
        (f"{OPS}/attention/__init__.py", "from .reference import x", "exports its api"),
    ],
)
def test_wrong_arrow_is_noticed(tree: Path, path: str, line: str, complaint: str) -> None:
    before = rules.wrong_arrows(tree)
    plant(tree / path, f"\n{line}\n")
    new = [c for c in rules.wrong_arrows(tree) if c not in before]
    assert len(new) == 1
    assert complaint in new[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (f"{OPS}/attention/api.py", "def f():\n    from . import triton"),
        (f"{OPS}/attention/api.py", "from disca_kernels.ops.attention import reference"),
        (f"{OPS}/attention/triton.py", "import triton.language as tl"),
        ("python/disca/new.py", "from disca_kernels import attention, dual, __version__"),
        ("python/disca/new.py", "from disca_kernels.ops.attention import attention"),
        ("disca_kernels/dual.py", "import disca_kernels.ops.attention"),
        (
            f"{OPS}/attention/api.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import triton",
        ),
    ],
)
def test_right_arrow_is_accepted(tree: Path, path: str, line: str) -> None:
    before = rules.wrong_arrows(tree)
    plant(tree / path, f"\n{line}\n")
    assert rules.wrong_arrows(tree) == before


@pytest.mark.parametrize(
    "path",
    [
        *(f"{OPS}/adaln_modulate/{room}.py" for room in rules.ROOMS),
        "tests/ops/test_adaln_modulate.py",
        "benchmarks/bench_adaln_modulate.py",
        "docs/ops/adaln_modulate.md",
        "csrc/adaln_modulate/adaln_modulate.h",
        "csrc/adaln_modulate/adaln_modulate_cpu.cpp",
        "csrc/adaln_modulate/adaln_modulate_cuda.cu",
    ],
)
def test_missing_room_is_noticed(tree: Path, path: str) -> None:
    (tree / path).unlink()
    assert f"adaln_modulate: {path} is missing" in rules.missing_rooms(tree)


@pytest.mark.parametrize(
    ("path", "gone"),
    [
        ("disca_kernels/__init__.py", '"adaln_modulate",'),
        ("disca_kernels/__init__.py", "from disca_kernels.ops.adaln_modulate import"),
        ("disca_kernels/backend.py", '"adaln_modulate": ('),
        ("CHANGELOG.md", "`adaln_modulate`"),
        ("CMakeLists.txt", "csrc/adaln_modulate/adaln_modulate_cuda.cu"),
        ("csrc/bindings.cpp", "register_adaln_modulate(m)"),
    ],
)
def test_missing_registration_is_noticed(tree: Path, path: str, gone: str) -> None:
    text = (tree / path).read_text(encoding="utf-8")
    assert gone in text
    (tree / path).write_text(text.replace(gone, ""), encoding="utf-8")
    assert any(c.startswith(f"adaln_modulate: {path} lacks") for c in rules.missing_rooms(tree))


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        (f"{OPS}/new_op/__init__.py", "new_op: disca_kernels/ops/new_op/api.py is missing"),
        ("csrc/new_op/new_op.h", "csrc/new_op belongs to no op"),
        ("docs/ops/new_op.md", "docs/ops/new_op.md describes no op"),
        (
            "csrc/timestep_features/timestep_features_cpu.cpp",
            "timestep_features_cpu.cpp has no room in ops/timestep_features",
        ),
    ],
)
def test_orphan_is_noticed(tree: Path, path: str, complaint: str) -> None:
    plant(tree / path, "")
    assert any(complaint in c for c in rules.missing_rooms(tree))


def _function(lines: int, decorator: str = "", arguments: str = "") -> str:
    body = "    x = 0\n" * (lines - 1)
    return f"\n{decorator}\ndef planted({arguments}):\n{body}"


@pytest.mark.parametrize(
    ("folder", "text", "complaint"),
    [
        ("disca_kernels", "# line\n" * 401, "401 lines, at most 400"),
        ("python/disca", _function(61), "planted: 61 lines, at most 60"),
        ("tests", _function(61), "planted: 61 lines, at most 60"),
        ("benchmarks", _function(61), "planted: 61 lines, at most 60"),
        ("disca_kernels", _function(151, "@triton.jit"), "planted: 151 lines, at most 150"),
        (
            "disca_kernels",
            _function(2, arguments=", ".join(f"a{i}" for i in range(13))),
            "planted: 13 arguments, at most 12",
        ),
    ],
)
def test_outgrown_budget_is_noticed(tmp_path: Path, folder: str, text: str, complaint: str) -> None:
    plant(tmp_path / folder / "planted.py", text)
    assert [c for c in rules.over_budget(tmp_path) if complaint in c]


@pytest.mark.parametrize(
    "text",
    [
        "# line\n" * 400,
        _function(60),
        _function(150, "@triton.jit"),
        _function(2, arguments="self, *, " + ", ".join(f"a{i}" for i in range(12))),
        'def planted():\n    """One.\n' + "\n" * 80 + '    """\n    return 1\n',
        _function(2, "@triton.jit", ", ".join(f"a{i}" for i in range(30))),
    ],
    ids=["file", "function", "kernel", "arguments", "docstring", "kernel-arguments"],
)
def test_full_budget_is_accepted(tmp_path: Path, text: str) -> None:
    plant(tmp_path / "disca_kernels" / "planted.py", text)
    assert rules.over_budget(tmp_path) == []


def test_missing_package_marker_is_noticed(tmp_path: Path) -> None:
    plant(tmp_path / "disca_kernels" / "__init__.py", "")
    plant(tmp_path / "disca_kernels" / "new" / "module.py", "")
    assert rules.missing_package_markers(tmp_path) == ["disca_kernels/new: __init__.py is missing"]


def test_bad_header_is_noticed(tree: Path) -> None:
    plant(tree / "disca_kernels" / "planted.py", "import torch\n")
    plant(tree / "csrc" / "planted.h", f"// {rules.SPDX}\n#include <torch/extension.h>\n")
    assert rules.bad_headers(tree) == [
        "disca_kernels/planted.py: the first line is not the SPDX line",
        "csrc/planted.h: includes a torch header",
    ]


@pytest.mark.parametrize("op", rules.op_names(ROOT))
def test_registered_backends_match_the_rooms(op: str) -> None:
    rooms = ROOT / OPS / op
    present = {b for b in Backend if (rooms / f"{b}.py").exists()} | {Backend.EAGER}
    assert set(IMPLEMENTATIONS[op]) == present
