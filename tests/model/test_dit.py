# SPDX-License-Identifier: Apache-2.0
"""The DiT as a function: shapes, exact equalities, what must not matter, and errors."""

from dataclasses import replace

import pytest
import torch

from disca.errors import UserError
from disca.models import Block, Condition, DiT, DiTConfig, Host, load_dit
from tests.model.tiny import TINY, TINY_1_5, config, inputs, model, roughen

LAYOUTS = {
    "double and single": {},
    "single only": {"double_blocks": 0},
    "refiner": {"text_refiner_depth": 2},
    "no pooled": {"pooled_dim": None},
    "guidance": {"guidance_embed": True},
    "mean flow": {"mean_flow": True},
    "1.5": TINY_1_5,
    "frames in a patch": {"patch": (3, 1, 2)},
    "uneven rope": {"rope_dims": (0, 2, 10)},
}

TEXT = ["linear", "refiner", "1.5"]


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_output_has_the_shape_of_the_latent(changes, batch):
    net = model(**changes)
    x, t, r, cond = inputs(net.config, batch=batch)
    out = net(x, t, r if net.config.mean_flow else None, cond)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert out.std() > 1e-3


def test_fresh_model_starts_with_identity_blocks_and_zero_velocity():
    net = DiT(config(guidance_embed=True))
    x, t, _, cond = inputs(net.config)
    state = net.embed(x, t, None, cond)
    assert torch.equal(net.run(state).tokens, state.tokens)
    assert torch.equal(net(x, t, cond=cond), torch.zeros_like(x))


