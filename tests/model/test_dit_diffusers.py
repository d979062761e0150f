# SPDX-License-Identifier: Apache-2.0
"""The DiT against diffusers' two HunyuanVideo classes, weights carried over by name.

diffusers is an optional extra; without it this file is skipped.
"""

import re

import pytest
import torch

from disca.models import Condition, DiTConfig, load_dit

diffusers = pytest.importorskip("diffusers")

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "rope_axes_dim": (4, 4, 4),
    "num_refiner_layers": 2,
}
OURS = {"hidden": 24, "heads": 2, "rope_dims": (4, 4, 4), "text_dim": 16, "text_refiner_depth": 2}

# diffusers' name -> ours, tried in order; the projections of fused layers become the split form.
RENAMED = [
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder_2\.norm\.", "byt5_in.layernorm."),
    (r"^context_embedder_2\.linear_(\d)\.", r"byt5_in.fc\1."),
    (r"^image_embedder\.norm_in\.", "vision_in.proj.0."),
    (r"^image_embedder\.linear_1\.", "vision_in.proj.1."),
    (r"^image_embedder\.linear_2\.", "vision_in.proj.3."),
    (r"^image_embedder\.norm_out\.", "vision_in.proj.4."),
    (r"^cond_type_embed\.", "cond_type_embedding."),
    (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.", "txt_in.t_embedder."),
    (
        r"^context_embedder\.token_refiner\.refiner_blocks\.",
        "txt_in.individual_token_refiner.blocks.",
    ),
    (r"(txt_in.*)\.attn\.to_([qkv])\.", r"\1.self_attn_\2."),
    (r"(txt_in.*)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
    (r"(txt_in.*)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
    (r"(txt_in.*)\.ff\.", r"\1.mlp."),
    (r"^(?:time_text_embed|time_embed)\.timestep_embedder\.", "time_in."),
    (r"^time_embed\.timestep_embedder_r\.", "time_r_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
    (r"((?:time_in|time_r_in|guidance_in|t_embedder)\.)linear_1\.", r"\1mlp.0."),
    (r"((?:time_in|time_r_in|guidance_in|t_embedder)\.)linear_2\.", r"\1mlp.2."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"(single_blocks\.\d+)\.attn\.to_([qkv])\.", r"\1.linear1_\2."),
    (r"(single_blocks\.\d+)\.attn\.norm_([qk])\.", r"\1.\2_norm."),
    (r"(single_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.linear."),
    (r"(single_blocks\.\d+)\.proj_mlp\.", r"\1.linear1_mlp."),
    (r"(single_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    (r"\.norm1\.linear\.", ".img_mod.linear."),
    (r"\.norm1_context\.linear\.", ".txt_mod.linear."),
    (r"\.attn\.to_([qkv])\.", r".img_attn_\1."),
    (r"\.attn\.add_([qkv])_proj\.", r".txt_attn_\1."),
    (r"\.attn\.norm_added_([qk])\.", r".txt_attn_\1_norm."),
    (r"\.attn\.norm_([qk])\.", r".img_attn_\1_norm."),
    (r"\.attn\.to_out\.0\.", ".img_attn_proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn_proj."),
    (r"\.ff_context\.", ".txt_mlp."),
    (r"\.ff\.", ".img_mlp."),
    (r"\.net\.0\.proj\.", ".fc1."),
    (r"\.net\.2\.", ".fc2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
]


def _renamed(state):
    out, refiner = {}, {}
    for old, value in state.items():
        new = old
        for pattern, replacement in RENAMED:
            new = re.sub(pattern, replacement, new)
        if new.startswith("final_layer.adaLN"):
            value = torch.cat(value.chunk(2)[::-1])  # there scale comes before shift
        match = re.match(r"(.*self_attn)_([qkv])\.(.*)", new)
        if match:
            refiner.setdefault(f"{match[1]}_qkv.{match[3]}", {})[match[2]] = value
        else:
            out[new] = value
    out.update({key: torch.cat([parts[p] for p in "qkv"]) for key, parts in refiner.items()})
    return out


def _random(net):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.double().eval()


def _mask(lengths, size):
    return (torch.arange(size) < lengths[:, None]).long()


@pytest.mark.parametrize("guidance", [False, True])
def test_agrees_with_hunyuan_video(guidance):
    theirs = _random(
        diffusers.HunyuanVideoTransformer3DModel(
            **SHAPE, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
            text_embed_dim=16, pooled_projection_dim=8, guidance_embeds=guidance,
        )
    )  # fmt: skip
    settings = DiTConfig(
        **OURS, in_channels=4, out_channels=4, double_blocks=2, single_blocks=2, pooled_dim=8,
        guidance_embed=guidance,
    )  # fmt: skip
    ours = load_dit(_renamed(theirs.state_dict()), settings)
    x, text = torch.randn(2, 4, 3, 4, 6).double(), torch.randn(2, 5, 16).double()
    pooled, lengths = torch.randn(2, 8).double(), torch.tensor([5, 3])
    # Small scales: at 6000 radians float32 sinusoids, which diffusers has, are off by 4e-4.
    scale = torch.tensor([0.125, 0.5]).double() if guidance else None
    t = torch.tensor([0.25, 0.75]).double()
    options = {} if scale is None else {"guidance": 1000 * scale}
    with torch.no_grad():
        expected = theirs(
            x, 1000 * t, text, _mask(lengths, 5), pooled, **options, return_dict=False
        )[0]
        out = ours(x, t, cond=Condition(text, lengths, pooled, scale))
    # diffusers computes the time features and the rotation in float32.
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.05


@pytest.mark.parametrize("mean_flow", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_agrees_with_hunyuan_video_1_5(mean_flow, image):
    theirs = _random(
        diffusers.HunyuanVideo15Transformer3DModel(
            **SHAPE, in_channels=9, out_channels=4, num_layers=2, text_embed_dim=16,
            text_embed_2_dim=8, image_embed_dim=12, use_meanflow=mean_flow,
        )
    )  # fmt: skip
    settings = DiTConfig(
        **OURS, in_channels=9, out_channels=4, patch=(1, 1, 1), double_blocks=2, single_blocks=0,
        pooled_dim=None, split_qkv=True, glyph_dim=8, image_dim=12, mean_flow=mean_flow,
    )  # fmt: skip
    ours = load_dit(_renamed(theirs.state_dict()), settings)
    x, latents = torch.randn(2, 4, 3, 4, 4).double(), torch.randn(2, 5, 3, 4, 4).double()
    text, lengths = torch.randn(2, 5, 16).double(), torch.tensor([5, 3])
    glyph, glyph_lengths = torch.randn(2, 4, 8).double(), torch.tensor([2, 4])
    vision = torch.randn(2, 3, 12).double() if image else torch.zeros(2, 3, 12).double()
    t = torch.tensor([0.25, 0.75]).double()
    r = t / 2 if mean_flow else None
    cond = Condition(
        text, lengths, latents=latents, glyph=glyph, glyph_lengths=glyph_lengths,
        image=vision if image else None,
    )  # fmt: skip
    with torch.no_grad():
        expected = theirs(
            torch.cat((x, latents), dim=1), 1000 * t, text, _mask(lengths, 5),
            timestep_r=None if r is None else 1000 * r, encoder_hidden_states_2=glyph,
            encoder_attention_mask_2=_mask(glyph_lengths, 4), image_embeds=vision,
            return_dict=False,
        )[0]  # fmt: skip
        out = ours(x, t, r, cond)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.05
