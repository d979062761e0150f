# SPDX-License-Identifier: Apache-2.0
"""The command ``disca``.

Commands import what they need when they run, so that ``disca --help`` does not wait for torch.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from disca.errors import UserError

__all__ = ["app", "main"]

app = typer.Typer(
    name="disca",
    help="Distil, cache and sample video diffusion transformers.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
ablate = typer.Typer(help="Run an ablation.", rich_markup_mode=None)
app.add_typer(ablate, name="ablate")

Checkpoints = Annotated[
    Path | None,
    typer.Option(help="Folder of a training run; the checkpoints of the package by default."),
]
Docs = Annotated[
    Path | None, typer.Option(help="Markdown file whose marked section gets the table.")
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the run's by default.")]
Shift = Annotated[float | None, typer.Option(help="Flow shift; the run's by default.")]
ABLATION_SECTION = "time-tangent"


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Read the options that come before the command; :func:`main` reads --debug itself."""


@app.command()
def env() -> None:
    """Print versions, machine and backends, and why a backend is not usable."""
    from disca_kernels.env import format_report

    typer.echo(format_report())


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Output folder; run again to resume.")],
    preset: Annotated[str | None, typer.Option(help="Name of a preset, such as digits.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a run.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Make every stage tiny.")] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: a.b=value. Repeatable.")
    ] = None,
    stages: Annotated[
        list[str] | None, typer.Option("--stage", help="Run this stage only. Repeatable.")
    ] = None,
) -> None:
    """Train the stages of a preset or configuration, resuming what is there."""
    if (preset is None) == (config is None):
        raise UserError("give either --preset NAME or --config FILE")
    nested = _nested(changes or [])
    from disca.distill.config import load_config
    from disca.distill.run import train as run

    if config is not None and config.suffix not in (".yaml", ".yml"):
        raise UserError(f"--config takes a YAML file (.yaml or .yml), got {config}")
    source: str | Path = config if preset is None and config is not None else str(preset)
    run(load_config(source, smoke=smoke, changes=nested), out, stages=stages)
    typer.echo(f"trained: {out}")


@app.command()
def sample(
    prompt: Annotated[
        list[str], typer.Option(help="What to draw, e.g. '7 left fast'. Repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Result; ends in .gif or .mp4.")],
    checkpoints: Checkpoints = None,
    model: Annotated[str, typer.Option(help="Stage to sample, such as cfg.")] = "rmeanflow",
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 20,
    policy: Annotated[
        str, typer.Option(help="Cache policy, such as none, cfg (two passes) or fora:interval=3.")
    ] = "disca:full_steps=n4",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    guidance: Guidance = None,
    shift: Shift = None,
) -> None:
    """Sample clips for prompts and write them as one GIF or MP4."""
    from disca.compare.plan import row_plan
    from disca.compare.single import sample_clips

    summary = sample_clips(
        prompts=prompt,
        out=out,
        checkpoints=checkpoints,
        row=row_plan(model=model, steps=steps, policy=policy),
        seed=seed,
        changes={"guidance": guidance, "shift": shift},
    )
    typer.echo(summary)


@app.command()
def export(
    checkpoints: Annotated[Path, typer.Option(help="Folder of a training run.")],
    out: Annotated[Path, typer.Option(help="Folder of the exported weights.")],
) -> None:
    """Write the weights of a run as they are shipped: one float16 file for each stage."""
    from disca.compare.suite import copy_sampling
    from disca.distill.bundle import export as write

    sizes = write(checkpoints, out)
    copy_sampling(checkpoints, out)
    for stage, size in sizes.items():
        typer.echo(f"{stage}: {size / 1e6:.1f} MB")


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the results; run again to go on.")],
    preset: Annotated[
        str | None, typer.Option(help="A plan: a name such as digits, or a YAML file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few clips, one seed.")] = False,
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", help="A policy, e.g. taylorseer:interval=6,order=1. Repeatable."),
    ] = None,
    model: Annotated[str, typer.Option(help="Stage that --policy runs on.")] = "rmeanflow",
    steps: Annotated[int, typer.Option(help="Steps that --policy runs on.")] = 20,
    checkpoints: Checkpoints = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas.")] = None,
    clips: Annotated[int | None, typer.Option(help="Clips of each row and seed.")] = None,
    docs: Docs = None,
    guidance: Guidance = None,
    shift: Shift = None,
) -> None:
    """Compare cache policies on the same prompts and noise; print tables and write a report."""
    if preset is None and not policies:
        raise UserError(
            "nothing to compare: give --preset NAME, --preset FILE.yaml or --policy SPEC"
        )
    from disca.compare.command import run_plan
    from disca.compare.plan import load_plan

    rows = [{"model": model, "steps": steps, "policy": spec} for spec in policies or ()]
    if preset is None:
        rows.insert(0, {"model": model, "steps": steps})
    plan = load_plan(
        preset,
        quick=quick,
        rows=rows,
        changes={"seeds": None if seeds is None else _numbers(seeds), "clips": clips},
    )
    run_plan(
        plan,
        out,
        checkpoints=checkpoints,
        sampling={"guidance": guidance, "shift": shift},
        docs=docs,
        section="compare" if preset is None else Path(preset).stem,
        command=shlex.join(["disca", *sys.argv[1:]]),
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that disca compare wrote.")],
) -> None:
    """Write report.html anew from the results and clips of a comparison."""
    from disca.compare.report import write_report

    typer.echo(f"wrote {write_report(folder)}")


