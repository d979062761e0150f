# SPDX-License-Identifier: Apache-2.0
"""Call the fused operations from a model of your own: value, gradient and tangent.

python examples/fused_ops.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disca_kernels import adaln_modulate, attention, attention_jvp, timestep_features


class Block(nn.Module):
    """A transformer block that a time modulates, in plain PyTorch but for three calls."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(64, 2 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor, lengths: Tensor) -> Tensor:
        """Map tokens x [B, N, C], times t [B] and real lengths [B] to tokens."""
        # The band limit keeps the tangent from following the fastest sinusoids of 1000 t.
        features = timestep_features(t, 64, tangent_width=0.05)
        shift, scale = self.modulation(features).chunk(2, dim=-1)
        y = adaln_modulate(x, shift, scale)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, kv_lengths=lengths)  # [B, H, N, D]
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def main() -> None:
    """Run the block forward, backward and in forward mode."""
    torch.manual_seed(0)
    block = Block(width=32, heads=2)
    x, t, lengths = torch.randn(2, 10, 32), torch.rand(2), torch.tensor([10, 7])

    block(x, t, lengths).square().mean().backward()
    print(f"gradient of the qkv weights: {block.qkv.weight.grad.norm():.4f}")

    # How the output changes with time, in one pass.
    _, slope = torch.func.jvp(lambda t: block(x, t, lengths), (t,), (torch.ones_like(t),))
    print(f"slope in time: {slope.norm():.4f}")

    # Value and tangent of the attention alone, from one kernel where there is one.
    q, k, v, q_dot = (torch.randn(2, 2, 10, 16) for _ in range(4))
    o, o_dot = attention_jvp((q, k, v), (q_dot, None, None), kv_lengths=lengths)
    print(f"attention: value {tuple(o.shape)}, tangent {o_dot.norm():.4f}")


if __name__ == "__main__":
    main()
