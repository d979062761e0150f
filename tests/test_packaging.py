# SPDX-License-Identifier: Apache-2.0
"""What `pip` builds from the sources, and what it says when it cannot."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import disca_kernels

ROOT = Path(__file__).resolve().parents[1]
_INPUTS = ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md")
_FOLDERS = ("csrc", "disca_kernels", "python")
_NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what a build reads, so that no build folder of the checkout leaks in."""
    copy = tmp_path_factory.mktemp("sources")
    for name in _INPUTS:
        shutil.copy(ROOT / name, copy / name)
    for name in _FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if k not in ("CXX", "DISCA_CUDA", "PYTHONPATH")}
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env={**base, **offline, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(sources: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(out)]
    return pip("wheel", str(sources), *options, **environment)


def build_and_install(sources: Path, out: Path, **environment: str) -> tuple[Path, Path]:
    """Return the wheel and the folder that it is installed in."""
    built = build(sources, out / "wheels", **environment)
    assert built.returncode == 0, built.stdout
    [wheel] = (out / "wheels").glob("*.whl")
    installed = pip("install", "--no-deps", "--target", str(out / "site"), str(wheel))
    assert installed.returncode == 0, installed.stdout
    return wheel, out / "site"


@pytest.fixture(scope="module")
def cpu_build(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_and_install(sources, tmp_path_factory.mktemp("cpu"), DISCA_CUDA="0")


def python(code: str, site: Path) -> str:
    """Run code that sees the installed packages and not the checkout."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def shared_libraries(extension: Path) -> set[str]:
    """Return the libraries that the dynamic loader must find for an extension."""
    listing = subprocess.check_output(["readelf", "-d", str(extension)], text=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", listing))


def test_wheel_holds_both_packages_and_their_data(cpu_build: tuple[Path, Path]) -> None:
    wheel, _ = cpu_build
    assert f"-{disca_kernels.__version__}-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    information = f"disca_kernels-{disca_kernels.__version__}.dist-info"
    expected = {
        "disca/__init__.py",
        "disca/py.typed",
        "disca_kernels/_C.pyi",
        "disca_kernels/py.typed",
        f"{information}/licenses/LICENSE",
    }
    package = ROOT / "python" / "disca"
    for pattern in ("presets/*.yaml", "templates/*", "assets/**/*"):
        expected |= {
            f"disca/{path.relative_to(package)}" for path in package.glob(pattern) if path.is_file()
        }
    modules = [*(ROOT / "disca_kernels").rglob("*.py"), *package.rglob("*.py")]
    expected |= {str(path.relative_to(ROOT)).removeprefix("python/") for path in modules}
    assert sorted(expected - names) == []
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "csrc"))}
    entry_points = zipfile.ZipFile(wheel).read(f"{information}/entry_points.txt").decode()
    assert "disca = disca.cli:main" in entry_points


def test_installed_extension_computes(cpu_build: tuple[Path, Path]) -> None:
    _, site = cpu_build
    code = """
import torch, disca_kernels, disca_kernels._C as _C
from disca_kernels.ops.adaln_modulate.reference import adaln_modulate_reference
print(_C.__file__)
print(_C.build_info()["cuda"])
x, shift, scale = torch.randn(2, 5, 33), torch.randn(2, 33), torch.randn(2, 33)
y = disca_kernels.adaln_modulate(x, shift, scale, backend="cpu")
print(float((y - adaln_modulate_reference(x, shift, scale)).abs().max()) < 1e-5)
"""
    file, cuda, agrees = python(code, site).split()
    assert Path(file).is_relative_to(site)
    assert (cuda, agrees) == ("False", "True")


def test_cpu_extension_needs_no_torch_and_no_cuda(cpu_build: tuple[Path, Path]) -> None:
    _, site = cpu_build
    [extension] = (site / "disca_kernels").glob("_C.*.so")
    needed = shared_libraries(extension)
    assert "libc.so.6" in needed
    assert not {name for name in needed if re.match(r"lib(torch|c10|cuda|cudart)", name)}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"CXX": "/nonexistent"},
            "no C++ compiler was found (CXX=/nonexistent does not exist).",
        ),
        ({"PATH": ""}, "no C++ compiler was found (looked for c++, g++, clang++)."),
        (
            {"DISCA_CUDA": "1", "CUDACXX": "", "CUDA_HOME": "/nonexistent", "without": "nvcc"},
            "DISCA_CUDA=1 asks for the CUDA part, but nvcc was not found",
        ),
        ({"DISCA_CUDA": "yes"}, "DISCA_CUDA must be 0, 1 or unset, got 'yes'."),
        ({"DISCA_CUDA": "0", "CXX": "false"}, "its configuration failed (C++ compiler"),
    ],
    ids=["wrong-compiler", "no-compiler", "no-nvcc", "wrong-value", "broken-compiler"],
)
def test_refusal_is_one_clear_message(
    sources: Path, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    environment = dict(environment)
    if environment.pop("without", None):
        compiler = shutil.which("g++") or shutil.which("c++")
        assert compiler is not None
        environment |= {"PATH": "", "CXX": compiler}
    failed = build(sources, tmp_path, **environment)
    assert failed.returncode != 0
    assert f"disca-kernels cannot be built: {message}" in failed.stdout
    assert "Traceback" not in failed.stdout
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.cuda_ext
@pytest.mark.skipif(_NVCC is None, reason="nvcc is not installed")
def test_cuda_extension_imports_without_a_driver(sources: Path, tmp_path: Path) -> None:
    assert _NVCC is not None
    _, site = build_and_install(sources, tmp_path, DISCA_CUDA="1", CUDACXX=_NVCC)
    [extension] = (site / "disca_kernels").glob("_C.*.so")
    assert not {name for name in shared_libraries(extension) if name.startswith("libcuda")}
    code = """
import disca_kernels._C as _C
info = _C.build_info()
print(info["cuda"], info["cuda_architectures"])
"""
    answer = python(code, site).split()
    assert answer[0] == "True"
    assert {a.removesuffix("-real") for a in answer[1:]} >= {"80", "90"}
