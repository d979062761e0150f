# SPDX-License-Identifier: Apache-2.0
"""The results as tables: aligned text for a terminal, Markdown for the docs, cells for HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disca.compare.results import Results, Row, Spread, Timing

__all__ = ["Table", "docs_section", "group_tables", "markdown_table", "notes", "text_table"]

_ABSENT = "–"
REAL_LABEL = "Real clips"


@dataclass(frozen=True)
class Table:
    """One group of a comparison as text cells.

    Attributes:
        title: name of the group.
        headings: the columns; those in which no row has a value are left out.
        rows: the cells of each row.
        keys: the rows' keys, "real" for real clips.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    keys: list[str]


def group_tables(results: Results) -> list[Table]:
    """Return the table of each group, real clips last."""
    tables = []
    for title, rows in results.groups().items():
        cells = [[column(row) for _, column, _ in _COLUMNS] for row in rows]
        cells.append([real(results.real) for _, _, real in _COLUMNS])
        used = [i for i in range(len(_COLUMNS)) if any(row[i] != _ABSENT for row in cells)]
        tables.append(
            Table(
                title,
                [_COLUMNS[i][0] for i in used],
                [[row[i] for i in used] for row in cells],
                [*(row.key for row in rows), "real"],
            )
        )
    return tables


def text_table(table: Table) -> str:
    """Return a table as aligned text."""
    heads = [_words(table.headings, 0), _words(table.headings, 1), *table.rows]
    widths = [max(len(row[i]) for row in heads) for i in range(len(table.headings))]
    lines = [_line(row, widths) for row in heads]
    lines.insert(2, "  ".join("─" * width for width in widths))
    return "\n".join([table.title, *lines] if table.title else lines)


def markdown_table(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [" | ".join(table.headings), " | ".join(["---", *["---:"] * (len(table.headings) - 1)])]
    lines += [" | ".join(cells) for cells in table.rows]
    return "\n".join(f"| {line} |" for line in lines)


def docs_section(results: Results) -> str:
    """Return all tables, notes and provenance as Markdown for the docs."""
    parts = []
    for table in group_tables(results):
        parts += [f"### {table.title}", markdown_table(table)] if table.title else []
        parts += [] if table.title else [markdown_table(table)]
    versions = ", ".join(
        f"{name} {version}" for name, version in results.versions.items() if version is not None
    )
    return "\n\n".join([*parts, *notes(results), f"Measured {results.created} with {versions}."])


def notes(results: Results) -> list[str]:
    """Return sentences about the models and about how things were measured."""
    models, settings = results.models, results.settings
    lines = []
    for flops in dict.fromkeys(host["flops"] for host in models["hosts"].values()):
        names = [name for name, host in models["hosts"].items() if host["flops"] == flops]
        parameters = models["hosts"][names[0]]["parameters"]
        lines.append(
            f"{', '.join(names)}: {parameters:,} parameters, {flops / 1e6:,.1f} MFLOP a pass and "
            "clip."
        )
    for name, entry in models["predictors"].items():
        lines.append(
            f"{name} on {entry['host']}: {entry['parameters']:,} parameters, "
            f"{100 * entry['parameter_share']:.1f} % of the host's; a predicted step takes "
            f"{100 * entry['time_share']:.1f} % of a full step's time (fastest of each) and "
            f"{100 * entry['flop_share']:.1f} % of its operations."
        )
    if (paths := models.get("paths")) is not None:
        lines.append(
            f"Paths of {paths['stage']} in {paths['steps']} steps (0 is straight): "
            f"detour {paths['detour']:.3f}, turning {paths['turning']:.4f}, "
            f"straightness {paths['straightness']:.3f}."
        )
    lines.append(
        f"Scores: {settings['clips']} clips a seed, {_seeds(settings['seeds'])}, sampled "
        f"{min(settings['batch'], settings['clips'])} at once. Speed-ups: median (lowest to "
        f"highest) of {settings['repeats']} interleaved repeats, {settings['timing_batch']} clips "
        f"at once, torch threads: {results.machine['torch_threads']}, processor: "
        f"{results.machine['processor']}. Guidance {settings['guidance']:g}, flow shift "
        f"{settings['shift']:g}. Error vs. target: to {settings['target']}."
    )
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}: mean ± sample standard deviation"


def _score(
    name: str, *, scale: float = 1, digits: int
) -> tuple[Callable[[Row], str], Callable[[dict[str, Spread]], str]]:
    """Return a score's column: of a row, and of real clips."""

    def cell(spread: Spread | None) -> str:
        if spread is None:
            return _ABSENT
        mean = f"{scale * spread.mean:.{digits}f}"
        return mean if spread.std is None else f"{mean} ± {scale * spread.std:.{digits}f}"

    return (lambda row: cell(row.summary.get(name))), (lambda real: cell(real.get(name)))


def _nothing(real: dict[str, Spread]) -> str:
    return _ABSENT


def _speedup(timing: Timing) -> str:
    return f"{timing.median:.2f} ({timing.low:.2f} to {timing.high:.2f})"


def _kib(count: float) -> str:
    return f"{count / 1024:,.1f}" if count else _ABSENT


_Column = tuple[str, Callable[[Row], str], Callable[[dict[str, Spread]], str]]

_COLUMNS: tuple[_Column, ...] = (
    ("method", lambda row: row.label, lambda real: REAL_LABEL),
    ("steps computed", lambda row: f"{len(row.computed)} of {row.steps}", _nothing),
    ("full-pass equivalents", lambda row: f"{row.full_passes:.1f}", _nothing),
    ("speed-up theory", lambda row: f"{row.theoretical_speedup:.2f}", _nothing),
    ("speed-up measured", lambda row: _speedup(row.speedup), _nothing),
    ("end to end", lambda row: f"{row.speedup_total.median:.2f}", _nothing),
    ("semantic %", *_score("semantic", scale=100, digits=1)),
    ("all right %", *_score("joint", scale=100, digits=1)),
    ("Fréchet distance", *_score("frechet", digits=1)),
    ("Wasserstein distance", *_score("wasserstein", digits=4)),
    ("error vs. uncached (median)", *_score("error_uncached_median", digits=5)),
    ("error vs. uncached (mean)", *_score("error_uncached", digits=4)),
    ("jitter vs. uncached", *_score("jitter_uncached", digits=4)),
    ("PSNR dB", *_score("psnr_uncached", digits=1)),
    ("SSIM", *_score("ssim_uncached", digits=4)),
    ("error vs. target (median)", *_score("error_teacher_median", digits=4)),
    ("error vs. target (mean)", *_score("error_teacher", digits=4)),
    ("held KiB/clip", lambda row: _kib(row.cache_bytes), _nothing),
    ("peak KiB/clip", lambda row: _kib(row.peak_bytes), _nothing),
)


def _words(headings: Sequence[str], line: int) -> list[str]:
    """Return the first or second word group of each heading."""
    parts = [heading.rsplit(" ", 1) if " " in heading else ["", heading] for heading in headings]
    return [part[line] for part in parts]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join(
        [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    ).rstrip()
