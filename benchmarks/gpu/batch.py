# SPDX-License-Identifier: Apache-2.0
"""What the parent asks of a measuring process; it needs no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

FAILED = 3
"""Exit status of the process after a measurement that failed."""

TIERS = {
    "attention": ("first", "second", "third", "fourth"),
    "adaln_modulate": ("second", "third"),
    "cache_read": ("second", "third"),
    "gated_residual": ("second", "third"),
    "gated_residual_adaln": ("second", "third"),
    "gelu_tanh": ("second", "third"),
    "swiglu": ("second", "third"),
    "mean_velocity_step": ("second", "third"),
    "qk_norm_rope": ("second", "third"),
    "timestep_features": ("second", "third"),
    "predictor_step": ("second", "third"),
}
"""The operations, and in which tiers of value they have cases; "quick" and "dry" come on top."""

LAYOUTS, RIVAL_MODES = ("bhnd", "bnhd"), ("jvp", "fwd")


@dataclass(frozen=True)
class RivalFile:
    """A kernel in a Python file: ``name=/path/to/kernel.py:function[:layout[:mode]]``.

    Attributes:
        name: in the results.
        path: of the file.
        function: dotted name of the function in it.
        layout: "bhnd" or "bnhd" of every operand and result; operands are contiguous.
        mode: "jvp" calls ``function(q, k, v, q_dot, k_dot, v_dot) -> (o, o_dot, ...)``; "fwd"
            calls ``function(q, k, v) -> o`` and measures its gradients too.
    """

    name: str
    path: Path
    function: str
    layout: str = "bhnd"
    mode: str = "jvp"

    @classmethod
    def parse(cls, text: str) -> "RivalFile":
        """Read one from the command line; ValueError says what is wrong with it."""
        name, _, where = text.partition("=")
        path, *rest = where.split(":")
        form = f"a rival is name=/path/to/kernel.py:function[:layout[:mode]], got {text!r}"
        if not (name and path and rest and rest[0]) or len(rest) > 3:
            raise ValueError(form)
        rival = cls(name, Path(path).resolve(), *rest)
        if rival.layout not in LAYOUTS or rival.mode not in RIVAL_MODES:
            raise ValueError(f"{form}; layouts are {LAYOUTS}, modes are {RIVAL_MODES}")
        if not rival.path.is_file():
            raise ValueError(f"{form}; {rival.path} is no file")
        return rival

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return f"{self.name}={self.path}:{self.function}:{self.layout}:{self.mode}"


@dataclass
class Batch:
    """What one process is asked to do.

    Attributes:
        op: name of an operation, or "machine" or "ceilings".
        tier: which of its cases.
        who: "installed" for ours, PyTorch's and packages, "compiled" for `torch.compile`, "rivals"
            for the files.
        device: "cuda" or "cpu".
        seconds: time for the rounds of one measurement.
        rounds: fewest and most of them.
        seed: of the random operands.
        deadline: `time.time()` at which no further measurement starts.
        rivals: files, as on the command line.
        choices: file that keeps what tuned rivals chose.
        done: measurements that an earlier process made.
    """

    op: str
    tier: str
    who: str
    device: str
    seconds: float
    rounds: tuple[int, int]
    seed: int
    deadline: float
    rivals: list[str]
    choices: str
    done: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it for the process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
