# SPDX-License-Identifier: Apache-2.0
"""Make Triton's interpreter compute bfloat16 as a GPU does.

The interpreter of Triton 3.9 keeps bfloat16 as raw 16-bit integers. It truncates where the
hardware rounds to nearest even, and `tl.dot` multiplies the integers, so that no kernel that feeds
bfloat16 to the matrix units can be tested with it as it comes.
"""

from typing import Any

import numpy as np

from disca_kernels.backend import interpreting


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as raw 16-bit integers."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    raw: np.ndarray = np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return raw


def _from_bfloat16(raw: np.ndarray) -> np.ndarray:
    """Widen raw 16-bit integers to the float32 of the same value."""
    bits = np.ascontiguousarray(raw).astype(np.uint32) << np.uint32(16)
    values: np.ndarray = bits.view(np.float32)
    return values


def prepare_interpreter() -> None:
    """Repair bfloat16 if this process interprets Triton kernels; every room of kernels calls it."""
    if interpreting():
        repair_bfloat16()


def repair_bfloat16() -> None:
    """Replace the interpreter's bfloat16 casts and matrix product; calling it twice is harmless.

    Also lets a scalar bound a loop, which Triton up to 3.6 cannot do with NumPy from 2.4, and takes
    the strides that a tensor descriptor may have, of which Triton 3.5 refuses some. Has an effect
    only on kernels that run under `TRITON_INTERPRET=1` in this process.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_disca_bfloat16", False):
        return
    original_cast, original_fp_to_fp = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )
    original_dot = InterpreterBuilder.create_dot

    def cast(source: Any, target: Any) -> Any:
        """Cast between bfloat16 and float32, or return None for another pair."""
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(_from_bfloat16(source.data), tl.float32)
        return None

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        # A handle is false when its data holds a zero, so it must be compared with None.
        result = cast(source, target)
        return original_cast(self, source, target) if result is None else result

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        result = cast(source, target)
        if result is None:
            return original_fp_to_fp(self, source, target, rounding_mode)
        return result

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (
            TensorHandle(_from_bfloat16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return original_dot(self, a, b, d, *options)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder._disca_bfloat16 = True
    _repair_index()
    _repair_descriptors()


def _repair_index() -> None:
    """Convert a tensor of one element to an index, whatever its number of dimensions."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch


def _repair_descriptors() -> None:
    """Leave checking a descriptor to its constructor: Triton 3.5 mistakes elements for bytes."""
    from triton.runtime import interpreter

    interpreter.TensorDescHandle.validate = lambda self: None
