# SPDX-License-Identifier: Apache-2.0
"""A record as text: what was measured, what was not and why, and what failed, last."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = Sequence[str]
_HEADINGS = (
    "mode", "implementation", "ms", "middle half", "TFLOP/s", "GB/s", "of ceiling", "vs eager",
    "MiB", "error",
)  # fmt: skip


def ratios(measurements: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Return the median milliseconds of eager by operation, case and mode."""
    return {
        (m["op"], m["case"], m["mode"]): m["ms"]
        for m in measurements
        if m["status"] == "ok" and m["impl"] == "eager"
    }


def share(measured: dict[str, Any], ceilings: dict[str, Any]) -> tuple[float, str] | None:
    """Return the largest share of a ceiling of this device that was reached, and of which."""
    if not ceilings:
        return None
    seconds = measured["ms"] / 1e3
    copy = measured["bytes"] / seconds / ceilings["copy_bytes_per_second"]
    if measured["dtype"] not in ("bfloat16", "float16"):
        return copy, "copy"
    matmul = measured["flops"] / seconds / ceilings["matmul_flops"]
    return (matmul, "matmul") if matmul > copy else (copy, "copy")


def row(measured: dict[str, Any], record: dict[str, Any]) -> Row:
    """Return the cells of one measurement under `_HEADINGS`."""
    seconds = measured["ms"] / 1e3
    low, high = measured["ms_middle_half"]
    reached = share(measured, record["ceilings"])
    eager = ratios(record["measurements"]).get((measured["op"], measured["case"], measured["mode"]))
    peak = measured["peak_bytes"]
    return (
        measured["mode"],
        measured["impl"],
        f"{measured['ms']:.4g}",
        f"{low:.4g} to {high:.4g}",
        f"{measured['flops'] / seconds / 1e12:.4g}",
        f"{measured['bytes'] / seconds / 1e9:.4g}",
        "" if reached is None else f"{100 * reached[0]:.3g} % {reached[1]}",
        "" if eager is None else f"{eager / measured['ms']:.3g}x",
        "" if peak is None else f"{peak / 2**20:.4g}",
        f"{measured['relative_error']:.1e}",
    )


def columns(rows: Iterable[Row]) -> list[str]:
    """Align cells: the first two to the left, the others to the right."""
    cells = [list(r) for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in cells
    ]


def failures(record: dict[str, Any]) -> list[str]:
    """Return a line for everything that failed, steps and measurements."""
    lines = [
        f"{m['op']} {m['case']} {m['mode']} {m['impl']}: {m['reason']}"
        for m in record["measurements"]
        if m["status"] == "failed"
    ]
    lines += [f"{s['name']}: {s['reason']}" for s in record["steps"] if s["status"] == "failed"]
    for group in record["tests"]:
        lines += [f"{f['test']}: {[*f['why'].splitlines(), ''][0]}" for f in group["failures"]]
    return lines


def table(record: dict[str, Any]) -> str:
    """Return a record as text."""
    lines = _header(record)
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for m in record["measurements"]:
        cases.setdefault((m["op"], m["case"]), []).append(m)
    for (op, case), found in cases.items():
        good = [m for m in found if m["status"] == "ok"]
        if good:
            lines += ["", f"{op} {case}"]
            rows = columns([_HEADINGS, *(row(m, record) for m in good)])
            lines += [f"  {line}" for line in rows]
    lines += _not_measured(record)
    lines += ["", *(f"tests {_tests(group)}" for group in record["tests"])]
    failed = failures(record)
    if failed:
        lines += ["", f"FAILED ({len(failed)})", *(f"  {line}" for line in failed)]
    else:
        lines += ["", "nothing failed"]
    return "\n".join(lines) + "\n"


def _header(record: dict[str, Any]) -> list[str]:
    machine, versions, ceilings = record["machine"], record["versions"], record["ceilings"]
    lines = []
    if record["kind"] == "dry":
        lines += ["DRY RUN on a CPU: it shows that the harness works and measures no GPU", ""]
    lines.append(f"{machine.get('gpu', machine.get('processor'))}, {record['created']}")
    lines.append(", ".join(f"{k} {v}" for k, v in versions.items() if v is not None))
    changed = ", with changes" if record["changed"] else ""
    lines.append(f"commit {record['commit'] or 'unknown'}{changed}")
    if ceilings:
        lines.append(
            f"ceilings: copy {ceilings['copy_bytes_per_second'] / 1e9:.4g} GB/s (read and "
            f"written), {ceilings['matmul_dtype']} matmul {ceilings['matmul_size']}^3 "
            f"{ceilings['matmul_flops'] / 1e12:.4g} TFLOP/s"
        )
    return lines


def _not_measured(record: dict[str, Any]) -> list[str]:
    """Group what has no figure, and did not fail, by its reason."""
    reasons: dict[str, list[str]] = {}
    for m in record["measurements"]:
        if m["status"] in ("skipped", "unavailable"):
            first_line = m["reason"].partition("\n")[0]
            what = f"{m['op']} {m['impl']}"
            found = reasons.setdefault(f"{what}: {first_line}", [])
            found.append(f"{m['case']} {m['mode']}")
    lines = [f"  {reason} ({len(found)} cases)" for reason, found in reasons.items()]
    lines += [
        f"  step {s['name']}: {s['status']}, {s['reason']}"
        for s in record["steps"]
        if s["status"] in ("skipped", "unfinished")
    ]
    return ["", "not measured", *lines] if lines else []


def _tests(group: dict[str, Any]) -> str:
    numbers = ", ".join(f"{group[key]} {key}" for key in ("passed", "failed", "skipped"))
    return f"{group['name']}: {numbers}"
