# SPDX-License-Identifier: Apache-2.0
"""The cache predictor: published shape and names, its two forms, loading."""

import pytest
import safetensors.torch
import torch

from disca.errors import UserError
from disca.models import (
    DiT,
    DiTConfig,
    Predictor,
    hunyuan_video_1_0,
    hunyuan_video_1_5,
    load_predictor,
)
from disca.models.weights import canonical_keys, read_state_dict
from tests.model.tiny import TINY_1_5, config, inputs, model, roughen

CONFIG_1_5 = DiTConfig(**TINY_1_5)
KINDS = {
    "single": (config(), {}),
    "double": (config(), {"block": "double"}),
    "1.5": (CONFIG_1_5, {}),
}
KIND = pytest.mark.parametrize(("host_config", "options"), KINDS.values(), ids=KINDS.keys())


def _case(host_config, form, **options):
    torch.manual_seed(0)
    host = roughen(DiT(host_config))
    predictor = roughen(Predictor(host_config, form=form, **options), seed=3)
    x, t, _, cond = inputs(host_config)
    state = host.embed(x, t, None, cond)
    return host, predictor, state, host.run(state).tokens


# Published: two blocks of 141,591,808 and a fusion MLP of 28,317,696 for 1.0; for 1.5 two double
# blocks and two fusion MLPs of 2048 (arXiv 2602.05449: under 4 % of the host).
@pytest.mark.parametrize(
    ("host_config", "count", "share"),
    [
        (hunyuan_video_1_0(mean_flow=True), 311_501_312, 0.0243),
        (hunyuan_video_1_5(), 327_287_808, 0.0393),
    ],
)
def test_published_parameter_counts(host_config, count, share):
    with torch.device("meta"):
        predictor, host = Predictor(host_config), DiT(host_config)
    assert sum(parameter.numel() for parameter in predictor.parameters()) == count
    assert predictor.share(host) == pytest.approx(share, abs=5e-5)


def test_names_and_shapes_of_the_released_1_0_file():
    with torch.device("meta"):
        state = Predictor(hunyuan_video_1_0()).state_dict()
    expected = {
        "fusion_mlp.0.weight": [3072, 6144],
        "fusion_mlp.0.bias": [3072],
        "fusion_mlp.2.weight": [3072, 3072],
        "fusion_mlp.2.bias": [3072],
    }
    for i in range(2):
        expected |= {
            f"mm_single_blocks.{i}.linear1.weight": [21504, 3072],
            f"mm_single_blocks.{i}.linear1.bias": [21504],
            f"mm_single_blocks.{i}.linear2.weight": [3072, 15360],
            f"mm_single_blocks.{i}.linear2.bias": [3072],
            f"mm_single_blocks.{i}.q_norm.weight": [128],
            f"mm_single_blocks.{i}.k_norm.weight": [128],
            f"mm_single_blocks.{i}.modulation.linear.weight": [9216, 3072],
            f"mm_single_blocks.{i}.modulation.linear.bias": [9216],
        }
    assert {key: list(value.shape) for key, value in state.items()} == expected


def test_names_and_shapes_of_the_released_1_5_file():
    with torch.device("meta"):
        state = Predictor(hunyuan_video_1_5()).state_dict()
    expected = {}
    for stream in ("img", "txt"):
        expected[f"fusion_mlp_{stream}.0.weight"] = [2048, 4096]
        expected[f"fusion_mlp_{stream}.2.weight"] = [2048, 2048]
        for i in range(2):
            block = f"double_blocks.{i}.{stream}"
            expected |= {
                f"{block}_attn_{part}.weight": [2048, 2048] for part in ("q", "k", "v", "proj")
            }
            expected[f"{block}_mod.linear.weight"] = [12288, 2048]
            expected[f"{block}_mlp.fc1.weight"] = [8192, 2048]
            expected[f"{block}_mlp.fc2.weight"] = [2048, 8192]
    expected |= {key.replace("weight", "bias"): value[:1] for key, value in expected.items()}
    for stream in ("img", "txt"):
        for i in range(2):
            for part in ("q", "k"):
                expected[f"double_blocks.{i}.{stream}_attn_{part}_norm.weight"] = [128]
    assert {key: list(value.shape) for key, value in state.items()} == expected


