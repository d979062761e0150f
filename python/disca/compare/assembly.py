# SPDX-License-Identifier: Apache-2.0
"""Put what a comparison measured together to the content of results.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from disca.cache.registry import parse_spec
from disca.compare.clips import REAL_KEY
from disca.compare.costs import describe_host, describe_predictor, path_curvature
from disca.compare.plan import Plan, RowPlan
from disca.compare.records import Record, Timings
from disca.compare.results import Results, Row, Timing, summarise
from disca.compare.scoring import seed_inputs
from disca_kernels.env import collect

if TYPE_CHECKING:
    from disca.compare.suite import Suite

__all__ = ["TIMING_SEED", "Assembly"]

TIMING_SEED = 0
"""Seed of prompts and noise where time, memory and paths are measured."""

_STEP_REPEATS = 10


@dataclass
class Assembly:
    """Everything that a finished comparison kept.

    Attributes:
        suite: the models.
        plan: what was run.
        target: the row that errors were taken to.
        record: returns what was kept of a row's key and a seed.
        timings: time and memory.
    """

    suite: Suite
    plan: Plan
    target: RowPlan
    record: Callable[[str, int], Record]
    timings: Timings

    def results(self, command: str) -> Results:
        """Return the content of results.json, made by ``command``."""
        environment = collect()
        batch = seed_inputs(self.suite, self.plan.clips, self.plan.seeds[0]).real
        plan = self.plan.model_dump(mode="json", exclude={"title", "rows", "target"})
        return Results(
            title=self.plan.title,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command,
            versions=environment["versions"],
            machine=environment["machine"],
            settings={
                **plan,
                **self.suite.sampling.model_dump(),
                "target": self.target.name,
                "prompts": self.suite.prompts_of(batch)[: self.plan.shown],
            },
            models=self._models(),
            rows=[self._row(row) for row in self.plan.rows],
            real=summarise(self.record(REAL_KEY, seed).scores for seed in self.plan.seeds),
        )

    def _records(self, row: RowPlan) -> list[Record]:
        return [self.record(row.key, seed) for seed in self.plan.seeds]

    def _flops(self, row: RowPlan) -> float:
        """Return a row's operations, mean over seeds."""
        return sum(record.flops for record in self._records(row)) / len(self.plan.seeds)

    def _seconds(self, row: RowPlan, part: int) -> list[float]:
        """Return a row's seconds by repeat: 0 for the loop, 1 end to end."""
        return [each[row.key][part] for each in self.timings.repeats[: self.plan.repeats]]

    def _speedup(self, row: RowPlan, part: int) -> Timing:
        pairs = zip(self._seconds(self.plan.rows[0], part), self._seconds(row, part), strict=True)
        return Timing.of(reference / own for reference, own in pairs)

    def _row(self, row: RowPlan) -> Row:
        records = self._records(row)
        first, scores = records[0], [record.scores for record in records]
        flops = self._flops(row)
        return Row(
            key=row.key,
            label=row.name,
            group=row.group,
            policy=parse_spec(row.policy)[0],
            spec=row.policy,
            model=row.model,
            steps=row.steps,
            hooked=first.hooked,
            computed=first.computed,
            skipped=first.skipped,
            cache_bytes=first.cache_bytes,
            peak_bytes=self.timings.peaks[row.key],
            flops=flops,
            full_passes=flops / self._hosts[row.model]["flops"],
            theoretical_speedup=self._flops(self.plan.rows[0]) / flops,
            seconds=Timing.of(self._seconds(row, 0)),
            speedup=self._speedup(row, 0),
            seconds_total=Timing.of(self._seconds(row, 1)),
            speedup_total=self._speedup(row, 1),
            error_per_step=first.error_per_step,
            per_seed=scores,
            summary=summarise(scores),
        )

    @cached_property
    def _hosts(self) -> dict[str, dict[str, Any]]:
        names = dict.fromkeys(row.model for row in self.plan.rows)
        return {name: describe_host(self.suite, name) for name in names}

    def _models(self) -> dict[str, Any]:
        """Describe the networks that the rows use, and the paths of the target."""
        inputs = seed_inputs(self.suite, self.plan.timing_batch, TIMING_SEED)
        noise, cond = inputs.noise, inputs.real.condition
        predictors = {
            name: describe_predictor(self.suite, host, name, noise, cond, _STEP_REPEATS)
            for name, host in self._predictors()
        }
        described = {"hosts": self._hosts, "predictors": predictors}
        target = self.target
        if target.steps > 1 and parse_spec(target.policy)[0] == "none":
            described["paths"] = path_curvature(self.suite, target.model, target.steps, noise, cond)
        return described

    def _predictors(self) -> Iterator[tuple[str, str]]:
        """Return the predictors that the rows use, each with the first host that it is used on."""
        seen = set()
        for row in self.plan.rows:
            name, settings = parse_spec(row.policy)
            predictor = settings.get("predictor", self.suite.sampling.predictor)
            if name == "disca" and predictor not in seen:
                seen.add(predictor)
                yield predictor, row.model
