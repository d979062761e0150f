# SPDX-License-Identifier: Apache-2.0
"""Turn benchmarks/results/*.json into docs/benchmarks.md and a section of the README.

python -m benchmarks.render
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import failures, ratios, share
from disca.compare.files import replace_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README_TOKENS = 4096
NO_GPU = (
    "No run on a GPU has been recorded, so no figure for a GPU is claimed. `make gpu` makes the "
    "record on any machine that has one."
)
NO_CPU = "No run on a CPU has been recorded; `make bench` makes the record."

Record = dict[str, Any]


def load(folder: Path) -> tuple[list[Record], list[Record]]:
    """Return the records of GPUs and those of CPUs in a folder, each with its `file` name.

    Raises:
        ValueError: a file is a rehearsal, or no record at all.
    """
    gpus, cpus = [], []
    for path in sorted(folder.glob("*.json")):
        record = {**json.loads(path.read_text(encoding="utf-8")), "file": path.name}
        if "machine_info" in record and "gpu" not in record["machine_info"]:
            cpus.append(record)
        elif record.get("kind") == "gpu" and record["mode"] == "gpu":
            gpus.append(record)
        else:
            kind = record.get("mode", "unknown")
            raise ValueError(f"{path.name} is no full run of `make gpu` or `make bench`: {kind}")
    return gpus, cpus


def markdown(headings: str, rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a table; `headings` are separated by bars."""
    names = [name.strip() for name in headings.split("|")]
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def mebibytes(size: int | None) -> str:
    """Format a size, empty if it is not known."""
    return "" if size is None else f"{size / 2**20:.4g}"


