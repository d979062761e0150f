# SPDX-License-Identifier: Apache-2.0
"""What an import must not load, seen from a fresh interpreter."""

import os
import subprocess
import sys

import pytest

from tests.contract.source import ROOT

_BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code: str, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, "-c", _BLOCK.format(blocked=set(blocked)) + code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_by(statement: str) -> set[str]:
    result = run(f"{statement}\nprint(*sorted(sys.modules))")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_disca_kernels_loads_neither_extension_nor_triton() -> None:
    loaded = loaded_by("import disca_kernels")
    assert "torch" in loaded
    assert "disca_kernels._C" not in loaded
    assert not {name for name in loaded if name.partition(".")[0] == "triton"}


def test_the_check_sees_what_is_loaded() -> None:
    assert "triton" in loaded_by("import disca_kernels, triton")


def test_disca_kernels_works_without_triton() -> None:
    code = """
import torch, disca_kernels
x = torch.ones(1, 2, 4)
print(disca_kernels.adaln_modulate(x, x, x, backend="eager").shape)
print(disca_kernels.why_not("attention", "triton"))
"""
    result = run(code, blocked=("triton",))
    assert result.returncode == 0, result.stderr
    assert "triton is not installed" in result.stdout


@pytest.mark.parametrize("blocked", [("diffusers", "flash_attn"), ("triton",)], ids=" ".join)
def test_disca_imports_without_optional_packages(blocked: tuple[str, ...]) -> None:
    code = """
import importlib, pkgutil, disca
for module in pkgutil.walk_packages(disca.__path__, "disca."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    result = run(code, blocked=blocked)
    assert result.returncode == 0, result.stderr


def test_disca_loads_no_kernel() -> None:
    loaded = loaded_by("import disca")
    assert not {"triton", "diffusers", "disca_kernels._C"} & loaded
