# SPDX-License-Identifier: Apache-2.0
"""The charts of the report, as SVG: a score over the measured speed-up, and the error per step."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from disca.compare.results import Row, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PANELS", "Mark", "Panel", "error_chart", "marks", "panel_chart"]

_INK, _FAINT = "#111827", "#6b7280"
_UNCACHED = "#374151"
_NO_CACHE = ("none", "cfg")  # the policies that run the whole network in every step
_COLOURS = (
    "#2563eb",
    "#dc2626",
    "#047857",
    "#b45309",
    "#7c3aed",
    "#0e7490",
    "#be185d",
    "#4d7c0f",
    "#78350f",
    "#475569",
    "#a21caf",
    "#115e59",
    "#c2410c",
    "#3730a3",
)

# A figure is as wide as a phone, in points: text that is set for it there is never too small.
_WIDTH, _HEIGHT = 340.0, 270.0
_MARGINS = {"left": 0.17, "right": 0.97, "bottom": 0.17, "top": 0.96}
_STYLE: Any = {
    "svg.fonttype": "path",  # the reader's machine need not have the font
    "svg.hashsalt": "disca",  # the same results make the same bytes
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "grid.color": "#9ca3af",
    "grid.alpha": 0.35,
    "lines.linewidth": 1.2,
}


@dataclass(frozen=True)
class Mark:
    """How a row is drawn, the same in the charts and in the table.

    Attributes:
        number: its place in the group, from 1; it stands beside its points.
        colour: of its policy, or of its model where a group has a single policy.
        shape: a square for rows without a cache, a circle for the others.
    """

    number: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Panel:
    """A chart of one value over the measured speed-up.

    Attributes:
        name: what is drawn.
        axis: the label of its axis.
        value: takes the value from a row; None where the row has none.
        metric: the score that it is, for the line of the real clips.
        scale: what the score is multiplied by.
        log: whether its axis is always logarithmic.
        diagonal: whether to draw the line where both axes are equal.
    """

    name: str
    axis: str
    value: Callable[[Row], Spread | None]
    metric: str | None = None
    scale: float = 1.0
    log: bool = False
    diagonal: bool = False


def _score(name: str, axis: str, metric: str, scale: float = 1.0, log: bool = False) -> Panel:
    return Panel(name, axis, lambda row: row.summary.get(metric), metric, scale, log)


PANELS = (
    _score("Semantic score", "semantic score (%), higher is better", "semantic", 100),
    _score("Fréchet distance", "Fréchet distance, lower is better", "frechet"),
    _score("Wasserstein distance", "Wasserstein distance, lower is better", "wasserstein"),
    _score(
        "Error against the uncached run",
        "relative squared error",
        "error_uncached_median",
        log=True,
    ),
    Panel(
        "Theory against measurement",
        "speed-up by operations",
        lambda row: Spread(mean=row.theoretical_speedup, std=None),
        log=True,
        diagonal=True,
    ),
)
"""The charts over the measured speed-up."""


def marks(groups: dict[str, list[Row]]) -> dict[str, list[Mark]]:
    """Choose number, colour and shape of every row, by group.

    A policy has one colour in all groups. In a group whose rows all have the same policy the models
    have the colours.
    """
    names = [row.policy for rows in groups.values() for row in rows if row.policy != "none"]
    policies = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    chosen = {}
    for group, rows in groups.items():
        models = list(dict.fromkeys(row.model for row in rows))
        single = len({row.policy for row in rows}) == 1
        chosen[group] = [
            Mark(
                number,
                _COLOURS[models.index(row.model) % len(_COLOURS)]
                if single
                else policies.get(row.policy, _UNCACHED),
                "s" if row.policy in _NO_CACHE else "o",
            )
            for number, row in enumerate(rows, start=1)
        ]
    return chosen


def panel_chart(
    panel: Panel, rows: Sequence[Row], styles: Sequence[Mark], real: Spread | None = None
) -> str | None:
    """Draw a value over the measured speed-up of the denoising loop.

    Points are medians (speed-up) and means (value); bars reach from the lowest to the highest
    measured speed-up and one standard deviation over seeds up and down. Rows of one model and
    policy are joined by a line.

    Args:
        panel: what is drawn.
        rows: the rows.
        styles: how each is drawn, from :func:`marks`.
        real: the score of real clips, drawn as a dotted line.

    Returns:
        The chart as SVG; None if no row has the value.
    """
    points = [
        (row, mark, spread)
        for row, mark in zip(rows, styles, strict=True)
        if (spread := panel.value(row)) is not None and _drawable(panel, spread)
    ]
    if not points:
        return None

    def draw(axis: Axes) -> None:
        values = [panel.scale * spread.mean for _, _, spread in points]
        if panel.log or (min(values) > 0 and max(values) > 30 * min(values)):
            axis.set_yscale("log")
        axis.set_xscale("log")
        _families(axis, [(row, mark, v) for (row, mark, _), v in zip(points, values, strict=True)])
        for (row, mark, spread), value in zip(points, values, strict=True):
            _point(axis, row, mark, value, spread, panel.scale)
        if real is not None and panel.metric is not None:
            axis.axhline(panel.scale * real.mean, color=_FAINT, linestyle=":", gid="real")
        _limits(axis, [row.speedup.median for row, _, _ in points])
        if panel.diagonal:
            low, high = axis.get_xlim()
            axis.plot([low, high], [low, high], color=_FAINT, linestyle=":", scalex=False)
        if axis.get_yscale() == "log":
            _heights(axis)
        axis.set_xlabel("measured speed-up")
        axis.set_ylabel(panel.axis)
        places = [(row.speedup.median, v) for (row, _, _), v in zip(points, values, strict=True)]
        _number(axis, places, [mark for _, mark, _ in points])

    return _svg(draw)


def error_chart(rows: Sequence[Row], styles: Sequence[Mark]) -> str | None:
    """Draw each row's error after every step; dots are the steps that ran the whole network.

    Args:
        rows: rows with the same number of steps.
        styles: how each is drawn, from :func:`marks`.

    Returns:
        The chart as SVG; None if no row has errors beyond rounding.
    """
    drawn = [
        (row, mark, _positive(row.error_per_step))
        for row, mark in zip(rows, styles, strict=True)
        if row.error_per_step is not None
    ]
    drawn = [line for line in drawn if not all(map(math.isnan, line[2]))]
    if not drawn:
        return None

    from matplotlib.ticker import MaxNLocator

    def draw(axis: Axes) -> None:
        axis.set_yscale("log")
        for row, mark, errors in drawn:
            axis.plot(
                range(1, len(errors) + 1),
                errors,
                color=mark.colour,
                marker=".",
                markersize=5,
                markevery=[i for i in row.computed if i < len(errors)],
                gid=f"errors-{mark.number}",
            )
        axis.set_xlabel("step")
        axis.set_ylabel("relative squared error")
        longest = max(len(errors) for _, _, errors in drawn)
        axis.set_xlim(0.5, longest * 1.06 + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _end_numbers(axis, [(mark, errors) for _, mark, errors in drawn])

    return _svg(draw)


def _svg(draw: Callable[[Axes], None]) -> str:
    """Return what is drawn on one pair of axes as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        figure.subplots_adjust(**_MARGINS)
        axis = figure.subplots()
        axis.grid(True)
        draw(axis)
        return _saved(figure)


