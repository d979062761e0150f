# SPDX-License-Identifier: Apache-2.0
"""Tables, spreads, marked sections and interleaved timing."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from disca.compare.files import check_section, output_folder, replace_section, write_text
from disca.compare.results import Results, Row, SeedScores, Spread, Timing, summarise
from disca.compare.tables import HEADINGS, docs_section, markdown_table, text_table
from disca.compare.timing import interleaved
from disca.errors import UserError


def scores(seed, semantic, error=None):
    return SeedScores(
        seed=seed,
        semantic=semantic,
        digit=semantic,
        direction=1.0,
        speed=1.0,
        joint=semantic,
        frechet=2.5,
        error_uncached=error,
        error_uncached_median=error and error / 10,
    )


@pytest.fixture
def results():
    seeds = [scores(0, 0.9), scores(1, 0.8), scores(2, 0.7)]
    cached = [scores(s, 0.5, 0.0123) for s in range(3)]
    rows = [
        Row(
            key="teacher-50x2",
            label="Teacher",
            model="teacher",
            steps=50,
            full_passes=100,
            flops=10**9,
            theoretical_speedup=1.0,
            measured_speedup=Timing.of([1.0, 1.0]),
            per_seed=seeds,
            summary=summarise(seeds),
        ),
        Row(
            key="disca-n4",
            label="DisCa n4, 20",
            model="rmeanflow",
            steps=20,
            full_steps=[0, 1],
            full_passes=8,
            predictor_passes=12,
            cache_bytes=4096,
            theoretical_speedup=11.9,
            measured_speedup=Timing.of([9.0, 11.0, 10.0]),
            per_seed=cached,
            summary=summarise(cached),
        ),
        Row(key="real", label="Real", model="real", per_seed=seeds, summary=summarise(seeds)),
    ]
    predictor = {"parameters": 5, "parameter_share": 0.05, "time_share": 0.1, "flop_share": 0.07}
    return Results(
        created="2026-01-02T03:04:05+00:00",
        versions={"torch": "2.13.0", "diffusers": None},
        machine={"torch_threads": 2, "processor": "a processor"},
        settings={
            "seeds": [0, 1, 2],
            "clips": 7,
            "repeats": 3,
            "timing_batch": 8,
            "guidance": 4.0,
            "shift": 5.0,
            "form": "paper",
        },
        models={
            "host": {"parameters": 100, "flops": 10**9},
            "predictors": {"paper": predictor},
            "paths": {
                "stage": "cfg",
                "steps": 50,
                "detour": 0.25,
                "turning": 0.01,
                "straightness": 0.5,
            },
        },
        rows=rows,
    )


def test_summary():
    summary = summarise([scores(0, 0.9), scores(1, 0.8), scores(2, 0.7)])
    assert summary["semantic"].mean == pytest.approx(0.8)
    assert summary["semantic"].std == pytest.approx(0.1)
    assert "error_uncached" not in summary
    assert summarise([scores(0, 0.9)])["semantic"] == Spread(mean=0.9, std=None)


def test_timing_is_median_and_range():
    timing = Timing.of([3.0, 1.0, 10.0])
    assert (timing.median, timing.low, timing.high) == (3.0, 1.0, 10.0)


def test_json_round_trip(results):
    assert Results.model_validate_json(results.model_dump_json()) == results
    assert results.row("disca-n4").full_passes == 8
    with pytest.raises(ValidationError, match="extra"):
        Results.model_validate({**results.model_dump(), "surprise": 1})


def test_text_table_is_aligned(results):
    lines = text_table(results).splitlines()
    assert len(lines) == 3 + 3
    starts = [line.index("10.00 (9.00 to 11.00)") for line in lines if "11.00" in line]
    ends = {len(line) for line in lines if line.endswith("–")}
    assert starts
    assert len(ends) == 1  # the last column ends at one place


def test_markdown_table(results):
    lines = markdown_table(results).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(HEADINGS)
    assert all(line.count("|") == len(HEADINGS) + 1 for line in lines)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == [
        "DisCa n4, 20",
        "8",
        "12",
        "10.00 (9.00 to 11.00)",
        "11.90",
        "50.0 ± 0.0",
        "2.50 ± 0.00",
        "0.00123 ± 0.00000",
        "0.0123 ± 0.0000",
        "–",
        "4.0",
    ]
    real = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert real[1:5] == ["–"] * 4
    assert real[5] == "80.0 ± 10.0"


def test_docs_section_says_how(results):
    text = docs_section(results)
    assert "seeds 0, 1, 2: mean ± sample standard deviation" in text
    assert "5.0 % of the host's" in text
    assert "torch 2.13.0" in text
    assert "detour 0.250" in text
    assert "diffusers" not in text


def test_replace_section(tmp_path):
    path = tmp_path / "results.md"
    rest = "\n<!-- begin b -->\n<!-- end b -->\n"
    path.write_text(f"# Title\n<!-- begin a -->\nold\n<!-- end a -->\n{rest}")
    for _ in range(2):  # a second time changes nothing
        replace_section(path, "a", "| new |\n")
        expected = f"# Title\n<!-- begin a -->\n| new |\n<!-- end a -->\n{rest}"
        assert path.read_text() == expected
    replace_section(path, "b", "text")
    assert path.read_text().endswith("<!-- begin b -->\ntext\n<!-- end b -->\n")
    assert [p.name for p in tmp_path.iterdir()] == ["results.md"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<!-- begin a -->\n",
        "<!-- end a -->\n<!-- begin a -->\n",
        "<!-- begin a -->\n<!-- end a -->\n" * 2,
        "text <!-- begin a -->\n<!-- end a -->\n",
    ],
)
def test_section_rejects(tmp_path, content):
    path = tmp_path / "results.md"
    path.write_text(content)
    with pytest.raises(UserError, match="once each and in this order"):
        check_section(path, "a")
    with pytest.raises(UserError, match="once each and in this order"):
        replace_section(path, "a", "x")
    assert path.read_text() == content


def test_section_of_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*missing.md: No such file"):
        check_section(tmp_path / "missing.md", "a")


def test_output_folder(tmp_path):
    made = output_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert list(made.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the folder .*file"):
        output_folder(tmp_path / "file" / "sub")


def test_write_text_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_interleaved_runs_each_once_a_repeat():
    order = []

    def run(name):
        order.append(name)
        return float(len(order))

    seconds = interleaved({name: lambda name=name: run(name) for name in "abc"}, 5)
    assert [len(values) for values in seconds.values()] == [5, 5, 5]
    repeats = [order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(repeat) == ["a", "b", "c"] for repeat in repeats)
    assert len({tuple(repeat) for repeat in repeats}) > 1  # not always in the same order
    assert sorted(s for values in seconds.values() for s in values) == list(range(1, 16))
