# SPDX-License-Identifier: Apache-2.0
"""Tables, spreads, marked sections and interleaved timing."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from disca.compare.files import check_section, output_folder, replace_section, write_text
from disca.compare.results import (
    RESULTS_FILE,
    Results,
    Row,
    SeedScores,
    Spread,
    Timing,
    load_results,
    summarise,
)
from disca.compare.tables import docs_section, group_tables, markdown_table, text_table
from disca.compare.timing import interleaved
from disca.errors import UserError


def scores(seed, semantic, error=None):
    return SeedScores(
        seed=seed,
        semantic=semantic,
        frechet=2.5,
        error_uncached=error,
        error_uncached_median=error and error / 10,
    )


def row(key, group, per_seed, speedup, **changes):
    fields = {
        "label": key.upper(),
        "group": group,
        "policy": "none",
        "spec": "none",
        "model": "cfg",
        "steps": 4,
        "hooked": [],
        "computed": [0, 1, 2, 3],
        "skipped": [],
        "cache_bytes": 0,
        "peak_bytes": 2048,
        "flops": 4e9,
        "full_passes": 4.0,
        "theoretical_speedup": 1.0,
        "error_per_step": None,
    }
    timing = Timing.of(speedup)
    times = dict.fromkeys(("seconds", "speedup", "seconds_total", "speedup_total"), timing)
    summary = summarise(per_seed)
    return Row(
        **{**fields, **times, "key": key, "per_seed": per_seed, "summary": summary, **changes}
    )


@pytest.fixture
def results():
    seeds = [scores(0, 0.9), scores(1, 0.8), scores(2, 0.7)]
    cached = [scores(s, 0.5, 0.0123) for s in range(3)]
    skipped = {"computed": [0, 2], "skipped": [1, 3], "cache_bytes": 4096, "full_passes": 2.25}
    rows = [
        row("plain", "first", seeds, [1.0, 1.0, 1.0]),
        row("fora", "first", cached, [9.0, 11.0, 10.0], policy="fora", **skipped),
        row("other", "second", seeds, [2.0, 2.0, 2.0]),
    ]
    predictor = {"parameters": 5, "parameter_share": 0.05, "time_share": 0.1, "flop_share": 0.07}
    return Results(
        title="T",
        created="2026-01-02T03:04:05+00:00",
        command="disca compare",
        versions={"torch": "2.13.0", "diffusers": None},
        machine={"torch_threads": 2, "processor": "a processor"},
        settings={
            "seeds": [0, 1, 2],
            "clips": 7,
            "batch": 64,
            "repeats": 3,
            "timing_batch": 8,
            "guidance": 4.0,
            "shift": 5.0,
            "target": "PLAIN",
        },
        models={
            "hosts": {"cfg": {"parameters": 100, "flops": 10**9}},
            "predictors": {"predictor": {"host": "cfg", **predictor}},
            "paths": {
                "stage": "cfg",
                "steps": 50,
                "detour": 0.25,
                "turning": 0.01,
                "straightness": 0.5,
            },
        },
        rows=rows,
        real=summarise(seeds),
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


def test_json_round_trip(results, tmp_path):
    write_text(tmp_path / RESULTS_FILE, results.model_dump_json())
    assert load_results(tmp_path) == results
    with pytest.raises(ValidationError, match="extra"):
        Results.model_validate({**results.model_dump(), "surprise": 1})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, "holds no results.json: no comparison finished there; run 'disca compare"),
        ("", "cannot be read"),
        ("[]", "has schema version None, this version reads 2"),
        ({"schema_version": 1}, "has schema version 1, this version reads 2; run 'disca compare'"),
        ({"rows": [{}]}, r"is damaged at rows.0.key: Field required"),
    ],
)
def test_results_that_cannot_be_read(results, tmp_path, change, match):
    if change is not None:
        content = results.model_dump(mode="json") | change if isinstance(change, dict) else change
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / RESULTS_FILE).write_text(text)
    with pytest.raises(UserError, match=match):
        load_results(tmp_path)


def test_one_table_a_group_without_empty_columns(results):
    first, second = group_tables(results)
    assert (first.title, second.title) == ("first", "second")
    assert first.keys == ["plain", "fora", "real"]
    assert "Wasserstein distance" not in first.headings
    assert "error vs. uncached (mean)" in first.headings
    assert "error vs. uncached (mean)" not in second.headings
    cells = dict(zip(first.headings, first.rows[1], strict=True))
    assert cells == {
        "method": "FORA",
        "steps computed": "2 of 4",
        "full-pass equivalents": "2.2",
        "speed-up theory": "1.00",
        "speed-up measured": "10.00 (9.00 to 11.00)",
        "end to end": "10.00",
        "semantic %": "50.0 ± 0.0",
        "Fréchet distance": "2.5 ± 0.0",
        "error vs. uncached (median)": "0.00123 ± 0.00000",
        "error vs. uncached (mean)": "0.0123 ± 0.0000",
        "held KiB/clip": "4.0",
        "peak KiB/clip": "2.0",
    }
    real = dict(zip(first.headings, first.rows[2], strict=True))
    assert real["semantic %"] == "80.0 ± 10.0"
    assert real["held KiB/clip"] == "–"


def test_text_table_is_aligned(results):
    title, *lines = text_table(group_tables(results)[0]).splitlines()
    assert title == "first"
    assert len(lines) == 3 + 3
    ends = {len(line) for line in lines if line.endswith("–") or "2.0" in line[-4:]}
    assert len(ends) == 1  # the last column ends at one place


def test_markdown_table(results):
    table = group_tables(results)[0]
    lines = markdown_table(table).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == table.headings
    assert all(line.count("|") == len(table.headings) + 1 for line in lines)


def test_docs_section_says_how(results):
    text = docs_section(results)
    assert text.index("### first") < text.index("### second")
    assert "seeds 0, 1, 2: mean ± sample standard deviation" in text
    assert "predictor on cfg: 5 parameters, 5.0 % of the host's" in text
    assert "torch 2.13.0" in text
    assert "detour 0.250" in text
    assert "Error vs. target: to PLAIN." in text
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


def test_interleaved_runs_each_once_in_another_order():
    order = []

    def run(name):
        order.append(name)
        return len(order)

    runs = {name: lambda name=name: run(name) for name in "abc"}
    done = []
    measured = [interleaved(runs, repeat, advance=done.append) for repeat in range(5)]
    assert done == order
    repeats = [order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(repeat) == ["a", "b", "c"] for repeat in repeats)
    assert len({tuple(repeat) for repeat in repeats}) > 1  # not always in the same order
    assert sorted(s for each in measured for s in each.values()) == list(range(1, 16))
