# SPDX-License-Identifier: Apache-2.0
"""Initial weights of a video DiT."""

from torch import Tensor, nn

from disca.models.blocks import DoubleBlock, FinalLayer, Modulation, SingleBlock
from disca.models.embedders import PatchEmbed, RefinerBlock

__all__ = ["initialise", "zero_linear"]


def initialise(model: nn.Module, latent_channels: int) -> None:
    """Initialise for training from scratch.

    Linear layers are Xavier-uniform with zero bias, each part of a fused projection on its own; in
    the embedders of the published widths that is DiT's standard deviation of 0.02, and in narrow
    models it keeps their time signal. Every modulation, every gate and the output layer start at
    zero, so that each block starts as the identity.

    Args:
        model: the model; modules of this package are known by their class.
        latent_channels: input channels of the noisy latent; further (conditioning) channels start
            at zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _xavier(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Modulation):
            zero_linear(module.linear)
        elif isinstance(module, FinalLayer):
            zero_linear(module.linear)
            zero_linear(module.adaLN_modulation[1])
        elif isinstance(module, PatchEmbed):
            _initialise_patches(module, latent_channels)
        elif isinstance(module, SingleBlock):
            _initialise_fused(module)
        elif isinstance(module, DoubleBlock) and not module.split_qkv:
            for stream in ("img", "txt"):
                for part in getattr(module, f"{stream}_attn_qkv").weight.chunk(3):
                    _xavier(part)
        elif isinstance(module, RefinerBlock):
            zero_linear(module.adaLN_modulation[1])


def zero_linear(layer: nn.Module) -> None:
    """Set weight and bias of a linear layer to zero."""
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _xavier(weight: Tensor) -> None:
    nn.init.xavier_uniform_(weight.detach())


def _initialise_patches(module: PatchEmbed, latent_channels: int) -> None:
    assert module.proj.bias is not None
    nn.init.zeros_(module.proj.bias)
    weight = module.proj.weight.detach()
    nn.init.zeros_(weight)
    latent = weight[:, :latent_channels]
    # As the linear layer that it is; the fan-out of a convolution would count the patch again.
    latent.copy_(nn.init.xavier_uniform_(latent.flatten(1)).view_as(latent))


def _initialise_fused(block: SingleBlock) -> None:
    hidden = block.hidden
    for part in block.linear1.weight[: 3 * hidden].chunk(3):
        _xavier(part)
    _xavier(block.linear1.weight[3 * hidden :])
    _xavier(block.linear2.weight[:, :hidden])
    _xavier(block.linear2.weight[:, hidden:])
