# SPDX-License-Identifier: Apache-2.0
"""The report as text: what it holds, what it draws, and that it needs nothing from outside."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from disca.cli import main
from disca.compare.charts import PANELS, _plain_ticks, error_chart, marks, panel_chart
from disca.compare.report import render_report, write_report
from disca.compare.results import SeedScores, Spread, Timing, summarise
from disca.errors import UserError
from tests.model.comparisons import (
    FRAMES,
    PROMPTS,
    SIZE,
    cached_row,
    make_clips,
    make_results,
    make_row,
    write_comparison,
)

SEMANTIC, FRECHET, _, ERROR, THEORY = PANELS


@pytest.fixture(scope="module")
def page():
    results = make_results()
    return render_report(results, make_clips(results))


def pictures(page, kind):
    """(alternative text, content) of the page's pictures of a kind, in order."""
    found = []
    for tag in re.findall(r"<img[^>]*>", page):
        source = re.search(rf'src="data:{re.escape(kind)};base64,([^"]+)"', tag)
        if source:
            found.append((re.search(r'alt="([^"]*)"', tag)[1], base64.b64decode(source[1])))
    return found


def ids(svg):
    return {element.get("id") for element in ET.fromstring(svg).iter()}


def styles_of(rows):
    return marks({"": rows})[""]


def test_nothing_is_asked_for_from_outside(page):
    addresses = re.findall(r"""(?:src|href|action)=["']?([^"'\s>]+)""", page)
    assert addresses
    assert {address.split(":")[0] for address in addresses if not address.startswith("#")} == {
        "data"
    }
    assert not re.search(r"url\(|@import|<script|<iframe|<object", page)
    assert "default-src 'none'" in page


def test_groups_have_tables_charts_runs_and_clips(page):
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", page) == [
        "Student", "Distilled", "Settings and machine",
    ]  # fmt: skip
    rows = re.findall(r'<th scope="row">.*?</span>([^<]+)</th>', page)
    assert rows == ["CFG, 10 steps", "FORA, 3", "Flow, 4 steps", "Reuse, 2"]
    assert page.count('<tr class="real">') == 2
    charts = [alt for alt, _ in pictures(page, "image/svg+xml")]
    each = [
        "Semantic score over measured speed-up",
        "Fréchet distance over measured speed-up",
        "Error against the uncached run over measured speed-up",
        "Theory against measurement over measured speed-up",
    ]
    assert charts == [
        *(f"{name}, Student" for name in each),
        "Error after each step, cfg, 10 steps, Student",
        *(f"{name}, Distilled" for name in each),
        "Error after each step, flow, 4 steps, Distilled",
    ]


def test_steps_and_memory(page):
    """FORA computes steps 0, 3, 6, 9 of 10 and holds 2048 bytes."""
    labels = re.findall(r'aria-label="(\d+ of \d+ steps computed)"', page)
    assert labels == [f"{n} steps computed" for n in ("10 of 10", "4 of 10", "4 of 4", "2 of 4")]
    boxes = [f"M{i} 0h.8v1h-.8z" for i in (0, 3, 6, 9)]
    assert f'<path d="{"".join(boxes)}"/>' in page
    assert page.count("2.0 KiB") == 2
    assert page.count("nothing</span>") == 2
    alone = render_report(make_results([make_row("a")]), {})
    assert "Steps computed and memory held" not in alone


def test_clips_are_the_frames_one_below_the_other(page):
    clips = make_clips(make_results())
    found = pictures(page, "image/png")
    assert [alt for alt, _ in found] == [
        f"{label}: {prompt}"
        for group in (["CFG, 10 steps", "FORA, 3"], ["Flow, 4 steps", "Reuse, 2"])
        for label in (*group, "Real clips")
        for prompt in PROMPTS
    ]
    content = dict(found)["FORA, 3: 3 up slow"]
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    frames = clips["cfg-10-fora"][1, 0]  # [F, H, W] of -1 and 1
    np.testing.assert_array_equal(pixels, (frames.reshape(-1, SIZE).numpy() + 1) / 2 * 255)
    assert f"--frames:{FRAMES}" in page
    # 8 pixels wide: 7 times as large is the 56 of a phone, 12 times the 96 of a screen
    assert "--wide:96px;--narrow:56px;aspect-ratio:8 / 8" in page


