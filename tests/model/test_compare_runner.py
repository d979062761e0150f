# SPDX-License-Identifier: Apache-2.0
"""The comparison from end to end on tiny random models: counts, pairing, files, going on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disca.cache import build_policy
from disca.compare import runner
from disca.compare.clips import load_clips
from disca.compare.costs import pass_flops, predicted_flops
from disca.compare.flops import count_flops
from disca.compare.plan import Plan, row_plan
from disca.compare.results import load_results
from disca.compare.runner import compare
from disca.compare.scoring import sample_row, seed_inputs
from disca.compare.suite import Sampling, Suite
from disca.data import MovingDigits
from disca.errors import UserError
from disca.eval import relative_errors
from disca.eval.classifier import ClipClassifier
from disca.models import DiT, DiTConfig
from tests.model.tiny import roughen


class Mixture(nn.Module):
    """A predictor with one layer over the current and the cached tokens."""

    def __init__(self, hidden):
        super().__init__()
        self.layer = nn.Linear(2 * hidden, hidden)

    def forward(self, state, cache):
        return cache + self.layer(torch.cat([state.tokens, cache], -1))


def make_suite():
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
    roughen(teacher)  # a fresh model's gates and output are zero
    cfg = DiT.from_teacher(teacher, guidance_embed=True)
    students = {name: DiT.from_teacher(cfg, mean_flow=True) for name in ("meanflow", "rmeanflow")}
    hosts = {"teacher": teacher, "cfg": cfg, **students}
    return Suite(
        source=source,
        hosts={name: host.eval() for name, host in hosts.items()},
        predictors={"predictor": Mixture(24), "other": Mixture(24)},
        classifier=ClipClassifier(1, source.label_sizes).eval(),
        sampling=Sampling(predictor="other"),
    )


@pytest.fixture(scope="module")
def suite():
    return make_suite()


ROWS = (
    {"model": "teacher", "steps": 2, "policy": "cfg", "label": "Teacher"},
    {"model": "cfg", "steps": 2},
    {"model": "rmeanflow", "steps": 4},
    {"model": "rmeanflow", "steps": 4, "policy": "disca:full_steps=every:2"},
    {"model": "rmeanflow", "steps": 4, "policy": "disca:full_steps=[0],predictor=predictor"},
    {"model": "rmeanflow", "steps": 4, "policy": "reuse:full_steps=every:2"},
    {"model": "rmeanflow", "steps": 4, "policy": "fora:interval=2", "group": "more"},
)
TEACHER, CFG, PLAIN, DISCA, PAPER, REUSE, FORA = (row_plan(**row).key for row in ROWS)


def make_plan(**changes):
    fields = {"seeds": (0, 4), "clips": 5, "batch": 3, "reference_clips": 8, "timing_batch": 2}
    fields |= {"repeats": 2, "shown": 2, "title": "Tiny", "rows": ROWS}
    return Plan.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def done(suite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "new" / "results"
    return folder, compare(suite, make_plan(), folder, command="disca compare", progress=False)


@pytest.mark.parametrize(
    ("key", "computed", "skipped"),
    [
        (TEACHER, [0, 1], []),
        (PLAIN, [0, 1, 2, 3], []),
        (DISCA, [0, 2], [1, 3]),
        (PAPER, [0], [1, 2, 3]),
        (FORA, [0, 2], [1, 3]),
    ],
)
def test_steps(done, key, computed, skipped):
    row = done[1].row(key)
    assert (row.computed, row.skipped) == (computed, skipped)


def test_operations_are_counted_from_the_run(done, suite):
    row = done[1].row
    one, predicted = pass_flops(suite, "rmeanflow"), predicted_flops(suite, "rmeanflow", "other")
    assert row(PLAIN).flops == 4 * one
    assert row(DISCA).flops == 2 * one + 2 * predicted
    assert row(DISCA).full_passes == pytest.approx(2 + 2 * predicted / one)
    assert row(TEACHER).flops == 4 * pass_flops(suite, "teacher")
    assert row(TEACHER).full_passes == pytest.approx(4)
    assert row(PLAIN).theoretical_speedup == pytest.approx(row(TEACHER).flops / (4 * one))
    host = suite.host("rmeanflow")
    noise, t = torch.zeros(1, *suite.source.shape), torch.full((1,), 0.5)
    cond = suite.condition("rmeanflow", suite.source.null(1))
    outside = count_flops(lambda: host.head(host.embed(noise, t, t, cond)))
    assert row(REUSE).flops == 2 * one + 2 * outside


def test_held_and_peak_memory(done, suite):
    tokens = (1 * 2 * 2 + suite.source.text_tokens) * 24 * 4  # tokens * width * float32
    row = done[1].row
    assert [row(key).cache_bytes for key in (PLAIN, DISCA, REUSE)] == [0, tokens, tokens]
    assert row(FORA).cache_bytes == 3 * 2 * tokens  # attention and MLP of three blocks
    assert row(FORA).peak_bytes > row(PLAIN).peak_bytes > tokens


def test_errors_are_against_the_same_seed(done):
    for row in done[1].rows:
        cached = row.policy not in ("none", "cfg")
        assert [score.seed for score in row.per_seed] == [0, 4]
        assert all((score.error_uncached is None) is not cached for score in row.per_seed)
        assert all((score.error_teacher is None) == (row.key == TEACHER) for score in row.per_seed)
        assert (row.error_per_step is None) is not cached
        if cached:
            # the last entry is the error of the samples themselves, and a computed step has none
            assert row.error_per_step[0] < 1e-12
            assert row.error_per_step[-1] == pytest.approx(row.per_seed[0].error_uncached_median)
            assert row.per_seed[0].psnr_uncached > 0
            assert 0 < row.per_seed[0].ssim_uncached <= 1
            assert row.per_seed[0].jitter_uncached > 0


def test_measured_speedup_is_per_repeat(done):
    first = done[1].rows[0]
    for row in done[1].rows:
        for seconds, speedup in (("seconds", "speedup"), ("seconds_total", "speedup_total")):
            pairs = zip(getattr(first, seconds).values, getattr(row, seconds).values, strict=True)
            assert getattr(row, speedup).values == pytest.approx([a / b for a, b in pairs])
        assert row.seconds_total.low > row.seconds.low


def test_predictors_are_described_with_their_shares(done, suite):
    described = done[1].models["predictors"]
    assert set(described) == {"other", "predictor"}
    own = sum(p.numel() for p in suite.predictors["other"].parameters())
    host = sum(p.numel() for p in suite.hosts["rmeanflow"].parameters())
    assert described["other"]["parameter_share"] == own / host
    assert 0 < described["other"]["flop_share"] < 1
    assert described["other"]["time_share"] > 0


def test_files(done):
    folder, results = done
    assert sorted(path.name for path in folder.iterdir()) == [
        "clips.safetensors",
        "results.json",
        "work",
    ]
    assert load_results(folder) == results
    clips = load_clips(folder)
    assert set(clips) == {row.key for row in results.rows} | {"real"}
    assert all(clip.shape == (2, 1, 4, 16, 16) for clip in clips.values())
    assert len(results.settings["prompts"]) == 2
    assert results.command == "disca compare"
    assert list(results.groups()) == ["", "more"]


def sampled(monkeypatch):
    """Watch which rows are sampled."""
    names = []
    original = runner.sample_row

    def watched(suite, row, *rest, **named):
        names.append(row.key)
        return original(suite, row, *rest, **named)

    monkeypatch.setattr(runner, "sample_row", watched)
    return names


def test_a_finished_comparison_runs_nothing_again(done, suite, monkeypatch):
    names = sampled(monkeypatch)
    again = compare(suite, make_plan(), done[0], command="disca compare", progress=False)
    assert names == []
    same = {"exclude": {"created", "models"}}
    assert again.model_dump(**same) == done[1].model_dump(**same)


def test_goes_on_where_it_was_stopped(suite, tmp_path, monkeypatch):
    plan = make_plan(rows=ROWS[:4], seeds=(0,))
    names = sampled(monkeypatch)
    original = runner.sample_row

    def stopped(suite, row, *rest, **named):
        if row.key == DISCA:
            raise KeyboardInterrupt
        return original(suite, row, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "sample_row", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(suite, plan, tmp_path, progress=False)
    with pytest.raises(UserError, match="no comparison finished there"):
        load_results(tmp_path)
    names.clear()
    resumed = compare(suite, plan, tmp_path, progress=False)
    # what it is compared with is sampled again, nothing else
    assert sorted(names) == sorted([PLAIN, TEACHER, DISCA])
    fresh = compare(suite, plan, tmp_path / "fresh", progress=False)
    assert [row.per_seed for row in resumed.rows] == [row.per_seed for row in fresh.rows]
    # a row more needs that row only
    names.clear()
    longer = compare(suite, make_plan(rows=ROWS[:6], seeds=(0,)), tmp_path, progress=False)
    assert set(names) == {PLAIN, TEACHER, PAPER, REUSE}
    assert len(longer.rows) == 6


def test_parts_of_another_comparison_are_refused(done, suite):
    with pytest.raises(UserError, match="other settings, data or weights; take another --out"):
        compare(suite, make_plan(clips=6), done[0], progress=False)
    other = make_suite()
    with torch.no_grad():
        next(other.hosts["cfg"].parameters()).add_(1)
    with pytest.raises(UserError, match="other settings, data or weights"):
        compare(other, make_plan(), done[0], progress=False)
    judged = Suite(**{**vars(suite), "classifier": ClipClassifier(1, (10, 4, 2)).eval()})
    with pytest.raises(UserError, match="other settings, data or weights"):
        compare(judged, make_plan(), done[0], progress=False)


def test_a_damaged_part_is_named(suite, tmp_path):
    plan = make_plan(rows=ROWS[1:2], seeds=(0,))
    compare(suite, plan, tmp_path, progress=False)
    part = tmp_path / "work" / f"{CFG}.seed0.json"
    part.write_text(part.read_text()[:-5])
    with pytest.raises(UserError, match=rf"{part.name} is damaged; delete it"):
        compare(suite, plan, tmp_path, progress=False)
    part.unlink()
    compare(suite, plan, tmp_path, progress=False)


def test_clips_follow_the_first_seed_and_the_number_shown(suite, tmp_path):
    def clips(**changes):
        compare(suite, make_plan(rows=ROWS[1:2], **changes), tmp_path, progress=False)
        return load_clips(tmp_path)[CFG]

    first = clips(seeds=(0,))
    assert len(first) == 2
    second = clips(seeds=(1, 0))
    assert not torch.equal(first, second)
    assert torch.equal(clips(seeds=(0, 1)), first)
    more = clips(seeds=(0,), shown=4)
    assert len(more) == 4
    assert torch.equal(more[:2], first)
    part = tmp_path / "work" / f"{CFG}.seed0.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{part.name} is damaged; delete it"):
        clips(seeds=(0,), shown=4)


def test_a_row_that_diverges_is_named(suite, tmp_path):
    class Explodes(type(suite.hosts["cfg"])):
        def head(self, state):
            return super().head(state) / 0

    host = suite.hosts["cfg"]
    broken = Explodes(host.config)
    broken.load_state_dict(host.state_dict())
    hosts = {**suite.hosts, "cfg": broken.eval()}
    exploding = Suite(**{**vars(suite), "hosts": hosts})
    with pytest.raises(UserError, match=r"'cfg, 2 steps' \(none on cfg, 2 steps\) diverged"):
        compare(exploding, make_plan(rows=ROWS[1:2]), tmp_path, progress=False)


def test_held_bytes_do_not_depend_on_the_batch(suite):
    row = row_plan(model="rmeanflow", steps=4, policy="easycache:threshold=50,first=1")
    inputs = seed_inputs(suite, 6, 0)
    held = set()
    for batch in (6, 2):
        policy = build_policy(row.policy, suite.resources(lambda name: None))
        cond = inputs.real.condition
        sampled = sample_row(suite, row, policy, inputs.noise, cond, batch=batch, trajectory=False)
        held.add(sampled.cache_bytes)
    assert held == {3 * 4 * 16 * 16 * 4}  # three latents of one clip


def test_the_target_need_not_be_a_row(suite, tmp_path):
    plan = make_plan(rows=ROWS[2:3], seeds=(0,), target={"model": "cfg", "steps": 3})
    results = compare(suite, plan, tmp_path, progress=False)
    assert results.rows[0].per_seed[0].error_teacher > 0
    assert results.settings["target"] == "cfg, 3 steps"
    assert results.models["paths"]["stage"] == "cfg"


def test_the_same_noise_for_every_row(suite, tmp_path):
    """One step of a student that equals its teacher gives the teacher's sample."""
    rows = [{"model": name, "steps": 1} for name in ("cfg", "meanflow", "rmeanflow")]
    compare(suite, make_plan(rows=rows, seeds=(0,)), tmp_path, progress=False)
    clips = load_clips(tmp_path)
    assert torch.equal(clips["meanflow-1-none"], clips["rmeanflow-1-none"])
    assert relative_errors(clips["cfg-1-none"], clips["meanflow-1-none"]).max() < 1e-6


