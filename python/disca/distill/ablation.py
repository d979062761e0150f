# SPDX-License-Identifier: Apache-2.0
"""The time-tangent ablation: width of the band limit, restriction R, seeds."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from disca.data.source import ClipSource
from disca.distill import checkpoint as ckpt
from disca.distill.bundle import load_models
from disca.distill.config import MeanFlowStage, Settings
from disca.distill.meanflow import MeanFlowTask
from disca.distill.run import locked
from disca.distill.trainer import NonFiniteError, Trainer, step_generator
from disca.errors import UserError
from disca.models.condition import Condition
from disca.models.dit import DiT
from disca.sample.samplers import mean_velocity
from disca.sample.schedule import flow_shift_schedule

__all__ = ["AblationSettings", "run", "table"]

Width = float | Literal["interval"]


class AblationSettings(Settings):
    """What the ablation varies and how long it trains.

    Attributes:
        teacher: Stage whose network is the frozen teacher and the student's start.
        base: MeanFlow stage of the run from which times, guidance range and optimiser are taken.
        widths: Band limits h of the time tangent; "interval" is (t - r) / 2, 0 is exact.
        restrictions: Values of R.
        seeds: Seeds of the training runs.
        iterations: Training steps of each run.
        batch: Batch size of training.
        correction_clip: Bound on the correction; None, since it would hide what is measured here.
        steps: Numbers of sampling steps to compare.
        reference_steps: Steps of the teacher's trajectory that they are compared with.
        guidance: Guidance scale of the samples.
        shift: Flow shift of the samples' schedule.
        clips: Number of clips sampled.
        window: Share of the iterations at each end over which losses are averaged.
    """

    teacher: str = "cfg"
    base: str = "rmeanflow"
    widths: tuple[Width, ...] = (0.0, 0.01, 0.05, "interval")
    restrictions: tuple[float, ...] = (0.2, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = Field(default=80, ge=1)
    batch: int = Field(default=32, ge=1)
    correction_clip: float | None = Field(default=None, gt=0)
    steps: tuple[int, ...] = (20, 10, 5, 2)
    reference_steps: int = Field(default=50, ge=1)
    guidance: float = 4.0
    shift: float = Field(default=5.0, gt=0)
    clips: int = Field(default=64, ge=1)
    window: float = Field(default=0.2, gt=0, le=0.5)


@dataclass(frozen=True)
class _Samples:
    """Fixed noise and prompts, and where the teacher's long trajectory ends for them."""

    noise: Tensor
    condition: Condition
    reference: Tensor
    settings: AblationSettings

    def errors(self, model: DiT) -> dict[int, float]:
        """Mean squared error of a model's samples by number of steps."""
        found = {}
        for steps in self.settings.steps:
            sampled = _sample(model, self.noise, self.condition, steps, self.settings.shift)
            found[steps] = float((sampled - self.reference).square().mean())
        return found


@dataclass
class _Row:
    """Results of one width and restriction over the seeds."""

    width: Width
    restriction: float
    results: list[dict[str, Any]] = field(default_factory=list)

    def cell(self, value: Callable[[dict[str, Any]], float], digits: str = ".3g") -> str:
        """Return mean and spread over the seeds."""
        values = [value(r) for r in self.results if "failure" not in r]
        if not values:
            return "failed"
        text = f"{statistics.fmean(values):{digits}}"
        return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text

    @property
    def verdict(self) -> str:
        """Tell in how many runs the loss rose or left the finite numbers."""
        failed = sum("failure" in r for r in self.results)
        risen = sum(r["loss_last"] > r["loss_first"] for r in self.results if "failure" not in r)
        count = len(self.results)
        if failed:
            return f"not finite in {failed} of {count}"
        return f"rises in {risen} of {count}" if risen else "falls"


@torch.no_grad()
def _sample(model: DiT, noise: Tensor, condition: Condition, steps: int, shift: float) -> Tensor:
    condition = condition if model.config.guidance_embed else condition.with_guidance(None)

    def velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        result: Tensor = model(x, t, r if model.mean_flow else None, condition)
        return result

    return mean_velocity(velocity, noise, flow_shift_schedule(steps, shift))


def run(
    checkpoints: str | Path,
    out: str | Path,
    settings: AblationSettings | None = None,
    *,
    progress: bool = True,
) -> str:
    """Train MeanFlow with each width, restriction and seed, and compare loss and samples.

    Every run starts from the same teacher. A finished run leaves ``result.json`` in its folder and
    is not repeated; an interrupted one resumes from its checkpoint.

    Args:
        checkpoints: Training folder or exported weights with the teacher.
        out: Output folder; one run at a time may use it.
        settings: What to vary; the defaults by default.
        progress: Whether to draw progress bars.

    Returns:
        The Markdown table, which is also written to ``table.md``; ``results.json`` has the numbers.

    Raises:
        UserError: If the teacher is missing, or the folder cannot be written, is in use, or holds
            results of other settings.
    """
    settings = settings or AblationSettings()
    bundle = load_models(checkpoints)
    torch.set_num_threads(bundle.config.threads)
    teacher = bundle.dit(settings.teacher)
    base = bundle.config.stages.get(settings.base)
    if not isinstance(base, MeanFlowStage):
        raise UserError(f"the run in {checkpoints} has no MeanFlow stage {settings.base!r}")
    folder = Path(out)
    with locked(folder):
        samples = _reference(teacher, bundle.source, settings)
        baseline = samples.errors(teacher)
        rows = [_Row(h, r) for r in settings.restrictions for h in settings.widths]
        jobs = [(row, seed) for row in rows for seed in settings.seeds]
        for row, seed in tqdm(jobs, desc="ablation", unit="run", disable=not progress):
            place = folder / f"R{row.restriction}-h{row.width}-seed{seed}"
            place.mkdir(exist_ok=True)
            job = _Job(
                teacher, bundle.source, base, settings, row.width, row.restriction, seed, place
            )
            row.results.append(job.result(samples))
        text = table(rows, baseline, settings)
        results = [
            {"width": r.width, "restriction": r.restriction, "runs": r.results} for r in rows
        ]
        ckpt.write_json(
            folder / "results.json",
            {"settings": settings.model_dump(mode="json"), "teacher": baseline, "rows": results},
        )
        ckpt.write_text(folder / "table.md", text)
    return text