@KIND
@pytest.mark.parametrize("form", ["paper", "residual"])
def test_output_is_tokens_and_depends_on_all_inputs(host_config, options, form):
    host, predictor, state, cache = _case(host_config, form, **options)
    out = predictor(state, cache)
    assert out.shape == state.tokens.shape
    changed = cache.clone()
    changed[:, 0, 0] += 1
    assert not torch.equal(predictor(state, changed), out)
    moved = state.with_tokens(state.tokens + 0.1)
    assert not torch.equal(predictor(moved, cache), out)
    assert predictor.velocity(host, state, cache).shape == (3, 3, 3, 4, 6)
    expected = host.head(state.with_tokens(out))
    assert torch.equal(predictor.velocity(host, state, cache), expected)


@KIND
def test_fresh_residual_form_is_reuse_to_the_bit_and_learns(host_config, options):
    host, _, state, cache = _case(host_config, "paper", **options)
    predictor = Predictor(host_config, form="residual", **options)
    assert torch.equal(predictor(state, cache), cache)
    reuse = host.head(state.with_tokens(cache))
    assert torch.equal(predictor.velocity(host, state, cache), reuse)
    predictor(state.with_tokens(state.tokens.detach()), cache.detach()).square().sum().backward()
    assert predictor.correction.weight.grad.abs().max() > 1e-3


@KIND
def test_fusion_reads_current_first_then_cache(host_config, options):
    """The first layer is the one of the joined tensor [current, cache]."""
    _, predictor, state, cache = _case(host_config, "paper", **options)
    parts = [(getattr(predictor, "fusion_mlp", None), slice(None))]
    if predictor.block == "double":
        n = state.n_video
        parts = [
            (predictor.fusion_mlp_img, slice(0, n)),
            (predictor.fusion_mlp_txt, slice(n, None)),
        ]
    joined = torch.cat((state.tokens, cache), dim=-1)
    expected = torch.cat([mlp(joined[:, rows]) for mlp, rows in parts], dim=1)
    blocks = predictor.mm_single_blocks if predictor.block == "single" else predictor.double_blocks
    fused = state.with_tokens(expected)
    for block in blocks:
        fused = block(fused)
    torch.testing.assert_close(predictor(state, cache), fused.tokens, rtol=1e-4, atol=1e-5)


def test_padded_text_in_cache_and_tokens_does_not_reach_video():
    host, predictor, state, cache = _case(config(), "residual")
    dirty = cache.clone()
    padding = torch.arange(cache.shape[1]) >= state.kv_lengths[:, None]
    dirty[padding] = 1e3
    out = predictor.velocity(host, state, dirty)
    assert torch.equal(out, predictor.velocity(host, state, cache))


def test_gradient_reaches_the_predictor_only():
    host, predictor, state, cache = _case(config(), "residual")
    host.requires_grad_(False)
    state = state.with_tokens(state.tokens.detach())
    state.vec = state.vec.detach()
    predictor.velocity(host, state, cache.detach()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
    assert all(p.grad is None for p in host.parameters())


def _split(state):
    """Rename merged weights to the split, tensor-parallel form of the released files."""
    out = {}
    for key, value in state.items():
        if ".linear1." in key:
            sizes = [24, 24, 24, value.shape[0] - 72]
            for part, piece in zip(("q", "k", "v", "mlp"), value.split(sizes), strict=True):
                out[key.replace("linear1.", f"linear1_{part}.")] = piece
        elif "_attn_qkv." in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("_attn_qkv.", f"_attn_{part}.")] = piece
        else:
            out[key.replace("linear2.", "linear2.fc.")] = value
    return out


