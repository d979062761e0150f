# SPDX-License-Identifier: Apache-2.0
"""ICC: cached linear layers, corrected by a low-rank product of the change of their input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from disca.cache.calibration import CalibratedPolicy, observe
from disca.cache.interval import Interval
from disca.errors import UserError

if TYPE_CHECKING:
    from disca.cache.calibration import Batches, Calibration
    from disca.cache.policy import StepInput
    from disca.models.host import Host
    from disca.models.state import State

__all__ = ["MAX_RANK", "Icc", "TokenLinears", "weighted_factors"]

Statistics = Literal["values", "increments"]

MAX_RANK = 128
"""The largest rank that a calibration holds: that of the authors' commands."""

_RATIO = 1000.0
_EPS = 1e-6


class TokenLinears(TorchFunctionMode):
    """Replaces the linear layers of tokens inside ``with``, counted in the order of their calls.

    A layer of tokens is a call of :func:`torch.nn.functional.linear` with an input [B, N, C];
    linear layers of vectors [B, C], such as modulations, run as they are.

    Args:
        replace: called with the number of the call, the input, the weight [O, I] and a function
            that runs the layer; returns the output [B, N, O].

    Attributes:
        calls: layers of tokens so far.
    """

    def __init__(self, replace: Callable[[int, Tensor, Tensor, Callable[[], Tensor]], Tensor]):
        super().__init__()
        self.replace = replace
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass every function on but the linear layers of tokens."""
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        x, weight = _operands(*args, **kwargs)
        if x.dim() != 3:
            return func(*args, **kwargs)
        number = self.calls
        self.calls += 1
        return self.replace(number, x, weight, lambda: func(*args, **kwargs))


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sort the arguments of a call, named or not; the names are those of torch's function."""
    return input, weight


