# SPDX-License-Identifier: Apache-2.0
"""The comparison from end to end on tiny random models: counts, pairing, files, report."""

from __future__ import annotations

import json
import re

import av
import pytest
import torch
from PIL import Image
from torch import nn

from disca.data import MovingDigits
from disca.compare.costs import method_flops, pass_flops, skip_flops
from disca.compare.methods import Method, default_methods, run_method
from disca.compare.report import render_report, write_outputs
from disca.compare.results import METRICS, Results
from disca.compare.runner import EvaluationSettings, evaluate
from disca.compare.suite import Sampling, Suite
from disca.errors import UserError
from disca.eval.classifier import ClipClassifier
from disca.models import DiT, DiTConfig
from disca.sample import resolve_full_steps


class Mixture(nn.Module):
    """A predictor with one layer over the current and the cached tokens."""

    def __init__(self, hidden):
        super().__init__()
        self.layer = nn.Linear(2 * hidden, hidden)

    def forward(self, state, cache):
        return cache + self.layer(torch.cat([state.tokens, cache], -1))


def make_suite(**changes):
    torch.manual_seed(0)
    source = MovingDigits(frames=4, size=16)
    config = DiTConfig(
        in_channels=1,
        out_channels=1,
        patch=(4, 8, 8),
        hidden=24,
        heads=1,
        rope_dims=(8, 8, 8),
        double_blocks=1,
        single_blocks=2,
        mlp_ratio=2.0,
        text_dim=source.text_dim,
        pooled_dim=source.pooled_dim,
        text_refiner_depth=0,
        time_features=16,
    )
    teacher = DiT(config)
    with torch.no_grad():  # a fresh model's output is zero
        for parameter in teacher.final_layer.parameters():
            parameter.normal_(std=0.2)
    cfg = DiT.from_teacher(teacher, guidance_embed=True)
    students = {name: DiT.from_teacher(cfg, mean_flow=True) for name in ("meanflow", "rmeanflow")}
    hosts = {"teacher": teacher, "cfg": cfg, **students}
    return Suite(
        source=source,
        hosts={name: host.eval() for name, host in hosts.items()},
        predictors={"paper": Mixture(24), "residual": Mixture(24)},
        classifier=ClipClassifier(1, source.label_sizes).eval(),
        sampling=Sampling(form="residual"),
    )


@pytest.fixture(scope="module")
def suite():
    return make_suite()


@pytest.fixture(scope="module")
def settings():
    return EvaluationSettings(
        seeds=(0, 4), clips=5, batch=3, reference_clips=8, timing_batch=2, repeats=2, shown=2
    )


METHODS = (
    Method("teacher-2x2", "Teacher, CFG, 2 x 2", "teacher", 2, "cfg"),
    Method("cfg-2", "CFG-distilled, 2", "cfg", 2),
    Method("meanflow-3", "MeanFlow, 3", "meanflow", 3),
    Method("rmeanflow-3", "Restricted MeanFlow, 3", "rmeanflow", 3),
    Method("disca-x", "DisCa, 3", "rmeanflow", 3, "disca", "every:2", None, "rmeanflow-3"),
    Method("disca-y", "DisCa paper, 3", "rmeanflow", 3, "disca", "0", "paper", "rmeanflow-3"),
    Method("reuse-x", "Reuse, 3", "rmeanflow", 3, "reuse", "every:2", None, "rmeanflow-3"),
)
BY_KEY = {method.key: method for method in METHODS}


@pytest.fixture(scope="module")
def evaluation(suite, settings):
    return evaluate(suite, settings, methods=METHODS, progress=False)


@pytest.fixture(scope="module")
def page(evaluation):
    return render_report(evaluation)


def test_rows_cover_the_comparison():
    methods = default_methods(("paper", "residual"), "residual")
    assert [method.key for method in methods] == [
        "teacher-50x2",
        "cfg-50",
        "teacher-10x2",
        "cfg-20",
        "cfg-10",
        "meanflow-20",
        "meanflow-10",
        "rmeanflow-20",
        "rmeanflow-10",
        "rmeanflow-9",
        "disca-n2",
        "disca-n3",
        "disca-n4",
        "disca-every4",
        "disca-n4-paper",
        "reuse-n4",
        "reuse-every4",
    ]
    keys = [method.key for method in methods]
    for method in methods:
        assert (method.full_steps is None) == (method.uncached is None)
        assert method.uncached is None or method.uncached in keys
        if method.full_steps is not None:
            assert 0 < len(resolve_full_steps(method.full_steps, method.steps)) < method.steps
            assert methods[keys.index(method.uncached)].steps == method.steps


def test_rows_need_the_chosen_form():
    with pytest.raises(UserError, match="no checkpoint of the predictor's 'paper' form"):
        default_methods(("residual",), "paper")


@pytest.mark.parametrize(
    ("key", "full", "predicted"),
    [
        ("teacher-2x2", 4, 0),
        ("cfg-2", 2, 0),
        ("meanflow-3", 3, 0),
        ("rmeanflow-3", 3, 0),
        ("disca-x", 2, 1),
        ("disca-y", 1, 2),
        ("reuse-x", 2, 1),
    ],
)
def test_pass_counts(evaluation, key, full, predicted):
    row = evaluation.results.row(key)
    assert (row.full_passes, row.predictor_passes) == (full, predicted)


def test_cache_is_one_token_tensor_of_one_clip(evaluation, suite):
    text = suite.source.text_tokens
    expected = (1 * 2 * 2 + text) * 24 * 4  # (video tokens + text tokens) * width * float32
    for row in evaluation.results.rows:
        cached = row.key.startswith(("disca", "reuse"))
        assert row.cache_bytes == (expected if cached else 0)