def _reference(teacher: DiT, source: ClipSource, settings: AblationSettings) -> _Samples:
    generator = step_generator(0, "ablation", 0, 0)
    clips = source.sample(settings.clips, generator, split="test")
    noise = torch.randn(clips.clips.shape, generator=generator)
    condition = clips.condition.with_guidance(settings.guidance)
    reference = _sample(teacher, noise, condition, settings.reference_steps, settings.shift)
    return _Samples(noise, condition, reference, settings)


@dataclass(frozen=True)
class _Job:
    """One training run of the ablation."""

    teacher: DiT
    source: ClipSource
    base: MeanFlowStage
    settings: AblationSettings
    width: Width
    restriction: float
    seed: int
    folder: Path

    def result(self, samples: _Samples) -> dict[str, Any]:
        """Return the run's result, from its file if it is finished."""
        stage = self._stage()
        identity = {
            "stage": stage.model_dump(mode="json"),
            "samples": self.settings.model_dump(
                mode="json", include={"steps", "reference_steps", "guidance", "shift", "clips"}
            ),
            "seed": self.seed,
        }
        path = self.folder / "result.json"
        if path.is_file():
            result = ckpt.read_json(path)
            changes = ckpt.differing_fields(result.pop("config", {}), identity)
            if changes:
                raise UserError(f"{path} is of other settings ({changes[0]}); use another folder")
            return result
        result = self._train(stage, identity, samples)
        ckpt.write_json(path, {"config": identity, **result})
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    def _stage(self) -> MeanFlowStage:
        changes = {
            "teacher": self.settings.teacher,
            "steps": self.settings.iterations,
            "batch": self.settings.batch,
            "restriction": self.restriction,
            "tangent_width": self.width,
            "correction_clip": self.settings.correction_clip,
            "tensorboard": False,
            "checkpoint_every": 50,
        }
        return MeanFlowStage.model_validate({**self.base.model_dump(), **changes})

    def _train(
        self, stage: MeanFlowStage, identity: Mapping[str, Any], samples: _Samples
    ) -> dict[str, Any]:
        start = copy.deepcopy(self.teacher).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            student = DiT.from_teacher(start, mean_flow=True)
        task = MeanFlowTask("ablation", student, self.teacher, self.source, stage)
        trainer = Trainer(
            task,
            stage,
            {"model": stage.optimizer},
            self.folder,
            seed=self.seed,
            identity=identity,
            progress=False,
        )
        try:
            final = trainer.fit()["model"]
        except NonFiniteError as error:
            return {"failure": str(error)}
        assert isinstance(final, DiT)
        window = max(1, round(self.settings.window * self.settings.iterations))
        lines = list(_log(self.folder))
        return {
            "loss_first": statistics.fmean(x["mse"] for x in lines[:window]),
            "loss_last": statistics.fmean(x["mse"] for x in lines[-window:]),
            "slope_first": statistics.fmean(x["slope_rms"] for x in lines[:window]),
            "slope_last": statistics.fmean(x["slope_rms"] for x in lines[-window:]),
            "errors": {str(k): v for k, v in samples.errors(final.eval()).items()},
        }


def _log(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "log.jsonl").read_text().splitlines():
        yield json.loads(line)


def table(rows: Sequence[_Row], baseline: Mapping[int, float], settings: AblationSettings) -> str:
    """Return the results as a Markdown table, mean ± standard deviation over the seeds.

    Args:
        rows: Results by width and restriction.
        baseline: Squared errors of the teacher itself by number of steps.
        settings: Settings of the ablation.

    Returns:
        The table with one line of explanation above it.
    """
    steps = settings.steps
    lines = [
        f"Squared error of {settings.clips} samples against the teacher's "
        f"{settings.reference_steps} steps, after {settings.iterations} iterations from that "
        f"teacher, {len(settings.seeds)} seeds, guidance {settings.guidance:g}, shift "
        f"{settings.shift:g}. Loss and rms of du/dt: mean of the first and of the last "
        f"{settings.window:.0%} of the iterations.",
        "",
        "| R | width h | loss first | loss last | verdict | rms du/dt first | rms du/dt last | "
        + " | ".join(f"{n} steps" for n in steps)
        + " |",
        "|" + "---|" * (7 + len(steps)),
        "| teacher | | | | | | | " + " | ".join(f"{baseline[n]:.3g}" for n in steps) + " |",
    ]
    for row in rows:
        cells = [
            f"{row.restriction:g}",
            {"interval": "(t − r)/2", 0.0: "0 (exact)"}.get(row.width, str(row.width)),
            row.cell(lambda r: r["loss_first"]),
            row.cell(lambda r: r["loss_last"]),
            row.verdict,
            row.cell(lambda r: r["slope_first"]),
            row.cell(lambda r: r["slope_last"]),
            *(row.cell(lambda r, n=n: r["errors"][str(n)]) for n in steps),  # type: ignore[misc]
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