def test_clips_in_colour_keep_their_colours():
    results = make_results([make_row("a")])
    clip = torch.linspace(-1, 1, 3 * 2 * 2 * 2).reshape(1, 3, 2, 2, 2)
    ((_, content),) = pictures(render_report(results, {"a": clip}), "image/png")
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    expected = ((clip[0] + 1) * 127.5).round().permute(1, 2, 3, 0).reshape(4, 2, 3)
    np.testing.assert_array_equal(pixels, expected.numpy())


def test_a_still_clip_does_not_play():
    results = make_results([make_row("a")])
    page = render_report(results, {"a": torch.zeros(1, 1, 1, 4, 4)})
    assert '<img class="clip"' in page
    assert "Pause all clips" not in page
    # a clip without a prompt is counted
    results = make_results([make_row("a")], settings={**results.settings, "prompts": []})
    page = render_report(results, {"a": torch.zeros(2, 1, 2, 4, 4)})
    assert [alt for alt, _ in pictures(page, "image/png")] == ["a: clip 1", "a: clip 2"]
    assert 'class="clip moving"' in page


def test_provenance(page):
    for text in ("disca compare --preset two --out two", "a processor", "2.10", "0, 1",
                 "2026-01-02T03:04:05+00:00", "fora:interval=3", "block 0 attention, block 0 mlp",
                 "hosts.cfg.parameters"):  # fmt: skip
        assert text in page
    assert "flash-attn" not in page  # not installed


def test_names_cannot_break_the_page():
    row = make_row("a", label="<script>alert(1)</script>", group="<b>")
    page = render_report(make_results([row]), {"a": torch.zeros(1, 1, 2, 4, 4)})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>&lt;" not in page


def test_a_policy_has_one_colour_and_a_lone_policy_leaves_it_to_the_models():
    a = [make_row("a"), cached_row("b"), cached_row("c", policy="pab")]
    b = [cached_row("d", policy="pab"), make_row("e")]
    c = [make_row("f"), make_row("g", model="flow")]
    found = marks({"a": a, "b": b, "c": c})
    assert [mark.number for mark in found["a"]] == [1, 2, 3]
    assert [mark.shape for mark in found["a"]] == ["s", "o", "o"]
    assert found["a"][2].colour == found["b"][0].colour
    assert found["a"][0].colour == found["b"][1].colour
    assert len({mark.colour for mark in found["a"]}) == 3
    assert found["c"][0].colour != found["c"][1].colour


def test_a_chart_draws_every_row_with_the_score():
    rows = [make_row("a"), cached_row("b"), cached_row("c", scores={"frechet": 3.0})]
    svg = panel_chart(SEMANTIC, rows, styles_of(rows), Spread(mean=0.97, std=None))
    assert {"point-1", "point-2", "real"} <= ids(svg)
    assert "point-3" not in ids(svg)
    svg = panel_chart(FRECHET, rows, styles_of(rows))
    assert {"point-1", "point-2", "point-3"} <= ids(svg)
    assert "real" not in ids(svg)
    # the uncached row has no error, and the third was not compared
    assert {"point-1", "point-2", "point-3"} & ids(panel_chart(ERROR, rows, styles_of(rows))) == {
        "point-2"
    }
    assert {"point-1", "point-2", "point-3"} <= ids(panel_chart(THEORY, rows, styles_of(rows)))