class Icc(CalibratedPolicy):
    """Reuses every linear layer of tokens and corrects it for the change of its input.

    At a full step each layer ``y = W x + b`` keeps its input and output. At a skipped step

        y = y_kept + L R (x - x_kept),    L R = S_L^-1 SVD_rank(S_L W S_R) S_R^-1

    so that norms, attention and activations run as always and only the matrix products shrink
    (increment-calibrated caching with channel-aware SVD, arXiv 2505.05829). S_R and S_L hold the
    square roots of the mean size of each input and output channel, from calibration. Full steps are
    0, N, 2N, ...

    Args:
        interval: N, a full step every so many steps; the authors' period.
        rank: rank of the correction; a layer that it would cost as much as takes the largest rank
            that costs less.
        statistics: what S_L and S_R measure: ``"values"`` (CA-SVD) or ``"increments"``, the change
            from one step to the next (CD-SVD).
        calibration: the factors.

    Raises:
        UserError: an interval below 2, or a rank out of range.
    """

    name = "icc"

    def __init__(
        self,
        interval: int = 2,
        *,
        rank: int = 16,
        statistics: Statistics = "values",
        calibration: Calibration | None = None,
    ) -> None:
        if not 1 <= rank <= MAX_RANK:
            raise UserError(
                f"policy 'icc': a calibration holds ranks from 1 to {MAX_RANK}, got {rank}; "
                "without a correction the policy is 'fora'"
            )
        if statistics not in get_args(Statistics):
            raise UserError(
                f"policy 'icc': statistics are one of {', '.join(get_args(Statistics))}, "
                f"got {statistics!r}"
            )
        self.interval = Interval(self.name, interval)
        self.rank = rank
        self.statistics = statistics
        self.calibration = calibration
        self._factors: list[tuple[Tensor, Tensor]] = []

    def prepare(self) -> tuple[str, ...]:
        """Take the factors up to the rank and check that they save something."""
        self.interval.check(self.steps)
        tensors = self.fitted()
        like = next(self.host.parameters())
        whole = [
            (
                tensors[f"{self.statistics}.{number}.left"].to(like),
                tensors[f"{self.statistics}.{number}.right"].to(like),
            )
            for number in range(max(1, _count(tensors, self.statistics)))
        ]
        if all(left.shape[1] < self.rank for left, _ in whole):
            widest = max(left.shape[1] for left, _ in whole)
            raise UserError(
                f"policy 'icc': a correction of rank {self.rank} costs as much as every layer that "
                f"it stands for, so nothing is skipped; use at most {widest}"
            )
        self._factors = [(left[:, : self.rank], right[: self.rank]) for left, right in whole]
        return tuple(f"linear layer {number}" for number in range(len(whole)))

    def computes(self, step: StepInput, state: State) -> bool:
        """Compute every N steps."""
        return self.interval.full(step.index)

    def compute(self, step: StepInput, state: State) -> State:
        """Run the blocks and keep input and output of every layer."""

        def keep(number: int, x: Tensor, weight: Tensor, layer: Callable[[], Tensor]) -> Tensor:
            self.store[number, "x"] = x
            self.store[number, "y"] = y = layer()
            return y

        return self._run(state, keep)

    def skip(self, step: StepInput, state: State) -> State:
        """Run the blocks with the corrected cache in place of every layer."""

        def correct(number: int, x: Tensor, weight: Tensor, layer: Callable[[], Tensor]) -> Tensor:
            left, right = self._factors[number]
            change = F.linear(x - self.store[number, "x"], right)
            return self.store[number, "y"] + F.linear(change, left)

        return self._run(state, correct)

    def _run(
        self,
        state: State,
        replace: Callable[[int, Tensor, Tensor, Callable[[], Tensor]], Tensor],
    ) -> State:
        with TokenLinears(replace) as layers:
            state = self.host.run(state)
        if layers.calls != len(self._factors):
            raise UserError(
                f"policy 'icc': the calibration has {len(self._factors)} linear layers of tokens, "
                f"this run called {layers.calls}; blocks that are compiled cannot be read"
            )
        return state

    @classmethod
    def fit(cls, host: Host, schedule: Sequence[float], batches: Batches) -> dict[str, Tensor]:
        """Measure the channels of every layer of tokens and factorise its weight.

        The size of a channel is the mean of |x| over tokens, scaled to (0, 1] over the channels of
        each clip and step, then averaged over clips and steps. Its square root is the weight, at
        least a thousandth of the largest.

        Args:
            host: the network.
            schedule: times [steps + 1].
            batches: noise [B, C, F, H, W] and condition of each run.

        Returns:
            For both statistics and each layer n: ``<statistics>.n.left`` [O, r],
            ``<statistics>.n.right`` [r, I], and ``<statistics>.n.share`` [r], the share of the sum
            of singular values up to each rank; r is at most :data:`MAX_RANK` and below I*O/(I+O),
            from where the factors cost as much as the weight.

        Raises:
            UserError: fewer than 2 steps, or a host without linear layers of tokens.
        """
        steps = len(schedule) - 1
        if steps < 2:
            raise UserError(
                f"policy 'icc' measures changes between steps and a run of {steps} has none; "
                "calibrate with at least 2 steps"
            )
        found: dict[int, _Layer] = {}
        first = True

        def measure(number: int, x: Tensor, weight: Tensor, layer: Callable[[], Tensor]) -> Tensor:
            y = layer()
            entry = found.setdefault(number, _Layer(weight))
            entry.add(x, y, first=first)
            return y

        def run(state: State) -> State:
            with TokenLinears(measure):
                return host.run(state)

        for index, _, _ in observe(host, schedule, batches, run):
            # The next call of run is the first of a new batch if this was the last step.
            first = index == steps - 1
        if not found:
            raise UserError(
                "policy 'icc' replaces linear layers of tokens, and the blocks of the host call "
                "none; use a policy that keeps sub-layers or tokens, such as 'fora' or 'teacache'"
            )
        tensors: dict[str, Tensor] = {}
        for number, layer in found.items():
            for statistics in get_args(Statistics):
                factors = layer.factors(statistics)
                for name, tensor in zip(("left", "right", "share"), factors, strict=True):
                    tensors[f"{statistics}.{number}.{name}"] = tensor
        return tensors

    @classmethod
    def summary(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        """Say how much of the weighted matrices each rank keeps."""
        count = _count(tensors, "values")
        lines = [f"{count} linear layers of tokens"]
        for statistics in get_args(Statistics):
            shares = [tensors[f"{statistics}.{number}.share"] for number in range(count)]
            ranks = [rank for rank in (4, 8, 16, 32, 64, 128) if rank <= max(map(len, shares))]
            kept = (
                (rank, sum(float(share[min(rank, len(share)) - 1]) for share in shares) / count)
                for rank in ranks
            )
            text = ", ".join(f"rank {rank} keeps {100 * share:.0f} %" for rank, share in kept)
            lines.append(f"singular values with {statistics}: {text}")
        return lines


class _Layer:
    """Sizes of the channels of one linear layer, added up over clips and steps."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().clone()
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor, *, first: bool) -> None:
        """Add one step; ``first`` if no step of the same clips came before."""
        for side, value in (("right", x), ("left", y)):
            self._sum("values", side, value)
            if not first:
                self._sum("increments", side, value - self.last[side])
            self.last[side] = value

    def factors(self, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        left, right = self.sums[statistics, "left"], self.sums[statistics, "right"]
        return weighted_factors(self.weight, left, right)

    def _sum(self, statistics: str, side: str, value: Tensor) -> None:
        sizes = value.abs().mean(dim=1)  # [B, C]
        low, high = sizes.amin(dim=-1, keepdim=True), sizes.amax(dim=-1, keepdim=True)
        scaled = ((sizes - low + _EPS) / (high - low + _EPS)).sum(dim=0)
        key = (statistics, side)
        self.sums[key] = self.sums[key] + scaled if key in self.sums else scaled


def weighted_factors(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise a weight with its channels weighted by their sizes.

    ``L R = S_L^-1 SVD_r(S_L W S_R) S_R^-1`` with ``S = diag(sqrt(size / largest))``, bounded from
    below by a thousandth of its largest (channel-aware SVD, arXiv 2505.05829).

    Args:
        weight: W [O, I].
        left: sizes of the output channels [O].
        right: sizes of the input channels [I].

    Returns:
        L [O, r], R [r, I] and the share of the sum of singular values up to each rank [r], with r
        at most :data:`MAX_RANK`, below I*O/(I+O) and at least 1.
    """
    outputs, inputs = weight.shape
    rank = max(1, min(MAX_RANK, (outputs * inputs - 1) // (outputs + inputs)))
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    s_left, s_right = (_scales(size.to(work)) for size in (left, right))
    u, sigma, v = torch.linalg.svd(s_left[:, None] * work * s_right, full_matrices=False)
    share = (sigma.cumsum(0) / sigma.sum())[:rank]
    return (u[:, :rank] * sigma[:rank]) / s_left[:, None], v[:rank] / s_right, share


def _scales(sizes: Tensor) -> Tensor:
    roots = sizes.sqrt()
    return (roots / roots.amax()).clamp(min=1 / _RATIO)


def _count(tensors: Mapping[str, Tensor], statistics: Statistics) -> int:
    """Return how many layers a calibration speaks of."""
    names = (name.split(".") for name in tensors)
    return len({name[1] for name in names if name[0] == statistics and len(name) == 3})
