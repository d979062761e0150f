# SPDX-License-Identifier: Apache-2.0
"""The discriminator: logits on the grid, spectral norm, and where gradients go."""

import pytest
import torch

from disca.errors import UserError
from disca.models import Discriminator, DiT, DiTConfig
from disca.models.discriminator import frozen
from tests.model.tiny import TINY_1_5, config, inputs, roughen


def _case(settings=None, **options):
    settings = settings or config(mean_flow=True, single_blocks=6)
    torch.manual_seed(0)
    host = roughen(DiT(settings))
    return host, Discriminator(settings, **options), *inputs(settings)


@pytest.mark.parametrize("kernel", ["space_time", "time"])
@pytest.mark.parametrize("settings", [None, DiTConfig(**TINY_1_5)], ids=["1.0", "1.5"])
def test_one_logit_map_per_tap(settings, kernel):
    host, judge, x, t, _, cond = _case(settings, kernel=kernel, width=16)
    r = t if host.config.mean_flow else None
    logits = judge(host, x, t, r, cond)
    p_f, p_h, p_w = host.config.patch
    assert [list(part.shape) for part in logits] == [
        [3, 1, 3 // p_f, 4 // p_h, 6 // p_w] for _ in judge.taps
    ]
    assert all(part.isfinite().all() and part.std() > 0 for part in logits)


def test_default_taps_are_quarters_of_the_depth():
    assert Discriminator(config(single_blocks=6)).taps == (2, 4, 6, 8)
    assert Discriminator(config(double_blocks=0, single_blocks=2)).taps == (1, 2)
    with torch.device("meta"):
        assert Discriminator(DiTConfig(), width=8).taps == (15, 30, 45, 60)


def test_each_head_sees_the_features_of_its_block():
    """Disturbing block k changes the logits from the tap behind it on, and none before."""
    host, judge, x, t, _, cond = _case(width=16)
    judge.eval()
    before = judge(host, x, t, t, cond)
    with torch.no_grad():
        host.single_blocks[3].linear2.weight.mul_(-2)  # the sixth block
    after = judge(host, x, t, t, cond)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, False]


def test_gradient_reaches_the_latent_and_the_heads_but_not_the_host():
    host, judge, x, t, _, cond = _case(width=16)
    x.requires_grad_()
    sum(part.sum() for part in judge(host, x, t, t, cond)).backward()
    assert x.grad.abs().max() > 1e-4
    assert all(p.grad is not None for p in judge.parameters())
    assert all(p.grad is None and p.requires_grad for p in host.parameters())


def test_frozen_restores_the_flags_after_an_error():
    host, *_ = _case(width=16)
    host.img_in.requires_grad_(False)
    inside = []

    def fail():
        with frozen(host):
            inside.extend(p.requires_grad for p in host.parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert inside
    assert not any(inside)
    assert not any(p.requires_grad for p in host.img_in.parameters())
    assert all(p.requires_grad for p in host.single_blocks.parameters())


def test_convolutions_have_spectral_norm_one():
    _, judge, *_ = _case(width=16)
    with torch.no_grad():
        for head in judge.heads:
            for layer in (head.enter, head.mix, head.leave):
                layer.parametrizations.weight.original.mul_(50)
                for _ in range(60):
                    weight = layer.weight
                assert torch.linalg.matrix_norm(weight.flatten(1), 2) == pytest.approx(1, rel=2e-2)


def test_logits_do_not_depend_on_the_scale_of_features():
    """A residual stream grows with depth; the heads must not drown in it."""
    settings = config(mean_flow=True, double_blocks=0, single_blocks=1)
    host, judge, x, t, _, cond = _case(settings, taps=[1], width=16)
    judge.eval()

    class Louder:
        def __init__(self, host):
            self.embed, self.parameters, self.host = host.embed, host.parameters, host

        def run(self, state, start, stop):
            state = self.host.run(state, start, stop)
            return state.with_tokens(100 * state.tokens)

    quiet, loud = judge(host, x, t, t, cond)[0], judge(Louder(host), x, t, t, cond)[0]
    torch.testing.assert_close(loud, quiet, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("taps", [[], [0, 2], [2, 2], [3, 1], [1, 9]])
def test_rejects_taps(taps):
    with pytest.raises(UserError, match=r"increasing block numbers in 1 \.\. 8"):
        Discriminator(config(single_blocks=6), taps=taps)


def test_rejects_kernel():
    with pytest.raises(UserError, match='kernel must be "space_time" or "time", got \'space\''):
        Discriminator(config(), kernel="space")
