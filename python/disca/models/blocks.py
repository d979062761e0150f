# SPDX-License-Identifier: Apache-2.0
"""Double-stream and single-stream DiT blocks and the output head.

Module names follow the released HunyuanVideo files, so that their weights load unchanged.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disca.models.configs import DiTConfig
from disca.models.state import State
from disca_kernels import (
    adaln_modulate,
    attention,
    gated_residual,
    gated_residual_adaln,
    gelu_tanh,
    qk_norm_rope,
)

__all__ = ["DoubleBlock", "FinalLayer", "Mlp", "Modulation", "SingleBlock"]

Stream = Literal["img", "txt"]
_STREAMS: tuple[Stream, Stream] = ("img", "txt")


class Modulation(nn.Module):
    """Linear layer that turns the modulation vector into shifts, scales and gates.

    The SiLU before it is the same for every block: `State.vec` comes with it applied.
    """

    def __init__(self, hidden: int, parts: int) -> None:
        """Build the layer for `parts` vectors of width `hidden`."""
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Map vec [B, C] to `parts` tensors [B, C]."""
        out: Tensor = self.linear(vec)
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
        out: Tensor = self.fc2(gelu_tanh(F.linear(x, self.fc1.weight), self.fc1.bias))
        return out


def _join_heads(x: Tensor) -> Tensor:
    """Turn [B, H, N, D] into [B, N, C]."""
    return x.transpose(1, 2).flatten(2)


class SingleBlock(nn.Module):
    """Attention and MLP side by side over video and text tokens with shared weights.

    `x + gate * linear2([attention(q, k, v), gelu(m)])`, where
    `[q, k, v, m] = linear1(adaln_modulate(x, shift, scale))`.
    """

    parallel = True

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
        tokens = state.tokens
        x = adaln_modulate(tokens, shift, scale)
        # Attention's output and the MLP's activation are written side by side, so that one product
        # serves both; cutting the first layer's weights costs less than cutting its output.
        joined = gelu_tanh(*self._inner(x), self._attend(x, state))
        return state.with_tokens(gated_residual(tokens, self.linear2(joined), gate))

    def modulated(self, state: State) -> Tensor:
        """Return the video tokens as the first layer gets them [B, n_video, C]."""
        shift, scale, _ = self.modulation(state.vec)
        return adaln_modulate(state.video, shift, scale)

    def attention(self, state: State) -> Tensor:
        """Return attention's share of the update before the gate [B, N, C], without bias."""
        shift, scale, _ = self.modulation(state.vec)
        attended = self._attend(adaln_modulate(state.tokens, shift, scale), state)
        return F.linear(_join_heads(attended), self.linear2.weight[:, : self.hidden])

    def mlp(self, state: State) -> Tensor:
        """Return the MLP's share of the update before the gate [B, N, C], with the bias."""
        shift, scale, _ = self.modulation(state.vec)
        active = gelu_tanh(*self._inner(adaln_modulate(state.tokens, shift, scale)))
        return F.linear(active, self.linear2.weight[:, self.hidden :], self.linear2.bias)

    def combine(
        self, state: State, *, attention: Tensor | None = None, mlp: Tensor | None = None
    ) -> State:
        """Add outputs of `attention` and `mlp`, taken of one state, through the current gate."""
        _, _, gate = self.modulation(state.vec)
        tokens = state.tokens
        for update in (attention, mlp):
            if update is not None:
                tokens = gated_residual(tokens, update, gate)
        return state.with_tokens(tokens)

    def _attend(self, x: Tensor, state: State) -> Tensor:
        """Attention over modulated tokens [B, N, C], heads apart: [B, H, N, D]."""
        weight, bias = self.linear1.weight[: 3 * self.hidden], self.linear1.bias[: 3 * self.hidden]
        q, k, v = qk_norm_rope(
            F.linear(x, weight, bias),
            self.q_norm.weight,
            self.k_norm.weight,
            *state.rope,
            heads=self.heads,
            rope_tokens=state.n_video,
        )
        return attention(q, k, v, kv_lengths=state.kv_lengths)

    def _inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's first product of modulated tokens, and the bias that belongs to it."""
        weight, bias = self.linear1.weight[3 * self.hidden :], self.linear1.bias[3 * self.hidden :]
        return F.linear(x, weight), bias


