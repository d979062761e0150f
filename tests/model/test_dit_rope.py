# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: the closed form, the relative property, and the cache of tables."""

import math

import pytest
import torch

from disca.models.rope import normalise_and_rotate, rope_tables
from tests.model.tiny import inputs, model


def _tables(grid=(3, 4, 5), n_text=2, dims=(2, 4, 6), theta=256.0):
    cpu = torch.device("cpu")
    return rope_tables(grid, n_text, dims, theta, dtype=torch.float64, device=cpu)


def test_tables_follow_the_formula_and_are_neutral_for_text():
    cos, sin = _tables()
    assert cos.shape == sin.shape == (3 * 4 * 5 + 2, 6)
    frame, row, column = 2, 1, 3
    token = (frame * 4 + row) * 5 + column
    angles = [frame]
    angles += [row * 256 ** (-2 * i / 4) for i in range(2)]
    angles += [column * 256 ** (-2 * i / 6) for i in range(3)]
    assert cos[token].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-14)
    assert sin[token].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-14)
    assert torch.equal(cos[-2:], torch.ones(2, 6, dtype=torch.float64))
    assert not sin[-2:].any()


def test_rotation_is_interleaved_and_normalised():
    x = torch.randn(2, 62, 2, 3, 12, dtype=torch.float64)
    weight = torch.rand(2, 12, dtype=torch.float64) + 0.5
    cos, sin = _tables()
    out = normalise_and_rotate(x, weight, (cos, sin))
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[:, None]
    for pair in range(6):
        c, s = cos[:, pair, None, None], sin[:, pair, None, None]
        a, b = normal[..., 2 * pair], normal[..., 2 * pair + 1]
        torch.testing.assert_close(out[..., 2 * pair], a * c - b * s, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out[..., 2 * pair + 1], a * s + b * c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(normalise_and_rotate(x, weight, None), normal)


def test_scores_depend_on_relative_positions_only():
    """q at p and k at p + d give the same score for every p."""
    q, k = torch.randn(2, 12, dtype=torch.float64)
    ones = torch.ones(1, 12, dtype=torch.float64)
    rope = _tables(n_text=0)

    def placed(vector):
        everywhere = vector.expand(1, 60, 1, 1, 12)
        return normalise_and_rotate(everywhere, ones, rope).reshape(3, 4, 5, 12)

    queries, keys = placed(q), placed(k)
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


def test_low_precision_is_rotated_in_float32():
    x = torch.randn(1, 62, 2, 2, 12)
    weight, rope = torch.ones(2, 12), tuple(table.float() for table in _tables())
    out = normalise_and_rotate(x.bfloat16(), weight.bfloat16(), rope)
    assert out.dtype == torch.bfloat16
    exact = normalise_and_rotate(x.bfloat16().double(), weight.double(), _tables())
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


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