def _saved(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _drawable(panel: Panel, spread: Spread) -> bool:
    return math.isfinite(spread.mean) and (spread.mean > 0 or not panel.log)


def _families(axis: Axes, points: Sequence[tuple[Row, Mark, float]]) -> None:
    """Join the points of one model and policy, from slow to fast."""
    families: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row, mark, value in points:
        place = (row.speedup.median, value, mark.colour)
        families.setdefault((row.model, row.policy), []).append(place)
    for places in families.values():
        xs, ys, colours = zip(*sorted(places), strict=True)
        axis.plot(xs, ys, color=colours[0], alpha=0.35, zorder=1)


def _point(axis: Axes, row: Row, mark: Mark, value: float, spread: Spread, scale: float) -> None:
    speed = row.speedup
    axis.errorbar(
        speed.median,
        value,
        xerr=[[speed.median - speed.low], [speed.high - speed.median]],
        yerr=None if spread.std is None else scale * spread.std,
        fmt=mark.shape,
        color=mark.colour,
        markersize=5,
        elinewidth=0.8,
        gid=f"point-{mark.number}",
    )


def _limits(axis: Axes, speeds: Sequence[float]) -> None:
    low, high = min(speeds) / 1.12, max(speeds) * 1.18
    axis.set_xlim(low, high)
    _plain_ticks(axis.xaxis, (low, high))


def _heights(axis: Axes) -> None:
    """Give a logarithmic axis limits a factor of 1.3 apart or more, and readable ticks."""
    low, high = axis.get_ylim()
    room = math.sqrt(max(1.0, 1.3 * low / high))
    low, high = low / room, high * room
    axis.set_ylim(low, high)
    if high < 100 * low:
        _plain_ticks(axis.yaxis, (low, high))


def _plain_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Set ticks of a logarithmic axis that read 1, 2, 5 and not powers of ten."""
    low, high = limits
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(1 + i / 10 for i in range(90))):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    if not ticks:
        return
    ticks = ticks[:: math.ceil(len(ticks) / 6)]
    axis.set_ticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_ticks([], minor=True)


# Where a number may stand around its point, in points: near ones first.
_AROUND = [
    (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
    for radius in (8, 13, 19, 26)
    for angle in (45, 135, 315, 225, 0, 90, 180, 270)
]
_TEXT = 7.5

# Relative squared errors below this are what float32 makes of another order of additions.
_ROUNDING = 1e-10


def _number(axis: Axes, places: Sequence[tuple[float, float]], styles: Sequence[Mark]) -> None:
    """Write each point's number beside it, where it covers no other point or number."""
    axis.get_ylim()  # the axis finds its limits when it is asked for them
    points = [tuple(map(float, axis.transData.transform(place))) for place in places]
    box = axis.bbox
    written: list[tuple[float, float]] = []

    def cost(x: float, y: float, own: tuple[float, ...]) -> int:
        outside = not (box.x0 + 5 < x < box.x1 and box.y0 + 5 < y < box.y1)
        hidden = sum(abs(x - a) < 8 and abs(y - b) < 8 for a, b in points if (a, b) != own)
        doubled = sum(abs(x - a) < 10 and abs(y - b) < 9 for a, b in written)
        return 3 * outside + hidden + 2 * doubled

    for place, own, mark in zip(places, points, styles, strict=True):
        dx, dy = min(_AROUND, key=lambda d: cost(own[0] + d[0], own[1] + d[1], own))
        written.append((own[0] + dx, own[1] + dy))
        axis.annotate(
            str(mark.number),
            place,
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_TEXT,
            color=mark.colour,
            arrowprops={"arrowstyle": "-", "color": mark.colour, "lw": 0.4}
            if math.hypot(dx, dy) > 9
            else None,
        )


def _positive(errors: Sequence[float]) -> list[float]:
    """Return the errors with NaN, which is not drawn, for rounding and what is not finite."""
    return [error if _ROUNDING < error < math.inf else math.nan for error in errors]


def _end_numbers(axis: Axes, lines: Sequence[tuple[Mark, Sequence[float]]]) -> None:
    """Write each line's number behind its end, one above the other where they would meet."""
    axis.get_ylim()  # the axis finds its limits when it is asked for them
    ends = []
    for mark, errors in lines:
        last = max(i for i, error in enumerate(errors) if not math.isnan(error))
        x, y = axis.transData.transform((last + 1, errors[last]))
        ends.append((float(y), float(x), mark))
    ends.sort(key=lambda end: end[0])
    apart = min(_TEXT + 1, axis.bbox.height / len(ends))
    heights: list[float] = []
    for y, _, _ in ends:
        heights.append(max(y, heights[-1] + apart) if heights else y)
    ceiling = axis.bbox.y1
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - apart
    for height, (_, x, mark) in zip(heights, ends, strict=True):
        left, bottom = axis.transAxes.inverted().transform((x + 4, height))
        axis.text(
            left,
            bottom,
            str(mark.number),
            transform=axis.transAxes,
            fontsize=_TEXT,
            color=mark.colour,
            ha="left",
            va="center",
        )
