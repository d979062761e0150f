# SPDX-License-Identifier: Apache-2.0
"""Write what an evaluation found: results.json, the clips as GIF and MP4, and report.html."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import jinja2

from disca.compare.files import output_folder, write_text
from disca.compare.results import Results, Row
from disca.compare.runner import Evaluation
from disca.compare.tables import HEADINGS, model_lines, table_cells
from disca.data.io import clip_grid, write_clip

__all__ = ["render_report", "write_outputs"]

_FPS = 6.0
_SCALE = 4


def write_outputs(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write the files of an evaluation; each appears whole or not at all.

    Args:
        evaluation: what was measured.
        out: the folder; it is made if it is not there.

    Returns:
        results.json, clips.gif, clips.mp4 and report.html in ``out``.

    Raises:
        UserError: the folder cannot be written to.
    """
    output_folder(out)
    paths = [out / name for name in ("results.json", "clips.gif", "clips.mp4", "report.html")]
    write_text(paths[0], evaluation.results.model_dump_json(indent=2) + "\n")
    grid = clip_grid(list(evaluation.clips.items()), evaluation.prompts, scale=_SCALE)
    for path in paths[1:3]:
        write_clip(path, grid, fps=_FPS)
    write_text(paths[3], render_report(evaluation))
    return paths


def render_report(evaluation: Evaluation) -> str:
    """Return the report as one HTML page that asks the network for nothing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("disca", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    results = evaluation.results
    cells = table_cells(results)
    gallery = [
        {"label": label, "gif": _data_uri("image/gif", _row_gif(clips))}
        for label, clips in evaluation.clips.items()
    ]
    return environment.get_template("report.html.j2").render(
        results=results,
        headings=HEADINGS,
        rows=[
            {"cells": row, "real": record.model == "real"}
            for row, record in zip(cells, results.rows, strict=True)
        ],
        lines=model_lines(results),
        chart=_data_uri("image/png", _chart(results)),
        gallery=gallery,
        prompts=evaluation.prompts,
    )


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _row_gif(clips: Any) -> bytes:
    """Return one method's clips side by side, two pixels apart, as a GIF."""
    import torch.nn.functional as F

    apart = F.pad(clips, (0, 2), value=1.0)  # [n, C, F, H, W + 2]
    strip = apart.permute(1, 2, 3, 0, 4).flatten(3)  # [C, F, H, n * (W + 2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.gif"
        write_clip(path, strip, fps=_FPS, scale=3)
        return path.read_bytes()


_COLOURS = {
    "teacher": "#6b7280",
    "cfg": "#2563eb",
    "meanflow": "#d97706",
    "rmeanflow": "#059669",
    "disca": "#dc2626",
    "reuse": "#7c3aed",
}


def _chart(results: Results) -> bytes:
    """Draw semantic score and Fréchet distance over measured speed-up as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7.5), dpi=150, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axis, metric, scale, label in zip(
        panels,
        ("semantic", "frechet"),
        (100, 1),
        ("semantic score (%), higher is better", "Fréchet distance, lower is better"),
        strict=True,
    ):
        for row in results.rows:
            _mark(axis, row, metric, scale)
        axis.set_ylabel(label)
        axis.grid(True, alpha=0.3)
    panels[0].set_xscale("log")
    panels[1].set_xlabel("measured speed-up of the denoising loop over the first row (log scale)")
    ticks = [1, 2, 5, 10, 20, 50]
    panels[1].set_xticks(ticks, [str(tick) for tick in ticks])
    panels[1].minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _mark(axis: Any, row: Row, metric: str, scale: float) -> None:
    spread = row.summary.get(metric)
    if spread is None:
        return
    mean = scale * spread.mean
    if row.measured_speedup is None:
        axis.axhline(mean, color="black", linestyle=":", label=row.label)
        return
    family = row.key.split("-")[0]
    speed = row.measured_speedup
    axis.errorbar(
        speed.median,
        mean,
        xerr=[[speed.median - speed.low], [speed.high - speed.median]],
        yerr=None if spread.std is None else scale * spread.std,
        fmt="o",
        color=_COLOURS.get(family, "black"),
        label=_FAMILIES.get(family, row.label),
    )
    axis.annotate(
        row.label.rsplit(", ", 1)[-1] if family not in ("disca", "reuse") else row.key,
        (speed.median, mean),
        textcoords="offset points",
        xytext=(5, 4),
        fontsize=7,
    )


_FAMILIES = {
    "teacher": "Teacher, CFG",
    "cfg": "CFG-distilled",
    "meanflow": "MeanFlow",
    "rmeanflow": "Restricted MeanFlow",
    "disca": "DisCa",
    "reuse": "Reuse",
}