def interval(middle: float, bounds: list[float], digits: int = 3) -> str:
    """Format a median with its middle half."""
    low, high = bounds
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def versions_line(versions: dict[str, str | None]) -> str:
    """Name what is installed."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def commit_line(commit: str | None, changed: bool | None) -> str:
    """Name the commit, and say when the files were not those of the commit."""
    return f"commit {(commit or 'unknown')[:12]}" + (" with local changes" if changed else "")


# GPU ------------------------------------------------------------------------------------------


def gpu_section(records: list[Record]) -> str:
    """Return what was measured on GPUs as Markdown."""
    if not records:
        return NO_GPU
    return "\n".join(line for record in records for line in _gpu(record))


def _gpu(record: Record) -> list[str]:
    machine, ceilings = record["machine"], record["ceilings"]
    lines = [
        f"### {machine['gpu']}",
        "",
        f"{record['created']}, {commit_line(record['commit'], record['changed'])}, driver "
        f"{machine['driver']}, {versions_line(record['versions'])}; `{record['file']}`.",
    ]
    if ceilings:
        lines.append(
            f"Ceilings of this card, measured in the same run: copy "
            f"{ceilings['copy_bytes_per_second'] / 1e9:.0f} GB/s read and written, bfloat16 "
            f"product of {ceilings['matmul_size']}² matrices "
            f"{ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s."
        )
    for (op, case), found in _by_case(record["measurements"]).items():
        lines += ["", f"`{op}`, `{case}`:", ""]
        lines += markdown(
            "mode | implementation | ms (middle half) | TFLOP/s | GB/s | of the ceiling | "
            "times as fast as eager | peak MiB | relative error",
            (_gpu_row(m, record) for m in found),
        )
    failed = failures(record)
    if failed:
        lines += ["", "Failed:", "", *(f"- {line.splitlines()[0]}" for line in failed)]
    return [*lines, ""]


def _by_case(measurements: list[Record]) -> dict[tuple[str, str], list[Record]]:
    cases: dict[tuple[str, str], list[Record]] = {}
    for m in measurements:
        if m["status"] == "ok":
            cases.setdefault((m["op"], m["case"]), []).append(m)
    return cases


def _gpu_row(m: Record, record: Record) -> list[str]:
    seconds = m["ms"] / 1e3
    reached = share(m, record["ceilings"])
    eager = ratios(record["measurements"]).get((m["op"], m["case"], m["mode"]))
    return [
        m["mode"],
        m["impl"],
        interval(m["ms"], m["ms_middle_half"], 4),
        f"{m['flops'] / seconds / 1e12:.4g}",
        f"{m['bytes'] / seconds / 1e9:.4g}",
        "" if reached is None else f"{100 * reached[0]:.0f} % {reached[1]}",
        "" if eager is None else f"{eager / m['ms']:.3g}",
        mebibytes(m["peak_bytes"]),
        f"{m['relative_error']:.1e}",
    ]


# CPU ------------------------------------------------------------------------------------------


def cpu_section(records: list[Record]) -> str:
    """Return what was measured on CPUs as Markdown."""
    if not records:
        return NO_CPU
    return "\n".join(line for record in records for line in _cpu(record))


def _cpu(record: Record) -> list[str]:
    machine, commit = record["machine_info"], record["commit_info"]
    lines = [
        f"### {machine['processor']}, {machine['instructions']}, {machine['threads']} threads",
        "",
        f"{record['datetime'][:19]}, {commit_line(commit['id'], commit['dirty'])}, "
        f"{versions_line(machine['versions'])}; `{record['file']}`.",
    ]
    by_op: dict[str, list[Record]] = {}
    for benchmark in record["benchmarks"]:
        by_op.setdefault(benchmark["extra_info"]["op"], []).append(benchmark)
    for op, found in sorted(by_op.items()):
        lines += ["", f"`{op}`:", ""]
        lines += markdown(
            "case | implementation | ms (middle half) | times as fast as eager | | GFLOP/s | "
            "of the ceiling | peak MiB | eager's",
            (_cpu_row(b) for b in found),
        )
    return [*lines, ""]


def _cpu_row(benchmark: Record) -> list[str]:
    info = benchmark["extra_info"]
    case = benchmark["name"].partition("[")[2].rstrip("]")
    impl = info.get("impl", "")
    bounds = [1e3 * x for x in info["seconds_middle_half"]]
    if "share_of_matmul_rate" in info:
        ceiling = f"{100 * info['share_of_matmul_rate']:.0f} % matmul"
    else:
        ceiling = f"{100 * info['share_of_copy_bandwidth']:.0f} % copy"
    return [
        f"`{case.removesuffix(f'-{impl}')}`",
        impl,
        interval(1e3 * info["seconds"], bounds),
        _ratio(info),
        info.get("verdict", ""),
        f"{info['gigaflops_per_second']:.3g}",
        ceiling,
        mebibytes(info["peak_bytes"]),
        mebibytes(info.get("eager_peak_bytes")),
    ]


def _ratio(info: Record) -> str:
    if "speedup_vs_eager" not in info:
        return str(info["no_eager"])
    return interval(info["speedup_vs_eager"], info["speedup_quartiles"])


# README ---------------------------------------------------------------------------------------


def readme_section(gpus: list[Record], cpus: list[Record]) -> str:
    """Return the figures that a reader of the README looks for first."""
    lines = []
    for record in gpus:
        lines += [f"On one {record['machine']['gpu']}, attention:", "", *_gpu_headlines(record), ""]
    for record in cpus:
        machine = record["machine_info"]
        lines += [
            f"On {machine['threads']} threads of an {machine['processor']} "
            f"({machine['instructions']}), attention at {README_TOKENS} tokens, float32, against "
            "the formula in eager PyTorch in the same run:",
            "",
            *_cpu_headlines(record),
            "",
            f"The other operations, value and tangent in one pass at {README_TOKENS} tokens, "
            "against what a DiT block writes in eager PyTorch under `torch.func.jvp`, in that run:",
            "",
            *_cpu_operations(record),
            "",
        ]
    if not cpus:
        lines += [NO_CPU, ""]
    if not gpus:
        lines += [NO_GPU, ""]
    return "\n".join([*lines, "All cases: [docs/benchmarks.md](docs/benchmarks.md)."])


def _gpu_headlines(record: Record) -> list[str]:
    """Return, for each case and mode of attention, ours and the best of the others."""
    best: dict[tuple[str, str], dict[bool, Record]] = {}
    for m in record["measurements"]:
        if m["status"] == "ok" and m["op"] == "attention":
            sides = best.setdefault((m["case"], m["mode"]), {})
            if m["ours"] not in sides or m["ms"] < sides[m["ours"]]["ms"]:
                sides[m["ours"]] = m
    rows = []
    for (case, mode), sides in best.items():
        if True in sides:
            ours, other = sides[True], sides.get(False)
            speed = f"{ours['flops'] / ours['ms'] / 1e9:.0f}"
            rival = "" if other is None else f"{other['impl']}: {other['ms'] / ours['ms']:.2f}"
            rows.append([f"`{case}`", mode, ours["impl"], f"{ours['ms']:.4g}", speed, rival])
    return markdown("case | mode | ours | ms | TFLOP/s | times as fast as the best other", rows)


def _cpu_headlines(record: Record) -> list[str]:
    rows = []
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        case = info.get("case", "")
        wanted = f"q{README_TOKENS}k{README_TOKENS}" in case and case.endswith("float32")
        if info["op"] == "attention" and wanted and "speedup_vs_eager" in info:
            peaks = f"{mebibytes(info['peak_bytes'])} / {mebibytes(info['eager_peak_bytes'])}"
            ms = f"{1e3 * info['seconds']:.3g}"
            rows.append([f"`{case}`", info["mode"], info["impl"], ms, _ratio(info), peaks])
    headings = "case | mode | implementation | ms | times as fast | peak MiB / eager's"
    return markdown(headings, rows)


def _cpu_operations(record: Record) -> list[str]:
    """Return the value-and-tangent entries of the other operations at the README's size."""
    rows = []
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        ours = info.get("mode") == "jvp" and info.get("impl") == "cpu"
        if ours and info["op"] != "attention" and f"n{README_TOKENS}" in info.get("case", ""):
            ms = f"{1e3 * info['seconds']:.3g}"
            rows.append([f"`{info['op']}`", f"`{info['case']}`", ms, _ratio(info)])
    return markdown("operation | case | ms | times as fast", rows)


def render(root: Path) -> None:
    """Rewrite the marked sections of the two pages."""
    gpus, cpus = load(root / "benchmarks" / "results")
    page = root / "docs" / "benchmarks.md"
    replace_section(page, "gpu", gpu_section(gpus))
    replace_section(page, "cpu", cpu_section(cpus))
    replace_section(root / "README.md", "benchmarks", readme_section(gpus, cpus))


if __name__ == "__main__":
    try:
        render(ROOT)
    except ValueError as error:
        sys.exit(str(error))