def test_a_chart_of_nothing_is_none():
    rows = [make_row("a")]
    assert panel_chart(ERROR, rows, styles_of(rows)) is None
    zero = [cached_row("a", scores={"error_uncached_median": 0.0}, error_per_step=[0.0] * 10)]
    assert zero[0].summary["error_uncached_median"].mean == 0
    assert panel_chart(ERROR, zero, styles_of(zero)) is None
    assert error_chart(rows, styles_of(rows)) is None
    assert error_chart(zero, styles_of(zero)) is None


def test_the_error_chart_draws_every_cached_row():
    rows = [make_row("a"), cached_row("b"), cached_row("c", policy="pab")]
    found = ids(error_chart(rows, styles_of(rows)))
    assert {"errors-2", "errors-3"} <= found
    assert "errors-1" not in found


def test_rounding_is_no_error():
    """Computing the same in another order leaves about 1e-15, far below any curve."""
    errors = [1e-15, 0.0, *(0.001 * 2**i for i in range(8))]
    rows = [cached_row("a", error_per_step=errors)]
    assert "10^{-15}" not in (svg := error_chart(rows, styles_of(rows)))
    assert "10^{-2}" in svg


def test_the_speed_axis_has_readable_ticks():
    """Speed-ups of 1 to 1.3 lie between two powers of ten, and so do 30 to 200."""
    for speeds in ((1.0, 1.3), (30.0, 200.0), (1.0, 1.0)):
        rows = [make_row(str(i), speedup=Timing.of([s])) for i, s in enumerate(speeds)]
        assert "10^" not in panel_chart(SEMANTIC, rows, styles_of(rows))
    rows = [make_row(str(i), speedup=Timing.of([s])) for i, s in enumerate((1.0, 12.0))]
    rows.append(cached_row("c", scores={"error_uncached_median": 0.06}))
    rows.append(cached_row("d", scores={"error_uncached_median": 0.3}))
    assert "10^" not in panel_chart(ERROR, rows, styles_of(rows))
    comments = re.findall(r"<!-- ([^ ]+) -->", panel_chart(SEMANTIC, rows, styles_of(rows)))
    assert {"1", "2", "5", "10"} <= set(comments)


def error_rows(*errors):
    """A cached row of a single seed for each error."""
    rows = []
    for i, error in enumerate(errors):
        scores = [SeedScores(seed=0, error_uncached_median=error)]
        rows.append(cached_row(str(i)).model_copy(update={"summary": summarise(scores)}))
    return rows


def heights(svg):
    """The numbers on the axis of values, which matplotlib names ytick and writes as comments."""
    return [float(text) for text in re.findall(r'"ytick_\d+".*?<!-- ([^ ]+) -->', svg, re.DOTALL)]


@pytest.mark.parametrize(
    "errors",
    [[0.03], [0.15], [0.15, 0.15], [0.105, 0.1051], [0.995, 1.02], [0.2, 0.205, 0.206]],
)
def test_errors_close_together_are_drawn(errors):
    """Limits a factor of 1.3 apart have at least two numbers, and the points between them."""
    rows = error_rows(*errors)
    svg = panel_chart(ERROR, rows, styles_of(rows))
    assert {f"point-{i + 1}" for i in range(len(errors))} <= ids(svg)
    assert len(heights(svg)) >= 2
    assert "10^" not in svg
    assert max(heights(svg)) / min(heights(svg)) < 100


def test_zero_errors_are_left_out_beside_others():
    rows = error_rows(0.0, 0.105, 0.0)
    found = ids(panel_chart(ERROR, rows, styles_of(rows)))
    assert {"point-1", "point-2", "point-3"} & found == {"point-2"}
    rows = error_rows(0.0, 0.0)
    assert panel_chart(ERROR, rows, styles_of(rows)) is None
    lines = [cached_row("a", error_per_step=[0.0, 0.105, 0.1051])]
    assert "errors-1" in ids(error_chart(lines, styles_of(lines)))