def test_unlabelled_clips_are_scored_by_distance(suite, tmp_path):
    class Unlabelled:
        """The same clips without their labels and prompts."""

        def __init__(self, source):
            self.shape, self.source = source.shape, source

        def sample(self, n, generator, *, split="train"):
            batch = self.source.sample(n, generator, split=split)
            return type(batch)(batch.clips, self.null(n))

        def null(self, n):
            return self.source.null(n)

    bare = Suite(**{**vars(suite), "source": Unlabelled(suite.source), "classifier": None})
    results = compare(bare, make_plan(rows=ROWS[2:4], seeds=(0,)), tmp_path, progress=False)
    assert results.settings["prompts"] == []
    for scores in (results.rows[0].summary, results.real):
        assert scores["wasserstein"].mean > 0
        assert not {"semantic", "frechet"} & set(scores)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"model": "student", "steps": 2}, "no finished stage 'student'; found: teacher, cfg"),
        ({"model": "cfg", "steps": 2, "policy": "none:a=1"}, "has no setting 'a'"),
        ({"model": "cfg", "steps": 2, "policy": "fora:interval=3,first=2"}, "nothing would be"),
        ({"model": "cfg", "steps": 3, "policy": "reuse:full_steps=[0, 3]"}, "out of range"),
        ({"model": "cfg", "steps": 3, "policy": "disca:full_steps=n4"}, "is for 20 steps, got 3"),
    ],
)
def test_a_bad_row_is_refused_before_anything_runs(suite, tmp_path, monkeypatch, row, match):
    names = sampled(monkeypatch)
    with pytest.raises(UserError, match=match):
        compare(suite, make_plan(rows=[*ROWS, row]), tmp_path, progress=False)
    assert names == []


def test_labelled_clips_need_a_classifier(suite, tmp_path):
    blind = Suite(**{**vars(suite), "classifier": None})
    with pytest.raises(UserError, match="no finished classifier stage"):
        compare(blind, make_plan(), tmp_path, progress=False)
