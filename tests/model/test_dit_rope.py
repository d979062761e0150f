# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: the closed form, the relative property, and the cache of tables."""

import math

import pytest
import torch

from disca.models.rope import rope_tables
from disca_kernels import qk_norm_rope
from tests.model.tiny import inputs, model


def _tables(grid=(3, 4, 5), dims=(2, 4, 6), theta=256.0):
    return rope_tables(grid, dims, theta, dtype=torch.float64, device=torch.device("cpu"))


def test_tables_follow_the_formula():
    cos, sin = _tables()
    assert cos.shape == sin.shape == (3 * 4 * 5, 6)
    frame, row, column = 2, 1, 3
    token = (frame * 4 + row) * 5 + column
    angles = [frame]
    angles += [row * 256 ** (-2 * i / 4) for i in range(2)]
    angles += [column * 256 ** (-2 * i / 6) for i in range(3)]
    assert cos[token].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-14)
    assert sin[token].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-14)


def test_scores_depend_on_relative_positions_only():
    """q at p and k at p + d give the same score for every p."""
    vectors = torch.randn(3 * 12, dtype=torch.float64)
    q, k, _ = qk_norm_rope(vectors.expand(1, 60, 36), None, None, *_tables(), heads=1)
    queries, keys = (part.reshape(3, 4, 5, 12) for part in (q, k))
    for d_f, d_h, d_w in [(0, 0, 1), (1, 0, 0), (1, 2, 3), (2, 1, 0)]:
        moved = keys[d_f:, d_h:, d_w:]
        f, h, w = moved.shape[:3]
        scores = (queries[:f, :h, :w] * moved).sum(-1)
        torch.testing.assert_close(scores, scores[0, 0, 0].expand_as(scores), rtol=0, atol=1e-12)
        assert (scores[0, 0, 0] - (queries[0, 0, 0] * keys[0, 0, 0]).sum()).abs() > 1e-3


def test_frames_have_a_position_and_text_has_none():
    """Exchanging text tokens changes nothing; exchanging frames changes more than their order."""
    net = model(torch.float64)
    x, t, _, cond = inputs(net.config, dtype=torch.float64)
    full = torch.full_like(cond.text_lengths, 5)
    cond = type(cond)(cond.text, full, cond.pooled)
    turned = type(cond)(cond.text.flip(1), full, cond.pooled)
    torch.testing.assert_close(net(x, t, cond=turned), net(x, t, cond=cond), rtol=0, atol=1e-12)
    swapped = net(x[:, :, [0, 2, 1]], t, cond=cond)[:, :, [0, 2, 1]]
    assert (swapped - net(x, t, cond=cond)).abs().max() > 1e-3


def test_tables_are_computed_once_and_survive_inference_mode_and_transforms():
    net = model()
    x, t, _, cond = inputs(net.config, size=(4, 2, 8))

    def rope():
        return net.embed(x, t, None, cond).rope

    torch.func.jvp(lambda x: net.img_in(x) + rope()[0].sum(), (x,), (x,))
    with torch.inference_mode():
        first = rope()
    assert all(table is again for table, again in zip(first, rope(), strict=True))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(first[0])
    net(x, t, cond=cond).sum().backward()
    assert net.img_in.proj.weight.grad.isfinite().all()
