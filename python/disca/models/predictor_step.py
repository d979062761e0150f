# SPDX-License-Identifier: Apache-2.0
"""A skipped step as one unit, from the latent at t to the latent at r."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, nn

from disca.errors import UserError
from disca.models.condition import Condition
from disca.models.host import Host
from disca.models.state import State
from disca_kernels import mean_velocity_step

__all__ = ["CapturedStep", "PredictorStep"]

_WARM_UP_RUNS = 3


class PredictorStep(nn.Module):
    """One skipped step: embed, cache read, predictor blocks, head and update.

        x_r = x_t - (t - r) head(P(embed(x_t, t, r, cond), cache))

    (DisCa, arXiv 2602.05449, Eq. 5.) Which steps are skipped is decided outside. The call has
    static shapes and never waits for the device, so that it goes into a CUDA graph (`capture`) and
    through `torch.compile(fullgraph=True)` as it is.

        step = PredictorStep(host, predictor)
        cache = host.run(host.embed(x, t, r, cond)).tokens       # a full step
        x = step(x, t, r, cond, cache)                           # a skipped one

    Args:
        host: the model whose embedders and head serve every step.
        predictor: maps the embedded state and the cache [B, N, C] to tokens [B, N, C].
    """

    def __init__(self, host: Host, predictor: Callable[[State, Tensor], Tensor]) -> None:
        """Join a host and its predictor; they are referred to, not copied."""
        super().__init__()
        self.host = host
        self.predictor = predictor

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Condition, cache: Tensor) -> Tensor:
        """Go from t to r.

        Args:
            x: sample at t [B, C, F, H, W].
            t: start times [B].
            r: end times [B].
            cond: condition of the batch.
            cache: tokens after the host's last block at an earlier full step [B, N, C].

        Returns:
            The sample at r, of the shape and dtype of x; the update is computed in float32.

        Raises:
            UserError: the cache is of another batch, resolution or model than x, or the predictor
                was made for another host.
        """
        state = self.host.embed(x, t, r if self.host.mean_flow else None, cond)
        tokens = self.predictor(state, cache)
        if tokens.shape != cache.shape:
            raise UserError(
                f"the predictor returned tokens {list(tokens.shape)}, "
                f"the host's are {list(cache.shape)}: it was made for another host"
            )
        return mean_velocity_step(x, self.host.head(state.with_tokens(tokens)), t, r)

    def capture(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Condition, cache: Tensor
    ) -> "CapturedStep":
        """Record the step as a CUDA graph for inputs of these shapes.

        Args:
            x: sample [B, C, F, H, W] on a CUDA device.
            t: start times [B].
            r: end times [B].
            cond: condition; its tensors may change between calls, its shapes may not.
            cache: tokens [B, N, C].

        Returns:
            A callable with the arguments of `forward`.

        Raises:
            UserError: the tensors are not on a CUDA device.
        """
        if not x.is_cuda:
            raise UserError(
                "a step is captured in a CUDA graph, so x must be on a CUDA device, got "
                f"{x.device}; call the step itself there, or torch.compile it"
            )
        return CapturedStep(self, x, t, r, cond, cache)


class CapturedStep:
    """A `PredictorStep` in a CUDA graph: one launch instead of some forty, for sampling only.

    Inputs are copied into buffers of its own, and the result out of one. Nothing has a gradient.
    """

    def __init__(
        self,
        step: PredictorStep,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Condition,
        cache: Tensor,
    ) -> None:
        """Run the step on a stream of its own until everything is compiled, then record it."""
        self._names = _names(cond)
        self._buffers = [tensor.detach().clone() for tensor in _tensors(x, t, r, cond, cache)]
        static = _rebuilt(self._buffers, cond)
        self._graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.no_grad(), torch.cuda.stream(aside):
            for _ in range(_WARM_UP_RUNS):
                step(*static)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._result = step(*static)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, cond: Condition, cache: Tensor) -> Tensor:
        """Go from t to r; see `PredictorStep.forward`.

        Raises:
            UserError: an input has another shape, dtype or device than the one that was recorded,
                or wants a gradient.
        """
        given = _tensors(x, t, r, cond, cache)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            raise UserError(
                "a captured step has no gradient, and an input requires one; call it under "
                "torch.no_grad(), or call the PredictorStep itself"
            )
        if _names(cond) != self._names:
            raise UserError(
                f"this step was captured for a condition with {', '.join(self._names)}, got one "
                f"with {', '.join(_names(cond))}; capture another one"
            )
        for buffer, tensor in zip(self._buffers, given, strict=True):
            if _kind(buffer) != _kind(tensor):
                raise UserError(
                    f"this step was captured for {_kind(buffer)}, got {_kind(tensor)}; capture "
                    "another one"
                )
        for buffer, tensor in zip(self._buffers, given, strict=True):
            buffer.copy_(tensor.detach())
        self._graph.replay()
        result: Tensor = self._result.clone()
        return result


def _names(cond: Condition) -> list[str]:
    """Name the fields of a condition that are present."""
    return [field.name for field in fields(cond) if getattr(cond, field.name) is not None]


def _tensors(x: Tensor, t: Tensor, r: Tensor, cond: Condition, cache: Tensor) -> list[Tensor]:
    return [x, t, r, cache, *(getattr(cond, name) for name in _names(cond))]


def _rebuilt(
    tensors: list[Tensor], cond: Condition
) -> tuple[Tensor, Tensor, Tensor, Condition, Tensor]:
    x, t, r, cache, *parts = tensors
    return x, t, r, Condition(**dict(zip(_names(cond), parts, strict=True))), cache


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
