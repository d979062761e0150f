# SPDX-License-Identifier: Apache-2.0
"""Cache policies and the sampler over them, on a host small enough to compute by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from disca.cache import CacheReport, LearnedPredictor, NoCache, Reuse, Store
from disca.cache.fora import Fora
from disca.cache.guided import Guided
from disca.cache.interval import Interval
from disca.errors import UserError
from disca.models import Condition, DiT, DiTConfig
from disca.models.predictor import Predictor
from disca.sample import cached_sample, disca_sample, flow_shift_schedule, mean_velocity
from tests.model.cache_hosts import LAYOUTS, TableBlock, TableHost, sample, tiny_case, uniform

SCHEDULE = flow_shift_schedule(20)
N4 = [0, 1, 2, 5, 9, 13, 17, 19]


@dataclass(frozen=True)
class ToyState:
    tokens: Tensor
    t: Tensor
    r: Tensor | None
    log: str

    def with_tokens(self, tokens):
        return replace(self, tokens=tokens)


class ToyHost:
    """A host whose tokens are the pixels: embed copies, run takes a tanh, head scales by time."""

    def __init__(self, *, mean_flow: bool = True) -> None:
        self.mean_flow = mean_flow
        self.calls: list[str] = []

    def embed(self, x, t, r, cond):
        assert (r is None) is not self.mean_flow
        self.calls.append("embed")
        return ToyState(x.flatten(1).unsqueeze(-1), t, r, "embedded")

    def run(self, state, start=0, stop=None):
        self.calls.append("run")
        tokens = torch.tanh(state.tokens * (1 + state.t.view(-1, 1, 1)))
        return ToyState(tokens, state.t, state.r, "run")

    def head(self, state):
        self.calls.append("head")
        end = 0 if state.r is None else state.r.view(-1, 1, 1)
        return (state.tokens * (1 + end)).view(-1, 1, 2, 3, 3)

    def forward(self, x, t, r=None):
        return self.head(self.run(self.embed(x, t, r if self.mean_flow else None, None)))


class SpyPredictor:
    def __init__(self) -> None:
        self.calls: list[tuple[ToyState, Tensor]] = []

    def __call__(self, state, cache):
        self.calls.append((state, cache))
        return 0.25 * state.tokens + 0.75 * cache


@pytest.fixture
def x():
    return torch.randn(4, 1, 2, 3, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mean_flow", [True, False])
def test_all_full_equals_mean_velocity(x, mean_flow):
    """With every step full the cached sampler is the plain one, bit for bit."""
    host, spy = ToyHost(mean_flow=mean_flow), SpyPredictor()
    result = disca_sample(host, spy, x, SCHEDULE, None, "all", allow_idle=True)
    plain = mean_velocity(host.forward, x, SCHEDULE)
    assert torch.equal(result.x, plain)
    assert torch.equal(cached_sample(host, NoCache(), x, SCHEDULE, None).x, plain)
    assert spy.calls == []
    assert (result.full_passes, result.predictor_passes) == (20, 0)


def test_predictor_runs_at_the_other_steps_with_the_last_full_tokens(x):
    host, spy = ToyHost(), SpyPredictor()
    steps = []
    result = disca_sample(
        host, spy, x, SCHEDULE, None, "n4", callback=steps.append, trajectory=True
    )
    assert [step.index for step in steps if step.full] == N4
    assert (result.full_passes, result.predictor_passes) == (8, 12)

    inputs = [x, *result.trajectory[:-1]]
    skipped = [i for i in range(20) if i not in N4]
    for i, (state, cache) in zip(skipped, spy.calls, strict=True):
        assert torch.equal(state.tokens, inputs[i].flatten(1).unsqueeze(-1))
        assert torch.equal(state.t, SCHEDULE[i].expand(4))
        assert torch.equal(state.r, SCHEDULE[i + 1].expand(4))
        assert state.log == "embedded"
        full = max(step for step in N4 if step < i)
        expected = torch.tanh(inputs[full].flatten(1).unsqueeze(-1) * (1 + SCHEDULE[full]))
        assert torch.equal(cache, expected)


def test_embedders_and_head_run_at_every_step(x):
    host = ToyHost()
    disca_sample(host, SpyPredictor(), x, SCHEDULE, None, "n4")
    assert host.calls.count("embed") == host.calls.count("head") == 20
    assert host.calls.count("run") == 8


def test_by_hand(x):
    """Two steps, the second reused: the head still sees the new times."""
    schedule = torch.tensor([1.0, 0.5, 0.0])
    result = cached_sample(ToyHost(), Reuse([0]), x, schedule, None, trajectory=True)
    tokens = torch.tanh(x * 2)
    first = x - 0.5 * tokens * 1.5
    assert torch.equal(result.trajectory[0], first)
    assert torch.equal(result.x, first - 0.5 * tokens)


def test_cache_is_one_detached_tensor(x):
    class Learning(ToyHost):
        weight = torch.ones((), requires_grad=True)

        def run(self, state, start=0, stop=None):
            with torch.enable_grad():
                state = super().run(state)
                return ToyState(state.tokens * self.weight, state.t, state.r, state.log)

    spy = SpyPredictor()
    result = disca_sample(Learning(), spy, x, SCHEDULE, None, "n4")
    assert all(not cache.requires_grad for _, cache in spy.calls)
    assert result.cache_bytes == 4 * 18 * 1 * 4  # B * N * C * sizeof(float32)
    assert len({cache.data_ptr() for _, cache in spy.calls}) <= len(N4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cache_bytes(x, dtype):
    result = cached_sample(ToyHost(), Reuse(N4), x.to(dtype), SCHEDULE.to(dtype), None)
    assert result.cache_bytes == x.numel() * dtype.itemsize
    assert cached_sample(ToyHost(), NoCache(), x, SCHEDULE, None).cache_bytes == 0


def test_report_and_reset(x):
    policy = Reuse(N4)
    hooked, skipped = ("tokens before the head",), tuple(i for i in range(20) if i not in N4)
    for _ in range(2):  # nothing of the first run is left in the second
        result = cached_sample(ToyHost(), policy, x, SCHEDULE, None)
        expected = CacheReport("reuse", hooked, tuple(N4), skipped, x.numel() * 4)
        assert result.report == policy.report() == expected
    policy.reset(ToyHost(), SCHEDULE.tolist())
    assert len(policy.store) == 0
    assert policy.report() == CacheReport("reuse", hooked, (), (), 0)


@pytest.mark.parametrize("policy", [Reuse(range(20)), LearnedPredictor(SpyPredictor(), range(20))])
def test_rejects_a_policy_that_cannot_skip(x, policy):
    with pytest.raises(UserError, match="would skip nothing: all 20 steps are full"):
        cached_sample(ToyHost(), policy, x, SCHEDULE, None)


@pytest.mark.parametrize(
    ("full", "message"),
    [
        ([], "must contain step 0"),
        ([1, 2], "must contain step 0"),
        ([0, 20], "full step 20 is out of range: a schedule of 20 steps has steps 0 to 19"),
        ([0, -1], "full step -1 is out of range"),
        ([0, 3, 3], "full step 3 is given twice"),
    ],
)
def test_rejects_full_steps_that_do_not_fit(x, full, message):
    with pytest.raises(UserError, match=message):
        cached_sample(ToyHost(), Reuse(full), x, SCHEDULE, None)


@pytest.mark.parametrize(
    ("hooked", "skipped", "counts"),
    [(("x",), (), "hooked 1 .* skipped 0 of 20"), ((), (1, 2), "hooked 0 .* skipped 2 of 20")],
)
def test_rejects_an_adaptive_policy_that_did_nothing(x, hooked, skipped, counts):
    class Inert(NoCache):
        name = "inert"
        idle_ok = False

        def report(self):
            return CacheReport(self.name, hooked, (0,), skipped, 0)

    with pytest.raises(UserError, match=f"policy 'inert' {counts} steps: it changed nothing"):
        cached_sample(ToyHost(), Inert(), x, SCHEDULE, None)


def test_rejects_a_predictor_of_another_host(x):
    with pytest.raises(UserError, match=r"returned tokens \[4, 17, 1\], the host's are"):
        disca_sample(ToyHost(), lambda state, cache: cache[:, 1:], x, SCHEDULE, None, "n4")


def test_list_for_another_schedule(x):
    with pytest.raises(UserError, match="'n4' is for 20 steps, got 10"):
        disca_sample(ToyHost(), SpyPredictor(), x, flow_shift_schedule(10), None, "n4")


@pytest.fixture(scope="module")
def real_host():
    """A DiT with random weights everywhere, so that no term vanishes."""
    torch.manual_seed(0)
    config = DiTConfig(
        in_channels=1,
        out_channels=1,
        patch=(2, 2, 2),
        hidden=24,
        heads=1,
        rope_dims=(8, 8, 8),
        double_blocks=1,
        single_blocks=2,
        text_dim=5,
        text_refiner_depth=0,
        pooled_dim=5,
        time_features=16,
        guidance_embed=True,
        mean_flow=True,
    )
    host = DiT(config).eval()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return host


@pytest.fixture
def real_inputs():
    lengths = torch.tensor([3, 1])
    cond = Condition(torch.randn(2, 3, 5), lengths, torch.randn(2, 5)).with_guidance(4.0)
    return torch.randn(2, 1, 2, 4, 6), flow_shift_schedule(5), cond


def test_dit_all_full(real_host, real_inputs):
    x, schedule, cond = real_inputs
    predictor = Predictor(real_host.config)
    result = disca_sample(real_host, predictor, x, schedule, cond, "all", allow_idle=True)
    with torch.no_grad():
        plain = mean_velocity(lambda x, t, r: real_host(x, t, r, cond), x, schedule)
    assert torch.equal(result.x, plain)
    assert not torch.equal(result.x, x)


def test_dit_untrained_residual_predictor_is_reuse(real_host, real_inputs):
    x, schedule, cond = real_inputs
    predictor = Predictor(real_host.config, form="residual").eval()
    learned = disca_sample(real_host, predictor, x, schedule, cond, "every:2")
    reused = cached_sample(real_host, Reuse([0, 2, 4]), x, schedule, cond)
    assert torch.equal(learned.x, reused.x)
    plain = cached_sample(real_host, NoCache(), x, schedule, cond)
    assert not torch.equal(reused.x, plain.x)
    # video tokens (1 * 2 * 3) and text tokens (3, padding included) of width 24, two samples
    assert learned.cache_bytes == 2 * (6 + 3) * 24 * 4


# What the policies are built of


def test_store_counts_storages_once():
    store, base = Store(), torch.zeros(4, 8)
    store["whole"], store["view"] = base, base[:, :2]
    assert store.nbytes() == 4 * 8 * 4
    store["double"] = torch.zeros(3, dtype=torch.float64)
    assert store.nbytes() == 4 * 8 * 4 + 3 * 8
    del store["whole"]  # the view still holds all of it
    assert store.nbytes() == 4 * 8 * 4 + 3 * 8
    assert (len(store), sorted(store)) == (2, ["double", "view"])


def test_store_detaches_and_remembers_its_peak():
    store = Store()
    store["x"] = torch.ones(10, requires_grad=True) * 2
    assert not store["x"].requires_grad
    assert store.peak == 0
    store.measure()
    store["x"] = torch.ones(2)
    store.measure()
    assert (store.nbytes(), store.peak) == (8, 40)


@pytest.mark.parametrize(
    ("settings", "full"),
    [((3,), [0, 3, 6, 9]), ((4, 3), [0, 1, 2, 6, 10]), ((6, 4), [0, 1, 2, 3, 9])],
)
def test_interval(settings, full):
    interval = Interval("some", *settings)
    assert [i for i in range(11) if interval.full(i)] == full
    assert [interval.since(i) for i in range(11)] == [
        i - max(step for step in full if step <= i) for i in range(11)
    ]


def test_interval_refusals():
    with pytest.raises(UserError, match="'some': an interval of 1 computes every step"):
        Interval("some", 1)
    with pytest.raises(UserError, match="'some': at least the first step is full, got first=0"):
        Interval("some", 2, 0)
    Interval("some", 2, 4).check(5)
    with pytest.raises(UserError, match="first 4 steps are full and the run has 4"):
        Interval("some", 2, 4).check(4)


# FORA


def test_fora_by_hand():
    """Both kept outputs pass through the gate of now."""
    # t = 1: 0 + 1·8 + 1·2 = 10, x = 0 − ½·10 = −5
    # t = ½: −5 + ½·8 + ½·2 = 0, x stays
    host = TableHost(TableBlock(lambda t: 8 * t, lambda t: 2 * t))
    result = sample(host, "fora:interval=2", torch.zeros(1, 1, 2, 1, 2), [1, 0.5, 0])
    assert result.trajectory[0].unique().tolist() == [-5]
    assert result.x.unique().tolist() == [-5]
    assert result.report.hooked == ("block 0: attention", "block 0: mlp")
    assert result.report.cache_bytes == 2 * 5 * 4  # two outputs of 4 pixels and a text token


@pytest.mark.parametrize(("first", "computed"), [(1, (0, 3, 6)), (3, (0, 1, 2, 5))])
def test_fora_steps(first, computed):
    host = TableHost(TableBlock(lambda t: t, lambda t: t))
    x = torch.zeros(1, 1, 1, 1, 1)
    report = sample(host, f"fora:interval=3,first={first}", x, uniform(8)).report
    assert report.computed == computed
    assert host.blocks[0].calls == {"attention": len(computed), "mlp": len(computed)}


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_fora_skipped_step(config):
    host, x, cond = tiny_case(config)
    times = uniform(3)
    policy = Fora(2)
    result = sample(host, policy, x, times, cond)
    assert torch.equal(result.x, sample(host, policy, x, times, cond).x)

    def embed(index, x):
        t, r = (times[i].expand(len(x)) for i in (index, index + 1))
        return host.embed(x, t, r if host.mean_flow else None, cond)

    with torch.no_grad():
        before, now = embed(0, x), embed(1, result.trajectory[0])
        whole = host.head(host.run(now))
        for block in host.blocks:
            attention, after = block.attention(before), before
            if not block.parallel:
                after = block.combine(before, attention=attention)
            mlp = block.mlp(after)
            before = block(before)
            now = block.combine(block.combine(now, attention=attention), mlp=mlp)
        expected = result.trajectory[0] - (times[1] - times[2]) * host.head(now)
    torch.testing.assert_close(result.trajectory[1], expected, rtol=1e-5, atol=1e-5)
    assert (host.head(now) - whole).abs().max() > 1e-2
    assert result.report.cache_bytes == 2 * len(host.blocks) * 2 * before.shape[1] * 24 * 4


def test_sublayer_policies_refuse_a_host_without_sublayers():
    host = TableHost(TableBlock(lambda t: t, lambda t: t), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"block 1 of the host \(Linear\) does not expose them"):
        sample(host, "fora:interval=2", torch.zeros(1, 1, 1, 1, 1), uniform(4))
    with pytest.raises(UserError, match="nothing to hook: the host has no blocks"):
        sample(TableHost(), "pab:interval=2", torch.zeros(1, 1, 1, 1, 1), uniform(4))


# Guidance


def test_guided_by_hand():
    """v = v_null + g (v_cond − v_null), the host run twice a step."""

    class Prompted(TableHost):
        def embed(self, x, t, r, cond):
            state = super().embed(x, t, r, cond)
            return state.with_tokens(state.tokens + cond)

    host = Prompted(TableBlock(lambda t: 0.0, lambda t: 0.0))
    policy = Guided(lambda batch: torch.full((batch, 1, 1), 3.0), guidance=6.0)
    cond = torch.full((2, 1, 1), 4.0)
    result = sample(host, policy, torch.ones(2, 1, 1, 1, 1), [1, 0.5, 0], cond)
    # the velocity is x + prompt: step 0: 4 + 6·(5 − 4) = 10, x = 1 − 5 = −4
    # step 1: −1 + 6·(0 + 1) = 5, x = −4 − 2.5
    assert [step.unique().tolist() for step in result.trajectory] == [[-4], [-6.5]]
    assert host.blocks[0].calls == {"attention": 4, "mlp": 4}
    assert result.report == CacheReport("cfg", (), (0, 1), (), 0)