def test_theoretical_speedup_counts_operations(evaluation, suite):
    row = evaluation.results.row
    one, skip = pass_flops(suite, "rmeanflow"), skip_flops(suite, "rmeanflow", "residual")
    assert row("disca-x").flops == 2 * one + skip
    assert row("reuse-x").flops == 2 * one + skip_flops(suite, "rmeanflow", None)
    assert row("teacher-2x2").flops == 4 * pass_flops(suite, "teacher")
    assert row("rmeanflow-3").theoretical_speedup == pytest.approx(
        method_flops(suite, BY_KEY["teacher-2x2"]) / (3 * one)
    )
    assert row("teacher-2x2").theoretical_speedup == 1


def test_same_noise_for_every_method(suite):
    """One step of a student that equals its teacher gives the teacher's sample."""
    batch = suite.source.sample(3, torch.Generator().manual_seed(0))
    noise = torch.randn(batch.clips.shape, generator=torch.Generator().manual_seed(1))
    one = {
        name: run_method(suite, Method(name, name, name, 1), noise, batch.condition).x
        for name in ("meanflow", "rmeanflow")
    }
    assert torch.equal(one["meanflow"], one["rmeanflow"])


def test_batches_do_not_change_the_samples(suite):
    method = BY_KEY["disca-x"]
    batch = suite.source.sample(5, torch.Generator().manual_seed(0))
    noise = torch.randn(batch.clips.shape, generator=torch.Generator().manual_seed(1))
    whole = run_method(suite, method, noise, batch.condition)
    done = []
    parts = run_method(suite, method, noise, batch.condition, batch=2, advance=done.append)
    torch.testing.assert_close(parts.x, whole.x, atol=1e-5, rtol=1e-5)
    assert done == [2, 2, 1]
    assert parts.full_passes == whole.full_passes


def test_errors_are_against_the_same_seed(evaluation):
    rows = {row.key: row for row in evaluation.results.rows}
    for key, method in BY_KEY.items():
        scores = rows[key].per_seed
        assert [score.seed for score in scores] == [0, 4]
        assert all((score.error_uncached is None) == (method.uncached is None) for score in scores)
        assert all((score.error_teacher is None) == (key == "teacher-2x2") for score in scores)
    # the two students are equal here, so plain MeanFlow is as far from the teacher as the other
    same = [rows[key].summary["error_teacher"] for key in ("meanflow-3", "rmeanflow-3")]
    assert same[0] == same[1]
    assert rows["reuse-x"].summary["error_uncached"].mean > 0
    assert rows["real"].summary["semantic"].mean <= 1


def test_measured_speedup_is_per_repeat(evaluation):
    first = evaluation.results.rows[0]
    for row in evaluation.results.rows[:-1]:
        ratios = [a / b for a, b in zip(first.seconds.values, row.seconds.values, strict=True)]
        assert row.measured_speedup.values == pytest.approx(ratios)
    assert evaluation.results.row("real").measured_speedup is None


def test_shares(evaluation, suite):
    shares = evaluation.results.models["predictors"]["residual"]
    own = sum(p.numel() for p in suite.predictors["residual"].parameters())
    host = sum(p.numel() for p in suite.hosts["rmeanflow"].parameters())
    assert shares["parameter_share"] == own / host
    assert 0 < shares["flop_share"] < 1
    assert shares["time_share"] > 0


def test_written_files(evaluation, settings, tmp_path):
    out = tmp_path / "new" / "folder"
    paths = write_outputs(evaluation, out)
    names = ["clips.gif", "clips.mp4", "report.html", "results.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in paths) == names

    written = json.loads((out / "results.json").read_text())
    assert written["schema_version"] == 1
    assert set(written) == {
        "schema_version",
        "created",
        "versions",
        "machine",
        "settings",
        "models",
        "rows",
    }
    assert set(written["rows"][0]["summary"]) <= set(METRICS)
    assert written["settings"]["seeds"] == [0, 4]
    assert written["settings"]["guidance"] == 4.0
    assert Results.model_validate(written) == evaluation.results

    with Image.open(out / "clips.gif") as gif:
        assert gif.n_frames == 4
    with av.open(str(out / "clips.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_report_needs_no_network(evaluation, page):
    assert "http:" not in page
    assert "https:" not in page
    assert "//" not in re.sub(r"data:[a-z/]+;base64,[A-Za-z0-9+/=]+", "", page)
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 1 + len(evaluation.clips)
    assert all(source.startswith("data:image/") for source in sources)
    assert 'name="viewport"' in page
    for row in evaluation.results.rows:
        assert row.label in page


def test_rejects_missing_pieces(settings):
    full = make_suite()
    without = {"hosts": {"teacher": full.hosts["teacher"]}}
    cases = [
        ({"classifier": None}, "no finished classifier stage"),
        (without, "no finished stage 'rmeanflow'; found: teacher"),
        ({"predictors": {"paper": full.predictors["paper"]}}, "'residual' form; found"),
    ]
    for change, match in cases:
        broken = Suite(**{**vars(full), **change})
        with pytest.raises(UserError, match=match):
            evaluate(broken, settings, progress=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seeds": ()}, "seeds must be different"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": (-1,)}, "from 0 up"),
        ({"clips": 0}, "clips must be at least 1"),
        ({"clips": 1}, "at least 2"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"batch": -3}, "batch must be at least 1, got -3"),
    ],
)
def test_settings_reject(change, match):
    with pytest.raises(UserError, match=match):
        EvaluationSettings(**change)