@KIND
@pytest.mark.parametrize("form", ["paper", "residual"])
@pytest.mark.parametrize("wrap", ["plain", "prefix", "nested", "split", "split in module"])
def test_load_round_trip(host_config, options, form, wrap, tmp_path):
    _, predictor, state, cache = _case(host_config, form, **options)
    weights = predictor.state_dict()
    if wrap.startswith("split"):
        weights = _split(weights)
        assert (weights.keys() != predictor.state_dict().keys()) or host_config.split_qkv
    if wrap == "prefix":
        weights = {f"module.predictor.{key}": value for key, value in weights.items()}
    if wrap in ("nested", "split in module"):
        weights = {"module": {"predictor": weights}, "step": 3}
        path = tmp_path / "weights.pt"
        torch.save(weights, path)
    else:
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, path)
    loaded = load_predictor(path, host_config, form=form, **options)
    assert torch.equal(loaded(state, cache), predictor(state, cache))


def test_load_keeps_dtype_and_owns_its_memory():
    predictor = roughen(Predictor(config())).bfloat16()
    weights = predictor.state_dict()
    loaded = load_predictor(weights, config())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        loaded.fusion_mlp[0].bias.add_(1)
    assert not torch.equal(loaded.fusion_mlp[0].bias, weights["fusion_mlp.0.bias"])


def test_load_rejects_what_does_not_fit(tmp_path):
    weights = Predictor(config()).state_dict()
    with pytest.raises(UserError, match=r"this predictor; 2 missing: correction\.bias, correction"):
        load_predictor(weights, config(), form="residual")
    with pytest.raises(UserError, match=r"8 unexpected: mm_single_blocks\.1\.k_norm\.weight, "):
        load_predictor(weights, config(), depth=1)
    with pytest.raises(UserError, match=r"8 missing: mm_single_blocks\.2\.k_norm"):
        load_predictor(weights, config(), depth=3)
    with pytest.raises(UserError, match=r"fusion_mlp\.0\.bias \[24\] instead of \[36\]"):
        load_predictor(weights, config(hidden=36, heads=3))
    with pytest.raises(
        UserError, match=r"56 missing: double_blocks.* and 48 more; 20 unexpected: fusion_mlp"
    ):
        load_predictor(weights, config(), block="double")
    incomplete = _split(weights)
    del incomplete["mm_single_blocks.0.linear1_k.bias"]
    with pytest.raises(UserError, match=r"mm_single_blocks\.0\.linear1\.bias lacks its parts k"):
        load_predictor(incomplete, config())
    with pytest.raises(UserError, match="'step' in the weight file has type int"):
        load_predictor({**weights, "step": 3}, config())


def test_read_rejects_bad_files(tmp_path):
    with pytest.raises(UserError, match="no weight file at"):
        read_state_dict(tmp_path / "none.safetensors")
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(Predictor(config()).state_dict(), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut\.safetensors is no complete safetensors file"):
        read_state_dict(cut)
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pt cannot be read"):
        read_state_dict(text)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        read_state_dict(tmp_path / "list.pt")


def test_prefix_is_stripped_only_when_all_keys_have_it():
    value = torch.zeros(1)
    assert canonical_keys({"module.a": value, "module.b": value}).keys() == {"a", "b"}
    assert canonical_keys({"module.a": value, "b": value}).keys() == {"module.a", "b"}
    assert canonical_keys({"module.predictor.a": value}).keys() == {"a"}


def test_rejects():
    with pytest.raises(UserError, match='form must be "paper" or "residual"'):
        Predictor(config(), form="sum")
    with pytest.raises(UserError, match='block must be "single" or "double"'):
        Predictor(config(), block="triple")
    with pytest.raises(UserError, match="depth must be at least 1, got 0"):
        Predictor(config(), depth=0)
    _, predictor, state, cache = _case(config(), "paper")
    with pytest.raises(UserError, match=r"shape of the tokens \[3, 23, 24\], got \[3, 22, 24\]"):
        predictor(state, cache[:, 1:])


def test_share_of_a_deep_small_host():
    host = model(single_blocks=12)
    predictor = Predictor(host.config)
    counts = [sum(p.numel() for p in module.parameters()) for module in (predictor, host)]
    assert predictor.share(host) == counts[0] / counts[1]
