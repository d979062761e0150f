# SPDX-License-Identifier: Apache-2.0
"""The forward-mode pass over whole modules: agreement, gradients, memory, structures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from disca_kernels import adaln_modulate, attention, dual, timestep_features


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
