# SPDX-License-Identifier: Apache-2.0
"""Run a plan: sample, score and time every row, going on where an earlier run was stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from disca.cache import CachePolicy, build_policy, policy_class
from disca.cache.registry import parse_spec
from disca.compare.assembly import TIMING_SEED, Assembly
from disca.compare.calibrating import calibration_for
from disca.compare.clips import REAL_KEY, read_clips, save_clips, write_clips
from disca.compare.files import output_folder, write_text
from disca.compare.plan import Plan, RowPlan
from disca.compare.records import Record, Timings
from disca.compare.results import RESULTS_FILE, Results
from disca.compare.scoring import (
    Inputs,
    Judge,
    Sampled,
    error_scores,
    sample_row,
    seed_inputs,
)
from disca.compare.timing import interleaved, row_peak, time_row
from disca.errors import UserError
from disca.eval.scores import relative_errors

if TYPE_CHECKING:
    from disca.compare.suite import Suite

__all__ = ["compare"]

WORK = "work"
"""Folder inside the output in which finished parts are kept."""

_WITHOUT_CACHE = ("none", "cfg")


def compare(
    suite: Suite, plan: Plan, out: Path, *, command: str = "", progress: bool = True
) -> Results:
    """Run a plan and write results.json and clips.safetensors.

    Every row of a seed starts from the same noise and follows the same prompts. A row's clips are
    scored against what was asked for, against real held-out clips, against the same model and steps
    without a cache, and against the plan's target. Then all rows are timed, interleaved. Each
    finished row and seed and each finished repeat of the timing is kept in ``out/work``: the same
    call goes on where it was stopped, and rows may be added to the plan.

    Args:
        suite: the models.
        plan: what to run.
        out: the folder of the results.
        command: the command line, for the record.
        progress: whether to draw a progress bar.

    Returns:
        The content of results.json.

    Raises:
        UserError: a model, predictor or classifier is missing, a policy does not fit its host or
            steps or changes nothing, or the folder holds parts of another comparison.
    """
    run = _Comparison(suite, plan, out)
    run.check()
    output_folder(out)
    with tqdm(total=run.work(), disable=not progress, bar_format=_BAR, mininterval=0.5) as bar:
        run.advance = bar.update
        run.describe = bar.set_description_str
        run.score()
        timings = run.time()
    results = Assembly(suite, plan, run.target, run.record, timings).results(command)
    save_clips(out, run.clips())
    write_text(out / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
    return results


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"


@dataclass
class _Comparison:
    """One call of :func:`compare`."""

    suite: Suite
    plan: Plan
    out: Path
    advance: Any = field(default=lambda amount: None)
    describe: Any = field(default=lambda text: None)

    @cached_property
    def rows(self) -> dict[str, RowPlan]:
        """The rows by key; one that is in two groups is run once."""
        return {row.key: row for row in self.plan.rows}

    @cached_property
    def target(self) -> RowPlan:
        return self.plan.target or self.plan.rows[0]

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides the scores, the rows apart."""
        plan = self.plan.model_dump(
            include={"clips", "batch", "reference_clips", "calibration_clips", "target"}
        )
        data = getattr(self.suite.source, "config", None)
        decides = [plan, self.suite.sampling.model_dump(), data]
        digest = hashlib.sha256(json.dumps(decides, default=str).encode())
        judge = {} if self.suite.classifier is None else {"classifier": self.suite.classifier}
        for networks in (self.suite.hosts, self.suite.predictors, judge):
            for name, network in sorted(networks.items()):
                digest.update(name.encode())
                for tensor in network.state_dict().values():
                    digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @cached_property
    def records(self) -> Path:
        return output_folder(self.out / WORK)

    def policy(self, row: RowPlan) -> CachePolicy:
        """Build a row's policy; a calibrated one is fitted first unless that was done."""
        calibration = partial(self._calibration, row)
        return build_policy(row.policy, self.suite.resources(calibration))

    def _calibration(self, row: RowPlan, policy: str) -> Any:
        return calibration_for(
            self.suite,
            policy,
            row.model,
            row.steps,
            output_folder(self.records / "calibration"),
            clips=self.plan.calibration_clips,
            seed=TIMING_SEED,
        )

    def check(self) -> None:
        """Refuse a row that cannot run before anything is run or written.

        Policies that have to be fitted come last, since that writes.
        """
        rows = [*self.rows.values(), self.target]
        for row in rows:
            self.suite.host(row.model)
        for row in sorted(rows, key=lambda row: policy_class(parse_spec(row.policy)[0]).calibrated):
            host = self.suite.host(row.model)
            self.policy(row).reset(host, self.suite.schedule(row.steps).tolist())

    # ------------------------------------------------------------------------------- scoring

    def work(self) -> int:
        """Return what is to do, in steps of one clip."""
        plan = self.plan
        scored = plan.clips * len(plan.seeds) * sum(_weight(row) for row in self.rows.values())
        timed = (plan.repeats + 1) * plan.timing_batch
        return scored + timed * sum(_weight(row) for row in self.rows.values())

    def score(self) -> None:
        """Sample and score what is not yet kept."""
        judge = Judge(self.suite, self.plan)
        for seed in self.plan.seeds:
            inputs = seed_inputs(self.suite, self.plan.clips, seed)
            references = _References(self, inputs)
            for row in self.rows.values():
                self.describe(f"seed {seed}, {row.name}")
                if not self._kept(row.key, seed):
                    self._score_row(row, seed, inputs, references, judge)
                self.advance(self.plan.clips * _weight(row))
            if not self._kept(REAL_KEY, seed):
                scores = judge.real(seed, inputs.real)
                self._keep(REAL_KEY, seed, Record.of_real(self.identity, scores), inputs.real.clips)

    def _kept(self, key: str, seed: int) -> bool:
        if Record.load(self._path(key, seed), self.identity) is None:
            return False
        if seed != self.plan.seeds[0]:
            return True
        clips = read_clips(self._clips_path(key, seed))
        return clips is not None and len(clips) == min(self.plan.shown, self.plan.clips)

    def _path(self, key: str, seed: int) -> Path:
        return self.records / f"{key}.seed{seed}.json"

    def _keep(self, key: str, seed: int, record: Record, clips: Tensor) -> None:
        if seed == self.plan.seeds[0]:
            write_clips(self._clips_path(key, seed), clips[: self.plan.shown])
        write_text(self._path(key, seed), record.model_dump_json())

    def _clips_path(self, key: str, seed: int) -> Path:
        return self.records / f"{key}.seed{seed}.safetensors"

    def _score_row(
        self, row: RowPlan, seed: int, inputs: Inputs, references: _References, judge: Judge
    ) -> None:
        policy = self.policy(row)
        cached = policy.name not in _WITHOUT_CACHE
        uncached = references.uncached(row) if cached else None
        target = None if row.key == self.target.key else references.target()
        sampled = (
            self.sample(row, policy, inputs, trajectory=True) if cached else references.of(row)
        )
        if not torch.isfinite(sampled.x).all():
            raise UserError(
                f"{row.name!r} ({row.policy} on {row.model}, {row.steps} steps) diverged: its "
                "samples are not finite; change its settings or leave the row out"
            )
        scores = judge.score(seed, sampled.x, inputs.real.labels)
        errors = error_scores(
            sampled.x,
            None if uncached is None else uncached.x,
            None if target is None else target.x,
        )
        along = None
        if uncached is not None:
            pairs = zip(sampled.trajectory, uncached.trajectory, strict=True)
            along = [relative_errors(a, b).median().item() for a, b in pairs]
        record = Record(
            identity=self.identity,
            scores=scores.model_copy(update=errors),
            hooked=list(sampled.report.hooked),
            computed=list(sampled.report.computed),
            skipped=list(sampled.report.skipped),
            cache_bytes=sampled.cache_bytes,
            flops=sampled.flops,
            error_per_step=along,
        )
        self._keep(row.key, seed, record, sampled.x)

    def sample(
        self, row: RowPlan, policy: CachePolicy, inputs: Inputs, *, trajectory: bool
    ) -> Sampled:
        """Sample a row from a seed's inputs."""
        return sample_row(
            self.suite,
            row,
            policy,
            inputs.noise,
            inputs.real.condition,
            batch=self.plan.batch,
            trajectory=trajectory,
        )

    # -------------------------------------------------------------------------------- timing

    def time(self) -> Timings:
        """Measure memory once and time all rows, as many repeats as are not yet kept."""
        path = self.records / "timing.json"
        timings = Timings.start(path, self._timing_identity())
        inputs = seed_inputs(self.suite, self.plan.timing_batch, TIMING_SEED)
        policies = {key: self.policy(row) for key, row in self.rows.items()}
        amounts = {key: _weight(row) * self.plan.timing_batch for key, row in self.rows.items()}

        def advance(key: str) -> None:
            self.advance(amounts[key])

        self.describe("memory")
        if not timings.peaks:
            # The run whose memory is measured is also what warms up.
            for key, row in self.rows.items():
                timings.peaks[key] = row_peak(self.suite, row, policies[key], inputs)
                advance(key)
            timings.save(path)
        self.describe("timing")
        runs = {
            key: partial(time_row, self.suite, row, policies[key], inputs, TIMING_SEED)
            for key, row in self.rows.items()
        }
        while len(timings.repeats) < self.plan.repeats:
            measured = interleaved(runs, len(timings.repeats), advance=advance)
            timings.repeats.append({k: (s.loop, s.total) for k, s in measured.items()})
            timings.save(path)
        return timings

    def _timing_identity(self) -> str:
        parts = [self.identity, self.plan.timing_batch, torch.get_num_threads(), *self.rows]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record(self, key: str, seed: int) -> Record:
        """Return what was kept of a row and seed."""
        record = Record.load(self._path(key, seed), self.identity)
        assert record is not None
        return record

    def clips(self) -> dict[str, Tensor]:
        """Return the kept clips of every row, real ones last."""
        keys = [*self.rows, REAL_KEY]
        first = self.plan.seeds[0]
        found = {key: read_clips(self._clips_path(key, first)) for key in keys}
        return {key: clips for key, clips in found.items() if clips is not None}


class _References:
    """The uncached runs of one seed that others are compared with, sampled when first needed."""

    def __init__(self, run: _Comparison, inputs: Inputs) -> None:
        self.run, self.inputs = run, inputs
        self._samples: dict[str, Sampled] = {}

    def uncached(self, row: RowPlan) -> Sampled:
        """Return the run of a row's model and steps without a cache."""
        return self.of(RowPlan(model=row.model, steps=row.steps))

    def target(self) -> Sampled:
        """Return the run of the plan's target."""
        return self.of(self.run.target)

    def of(self, row: RowPlan) -> Sampled:
        """Return the run of a row without a cache."""
        if row.key not in self._samples:
            policy = self.run.policy(row)
            self._samples[row.key] = self.run.sample(row, policy, self.inputs, trajectory=True)
        return self._samples[row.key]


def _weight(row: RowPlan) -> int:
    """Return the passes that a row would take without a cache."""
    return row.steps * (2 if row.policy.startswith("cfg") else 1)
