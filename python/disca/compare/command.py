# SPDX-License-Identifier: Apache-2.0
"""The content of ``disca compare``: run a plan, print its tables, write its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from disca.compare.files import check_section, replace_section
from disca.compare.plan import Plan
from disca.compare.report import write_report
from disca.compare.runner import compare
from disca.compare.suite import load_suite
from disca.compare.tables import docs_section, group_tables, notes, text_table

__all__ = ["run_plan"]


def run_plan(
    plan: Plan,
    out: Path,
    *,
    checkpoints: Path | None,
    sampling: Mapping[str, object],
    docs: Path | None,
    section: str,
    command: str,
) -> None:
    """Run a plan, print its tables and write results.json, clips and report.

    Nothing is run before everything was checked.

    Args:
        plan: what to run.
        out: folder of the results.
        checkpoints: folder of a run; the shipped checkpoints by default.
        sampling: guidance and shift; None leaves the run's.
        docs: Markdown file whose marked section gets the tables.
        section: name of that section.
        command: the command line, for the record.

    Raises:
        UserError: anything that does not fit.
    """
    if docs is not None:
        check_section(docs, section)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    suite = load_suite(checkpoints, **sampling)
    results = compare(suite, plan, out, command=command)
    for table in group_tables(results):
        print(text_table(table), end="\n\n")
    for line in notes(results):
        print(line)
    print(f"wrote {write_report(out)}")
    if docs is not None:
        replace_section(docs, section, docs_section(results))
        print(f"wrote the tables into {docs}")
