# SPDX-License-Identifier: Apache-2.0
"""Build, test and measure every operation on the GPU of this machine, within a time budget.

    python -m benchmarks.gpu --out DIR [--quick | --dry] [--budget SECONDS]
        [--rival name=/path/to/kernel.py:function[:layout[:mode]] ...]

Needs Python 3.10, torch with CUDA, triton and pytest, and no network. Every step runs in a process
of its own under a time limit and survives the failure of another. DIR gets the record, a table
and the log; the record is written after every measurement, so a run that is cut off leaves what it
had. The exit status is 0 only if nothing failed.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.batch import TIERS, RivalFile
from benchmarks.gpu.session import Session, Settings
from benchmarks.gpu.table import failures, table

STEPS = ("build", "ceilings", "tests", "rivals", "compiled", *TIERS)
_BUDGETS = {"gpu": 460.0, "quick": 150.0, "dry": 300.0}


def parse(arguments: list[str]) -> Settings:
    """Read the command line."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--rival",
        action="append",
        default=[],
        metavar="NAME=PATH:FUNCTION[:LAYOUT[:MODE]]",
        help="a kernel in a file; layout bhnd (default) or bnhd; mode jvp (default): "
        "f(q, k, v, q_dot, k_dot, v_dot) -> (o, o_dot), or fwd: f(q, k, v) -> o",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one small shape of each operation")
    size.add_argument(
        "--dry", action="store_true", help="rehearse on the CPU with Triton's interpreter"
    )
    parser.add_argument("--budget", type=float, help="seconds for everything (default 460)")
    parser.add_argument(
        "--limit", type=float, default=100.0, help="seconds for one measurement (default 100)"
    )
    parser.add_argument(
        "--skip", action="append", default=[], choices=STEPS, help="leave a step out"
    )
    parser.add_argument("--commit", help="commit of the sources, where git cannot tell")
    given = parser.parse_args(arguments)
    try:
        rivals = tuple(RivalFile.parse(text) for text in given.rival)
    except ValueError as error:
        parser.error(str(error))
    mode = "dry" if given.dry else "quick" if given.quick else "gpu"
    budget = given.budget or _BUDGETS[mode]
    out = given.out.resolve()
    return Settings(out, mode, budget, given.limit, rivals, frozenset(given.skip), given.commit)


def main(arguments: list[str]) -> int:
    """Run a session; return the exit status."""
    settings = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the step too
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="disca-gpu-") as scratch:
        session = Session(settings, Path(scratch))
        session.run()
    print("\n" + table(session.record))
    return 1 if failures(session.record) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
