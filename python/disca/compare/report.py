# SPDX-License-Identifier: Apache-2.0
"""The report of a comparison: one HTML page that needs no script and no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from disca.compare.charts import PANELS, Mark, error_chart, marks, panel_chart
from disca.compare.clips import REAL_KEY, load_clips
from disca.compare.files import write_text
from disca.compare.results import Results, Row, load_results
from disca.compare.tables import REAL_LABEL, Table, group_tables, notes
from disca.data.io import to_frames

__all__ = ["REPORT_FILE", "render_report", "write_report"]

REPORT_FILE = "report.html"

FRAMES_PER_SECOND = 8
"""How fast the clips play."""

# Widths of a clip in CSS pixels, on a phone and elsewhere: whole multiples of its own where it is
# smaller, so that its pixels stay square and sharp.
_NARROW, _WIDE = 56, 96


def write_report(folder: Path) -> Path:
    """Write report.html from the results and the clips of a comparison.

    Args:
        folder: the folder that ``disca compare --out`` wrote.

    Returns:
        The page, in that folder; it appears whole or not at all.

    Raises:
        UserError: results or clips are missing, damaged or of another schema, or the page cannot be
            written.
    """
    page = render_report(load_results(folder), load_clips(folder))
    path = folder / REPORT_FILE
    write_text(path, page)
    return path


def render_report(results: Results, clips: Mapping[str, Tensor]) -> str:
    """Return the page.

    Charts are SVG and clips are PNG, both inside the page as ``data:`` addresses. A clip's frames
    lie one below the other in its picture and a style moves it on, frame by frame. So all clips
    show the same frame at the same moment, which GIFs beside each other do not, and no colour is
    lost.

    Args:
        results: what was measured.
        clips: clips [n, C, F, H, W] in [-1, 1] by key of their row, and real ones.

    Raises:
        UserError: clips that cannot be shown: not of 1 or 3 channels, or with values that are not
            finite.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("disca", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    groups = results.groups()
    styles = marks(groups)
    prompts = list(results.settings.get("prompts") or [])
    tables = group_tables(results)
    return environment.get_template("report.html.j2").render(
        results=results,
        groups=[
            _group(results, table, rows, styles[title], clips, prompts)
            for table, (title, rows) in zip(tables, groups.items(), strict=True)
        ],
        notes=notes(results),
        moving=any(clip.shape[2] > 1 for clip in clips.values()),
        facts={
            "settings": _flat(results.settings),
            "models": _flat(results.models),
            "versions": _flat(results.versions),
            "machine": _flat(results.machine),
        },
        frames_per_second=FRAMES_PER_SECOND,
    )


def _group(
    results: Results,
    table: Table,
    rows: Sequence[Row],
    styles: Sequence[Mark],
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
) -> dict[str, Any]:
    """Return what the template shows of one group."""
    most = max((row.cache_bytes for row in rows), default=0)
    return {
        "title": table.title or results.title,
        "headings": table.headings,
        "table": list(zip([*styles, None], table.rows, strict=True)),
        "charts": _charts(results, rows, styles),
        "errors": _error_charts(rows, styles),
        "runs": [
            {
                "row": row,
                "mark": mark,
                "steps": _steps(row),
                "held": _size(row.cache_bytes),
                "share": 100 * row.cache_bytes / most if most else 0,
            }
            for row, mark in zip(rows, styles, strict=True)
        ],
        "cached": any(row.skipped or row.cache_bytes for row in rows),
        "clips": _clips(rows, styles, clips, prompts),
        "columns": list(prompts),
    }


def _charts(results: Results, rows: Sequence[Row], styles: Sequence[Mark]) -> list[tuple[str, str]]:
    """Return (name, address) of every chart over the speed-up that these rows have values for."""
    charts = []
    for panel in PANELS:
        real = results.real.get(panel.metric) if panel.metric else None
        svg = panel_chart(panel, rows, styles, real)
        if svg is not None:
            charts.append((panel.name, _data("image/svg+xml", svg.encode())))
    return charts


def _error_charts(rows: Sequence[Row], styles: Sequence[Mark]) -> list[tuple[str, str]]:
    """Return (name, address) of the errors per step: a chart for each model and number of steps."""
    kinds: dict[tuple[str, int], list[tuple[Row, Mark]]] = {}
    for row, mark in zip(rows, styles, strict=True):
        kinds.setdefault((row.model, row.steps), []).append((row, mark))
    charts = []
    for (model, steps), pairs in kinds.items():
        svg = error_chart([row for row, _ in pairs], [mark for _, mark in pairs])
        if svg is not None:
            charts.append((f"{model}, {steps} steps", _data("image/svg+xml", svg.encode())))
    return charts


def _steps(row: Row) -> str:
    """Return the path of an SVG, a unit wide a step, that is filled where the network ran."""
    return "".join(f"M{i} 0h.8v1h-.8z" for i in row.computed)


def _clips(
    rows: Sequence[Row],
    styles: Sequence[Mark],
    clips: Mapping[str, Tensor],
    prompts: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the clips of each row that has some, real ones last."""
    named = [(row.key, row.label, mark) for row, mark in zip(rows, styles, strict=True)]
    found = []
    for key, label, mark in [*named, (REAL_KEY, REAL_LABEL, None)]:
        if key in clips:
            shown = [_clip(clip) for clip in clips[key]]
            for i, clip in enumerate(shown):
                clip["alt"] = f"{label}: {prompts[i] if i < len(prompts) else f'clip {i + 1}'}"
            found.append({"label": label, "mark": mark, "clips": shown})
    return found


def _clip(clip: Tensor) -> dict[str, Any]:
    """Return address, frames and sizes of a clip [C, F, H, W]."""
    from PIL import Image

    channels, frames, height, width = clip.shape
    pixels = to_frames(clip).reshape(frames * height, width, 3)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    picture.save(buffer, format="PNG", optimize=True)
    narrow, wide = (max(1, size // width) * width for size in (_NARROW, _WIDE))
    if width > _WIDE:
        narrow, wide = 2 * _NARROW, 2 * _WIDE
    return {
        "src": _data("image/png", buffer.getvalue()),
        "frames": frames,
        "ratio": f"{width} / {height}",
        "narrow": narrow,
        "wide": wide,
    }


def _size(count: int) -> str:
    """Write a number of bytes for people."""
    if count >= 1024**2:
        return f"{count / 1024**2:,.1f} MiB"
    return f"{count / 1024:,.1f} KiB" if count else "nothing"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as (dotted name, text), leaving out what is not there."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            simple = all(isinstance(item, (str, int, float)) for item in value)
            text = ", ".join(map(str, value)) if simple else json.dumps(value)
            pairs += [(prefix + name, text)] if value else []
        elif value is not None:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            pairs.append((prefix + name, text))
    return pairs


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
