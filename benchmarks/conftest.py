# SPDX-License-Identifier: Apache-2.0
"""Fixture ``measure`` and what a results file records about the machine."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import harness

Measure = Callable[..., None]


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """Return a function that checks and times one case; see :class:`benchmarks.harness.Subject`.

    Example:
        def test_foo(measure, case, impl):
            x = case.inputs()
            measure(
                run=lambda: foo(x, backend=impl),
                eager=lambda: foo_reference(x),
                check=lambda: assert_within_budget(...),
                bytes_moved=case.bytes_moved,
                flops=case.flops,
                device=x.device,
            )
    """

    def run_case(**case: Any) -> None:
        subject = harness.Subject(**case)
        clock = harness.Clock(subject.device)
        # The timer must be known before pytest-benchmark makes its own fixture.
        request.node.add_marker(pytest.mark.benchmark(timer=clock, group=_group(request)))
        harness.measure(request.getfixturevalue("benchmark"), clock, subject)

    return run_case


def _group(request: pytest.FixtureRequest) -> str:
    """Group the implementations of one case: ``test_foo[shape-dtype-mode-impl]`` without impl."""
    name: str = request.node.name
    return name.rpartition("-")[0].replace("[", " ") or name


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add what a speed depends on and drop what only identifies the machine."""
    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["omp_num_threads"] = os.environ.get("OMP_NUM_THREADS")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info["device"] = properties.name
        machine_info["device_memory"] = properties.total_memory
        machine_info["cuda"] = torch.version.cuda


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keep the statistics and leave out the raw rounds, which nobody reads in a committed file."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
