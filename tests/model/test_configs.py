# SPDX-License-Identifier: Apache-2.0
"""Configurations, and the published models on the meta device."""

import json

import pytest
import torch

from disca.errors import UserError
from disca.models import DiT, DiTConfig, hunyuan_video_1_0, hunyuan_video_1_5
from tests.model.tiny import config


def _count(settings):
    with torch.device("meta"):
        net = DiT(settings)
    return sum(parameter.numel() for parameter in net.parameters())


def _by_part(settings):
    with torch.device("meta"):
        net = DiT(settings)
    counts = {}
    for name, parameter in net.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# Counted on diffusers 0.42.1's classes on the meta device: HunyuanVideoTransformer3DModel with
# guidance_embeds on and off, HunyuanVideo15Transformer3DModel with use_meanflow off and on. Its 1.0
# has no r-embedder; the released one is a time embedder of 10,229,760 parameters more.
TIME_EMBEDDER_1_0 = 256 * 3072 + 3072 + 3072 * 3072 + 3072
PUBLISHED = [
    (hunyuan_video_1_0(), 12_821_012_544),
    (hunyuan_video_1_0(guidance_embed=False), 12_810_782_784),
    (hunyuan_video_1_0(mean_flow=True), 12_821_012_544 + TIME_EMBEDDER_1_0),
    (hunyuan_video_1_5(), 8_326_608_160),
    (hunyuan_video_1_5(mean_flow=True), 8_331_330_848),
]


@pytest.mark.parametrize(("settings", "expected"), PUBLISHED)
def test_published_parameter_counts(settings, expected):
    assert _count(settings) == expected


def test_parts_of_1_0():
    """From the layer shapes: block widths 3072, 4 x 3072; 24 heads of 128."""
    parts = _by_part(hunyuan_video_1_0(mean_flow=True))
    # One stream of a double block: modulation 6, qkv 3, projection 1, MLP 4 + 4 square matrices.
    stream = (6 + 3 + 1 + 4 + 4) * 3072**2 + (6 + 3 + 1 + 4 + 1) * 3072 + 2 * 128
    assert parts["double_blocks"] == 20 * 2 * stream
    assert parts["single_blocks"] == 40 * 141_591_808
    assert parts["time_in"] == parts["time_r_in"] == parts["guidance_in"] == TIME_EMBEDDER_1_0
    assert parts["img_in"] == 3072 * 16 * 4 + 3072


def test_parts_of_1_5():
    parts = _by_part(hunyuan_video_1_5())
    assert parts["double_blocks"] == 54 * 151_056_896
    assert parts["img_in"] == 2048 * 65 + 2048
    assert parts["byt5_in"] == 11_412_352
    assert parts["vision_in"] == 3_696_000
    assert "single_blocks" not in parts
    assert "vector_in" not in parts


# The complete list of names outside the blocks, and within one block, of the released files.
NAMES_1_0 = {
    "img_in.proj", "txt_in.input_embedder", "txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", "time_in.mlp.0", "time_in.mlp.2",
    "time_r_in.mlp.0", "time_r_in.mlp.2", "vector_in.in_layer", "vector_in.out_layer",
    "guidance_in.mlp.0", "guidance_in.mlp.2", "final_layer.linear",
    "final_layer.adaLN_modulation.1",
}  # fmt: skip
REFINER = {"norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2",
           "adaLN_modulation.1"}  # fmt: skip
SINGLE = {"linear1", "linear2", "modulation.linear", "q_norm", "k_norm"}
DOUBLE = {"mod.linear", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_proj", "mlp.fc1", "mlp.fc2"}


def _modules(settings):
    with torch.device("meta"):
        state = DiT(settings).state_dict()
    norms = {key for key in state if key.endswith(("q_norm.bias", "k_norm.bias"))}
    assert norms == set()
    return {key.rsplit(".", 1)[0] for key in state}


def test_names_of_1_0():
    names = _modules(hunyuan_video_1_0(mean_flow=True))
    refiner = "txt_in.individual_token_refiner.blocks"
    expected = NAMES_1_0 | {f"{refiner}.{i}.{name}" for i in range(2) for name in REFINER}
    expected |= {f"single_blocks.{i}.{name}" for i in range(40) for name in SINGLE}
    for stream in ("img", "txt"):
        expected |= {f"double_blocks.{i}.{stream}_{name}" for i in range(20) for name in DOUBLE}
    assert names == expected


def test_names_of_1_5():
    names = _modules(hunyuan_video_1_5())
    assert {name for name in names if name.startswith("double_blocks.53.img_attn")} == {
        f"double_blocks.53.img_attn_{part}" for part in ("q", "k", "v", "q_norm", "k_norm", "proj")
    }
    embedders = {name.split(".")[0] for name in names}
    assert embedders == {
        "img_in", "txt_in", "time_in", "double_blocks", "final_layer", "byt5_in", "vision_in",
        "cond_type_embedding",
    }  # fmt: skip
    assert {name for name in names if name.startswith(("byt5_in", "vision_in"))} == {
        "byt5_in.layernorm", "byt5_in.fc1", "byt5_in.fc2", "byt5_in.fc3",
        "vision_in.proj.0", "vision_in.proj.1", "vision_in.proj.3", "vision_in.proj.4",
    }  # fmt: skip


def test_dictionary_round_trip():
    settings = config(guidance_embed=True, time_tangent_width=0.05)
    plain = json.loads(json.dumps(settings.to_dict()))
    assert DiTConfig.from_dict(plain) == settings
    assert DiTConfig.from_dict({}) == DiTConfig()
    assert hash(DiTConfig.from_dict(plain)) == hash(settings)


ERRORS = [
    ({"hiden": 3}, "unknown model key 'hiden'; did you mean 'hidden'"),
    ({"zzz": 3}, "known keys: in_channels"),
    ({"hidden": "wide"}, "wrong type"),
    ({"patch": [2, 2]}, r"patch needs three numbers .* got \[2, 2\]"),
    ({"patch": 2}, "wrong type"),
    ({"patch": [1, 0, 2]}, r"patch must be positive, got \[1, 0, 2\]"),
    ({"hidden": 0}, "hidden must be positive, got 0"),
    ({"hidden": 100, "heads": 3}, "divisible by heads, got 100 and 3"),
    ({"rope_dims": [16, 56, 54]}, r"sum to hidden // heads = 128, got \[16, 56, 54\] with sum 126"),
    ({"rope_dims": [15, 57, 56]}, "three even numbers"),
    ({"double_blocks": 0, "single_blocks": 0}, "at least one block"),
    ({"single_blocks": -1}, "single_blocks must not be negative, got -1"),
    ({"time_features": 33}, "time_features must be even"),
    ({"time_reduction": "max"}, 'must be "sum" or "mean", got \'max\''),
    ({"time_tangent_width": -0.1}, "must not be negative"),
    ({"in_channels": 8}, "got 8 < 16"),
]


@pytest.mark.parametrize(("values", "message"), ERRORS, ids=[str(e[0]) for e in ERRORS])
def test_rejects(values, message):
    with pytest.raises(UserError, match=message):
        DiTConfig.from_dict(values)