@app.command("export-vbench")
def export_vbench(
    folder: Annotated[Path, typer.Argument(help="Folder that disca compare wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of videos, prompts and command lines.")],
    full_info: Annotated[
        Path | None,
        typer.Option(help="VBench_full_info.json, if the prompts are VBench's own."),
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the videos.")] = 8.0,
    scale: Annotated[int, typer.Option(help="Enlargement in whole pixels.")] = 1,
) -> None:
    """Lay the clips of a comparison out as VBench reads them, with the commands that score them."""
    from disca.compare.vbench import export_comparison

    done = export_comparison(folder, out, full_info=full_info, fps=fps, scale=scale)
    typer.echo(f"wrote {done.videos} videos of each of {len(done.methods)} methods to {out}")
    if done.missing:
        typer.echo(f"a full score needs {done.missing} more videos of each method")
    typer.echo(f"score them with {done.script}")


@app.command()
def calibrate(
    policy: Annotated[str, typer.Option(help="A calibrated policy: teacache, magcache or icc.")],
    out: Annotated[Path, typer.Option(help="Folder of the calibration.")],
    model: Annotated[str, typer.Option(help="Stage that is measured.")] = "rmeanflow",
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 20,
    checkpoints: Checkpoints = None,
    clips: Annotated[int, typer.Option(help="Clips of the uncached runs.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of prompts and noise.")] = 0,
    guidance: Guidance = None,
    shift: Shift = None,
) -> None:
    """Fit a policy to a model on uncached runs and write what was measured."""
    from disca.compare.calibrating import calibrate_command

    lines = calibrate_command(
        policy,
        model,
        steps,
        out,
        checkpoints=checkpoints,
        clips=clips,
        seed=seed,
        changes={"guidance": guidance, "shift": shift},
    )
    for line in lines:
        typer.echo(line)


@ablate.command("time-tangent")
def time_tangent(
    checkpoints: Annotated[Path, typer.Option(help="Folder of a training run.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; run again to resume.")],
    docs: Docs = None,
) -> None:
    """Train MeanFlow with several widths of the time tangent and compare."""
    from disca.compare.files import check_section, replace_section

    if docs is not None:
        check_section(docs, ABLATION_SECTION)
    from disca.distill.ablation import run

    table = run(checkpoints, out)
    typer.echo(table)
    if docs is not None:
        replace_section(docs, ABLATION_SECTION, table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    A mistake of the user ends with one line on stderr and exit code 2. With ``--debug`` the
    traceback comes before that line. Any other error is a defect and keeps its traceback.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, prog_name="disca", standalone_mode=False)
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output went away (disca env | head): nothing is left to tell anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        line = _user_line(error)
        if line is None:
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        typer.echo(f"disca: error: {line}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _user_line(error: Exception) -> str | None:
    """Tell a user's mistake in one line; None for an error that is not one."""
    if isinstance(error, typer.TyperException):
        text = error.format_message()
    elif isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif type(error).__module__.startswith("pydantic"):
        text = str(error)
    else:
        return None
    return " ".join(text.split())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--seeds takes whole numbers separated by commas, such as 0,1,2; got {text!r}"
        ) from None


def _nested(changes: list[str]) -> dict[str, Any]:
    """Turn ``a.b=value`` into nested mappings; values are read as YAML."""
    import yaml

    nested: dict[str, Any] = {}
    for change in changes:
        path, equals, value = change.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise UserError(f"--set takes NAME.NAME=VALUE, got {change!r}")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {path}: cannot read the value {value!r} as YAML") from None
        place = nested
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {path}: {name} already has a value of its own")
        place[names[-1]] = parsed
    return nested


if __name__ == "__main__":
    main()