def test_limits_without_a_plain_number_keep_the_ticks_they_had():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.set_yscale("log")
    before = list(axis.get_yticks())
    _plain_ticks(axis.yaxis, (1.01, 1.02))
    assert list(axis.get_yticks()) == before


def test_squares_are_the_rows_without_a_cache():
    """The model in two passes, `cfg`, runs the whole network in every step and holds nothing."""
    rows = [make_row("a"), make_row("b", policy="cfg", spec="cfg"), cached_row("c")]
    assert [mark.shape for mark in styles_of(rows)] == ["s", "s", "o"]


def test_the_same_results_make_the_same_page(page):
    results = make_results()
    assert render_report(results, make_clips(results)) == page


def test_the_command(tmp_path, capsys):
    write_comparison(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(tmp_path)])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.strip() == f"wrote {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>")


def without(content, *path):
    """A copy of nested content without one field."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return copy


PREDICTOR = {
    "host": "cfg", "parameters": 5, "parameter_share": 0.1, "time_share": 0.1, "flop_share": 0.1,
}  # fmt: skip
PATHS = {"stage": "cfg", "steps": 10, "detour": 0.1, "turning": 0.1, "straightness": 0.1}


def full_results():
    """Results with every entry that the notes know."""
    models = make_results().models
    return make_results(models=models | {"predictors": {"small": PREDICTOR}, "paths": PATHS})


def read_fields():
    content = full_results().model_dump(mode="json")
    for part in ("machine", "settings"):
        yield from ((part, name) for name in content[part] if name != "prompts")
    yield from (("models", "hosts"), ("models", "predictors"))
    yield from (("models", "hosts", "cfg", name) for name in content["models"]["hosts"]["cfg"])
    yield from (("models", "predictors", "small", name) for name in PREDICTOR)
    yield from (("models", "paths", name) for name in PATHS)


@pytest.mark.parametrize("path", list(read_fields()), ids=".".join)
def test_results_without_a_field_that_the_notes_read(tmp_path, capsys, path):
    write_comparison(tmp_path, full_results())
    file = tmp_path / "results.json"
    file.write_text(json.dumps(without(json.loads(file.read_text()), *path)))
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(tmp_path)])
    assert exit_info.value.code not in (0, None)
    expected = f"{file} is damaged at {'.'.join(path)}: Field required; run 'disca compare' again"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("part", ["machine", "settings", "models"])
def test_results_whose_settings_are_empty(tmp_path, part):
    write_comparison(tmp_path)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: {}}))
    with pytest.raises(
        UserError, match=rf"results\.json is damaged at {part}\.\w+: Field required"
    ):
        write_report(tmp_path)


def test_results_with_a_field_of_another_type(tmp_path):
    results = make_results(settings={**make_results().settings, "guidance": "four"})
    write_comparison(tmp_path, results)
    with pytest.raises(UserError, match=r"damaged at settings\.guidance: Input should be a valid"):
        write_report(tmp_path)


def test_what_the_notes_can_do_without(tmp_path):
    """Prompts and paths may be missing or null, and what is not known is kept."""
    results = make_results()
    settings = {name: value for name, value in results.settings.items() if name != "prompts"}
    models = results.models | {"paths": None, "more": 1}
    write_comparison(tmp_path, make_results(settings=settings, models=models))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "FORA, 3: clip 1" in page
    assert "<dt>more</dt><dd>1</dd>" in page


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no results\.json.*disca compare --out"):
        write_report(tmp_path)
    write_comparison(tmp_path)
    (tmp_path / "clips.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no clips\.safetensors"):
        write_report(tmp_path)
    old = json.loads((tmp_path / "results.json").read_text()) | {"schema_version": 1}
    (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="schema version 1, this version reads 2"):
        write_report(tmp_path)
    results = make_results([make_row("a")])
    with pytest.raises(UserError, match="1 or 3 channels"):
        render_report(results, {"a": torch.zeros(1, 4, 2, 8, 8)})
    assert not (tmp_path / "report.html").exists()