class DoubleBlock(nn.Module):
    """Joint attention over video and text with separate weights for each, then one MLP each.

    The sub-modules of the two streams have the same names behind `img_` and `txt_`.
    """

    parallel = False

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
        modulations = self._modulations(state)
        updates = self._attention(state, modulations)
        streams = []
        for stream, tokens, update, modulation in zip(
            _STREAMS, state.streams, updates, modulations, strict=True
        ):
            _, _, gate, shift, scale, gate_mlp = modulation
            tokens, x = gated_residual_adaln(tokens, update, gate, shift, scale)
            streams.append(gated_residual(tokens, self._part(stream, "mlp")(x), gate_mlp))
        return state.with_streams(*streams)

    def modulated(self, state: State) -> Tensor:
        """Return the video tokens as the projection to queries gets them [B, n_video, C]."""
        shift, scale = self._part("img", "mod")(state.vec)[:2]
        return adaln_modulate(state.video, shift, scale)

    def attention(self, state: State) -> Tensor:
        """Return both streams' attention updates before the gates, joined [B, N, C]."""
        return torch.cat(self._attention(state, self._modulations(state)), dim=1)

    def mlp(self, state: State) -> Tensor:
        """Return both streams' MLP updates before the gates, joined, of a state after attention."""
        updates = []
        for stream, tokens, modulation in zip(
            _STREAMS, state.streams, self._modulations(state), strict=True
        ):
            shift, scale = modulation[3:5]
            updates.append(self._part(stream, "mlp")(adaln_modulate(tokens, shift, scale)))
        return torch.cat(updates, dim=1)

    def combine(
        self, state: State, *, attention: Tensor | None = None, mlp: Tensor | None = None
    ) -> State:
        """Add outputs of `attention` or `mlp` through the current gates of that sub-layer."""
        modulations = self._modulations(state)
        for update, gate in ((attention, 2), (mlp, 5)):
            if update is not None:
                halves = (update[:, : state.n_video], update[:, state.n_video :])
                parts = zip(state.streams, halves, modulations, strict=True)
                state = state.with_streams(*(gated_residual(x, y, m[gate]) for x, y, m in parts))
        return state

    def _part(self, stream: Stream, name: str) -> Any:
        return getattr(self, f"{stream}_{name}")

    def _modulations(self, state: State) -> list[tuple[Tensor, ...]]:
        """Each stream's shift, scale and gate of attention, then those of the MLP."""
        return [self._part(stream, "mod")(state.vec) for stream in _STREAMS]

    def _attention(self, state: State, modulations: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Both streams' updates before the gates."""
        video, text = (
            self._project(stream, adaln_modulate(tokens, *modulation[:2]))
            for stream, tokens, modulation in zip(_STREAMS, state.streams, modulations, strict=True)
        )
        q, k, v = qk_norm_rope(
            video,
            *self._norms("img"),
            *state.rope,
            text,
            *self._norms("txt"),
            heads=self.heads,
            rope_tokens=state.n_video,
        )
        out = attention(q, k, v, kv_lengths=state.kv_lengths)
        halves = (out[:, :, : state.n_video], out[:, :, state.n_video :])
        return [
            self._part(stream, "attn_proj")(_join_heads(half))
            for stream, half in zip(_STREAMS, halves, strict=True)
        ]

    def _norms(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Weights of the query and key norms."""
        names = ("attn_q_norm", "attn_k_norm")
        q_weight, k_weight = (self._part(stream, name).weight for name in names)
        return q_weight, k_weight

    def _project(self, stream: Stream, x: Tensor) -> Tensor:
        """Project tokens to queries, keys and values side by side, [B, N, 3C]."""
        if not self.split_qkv:
            packed: Tensor = self._part(stream, "attn_qkv")(x)
            return packed
        # Joining the weights costs less than joining what they make of the tokens.
        layers = [self._part(stream, f"attn_{part}") for part in "qkv"]
        weight = torch.cat([layer.weight for layer in layers])
        return F.linear(x, weight, torch.cat([layer.bias for layer in layers]))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear layer from tokens to patches."""

    def __init__(self, hidden: int, values: int) -> None:
        """Build the layer for patches of `values` numbers."""
        super().__init__()
        self.linear = nn.Linear(hidden, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Map video tokens [B, N, C] and vec [B, C] to patches [B, N, values]."""
        # The SiLU of the released layout is applied once for the whole model, in `State.vec`.
        shift, scale = self.adaLN_modulation[1](vec).chunk(2, dim=-1)
        out: Tensor = self.linear(adaln_modulate(x, shift, scale))
        return out
