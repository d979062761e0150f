# SPDX-License-Identifier: Apache-2.0
"""Shapes at which the kernels of modulated norms are compiled and inspected."""

from typing import NamedTuple


class ModulatedShape(NamedTuple):
    """One specialisation of a kernel that modulates normalised rows.

    Attributes:
        dtype: of the tokens, as Triton spells it.
        modulation_dtype: of what modulates them.
        n_channels: C.
        per_token: whether every token has a modulation of its own.
        affine: whether the norm has a weight, and a bias if it is a layer norm.
        rms: whether it is an RMS norm.
    """

    dtype: str
    modulation_dtype: str
    n_channels: int
    per_token: bool = False
    affine: bool = False
    rms: bool = False

    def __str__(self) -> str:
        """Name the case in a table."""
        kind = "per token" if self.per_token else "per sample"
        variant = ", affine" * self.affine + ", rms" * self.rms
        of_modulation = f"modulation {self.modulation_dtype} {kind}"
        return f"x {self.dtype}, {of_modulation}, C={self.n_channels}{variant}"

    def absent(self, mode: str) -> set[str]:
        """Name what the shape lacks in a mode: vectors of the affine part, gradients, sums."""
        absent = {"bias", "bias_dot"} if self.rms or not self.affine else set()
        if not self.affine:
            absent |= {"weight", "weight_dot"}
        if mode == "bwd":
            absent |= {"sum_gate"} if self.per_token else {"dgate", "dshift", "dscale"}
            absent |= {"sum", "sum_x_hat"} if self.per_token and not self.affine else set()
        return absent
