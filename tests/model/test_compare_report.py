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
from disca.compare.charts import PANELS, error_chart, marks, panel_chart
from disca.compare.report import render_report, write_report
from disca.compare.results import Spread, Timing
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
