# SPDX-License-Identifier: Apache-2.0
"""Builds the emulated machine and runs the Hopper kernel of attention on it.

The library is compiled from `hopper_machine.cpp`, which knows the machine and not the kernel, and
from `attention_hopper.cpp`, which includes the kernel as nvcc gets it.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNEL = "attention/attention_cuda_kernel.h"
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])

_Operand = tuple[int, tuple[int, ...], tuple[int, ...]]


class EmulationError(RuntimeError):
    """The kernel did what the machine forbids, or it waits for ever."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("operands", _Tensor * 6),
        ("o", ctypes.c_void_p),
        ("o_dot", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("lse_dot", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("half", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("lazy_products", ctypes.c_int),
        ("copy_probability", ctypes.c_double),
        ("stall_probability", ctypes.c_double),
    )


@dataclass(frozen=True)
class Timing:
    """How asynchronous work is ordered, within what the machine allows.

    Attributes:
        seed: of the order in which warps run.
        lazy_products: operands in shared memory are read when the product is waited for; otherwise
            when it starts.
        copy_probability: that a pending copy arrives in a round of all warps.
        stall_probability: that a warp does nothing in a round.
    """

    seed: int = 0
    lazy_products: bool = True
    copy_probability: float = 0.5
    stall_probability: float = 0.3


class Emulator:
    """The kernel on the emulated machine, callable as `disca_kernels._C.attention_jvp_cuda`."""

    def __init__(self, library: Path) -> None:
        self._emulate = ctypes.CDLL(str(library)).disca_emulate
        self.timing = Timing()

    def attention_jvp_cuda(
        self,
        *,
        dtype: str,
        primals: tuple[_Operand, ...],
        tangents: tuple[_Operand | None, ...],
        lengths: int,
        scale: float,
        stream: int,
        **outputs: int,
    ) -> None:
        """Compute into the addresses `o`, `lse`, `o_dot` and `lse_dot`."""
        call = _Call(
            lengths=lengths or None,
            scale=scale,
            half=dtype == "float16",
            seed=self.timing.seed,
            lazy_products=self.timing.lazy_products,
            copy_probability=self.timing.copy_probability,
            stall_probability=self.timing.stall_probability,
            **outputs,
        )
        for i, operand in enumerate((*primals, *tangents)):
            if operand is not None:
                data, sizes, strides = operand
                triple = ctypes.c_int64 * 3
                call.operands[i] = _Tensor(data, triple(*sizes), triple(*strides))
        message = ctypes.create_string_buffer(1000)
        if self._emulate(ctypes.byref(call), message, ctypes.c_size_t(len(message))):
            raise EmulationError(message.value.decode())


def _compile(*arguments: object) -> None:
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", *arguments]
    done = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_machine(folder: Path) -> Path:
    """Compile the machine, which does not depend on the kernel, into an object file."""
    machine = folder / "machine.o"
    _compile("-I", CSRC, "-c", HERE / "hopper_machine.cpp", "-o", machine)
    return machine


def build(folder: Path, machine: Path, changes: Mapping[str, str] | None = None) -> Emulator:
    """Compile the kernel for the machine in `folder`, with `changes` to its text.

    Each key of `changes` must occur in the kernel exactly once. A changed kernel is compiled for
    bfloat16 with all tangents alone.
    """
    kernel = (CSRC / KERNEL).read_text(encoding="utf-8")
    for old, new in (changes or {}).items():
        assert kernel.count(old) == 1, f"the kernel has {kernel.count(old)} times: {old}"
        kernel = kernel.replace(old, new)
    changed = folder / KERNEL
    changed.parent.mkdir(parents=True)
    changed.write_text(kernel, encoding="utf-8")
    library = folder / "libattention_hopper.so"
    options = ["-I", folder, "-I", CSRC, "-I", HERE, *["-DDISCA_ONE_VARIANT"] * bool(changes)]
    _compile(*options, "-shared", HERE / "attention_hopper.cpp", machine, "-o", library)
    return Emulator(library)
