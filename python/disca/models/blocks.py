# SPDX-License-Identifier: Apache-2.0
"""Double-stream and single-stream DiT blocks and the output head.

Module names follow the released HunyuanVideo files, so that their weights load unchanged.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disca.models.configs import DiTConfig
from disca.models.rope import Rope, normalise_and_rotate
from disca.models.state import State
from disca_kernels import adaln_modulate, attention

__all__ = ["DoubleBlock", "FinalLayer", "Mlp", "Modulation", "SingleBlock"]

Stream = Literal["img", "txt"]
_STREAMS: tuple[Stream, Stream] = ("img", "txt")


class Modulation(nn.Module):
    """SiLU and a linear layer that turns the modulation vector into shifts, scales and gates."""

    def __init__(self, hidden: int, parts: int) -> None:
        """Build the layer for `parts` vectors of width `hidden`."""
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Map vec [B, C] to `parts` tensors [B, C]."""
        out: Tensor = self.linear(F.silu(vec))
        return out.chunk(self.parts, dim=-1)


class HeadNorm(nn.Module):
    """Weight of the RMS normalisation of queries or keys over the head dimension."""

    def __init__(self, width: int) -> None:
        """Build a weight of ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden: int, inner: int) -> None:
        """Build the layer with an inner width."""
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def _gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add a gated update: x + gate * update, one gate [B, C] per row."""
    return torch.addcmul(x, gate.unsqueeze(1), update)


def _attend(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor) -> Tensor:
    """Attention over [B, N, H, D] tensors, heads joined again: [B, N, C]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return attention(q, k, v, kv_lengths=kv_lengths).transpose(1, 2).flatten(2)


class SingleBlock(nn.Module):
    """Attention and MLP side by side over video and text tokens with shared weights.

    `x + gate * linear2([attention(q, k, v), gelu(m)])`, where
    `[q, k, v, m] = linear1(adaln_modulate(x, shift, scale))`.
    """

    def __init__(self, config: DiTConfig) -> None:
        """Build the block for the width, heads and MLP ratio of `config`."""
        super().__init__()
        self.hidden, self.heads = config.hidden, config.heads
        self.linear1 = nn.Linear(config.hidden, 3 * config.hidden + config.mlp_hidden)
        self.linear2 = nn.Linear(config.hidden + config.mlp_hidden, config.hidden)
        self.q_norm = HeadNorm(config.head_dim)
        self.k_norm = HeadNorm(config.head_dim)
        self.modulation = Modulation(config.hidden, 3)

    def forward(self, state: State) -> State:
        """Return the state with this block's tokens."""
        shift, scale, gate = self.modulation(state.vec)
        x = adaln_modulate(state.tokens, shift, scale)
        update = self._attention(x, state) + self._mlp(x)
        return state.with_tokens(_gated(state.tokens, gate, update))

    def attention(self, state: State) -> Tensor:
        """Return attention's share of the update before the gate [B, N, C], without bias."""
        shift, scale, _ = self.modulation(state.vec)
        return self._attention(adaln_modulate(state.tokens, shift, scale), state)

    def mlp(self, state: State) -> Tensor:
        """Return the MLP's share of the update before the gate [B, N, C], with the bias."""
        shift, scale, _ = self.modulation(state.vec)
        return self._mlp(adaln_modulate(state.tokens, shift, scale))

    def combine(
        self, state: State, *, attention: Tensor | None = None, mlp: Tensor | None = None
    ) -> State:
        """Add outputs of `attention` and `mlp`, taken of one state, through the current gate."""
        _, _, gate = self.modulation(state.vec)
        tokens = state.tokens
        for update in (attention, mlp):
            if update is not None:
                tokens = _gated(tokens, gate, update)
        return state.with_tokens(tokens)

    # The fused layers are applied by parts: joining and cutting activations that are 5 to 7 times
    # as wide as the tokens costs more, forward and backward, than cutting the weights.

    def _attention(self, x: Tensor, state: State) -> Tensor:
        weight, bias = self.linear1.weight[: 3 * self.hidden], self.linear1.bias[: 3 * self.hidden]
        qkv = F.linear(x, weight, bias)
        qkv = qkv.view(*qkv.shape[:2], 3, self.heads, -1)
        norms = torch.stack((self.q_norm.weight, self.k_norm.weight))
        qk, v = torch.split(qkv, [2, 1], dim=2)
        q, k = normalise_and_rotate(qk, norms, state.rope).unbind(2)
        attended = _attend(q, k, v.squeeze(2), state.kv_lengths)
        return F.linear(attended, self.linear2.weight[:, : self.hidden])

    def _mlp(self, x: Tensor) -> Tensor:
        weight, bias = self.linear1.weight[3 * self.hidden :], self.linear1.bias[3 * self.hidden :]
        active = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        return F.linear(active, self.linear2.weight[:, self.hidden :], self.linear2.bias)


