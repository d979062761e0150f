# SPDX-License-Identifier: Apache-2.0
"""Builds ``disca_kernels._C`` with CMake; everything else about the package is in pyproject.toml.

Environment: ``DISCA_CUDA=0|1`` forces the CUDA part off or on (default: on where nvcc is found);
``CXX``, ``CUDACXX``, ``CUDA_HOME`` and ``CUDAARCHS`` mean what they mean elsewhere.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(problem: str, remedy: str) -> SystemExit:
    """Return the one message that a failed build ends with."""
    return SystemExit(f"\ndisca-kernels cannot be built: {problem}\n{remedy}\n")


def find_tool(name: str, directory_attribute: str) -> str:
    """Return the program that the pip package ``name`` brings, else the one on PATH."""
    try:
        package = importlib.import_module(name)
        found = shutil.which(name, path=getattr(package, directory_attribute))
    except ImportError:
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise fail(f"{name} was not found.", f"Install it: pip install {name}")
    return found


def find_compiler() -> str:
    """Return the C++ compiler, which CXX may name."""
    wanted = os.environ.get("CXX", "").split()
    names = wanted[:1] or ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    tried = f"CXX={names[0]} does not exist" if wanted else f"looked for {', '.join(names)}"
    raise fail(
        f"no C++ compiler was found ({tried}).",
        "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: "
        "conda install cxx-compiler) or set CXX to the path of one that understands C++17.",
    )


def find_nvcc() -> str | None:
    """Return nvcc, or None for a build without CUDA, as DISCA_CUDA and the machine decide."""
    forced = os.environ.get("DISCA_CUDA", "")
    if forced not in ("", "0", "1"):
        raise fail(f"DISCA_CUDA must be 0, 1 or unset, got {forced!r}.", "0 builds the CPU part.")
    if forced == "0":
        return None
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = [os.environ.get("CUDACXX", ""), "nvcc", str(home / "bin" / "nvcc")]
    found = next((path for path in map(shutil.which, filter(None, places)) if path), None)
    if found is None and forced == "1":
        raise fail(
            "DISCA_CUDA=1 asks for the CUDA part, but nvcc was not found (tried CUDACXX, PATH "
            f"and {home}).",
            "Install the CUDA toolkit, set CUDACXX to nvcc, or unset DISCA_CUDA.",
        )
    return found


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would call the compiler itself."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install the extension beside the package it belongs to."""
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        compiler, nvcc = find_compiler(), find_nvcc()
        pybind11 = importlib.import_module("pybind11")
        build = Path(self.build_temp).resolve() / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDISCA_VERSION={self.distribution.get_version()}",
            f"-DDISCA_CUDA={'ON' if nvcc else 'OFF'}",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        # A cache from another toolchain or from a deleted build environment misleads CMake.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        compile_and_copy = [cmake, "--build", str(build), "--target", "install"]
        for step, command in (("configuration", configure), ("compilation", compile_and_copy)):
            if subprocess.run(command, check=False).returncode:
                toolchain = f"C++ compiler {compiler}" + (f", nvcc {nvcc}" if nvcc else "")
                raise fail(
                    f"its {step} failed ({toolchain}); the reason is above.",
                    "DISCA_CUDA=0 builds the CPU part alone."
                    if nvcc
                    else "The compiler must understand C++17; CXX names another one.",
                )


setup(ext_modules=[Extension("disca_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
