# SPDX-License-Identifier: Apache-2.0
"""Hosts for tests of cache policies: one to compute by hand, and tiny DiTs of both layouts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from disca.cache import CachePolicy, Resources, build_policy
from disca.models import Condition, DiT, DiTConfig
from disca.models.state import State
from disca.sample import SampleResult, cached_sample
from tests.model.tiny import TINY, TINY_1_5, inputs, roughen

Table = Callable[[float], float]


class TableBlock(nn.Module):
    """A block whose sub-layers return one number everywhere, looked up by time; the gate is t."""

    parallel = False

    def __init__(self, attention: Table, mlp: Table) -> None:
        super().__init__()
        self.tables = {"attention": attention, "mlp": mlp}
        self.calls = {"attention": 0, "mlp": 0}

    def forward(self, state: State) -> State:
        state = self.combine(state, attention=self.attention(state))
        return self.combine(state, mlp=self.mlp(state))

    def attention(self, state: State) -> Tensor:
        return self._look_up("attention", state)

    def mlp(self, state: State) -> Tensor:
        return self._look_up("mlp", state)

    def combine(
        self, state: State, *, attention: Tensor | None = None, mlp: Tensor | None = None
    ) -> State:
        for update in (attention, mlp):
            if update is not None:
                state = state.with_tokens(state.tokens + state.vec.unsqueeze(-1) * update)
        return state

    def _look_up(self, part: str, state: State) -> Tensor:
        self.calls[part] += 1
        value = self.tables[part](round(float(state.vec[0]), 6))
        return torch.full_like(state.tokens, value)


class TableHost(nn.Module):
    """Tokens are the pixels and one text token of 0; the velocity is the video tokens."""

    mean_flow = False

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def embed(self, x: Tensor, t: Tensor, r: Tensor | None, cond: Any) -> State:
        assert r is None
        video = x.flatten(1).unsqueeze(-1)
        tokens = torch.cat([video, torch.zeros_like(video[:, :1])], dim=1)
        rope = (torch.ones(1), torch.zeros(1))
        lengths = torch.full((len(x),), tokens.shape[1])
        grid = (x.shape[2], x.shape[3], x.shape[4])
        return State((tokens,), video.shape[1], t.view(-1, 1), rope, lengths, grid)

    def run(self, state: State, start: int = 0, stop: int | None = None) -> State:
        for block in self.blocks[start:stop]:
            state = block(state)
        return state

    def head(self, state: State) -> Tensor:
        return state.video.reshape(-1, 1, *state.grid)


def _no_calibration(name: str) -> Any:
    raise AssertionError(f"{name} asked for a calibration")


def _no_prompt(batch: int) -> Condition:
    raise AssertionError("asked for the empty prompt")


RESOURCES = Resources({}, _no_calibration, _no_prompt, 1.0)

LAYOUTS = {
    f"{name}-{'mean' if mean_flow else 'plain'}": DiTConfig(**{**layout, "mean_flow": mean_flow})
    for name, layout in (("1.0", TINY), ("1.5", TINY_1_5))
    for mean_flow in (False, True)
}
"""Both layouts of the DiT, with an end time and without."""


def tiny_case(config: DiTConfig, batch: int = 2) -> tuple[DiT, Tensor, Condition]:
    """Return a tiny model, noise and a condition."""
    torch.manual_seed(0)
    host = roughen(DiT(config)).eval()
    x, _, _, cond = inputs(config, batch=batch, size=(2, 4, 4), text=3)
    return host, x, cond


def sample(
    host: Any, policy: CachePolicy | str, x: Tensor, times: Any, cond: Any = None
) -> SampleResult:
    """Sample a host under a policy or the text that describes one, keeping every step's sample."""
    if isinstance(policy, str):
        policy = build_policy(policy, RESOURCES)
    schedule = torch.as_tensor(times, dtype=torch.float32)
    return cached_sample(host, policy, x, schedule, cond, trajectory=True)


def uniform(steps: int) -> Tensor:
    """Return equally spaced times from 1 to 0."""
    return torch.linspace(1, 0, steps + 1)