class DoubleBlock(nn.Module):
    """Joint attention over video and text with separate weights for each, then one MLP each.

    The sub-modules of the two streams have the same names behind `img_` and `txt_`.
    """

    def __init__(self, config: DiTConfig) -> None:
        """Build the block for the width, heads, MLP ratio and projection layout of `config`."""
        super().__init__()
        self.hidden, self.heads, self.split_qkv = config.hidden, config.heads, config.split_qkv
        for stream in _STREAMS:
            self.add_module(f"{stream}_mod", Modulation(config.hidden, 6))
            if config.split_qkv:
                for part in "qkv":
                    self.add_module(
                        f"{stream}_attn_{part}", nn.Linear(config.hidden, config.hidden)
                    )
            else:
                self.add_module(f"{stream}_attn_qkv", nn.Linear(config.hidden, 3 * config.hidden))
            self.add_module(f"{stream}_attn_q_norm", HeadNorm(config.head_dim))
            self.add_module(f"{stream}_attn_k_norm", HeadNorm(config.head_dim))
            self.add_module(f"{stream}_attn_proj", nn.Linear(config.hidden, config.hidden))
            self.add_module(f"{stream}_mlp", Mlp(config.hidden, config.mlp_hidden))

    def forward(self, state: State) -> State:
        """Return the state with this block's tokens."""
        modulations = [self._part(stream, "mod")(state.vec) for stream in _STREAMS]
        state = self._add(state, [m[2] for m in modulations], self._attention(state, modulations))
        return self._add(state, [m[5] for m in modulations], self._mlp(state, modulations))

    def attention(self, state: State) -> Tensor:
        """Return both streams' attention updates before the gates, joined [B, N, C]."""
        modulations = [self._part(stream, "mod")(state.vec) for stream in _STREAMS]
        return torch.cat(self._attention(state, modulations), dim=1)

    def mlp(self, state: State) -> Tensor:
        """Return both streams' MLP updates before the gates, joined, of a state after attention."""
        modulations = [self._part(stream, "mod")(state.vec) for stream in _STREAMS]
        return torch.cat(self._mlp(state, modulations), dim=1)

    def combine(
        self, state: State, *, attention: Tensor | None = None, mlp: Tensor | None = None
    ) -> State:
        """Add outputs of `attention` or `mlp` through the current gates of that sub-layer."""
        modulations = [self._part(stream, "mod")(state.vec) for stream in _STREAMS]
        for update, gate in ((attention, 2), (mlp, 5)):
            if update is not None:
                halves = [update[:, : state.n_video], update[:, state.n_video :]]
                state = self._add(state, [m[gate] for m in modulations], halves)
        return state

    def _part(self, stream: Stream, name: str) -> Any:
        return getattr(self, f"{stream}_{name}")

    def _add(self, state: State, gates: list[Tensor], updates: list[Tensor]) -> State:
        video = _gated(state.video, gates[0], updates[0])
        text = _gated(state.text, gates[1], updates[1])
        return state.with_tokens(torch.cat((video, text), dim=1))

    def _attention(self, state: State, modulations: list[tuple[Tensor, ...]]) -> list[Tensor]:
        turn = (state.rope[0][: state.n_video], state.rope[1][: state.n_video])
        shift, scale = modulations[0][:2]
        q, k, v = self._project("img", adaln_modulate(state.video, shift, scale), turn)
        shift, scale = modulations[1][:2]
        text = self._project("txt", adaln_modulate(state.text, shift, scale), None)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), text, strict=True))
        out = _attend(q, k, v, state.kv_lengths)
        halves = (out[:, : state.n_video], out[:, state.n_video :])
        return [
            self._part(stream, "attn_proj")(half)
            for stream, half in zip(_STREAMS, halves, strict=True)
        ]

    def _project(
        self, stream: Stream, x: Tensor, rope: Rope | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_weight = self._part(stream, "attn_q_norm").weight
        k_weight = self._part(stream, "attn_k_norm").weight
        if self.split_qkv:
            q, k, v = (
                self._part(stream, f"attn_{part}")(x).unflatten(-1, (1, self.heads, -1))
                for part in "qkv"
            )
            q = normalise_and_rotate(q, q_weight.unsqueeze(0), rope)
            k = normalise_and_rotate(k, k_weight.unsqueeze(0), rope)
            return q.squeeze(2), k.squeeze(2), v.squeeze(2)
        qkv = self._part(stream, "attn_qkv")(x)
        qk, v = torch.split(qkv.view(*qkv.shape[:2], 3, self.heads, -1), [2, 1], dim=2)
        q, k = normalise_and_rotate(qk, torch.stack((q_weight, k_weight)), rope).unbind(2)
        return q, k, v.squeeze(2)

    def _mlp(self, state: State, modulations: list[tuple[Tensor, ...]]) -> list[Tensor]:
        updates = []
        for stream, part, modulation in zip(
            _STREAMS, (state.video, state.text), modulations, strict=True
        ):
            shift, scale = modulation[3:5]
            updates.append(self._part(stream, "mlp")(adaln_modulate(part, shift, scale)))
        return updates


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear layer from tokens to patches."""

    def __init__(self, hidden: int, values: int) -> None:
        """Build the layer for patches of `values` numbers."""
        super().__init__()
        self.linear = nn.Linear(hidden, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Map video tokens [B, N, C] and vec [B, C] to patches [B, N, values]."""
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        out: Tensor = self.linear(adaln_modulate(x, shift, scale))
        return out
