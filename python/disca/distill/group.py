# SPDX-License-Identifier: Apache-2.0
"""A trainable module with its optimisers, averaged weights and checkpoint names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from disca.distill import checkpoint as ckpt
from disca.distill.config import OptimizerConfig

__all__ = ["ParameterGroup"]

_BLOCK_MATRIX = re.compile(r"(^|\.)(double|single|mm_single)_blocks\.")


def _optimizers(
    named: list[tuple[str, nn.Parameter]], settings: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Return AdamW and, with `muon_lr`, Muon for the matrices of the blocks."""
    muon = [
        p
        for n, p in named
        if settings.muon_lr is not None and p.dim() == 2 and _BLOCK_MATRIX.search(n)
    ]
    taken = {id(p) for p in muon}
    rest = [p for _, p in named if id(p) not in taken]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {
                    "params": [p for p in rest if p.dim() > 1],
                    "weight_decay": settings.weight_decay,
                },
                {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
    ]
    if muon:
        assert settings.muon_lr is not None
        found.append(
            torch.optim.Muon(
                muon,
                lr=settings.muon_lr,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return found


def _ema_update(decay: float, warmup: bool) -> Any:
    """Return an AveragedModel update with rate ``min(decay, (1 + n) / (10 + n))`` if warming up."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        n = float(count)
        rate = min(decay, (1.0 + n) / (10.0 + n)) if warmup else decay
        torch._foreach_lerp_(averaged, current, 1.0 - rate)

    return update


class ParameterGroup:
    """A trainable module with its optimiser and averaged weights."""

    def __init__(self, module: nn.Module, settings: OptimizerConfig, total: int) -> None:
        self.module = module
        self.settings = settings
        self.total = total
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.optimizers = _optimizers(named, settings)
        self.averaged: AveragedModel | None = None
        if settings.ema is not None:
            self.averaged = AveragedModel(
                module,
                multi_avg_fn=_ema_update(settings.ema, settings.ema_warmup),
                use_buffers=False,
            ).requires_grad_(False)

    def set_lr(self, step: int) -> float:
        """Set and return the learning rate of a step (a closed form, so nothing to checkpoint)."""
        factor = self.settings.lr_factor(step, self.total)
        for optimizer, lr in zip(self.optimizers, self.settings.rates, strict=False):
            for entry in optimizer.param_groups:
                entry["lr"] = lr * factor
        return self.settings.lr * factor

    def final(self) -> nn.Module:
        """Return the weights to ship: the averaged ones if there are any."""
        return self.module if self.averaged is None else self.averaged.module

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Flatten the state to checkpoint names."""
        flat = {f"model/{name}/{k}": v for k, v in self.module.state_dict().items()}
        if self.averaged is not None:
            flat |= {f"ema/{name}/{k}": v for k, v in self.averaged.state_dict().items()}
        for optimizer in self.optimizers:
            state = ckpt.optimizer_tensors(optimizer, self.module)
            flat |= {f"optim/{name}/{k}": v for k, v in state.items()}
        return flat

    def restore(self, name: str, saved: ckpt.Checkpoint, path: Path) -> None:
        """Take the state back from a checkpoint."""
        ckpt.load_module(self.module, saved.section(f"model/{name}"), path)
        if self.averaged is not None:
            ckpt.load_module(self.averaged, saved.section(f"ema/{name}"), path)
        ckpt.restore_optimizer(self.optimizers, self.module, saved.section(f"optim/{name}"), path)
