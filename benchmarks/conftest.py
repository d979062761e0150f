# SPDX-License-Identifier: Apache-2.0
"""Fixture ``measure`` and what a results file records about the machine."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import describe, harness
from benchmarks.clock import Clock

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
        clock = Clock(subject.device)
        # The timer must be known before pytest-benchmark makes its own fixture.
        request.node.add_marker(pytest.mark.benchmark(timer=clock, group=_group(request)))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update(_label(request))
        harness.measure(benchmark, clock, subject, _group(request))

    return run_case


def _label(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return what the parameters of a benchmark say it measures."""
    parameters = request.node.callspec.params
    label = {key: str(parameters[key]) for key in ("case", "mode", "impl") if key in parameters}
    return {"op": request.node.originalname.removeprefix("test_"), **label}


def _group(request: pytest.FixtureRequest) -> str:
    """Group the implementations of one case: ``test_foo[shape-dtype-mode-impl]`` without impl."""
    name: str = request.node.name
    return name.rpartition("-")[0].replace("[", " ") or name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the large cases unless it is their speed that is asked for."""
    if config.getoption("benchmark_enable") or not config.getoption("benchmark_disable"):
        return
    large = [item for item in items if item.get_closest_marker("large") is not None]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item.get_closest_marker("large") is None]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Keep what a speed depends on, and nothing that identifies the machine."""
    machine_info.clear()
    machine_info.update(describe.machine(), versions=describe.versions())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keep what `harness.measure` recorded; a committed file needs neither rounds nor options."""
    output_json["commit_info"] = {
        key: output_json["commit_info"].get(key) for key in ("id", "dirty")
    }
    output_json["benchmarks"] = [
        {"name": entry["name"], "extra_info": entry["extra_info"]}
        for entry in output_json["benchmarks"]
    ]
