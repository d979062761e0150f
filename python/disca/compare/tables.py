# SPDX-License-Identifier: Apache-2.0
"""The results as tables: aligned text for a terminal, Markdown for the docs, cells for HTML."""

from __future__ import annotations

from collections.abc import Sequence

from disca.compare.results import Results, Row, Spread, Timing

__all__ = ["HEADINGS", "docs_section", "markdown_table", "model_lines", "table_cells", "text_table"]

HEADINGS = (
    "method",
    "full passes",
    "predictor passes",
    "speed-up measured",
    "speed-up theory",
    "semantic %",
    "Fréchet",
    "error vs. uncached (median)",
    "error vs. uncached (mean)",
    "error vs. teacher",
    "cache KiB/clip",
)

_ABSENT = "–"


def table_cells(results: Results) -> list[list[str]]:
    """Return the table's cells, one list a method, in the order of :data:`HEADINGS`."""
    return [_cells(row) for row in results.rows]


def text_table(results: Results) -> str:
    """Return the table as aligned text."""
    rows = [_wrapped_headings(0), _wrapped_headings(1), *table_cells(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(2, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def markdown_table(results: Results) -> str:
    """Return the table as Markdown."""
    lines = [" | ".join(HEADINGS), " | ".join(["---"] + ["---:"] * (len(HEADINGS) - 1))]
    lines += [" | ".join(cells) for cells in table_cells(results)]
    return "\n".join(f"| {line} |" for line in lines)


def docs_section(results: Results) -> str:
    """Return table, notes and provenance as Markdown for the docs."""
    versions = ", ".join(
        f"{name} {version}" for name, version in results.versions.items() if version is not None
    )
    settings = results.settings
    notes = [
        *model_lines(results),
        f"Guidance {settings['guidance']:g}, flow shift {settings['shift']:g}, "
        f"{settings['form']} predictor unless a row says otherwise. Measured {results.created} "
        f"with {versions}.",
    ]
    return "\n\n".join([markdown_table(results), *notes])


def model_lines(results: Results) -> list[str]:
    """Return sentences about the predictor's size and time, and about how things were measured."""
    models, settings = results.models, results.settings
    lines = [
        f"Host: {models['host']['parameters']:,} parameters, "
        f"{models['host']['flops'] / 1e6:,.1f} MFLOP a pass and clip."
    ]
    for form, entry in models["predictors"].items():
        lines.append(
            f"Predictor ({form} form): {entry['parameters']:,} parameters, "
            f"{100 * entry['parameter_share']:.1f} % of the host's; a predicted step takes "
            f"{100 * entry['time_share']:.1f} % of a full step's time (fastest of each) and "
            f"{100 * entry['flop_share']:.1f} % of its operations."
        )
    paths = models["paths"]
    lines.append(
        f"Paths of the {paths['stage']} stage in {paths['steps']} steps (0 is straight): "
        f"detour {paths['detour']:.3f}, turning {paths['turning']:.4f}, "
        f"straightness {paths['straightness']:.3f}."
    )
    seeds = settings["seeds"]
    lines.append(
        f"Scores: {settings['clips']} clips a seed, {_seeds(seeds)}; speed-ups: median "
        f"(lowest to highest) of {settings['repeats']} interleaved repeats of the denoising loop, "
        f"{settings['timing_batch']} clips at once, "
        f"torch threads: {results.machine['torch_threads']}, "
        f"processor: {results.machine['processor']}."
    )
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}: mean ± sample standard deviation"


def _cells(row: Row) -> list[str]:
    real = row.model == "real"
    return [
        row.label,
        _ABSENT if real else str(row.full_passes),
        _ABSENT if real else str(row.predictor_passes),
        _speedup(row.measured_speedup),
        _ABSENT if row.theoretical_speedup is None else f"{row.theoretical_speedup:.2f}",
        _score(row.summary.get("semantic"), scale=100, digits=1),
        _score(row.summary.get("frechet"), digits=2),
        _score(row.summary.get("error_uncached_median"), digits=5),
        _score(row.summary.get("error_uncached"), digits=4),
        _score(row.summary.get("error_teacher"), digits=4),
        f"{row.cache_bytes / 1024:.1f}" if row.cache_bytes else _ABSENT,
    ]


def _speedup(timing: Timing | None) -> str:
    if timing is None:
        return _ABSENT
    return f"{timing.median:.2f} ({timing.low:.2f} to {timing.high:.2f})"


def _score(spread: Spread | None, *, scale: float = 1, digits: int) -> str:
    if spread is None:
        return _ABSENT
    mean = f"{scale * spread.mean:.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {scale * spread.std:.{digits}f}"


def _wrapped_headings(line: int) -> list[str]:
    """Return the first or second word group of each heading."""
    parts = [heading.rsplit(" ", 1) if " " in heading else ["", heading] for heading in HEADINGS]
    return [part[line] for part in parts]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join(
        [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    ).rstrip()