def test_initialisation_scales_fused_parts_one_by_one():
    net = DiT(config(hidden=96, rope_dims=(16, 16, 16), in_channels=5, text_dim=64))
    block = net.single_blocks[0]
    for part in block.linear1.weight[:288].chunk(3):
        assert part.detach().std() == pytest.approx((2 / 192) ** 0.5, rel=0.05)
    assert block.linear1.weight[288:].detach().std() == pytest.approx((2 / 288) ** 0.5, rel=0.05)
    patches = net.img_in.proj.weight.detach()
    assert patches[:, :3].std() == pytest.approx((2 / (12 + 96)) ** 0.5, rel=0.1)
    assert not patches[:, 3:].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("refiner", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_at_r_equal_t_is_the_teacher_to_the_bit(reduction, refiner, dtype):
    teacher = model(dtype, time_reduction=reduction, text_refiner_depth=refiner).eval()
    student = DiT.from_teacher(teacher, mean_flow=True)
    x, t, r, cond = inputs(teacher.config, dtype=dtype)
    expected = teacher(x, t, cond=cond)
    assert torch.equal(student(x, t, t, cond), expected)
    assert not student.training
    if reduction == "sum":
        assert torch.equal(student(x, t, r, cond), expected)
    else:
        assert not torch.equal(student(x, t, r, cond), expected)


def test_r_matters_once_its_embedder_is_trained():
    net = model(mean_flow=True)
    x, t, r, cond = inputs(net.config)
    assert (net(x, t, r, cond) - net(x, t, t, cond)).abs().max() > 1e-4


def test_guided_student_is_the_teacher_at_every_guidance():
    teacher = model()
    student = DiT.from_teacher(teacher, guidance_embed=True, mean_flow=True)
    x, t, _, cond = inputs(teacher.config)
    expected = teacher(x, t, cond=cond)
    for guidance in (1.0, 4.5, 8.0):
        assert torch.equal(student(x, t, t, cond.with_guidance(guidance)), expected)


def test_student_owns_its_weights_and_keeps_trained_embedders():
    teacher = model(guidance_embed=True, mean_flow=True)
    student = DiT.from_teacher(teacher)
    x, t, r, cond = inputs(teacher.config)
    expected = teacher(x, t, r, cond)
    assert torch.equal(student(x, t, r, cond), expected)
    with torch.no_grad():
        student.final_layer.linear.weight.add_(1)
    assert torch.equal(teacher(x, t, r, cond), expected)


def test_student_cannot_drop_an_embedder():
    with pytest.raises(UserError, match="teacher has mean_flow"):
        DiT.from_teacher(model(mean_flow=True), mean_flow=False)


@pytest.mark.parametrize("changes", [{}, {"text_refiner_depth": 2}, TINY_1_5], ids=TEXT)
@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_padded_text_never_reaches_the_output(changes, garbage):
    net = model(**changes)
    x, t, _, cond = inputs(net.config)
    padding = torch.arange(cond.text.shape[1]) >= cond.text_lengths[:, None]
    dirty = replace(cond, text=cond.text.masked_fill(padding[..., None], garbage))
    if cond.glyph is not None:
        padding = torch.arange(cond.glyph.shape[1]) >= cond.glyph_lengths[:, None]
        dirty = replace(dirty, glyph=cond.glyph.masked_fill(padding[..., None], garbage))
    assert torch.equal(net(x, t, cond=dirty), net(x, t, cond=cond))
    # A real token does reach it.
    real = cond.text.clone()
    real[0, 0] += 1
    assert not torch.equal(net(x, t, cond=replace(cond, text=real))[0], net(x, t, cond=cond)[0])


@pytest.mark.parametrize("changes", [{}, {"text_refiner_depth": 2}, TINY_1_5], ids=TEXT)
def test_rows_and_padding_length_are_independent(changes):
    """A row alone, with its padding cut off, gives what it gives within a padded batch."""
    net = model(torch.float64, **changes)
    x, t, _, cond = inputs(net.config, dtype=torch.float64)
    together = net(x, t, cond=cond)
    for row in range(3):
        index = slice(row, row + 1)
        alone = cond.select(index)
        alone = replace(alone, text=alone.text[:, : max(1, int(alone.text_lengths[0]))])
        out = net(x[index], t[index], cond=alone)
        torch.testing.assert_close(out, together[index], rtol=0, atol=1e-12)


def test_prompt_without_tokens_is_finite():
    for changes in ({}, {"text_refiner_depth": 1}):
        net = model(**changes)
        x, t, _, cond = inputs(net.config)
        empty = replace(cond, text_lengths=torch.zeros(3, dtype=torch.long))
        assert net(x, t, cond=empty).isfinite().all()


def test_image_tokens_come_first_and_padding_last():
    net = model(**TINY_1_5)
    x, t, _, cond = inputs(net.config)
    state = net.embed(x, t, None, cond)
    real = cond.text_lengths + cond.glyph_lengths + 2
    assert torch.equal(state.kv_lengths, real + state.n_video)
    assert state.text.shape[1] == 5 + 4 + 2
    image = net.vision_in(cond.image) + net.cond_type_embedding.weight[2]
    torch.testing.assert_close(state.text[:, :2], image)
    without = net.embed(x, t, None, replace(cond, image=None))
    assert torch.equal(without.kv_lengths, real - 2 + state.n_video)


def test_noncontiguous_inputs():
    net = model(mean_flow=True)
    x, t, r, cond = inputs(net.config)
    wide = torch.zeros(3, 6, 3, 4, 12)
    wide[:, ::2, :, :, ::2] = x
    sliced = wide[:, ::2, :, :, ::2]
    times = torch.stack((t, r), dim=1)
    text = torch.zeros(3, 5, 14)
    text[..., ::2] = cond.text
    view = replace(cond, text=text[..., ::2])
    assert not sliced.is_contiguous()
    expected = net(x, t, r, cond)
    assert torch.equal(net(sliced, times[:, 0], times[:, 1], view), expected)


@pytest.mark.parametrize("changes", [{}, TINY_1_5], ids=["1.0", "1.5"])
def test_model_is_a_host_and_runs_in_pieces(changes):
    net = model(**changes)
    assert isinstance(net, Host)
    x, t, _, cond = inputs(net.config)
    whole = net(x, t, cond=cond)
    state = net.embed(x, t, None, cond)
    for index in range(len(net.blocks)):
        state = net.run(state, index, index + 1)
    assert torch.equal(net.head(state), whole)


@pytest.mark.parametrize("changes", [{}, TINY_1_5], ids=["1.0", "1.5"])
def test_blocks_are_their_sublayers(changes):
    net = model(torch.float64, **changes)
    x, t, _, cond = inputs(net.config, dtype=torch.float64)
    state = net.embed(x, t, None, cond)
    for block in net.blocks:
        assert isinstance(block, Block)
        whole = block(state)
        if block in net.single_blocks:
            built = block.combine(state, attention=block.attention(state), mlp=block.mlp(state))
        else:
            middle = block.combine(state, attention=block.attention(state))
            built = block.combine(middle, mlp=block.mlp(middle))
        torch.testing.assert_close(built.tokens, whole.tokens, rtol=0, atol=1e-12)
        assert (whole.tokens - state.tokens).abs().max() > 1e-3
        state = whole


def test_split_and_fused_projections_agree():
    """The layouts of 1.0 and 1.5 differ in names only; a fused model reads split names."""
    split = model(split_qkv=True)
    fused = load_dit(split.state_dict(), config())
    assert "double_blocks.0.img_attn_qkv.weight" in fused.state_dict()
    x, t, _, cond = inputs(split.config)
    torch.testing.assert_close(fused(x, t, cond=cond), split(x, t, cond=cond))


def test_load_dit_round_trip_is_exact(tmp_path):
    net = model(torch.bfloat16, **TINY_1_5)
    torch.save(
        {"module": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pt"
    )
    loaded = load_dit(tmp_path / "a.pt", DiTConfig(**TINY_1_5))
    assert loaded.state_dict().keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert loaded.state_dict()[key].dtype == torch.bfloat16
    state = net.state_dict()
    del state["time_in.mlp.0.bias"]
    with pytest.raises(UserError, match=r"1 missing: time_in\.mlp\.0\.bias"):
        load_dit(state, DiTConfig(**TINY_1_5))


def _changed(**fields):
    return lambda cond: replace(cond, **fields)


ERRORS = [
    ("channels", {}, {"x": torch.zeros(3, 2, 3, 4, 6)}, r"C = 3 .*got shape \[3, 2, 3, 4, 6\]"),
    ("dimensions", {}, {"x": torch.zeros(3, 3, 4, 6)}, r"\[B, C, F, H, W\]"),
    ("patch", {}, {"x": torch.zeros(3, 3, 3, 4, 5)}, r"multiples of the patch \[1, 2, 2\], got"),
    ("empty", {}, {"x": torch.zeros(3, 3, 0, 4, 6)}, r"positive multiples"),
    ("missing r", {"mean_flow": True}, {"r": None}, r"needs r; pass r = t"),
    ("needless r", {}, {"r": torch.zeros(3)}, r"no r-embedder"),
    (
        "r after t",
        {"mean_flow": True},
        {"r": torch.tensor([0.1, 0.75, 0.1])},
        r"r = 0\.75 in row 1",
    ),
    ("integer t", {}, {"t": torch.zeros(3, dtype=torch.long)}, r"t must be a floating-point"),
    ("scalar t", {}, {"t": torch.tensor(0.5)}, r"shape \[3\]"),
    ("guidance missing", {"guidance_embed": True}, {"cond": _changed(guidance=None)}, "guidance"),
    ("needless guidance", {}, {"cond": _changed(guidance=torch.ones(3))}, "no embedder for it"),
    ("pooled missing", {}, {"cond": _changed(pooled=None)}, r"cond\.pooled"),
    ("pooled width", {}, {"cond": _changed(pooled=torch.ones(3, 4))}, r"\[3, 5\], got \[3, 4\]"),
    (
        "text width",
        {},
        {"cond": _changed(text=torch.ones(3, 5, 8))},
        r"\[3, L, 7\], got \[3, 5, 8\]",
    ),
    (
        "long",
        {},
        {"cond": _changed(text_lengths=torch.tensor([1, 6, 2]))},
        r"\[0, 5\], got \[1, 6, 2\]",
    ),
    ("negative", {}, {"cond": _changed(text_lengths=torch.tensor([1, -1, 2]))}, r"lie in \[0, 5\]"),
    ("float lengths", {}, {"cond": _changed(text_lengths=torch.ones(3))}, "must be integers"),
    ("no glyph", TINY_1_5, {"cond": _changed(glyph=None)}, r"glyph_dim is set"),
    ("glyph lengths", TINY_1_5, {"cond": _changed(glyph_lengths=None)}, "glyph_lengths"),
    ("needless image", {}, {"cond": _changed(image=torch.ones(3, 2, 8))}, "image_dim is not set"),
    ("image width", TINY_1_5, {"cond": _changed(image=torch.ones(3, 2, 9))}, r"\[3, L, 8\]"),
    ("no latents", TINY_1_5, {"cond": _changed(latents=None)}, r"C = 7 .*conditioning"),
    ("no condition", {}, {"cond": lambda cond: None}, "a condition is needed"),
]


@pytest.mark.parametrize(
    ("changes", "bad", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_rejects(changes, bad, message):
    net = DiT(DiTConfig(**{**TINY, **changes}))
    x, t, r, cond = inputs(net.config)
    call = {"x": x, "t": t, "r": r if net.config.mean_flow else None, "cond": cond}
    for name, value in bad.items():
        call[name] = value(cond) if name == "cond" else value
    with pytest.raises(UserError, match=message):
        net(**call)


def test_gradient_reaches_every_weight_that_the_output_depends_on():
    net = model(mean_flow=True, guidance_embed=True, text_refiner_depth=1)
    x, t, r, cond = inputs(net.config)
    net(x, t, r, cond).square().sum().backward()
    lacking = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    # A softmax row does not change when the same number is added to all of its scores.
    assert {name for name in lacking if not name.endswith("k_norm.weight")} == set()


def test_condition_moves_selects_and_joins():
    settings = config(guidance_embed=True)
    *_, cond = inputs(settings)
    assert cond.batch == 3
    half = cond.to(dtype=torch.bfloat16)
    assert half.text.dtype == half.guidance.dtype == torch.bfloat16
    assert half.text_lengths.dtype == torch.int64
    assert cond.select(torch.tensor([2, 0])).guidance.tolist() == [6.0, 1.0]
    longer = inputs(settings, text=8, seed=2)[3]
    both = Condition.cat([cond, longer])
    assert both.text.shape == (6, 8, 7)
    assert torch.equal(both.text[:3, :5], cond.text)
    assert not both.text[:3, 5:].any()
    net = roughen(DiT(settings))
    x, t, _, _ = inputs(settings)
    out = net(torch.cat((x, x)), torch.cat((t, t)), cond=both)
    torch.testing.assert_close(out[:3], net(x, t, cond=cond))


def test_condition_errors():
    *_, cond = inputs(config())
    with pytest.raises(UserError, match="at least one"):
        Condition.cat([])
    with pytest.raises(UserError, match=r"\['pooled'\] are in some only"):
        Condition.cat([cond, replace(cond, pooled=None)])
    with pytest.raises(UserError, match=r"tensor of shape \[3\], got shape \[2\]"):
        cond.with_guidance(torch.ones(2))
    assert cond.with_guidance(2.0).guidance.tolist() == [2.0, 2.0, 2.0]
    assert cond.with_guidance(2.0).with_guidance(None).guidance is None
