# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that writes each outcome at once, so that a killed run leaves what it found."""

import json
import os

import pytest

VARIABLE = "DISCA_TEST_EVENTS"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the outcome of one test, or of its set-up if it did not get further."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    _write(report.nodeid, report.outcome, report.longreprtext if report.failed else "")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Append a file that could not be collected."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        _write(report.nodeid, "failed", report.longreprtext)


def _write(name: str, outcome: str, text: str) -> None:
    why = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
    line = {"test": name, "outcome": outcome, "why": "\n".join(why)[:400]}
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
