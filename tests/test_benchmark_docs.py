# SPDX-License-Identifier: Apache-2.0
"""The pages with figures say what the recorded results hold, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.gpu.table import failures, share, table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/benchmarks.md")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the pages, with the committed results."""
    for page in PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for file in render.RESULTS.glob("*.json"):
        shutil.copy(file, results)
    return tmp_path


def measurement(**changes: Any) -> dict[str, Any]:
    return {
        "op": "attention",
        "case": "b1h24q16384k16384d128-bfloat16",
        "mode": "jvp",
        "impl": "disca triton",
        "status": "ok",
        "ms": 22.0,
        "ms_middle_half": [21.9, 22.3],
        "rounds": 36,
        "flops": 9_895_604_649_984,
        "bytes": 805_306_368,
        "dtype": "bfloat16",
        "peak_bytes": 201_326_592,
        "relative_error": 0.0021,
        "ours": True,
        **changes,
    }


def gpu_record(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "gpu",
        "mode": "gpu",
        "created": "2027-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "changed": False,
        "machine": {"gpu": "NVIDIA Example", "driver": "1.2.3"},
        "versions": {"torch": "2.11.0", "flash-attn": None},
        "ceilings": {
            "copy_bytes_per_second": 3e12,
            "matmul_flops": 8e14,
            "matmul_size": 8192,
            "matmul_dtype": "bfloat16",
        },
        "steps": [{"name": "tests attention", "status": "failed", "reason": "2 of 9 tests failed"}],
        "tests": [],
        "measurements": [
            measurement(),
            measurement(impl="rcm", ms=66.0, ms_middle_half=[65.0, 67.0], ours=False),
            measurement(impl="eager", ms=440.0, ms_middle_half=[439.0, 441.0], ours=False),
            {**measurement(), "impl": "wrong", "status": "failed", "reason": "o: NaN"},
        ],
        **changes,
    }


def test_committed_pages_are_what_the_results_render_to(tree: Path) -> None:
    render.render(tree)
    for page in PAGES:
        assert (tree / page).read_text() == (ROOT / page).read_text(), (
            f"{page} is stale: run make benchmarks-doc"
        )


def test_without_results_the_pages_say_so(tree: Path) -> None:
    shutil.rmtree(tree / "benchmarks" / "results")
    render.render(tree)
    for page in PAGES:
        text = (tree / page).read_text()
        assert render.NO_GPU in text
        assert render.NO_CPU in text


def test_gpu_record_is_rendered(tree: Path) -> None:
    file = tree / "benchmarks" / "results" / "example-gpu.json"
    file.write_text(json.dumps(gpu_record()))
    render.render(tree)
    page, readme = ((tree / name).read_text() for name in PAGES[::-1])
    row = "| jvp | disca triton | 22 (21.9 to 22.3) | 449.8 | 36.6 | 56 % matmul | 20 | 192 |"
    assert row in page
    assert "copy 3000 GB/s read and written, bfloat16 product of 8192² matrices 800" in page
    assert "commit 0123456789ab, driver 1.2.3, torch 2.11.0; `example-gpu.json`." in page
    assert "- attention b1h24q16384k16384d128-bfloat16 jvp wrong: o: NaN" in page
    assert "- tests attention: 2 of 9 tests failed" in page
    headline = "| jvp | disca triton | 22 | 450 | rcm: 3.00 |"
    assert headline in readme
    assert render.NO_GPU not in page + readme


@pytest.mark.parametrize("mode", ["dry", "quick"])
def test_rehearsal_is_refused(tree: Path, mode: str) -> None:
    kind = "dry" if mode == "dry" else "gpu"
    file = tree / "benchmarks" / "results" / "x.json"
    file.write_text(json.dumps(gpu_record(kind=kind, mode=mode)))
    with pytest.raises(ValueError, match=rf"x.json is no full run .*: {mode}"):
        render.render(tree)


def cpu_record() -> dict[str, Any]:
    info = {
        "op": "attention",
        "case": "b1h8q4096k4096d64-float32",
        "mode": "jvp",
        "impl": "cpu",
        "seconds": 0.5,
        "seconds_middle_half": [0.49, 0.52],
        "rounds": 3,
        "speedup_vs_eager": 4.0,
        "speedup_quartiles": [3.9, 4.2],
        "verdict": "faster",
        "gigaflops_per_second": 206.2,
        "share_of_matmul_rate": 0.62,
        "peak_bytes": 17_825_792,
        "eager_peak_bytes": 4_294_967_296,
    }
    alone = {k: v for k, v in info.items() if "speedup" not in k and "eager" not in k}
    del alone["verdict"], alone["share_of_matmul_rate"]
    alone |= {"no_eager": "eager needs about 16 GiB, 9 are free", "share_of_copy_bandwidth": 0.1}
    return {
        "datetime": "2027-01-02T03:04:05.678",
        "machine_info": {
            "processor": "Example",
            "instructions": "AVX2",
            "threads": 2,
            "versions": {"torch": "2.13.0"},
        },
        "commit_info": {"id": "fedcba9876543210", "dirty": True},
        "benchmarks": [
            {"name": "test_attention[b1h8q4096k4096d64-float32-jvp-cpu]", "extra_info": info},
            {"name": "test_attention[big-jvp-cpu]", "extra_info": {**alone, "case": "big"}},
        ],
    }


def test_cpu_record_is_rendered(tree: Path) -> None:
    (tree / "benchmarks" / "results" / "cpu-example.json").write_text(json.dumps(cpu_record()))
    render.render(tree)
    readme, page = ((tree / name).read_text() for name in PAGES)
    case = "`b1h8q4096k4096d64-float32-jvp` | cpu | 500 (490 to 520) | 4 (3.9 to 4.2) | faster"
    assert f"| {case} | 206 | 62 % matmul | 17 | 4096 |" in page
    assert "| eager needs about 16 GiB, 9 are free |  | 206 | 10 % copy | 17 |  |" in page
    assert "commit fedcba987654 with local changes, torch 2.13.0; `cpu-example.json`." in page
    assert "| jvp | cpu | 500 | 4 (3.9 to 4.2) | 17 / 4096 |" in readme


def test_table_ends_with_the_failures() -> None:
    record = gpu_record()
    assert failures(record) == [
        "attention b1h24q16384k16384d128-bfloat16 jvp wrong: o: NaN",
        "tests attention: 2 of 9 tests failed",
    ]
    text = table(record)
    assert text.splitlines()[-3:] == ["FAILED (2)", *(f"  {x}" for x in failures(record))]
    assert "20x" in text
    assert table({**record, "steps": [], "measurements": []}).endswith("nothing failed\n")


def test_share_is_of_the_nearer_ceiling() -> None:
    ceilings = gpu_record()["ceilings"]
    assert share(measurement(), {}) is None
    assert share(measurement(), ceilings) == (pytest.approx(0.562, abs=1e-3), "matmul")
    moves_much = measurement(flops=1, bytes=3e10, ms=20.0)
    assert share(moves_much, ceilings) == (pytest.approx(0.5), "copy")
    # The matrix product was measured in bfloat16 and bounds no float32 kernel.
    assert share(measurement(dtype="float32"), ceilings)[1] == "copy"  # type: ignore[index]
