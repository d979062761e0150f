# SPDX-License-Identifier: Apache-2.0
"""The forward-mode pass over whole modules: agreement, gradients, memory, structures."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from disca_kernels import adaln_modulate, attention, dual, timestep_features
from tests.dual_cases import live_saved


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-right, left), -1).flatten(-2) * sin


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, e: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s1, c1, g1, s2, c2, g2 = self.modulation(F.silu(e)).chunk(6, -1)
        qkv = self.qkv(adaln_modulate(x, s1, c1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        x = x + g1[:, None] * self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2[:, None] * self.mlp(self.norm(x) * (1 + c2[:, None]) + s2.unsqueeze(1))


class SmallDiT(nn.Module):
    """The pieces of a video DiT in the smallest form."""

    def __init__(self, width: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Conv3d(3, width, (1, 2, 2), stride=(1, 2, 2))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 12)
        angles = torch.rand(8, width // heads)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.time(timestep_features(t, self.width).to(x.dtype))
        y = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = block(y, e, self.cos, self.sin)
        return self.head(y)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(),
            nn.Linear(16, 5, bias=False), nn.Softplus(),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x.flatten(1)[:, :6]) * t[:, None] ** 2


def example(kind: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    module = {"mlp": MLP, "dit": SmallDiT}[kind]().to(dtype)
    primals = torch.randn(2, 3, 2, 4, 4, dtype=dtype), torch.rand(2, dtype=dtype)
    tangents = torch.randn(2, 3, 2, 4, 4, dtype=dtype), torch.ones(2, dtype=dtype)
    return module, primals, tangents


def func_jvp(func, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(func, primals, tangents)


@pytest.mark.parametrize("kind", ["mlp", "dit"])
class TestModules:
    def test_agrees_with_func_jvp(self, kind):
        module, primals, tangents = example(kind)
        out, out_dot = dual.jvp(module, primals, tangents)
        expected, expected_dot = func_jvp(module, primals, tangents)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out_dot, expected_dot.detach(), rtol=1e-10, atol=1e-10)

    def test_agrees_with_central_differences(self, kind):
        module, (x, t), (x_dot, t_dot) = example(kind)
        _, out_dot = dual.jvp(module, (x, t), (x_dot, t_dot))
        h = 1e-6
        with torch.no_grad():
            ahead = module(x + h * x_dot, t + h * t_dot)
            behind = module(x - h * x_dot, t - h * t_dot)
        torch.testing.assert_close(out_dot, (ahead - behind) / (2 * h), rtol=2e-6, atol=2e-6)

    def test_gradient_is_that_of_the_plain_forward(self, kind):
        module, primals, tangents = example(kind)
        out, out_dot = dual.jvp(module, primals, tangents)
        assert out.requires_grad
        assert not out_dot.requires_grad
        assert out_dot.grad_fn is None
        plain = module(*primals)
        parameters = list(module.parameters())
        got = torch.autograd.grad(out.square().sum(), parameters)
        expected = torch.autograd.grad(plain.square().sum(), parameters)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_keeps_for_backward_what_the_plain_forward_keeps(self, kind):
        module, primals, tangents = example(kind)
        _, plain = live_saved(lambda: module(*primals))
        result, kept = live_saved(lambda: dual.jvp(module, primals, tangents))
        _, through_func = live_saved(lambda: func_jvp(module, primals, tangents))
        assert result[0].requires_grad
        assert kept == plain
        assert sum(through_func) > 1.3 * sum(plain)

    def test_without_gradients_keeps_nothing(self, kind):
        module, primals, tangents = example(kind)
        with torch.no_grad():
            (out, out_dot), kept = live_saved(lambda: dual.jvp(module, primals, tangents))
        assert not kept
        assert not out.requires_grad
        torch.testing.assert_close(out_dot, dual.jvp(module, primals, tangents)[1])

    def test_absent_tangents_are_zero(self, kind):
        module, (x, t), (x_dot, t_dot) = example(kind)
        for dots in ((x_dot, None), (None, t_dot)):
            full = [
                torch.zeros_like(p) if d is None else d for p, d in zip((x, t), dots, strict=True)
            ]
            _, got = dual.jvp(module, (x, t), dots)
            _, expected = func_jvp(module, (x, t), tuple(full))
            torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-10)
        out, out_dot = dual.jvp(module, (x, t), (None, None))
        assert torch.equal(out, module(x, t))
        assert torch.equal(out_dot, torch.zeros_like(out))

    def test_checkpointed(self, kind):
        module, primals, tangents = example(kind)
        parameters = list(module.parameters())

        def recomputed(x: Tensor, t: Tensor) -> Tensor:
            return checkpoint(module, x, t, use_reentrant=False)

        out, out_dot = dual.jvp(module, primals, tangents)
        (again, again_dot), kept = live_saved(lambda: dual.jvp(recomputed, primals, tangents))
        torch.testing.assert_close((again, again_dot), (out, out_dot))
        _, plain = live_saved(lambda: recomputed(*primals))
        assert kept == plain
        expected = torch.autograd.grad(out.square().sum(), parameters)
        torch.testing.assert_close(torch.autograd.grad(again.square().sum(), parameters), expected)

    def test_hooks(self, kind):
        module, primals, tangents = example(kind)
        seen = []
        for child in module.modules():
            child.register_forward_hook(lambda m, args, out: seen.append(type(out)) or out * 1)
            child.register_forward_pre_hook(lambda m, args: None)
        out, out_dot = dual.jvp(module, primals, tangents)
        expected, expected_dot = func_jvp(module, primals, tangents)
        assert dual.DualTensor in seen
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(out_dot, expected_dot.detach())

    def test_full_backward_hook(self, kind):
        module, primals, tangents = example(kind)
        calls = []
        module.register_full_backward_hook(lambda m, dx, dy: calls.append(dy[0].shape))
        out, out_dot = dual.jvp(module, primals, tangents)
        torch.testing.assert_close(out_dot, func_jvp(module, primals, tangents)[1].detach())
        out.sum().backward()
        assert calls == [out.shape]


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_autocast(kind):
    module, primals, tangents = example(kind, torch.float32)
    exact_dot = dual.jvp(module, primals, tangents)[1]
    with torch.autocast("cpu", torch.bfloat16):
        plain = module(*primals)
        out, out_dot = dual.jvp(module, primals, tangents)
    assert out.dtype == out_dot.dtype == plain.dtype
    torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)
    assert relative(out_dot, exact_dot) < 3e-2
    parameters = list(module.parameters())
    got = torch.autograd.grad(out.float().square().sum(), parameters)
    expected = torch.autograd.grad(plain.float().square().sum(), parameters)
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < 3e-2


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_bfloat16(kind):
    module, primals, tangents = example(kind)
    low = [tuple(x.bfloat16() for x in group) for group in (primals, tangents)]
    out, out_dot = dual.jvp(module.bfloat16(), *low)
    # The same rounded inputs and weights, with nothing rounded on the way.
    exact = dual.jvp(module.double(), *[tuple(x.double() for x in group) for group in low])[1]
    assert out.dtype == out_dot.dtype == torch.bfloat16
    assert relative(out_dot, exact) < 0.03


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm().clamp_min(1e-12))


@dataclasses.dataclass(frozen=True)
class State:
    tokens: Tensor
    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tensor):
            raise TypeError("tokens must be a tensor")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class TestStructures:
    X, X_DOT = torch.randn(3, 4), torch.randn(3, 4)

    def test_outputs(self):
        def func(x):
            index = x.argmax(-1)
            return {"a": (x.sin(), [x * 2]), "b": Pair(x.exp(), index), "c": State(x.cos(), 3)}

        out, out_dot = dual.jvp(func, (self.X,), (self.X_DOT,))
        assert isinstance(out["b"], Pair)
        assert isinstance(out_dot["c"], State)
        assert out["c"].count == 3
        assert torch.equal(out["c"].tokens, self.X.cos())
        assert type(out["c"].tokens) is Tensor
        assert torch.equal(out["b"].second, self.X.argmax(-1))
        assert out_dot["b"].second is None
        torch.testing.assert_close(out_dot["a"][0], self.X.cos() * self.X_DOT)
        torch.testing.assert_close(out_dot["a"][1][0], 2 * self.X_DOT)
        torch.testing.assert_close(out_dot["c"].tokens, -self.X.sin() * self.X_DOT)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x: State(x, 3),
            lambda x: [x],
            lambda x: {"x": x},
            lambda x: Pair(x, x),
            lambda x: (x, None),
        ],
    )
    def test_inputs(self, wrap):
        def value(tree):
            if isinstance(tree, State):
                return tree.tokens
            return tree["x"] if isinstance(tree, dict) else tree[0]

        primal, tangent = wrap(self.X), wrap(self.X_DOT)
        if isinstance(primal, State):
            tangent = dual_state(self.X_DOT)
        _, out_dot = dual.jvp(lambda tree: value(tree).sin(), (primal,), (tangent,))
        torch.testing.assert_close(out_dot, self.X.cos() * self.X_DOT)
        assert torch.equal(value(primal), self.X)

    def test_output_that_is_an_input(self):
        x = self.X.clone().requires_grad_()
        out, out_dot = dual.jvp(lambda x: x, (x,), (self.X_DOT,))
        assert out is x
        assert torch.equal(out_dot, self.X_DOT)

    def test_constant_output(self):
        out, out_dot = dual.jvp(lambda x: torch.ones(2), (self.X,), (self.X_DOT,))
        assert torch.equal(out, torch.ones(2))
        assert torch.equal(out_dot, torch.zeros(2))

    def test_tangent_is_never_tracked(self):
        x_dot = self.X_DOT.clone().requires_grad_()
        assert not dual.jvp(torch.sin, (self.X,), (x_dot,))[1].requires_grad

    def test_gradient_reaches_the_primals(self):
        x = self.X.clone().requires_grad_()
        out, _ = dual.jvp(lambda x: (x * x).sin(), (x,), (self.X_DOT,))
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, 2 * self.X * (self.X * self.X).cos())


def dual_state(tokens: Tensor) -> State:
    state = State(tokens, 3)
    object.__setattr__(state, "count", None)
    return state


class TestOtherCode:
    X, X_DOT = torch.randn(3, 4).double(), torch.randn(3, 4).double()

    def check(self, func):
        out, out_dot = dual.jvp(func, (self.X,), (self.X_DOT,))
        expected, expected_dot = func_jvp(func, (self.X,), (self.X_DOT,))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(out_dot, expected_dot.detach())

    @pytest.mark.parametrize(
        "func",
        [
            lambda x: einops.rearrange(x, "a (b c) -> b a c", b=2),
            lambda x: einops.repeat(x, "a b -> a b c", c=2) * 2,
            lambda x: einops.reduce(x, "a b -> a", "mean"),
            lambda x: einops.einsum(x, x, "a b, c b -> a c"),
        ],
    )
    def test_einops(self, func):
        self.check(func)

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_multi_head_attention(self, need_weights):
        module = nn.MultiheadAttention(4, 2, batch_first=True).double()
        self.check(lambda x: module(x[None], x[None], x[None], need_weights=need_weights)[0])

    def test_transformer_layer(self):
        self.check(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double())

    def test_shared_parameters(self):
        layer = nn.Linear(4, 4).double()
        self.check(nn.Sequential(layer, nn.SiLU(), layer, nn.Tanh(), layer))

    @pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout, F.feature_alpha_dropout])
    def test_dropout_uses_one_mask(self, drop):
        x = self.X.abs() + 1
        torch.manual_seed(3)
        plain = drop(x, 0.5, True)
        after = torch.rand(1)
        torch.manual_seed(3)
        out, out_dot = dual.jvp(lambda x: drop(x, 0.5, True), (x,), (self.X_DOT,))
        assert torch.equal(out, plain)
        assert torch.equal(torch.rand(1), after)
        torch.manual_seed(3)
        ahead = drop(x + 1e-6 * self.X_DOT, 0.5, True)
        torch.testing.assert_close(out_dot, (ahead - plain) / 1e-6, rtol=1e-5, atol=1e-5)

    def test_batch_norm_updates_its_statistics_once(self):
        module, twin = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double()
        out, out_dot = dual.jvp(module, (self.X,), (self.X_DOT,))
        torch.testing.assert_close(out, twin(self.X))
        torch.testing.assert_close(module.state_dict(), twin.state_dict())
        frozen = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)
        torch.testing.assert_close(
            out_dot, torch.func.jvp(frozen, (self.X,), (self.X_DOT,))[1].detach()
        )

    def test_dataclass_through_a_checkpoint(self):
        weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

        def block(state: State) -> State:
            return State((state.tokens @ weight).tanh(), state.count)

        def func(x: Tensor) -> Tensor:
            state = State(x * 2, 1)
            for _ in range(2):
                state = checkpoint(block, state, use_reentrant=False)
            return state.tokens

        out, out_dot = dual.jvp(func, (self.X,), (self.X_DOT,))
        plain = ((2 * self.X @ weight).tanh() @ weight).tanh()
        torch.testing.assert_close(out, plain)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), weight), torch.autograd.grad(plain.sum(), weight)
        )
        assert not out_dot.requires_grad
