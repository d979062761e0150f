# SPDX-License-Identifier: Apache-2.0
"""What a calibrated policy learned of a model from uncached runs, and the base of such policies."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from disca.cache.policy import TokenPolicy
from disca.cache.registry import POLICIES, policy_class
from disca.data.io import atomic_path
from disca.errors import UserError
from disca_kernels import mean_velocity_step

if TYPE_CHECKING:
    from disca.cache.policy import CachePolicy, Resources, StepInput, StepOutput
    from disca.models.condition import Condition
    from disca.models.host import Host
    from disca.models.state import State

__all__ = [
    "CALIBRATED",
    "CalibratedPolicy",
    "Calibration",
    "calibrate",
    "calibrated_class",
    "observe",
    "weights_digest",
]

CALIBRATED = "calibrated"
"""Value of a setting that is to come from a calibration."""

FORMAT = 1
"""Version of the file; it changes when a field changes its meaning."""

_TIME_TOLERANCE = 1e-6
_SAMPLED = 64
_LISTED = 6

Batches = Iterable[tuple[Tensor, "Condition"]]


def weights_digest(host: Host) -> str:
    """Return a hexadecimal digest by which weights are told apart, whatever device they are on.

    It covers the shape of every parameter and up to 64 of its values, evenly spread, so that it
    costs little for a model of any size.
    """
    digest = hashlib.sha256()
    for parameter in host.parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED)
        digest.update(repr(tuple(parameter.shape)).encode())
        digest.update(flat[::stride].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model over one schedule at one resolution.

    Attributes:
        policy: name of the policy that they are for.
        schedule: times [steps + 1] of the runs.
        shape: (C, F, H, W) of the latent.
        host: digest of the model's weights, see :func:`weights_digest`.
        tensors: what was measured, by name.
        settings: how the runs were made (model, clips, seed, guidance), as JSON values.
    """

    policy: str
    schedule: tuple[float, ...]
    shape: tuple[int, ...]
    host: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of steps of the runs."""
        return len(self.schedule) - 1

    def check(
        self,
        schedule: Sequence[float],
        shape: Sequence[int] | None = None,
        host: Host | None = None,
    ) -> None:
        """Check that a run is one of those that the calibration speaks of.

        Args:
            schedule: times [steps + 1] of the run.
            shape: (C, F, H, W) of its latent; None to leave it unchecked.
            host: its network; None to leave it unchecked.

        Raises:
            UserError: another number of steps, other times, another resolution or other weights;
                it names both sides and the command that makes a fitting calibration.
        """
        steps, model = len(schedule) - 1, str(self.settings.get("model", "MODEL"))
        if steps != self.steps:
            raise self._misfit(f"is for {self.steps} steps, the run has {steps}", model, steps)
        far = [
            (old, new)
            for old, new in zip(self.schedule, schedule, strict=True)
            if abs(old - new) > _TIME_TOLERANCE
        ]
        if far:
            old, new = far[0]
            reason = f"visits the time {old:.4g} where the run visits {new:.4g} (another shift?)"
            raise self._misfit(reason, model, steps)
        if shape is not None and tuple(shape) != self.shape:
            reason = f"is for latents [C, F, H, W] = {list(self.shape)}, the run's are "
            raise self._misfit(f"{reason}{list(shape)}", model, steps)
        if host is not None and weights_digest(host) != self.host:
            reason = f"is for weights {self.host}, the model's are {weights_digest(host)}"
            raise self._misfit(reason, "MODEL", steps)

    def measured(self) -> Mapping[str, Tensor]:
        """Return the tensors as a mapping whose missing names raise UserError."""
        return _Measured(self)

    def _misfit(self, reason: str, model: str, steps: int) -> UserError:
        return UserError(
            f"policy {self.policy!r}: the calibration {reason}; make one that fits with "
            f"{_command(self.policy, model, steps)}"
        )

    def save(self, path: str | Path) -> Path:
        """Write the calibration as one safetensors file, atomically.

        Raises:
            UserError: the file cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "policy": self.policy,
            "schedule": self.schedule,
            "shape": self.shape,
            "host": self.host,
            "settings": self.settings,
        }
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        with atomic_path(path) as temporary:
            # One entry only: safetensors writes several in random order.
            temporary.write_bytes(save(flat, {"calibration": json.dumps(metadata)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file of :meth:`save`; the tensors are on the CPU.

        Raises:
            UserError: no such file, a damaged one, no calibration, or one of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such calibration; 'disca calibrate' makes one")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["calibration"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version = header["format"]
            if version == FORMAT:
                return cls(
                    policy=header["policy"],
                    schedule=tuple(header["schedule"]),
                    shape=tuple(header["shape"]),
                    host=header["host"],
                    tensors=tensors,
                    settings=header["settings"],
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: not a whole calibration file ({error}); delete it and make it again "
                "with 'disca calibrate'"
            ) from error
        raise UserError(
            f"{path}: a calibration of format {version}, this version reads {FORMAT}; delete it "
            "and make it again with 'disca calibrate'"
        )


class _Measured(dict[str, Tensor]):
    """The tensors of a calibration, which may come from a file that lacks some."""

    def __init__(self, calibration: Calibration) -> None:
        super().__init__(calibration.tensors)
        self._calibration = calibration

    def __missing__(self, name: str) -> Tensor:
        found = self._calibration
        model = str(found.settings.get("model", "MODEL"))
        raise UserError(
            f"policy {found.policy!r}: the calibration lacks the measurement {name!r} (it has: "
            f"{', '.join(sorted(self)[:_LISTED]) or 'none'}); make it anew with "
            f"{_command(found.policy, model, found.steps)}"
        )


class CalibratedPolicy(TokenPolicy):
    """Base of the policies that measure the model in uncached runs before they can cache.

    A subclass sets ``explicit`` if one of its settings can stand in for the calibration, and
    implements :meth:`fit` and :meth:`summary`.

    Attributes:
        explicit: the setting that, unless it is ``"calibrated"``, makes the calibration needless.
        calibration: the measurements; None if the setting stands in for them.
    """

    calibrated = True
    explicit: ClassVar[str] = ""
    calibration: Calibration | None = None

    @classmethod
    def from_settings(cls, resources: Resources, **settings: Any) -> CachePolicy:
        """Build the policy, with its calibration unless the settings stand in for it."""
        if settings.get(cls.explicit, CALIBRATED) == CALIBRATED:
            settings["calibration"] = resources.calibration(cls.name)
        return cls(**settings)

    @classmethod
    @abstractmethod
    def fit(cls, host: Host, schedule: Sequence[float], batches: Batches) -> dict[str, Tensor]:
        """Measure the host in uncached runs.

        Args:
            host: the network.
            schedule: times [steps + 1].
            batches: noise [B, C, F, H, W] and condition of each run.

        Returns:
            The measurements by name.

        Raises:
            UserError: the host lacks what the policy reads, or there is too little to fit.
        """

    @classmethod
    @abstractmethod
    def summary(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        """Say in a few lines what was fitted and how well it fits."""

    def fitted(self) -> Mapping[str, Tensor]:
        """Return the measurements after a check against this run's host and schedule.

        Raises:
            UserError: there is no calibration, or it is another policy's or for another run; later,
                where a measurement that it lacks is looked up.
        """
        found = self.calibration
        if found is None or found.policy != self.name:
            what = "has no calibration" if found is None else f"got one of {found.policy!r}"
            raise UserError(
                f"policy {self.name!r} {what}; make one with "
                f"{_command(self.name, 'MODEL', self.steps)}"
            )
        found.check(self.schedule, host=self.host)
        return found.measured()

    def advance(self, step: StepInput) -> StepOutput:
        """Take one step; before the first, check the resolution."""
        if self.calibration is not None and step.index == 0:
            self.calibration.check(self.schedule, step.x.shape[1:])
        return super().advance(step)


def calibrated_class(name: str) -> type[CalibratedPolicy]:
    """Return the class of a calibrated policy.

    Raises:
        UserError: no policy of this name, or one that needs no calibration.
    """
    found = policy_class(name)
    if not issubclass(found, CalibratedPolicy):
        known = ", ".join(other for other in POLICIES if policy_class(other).calibrated)
        raise UserError(f"policy {name!r} needs no calibration; those that do: {known}")
    return found


@torch.no_grad()
def calibrate(
    policy_name: str,
    host: Host,
    schedule: Tensor | Sequence[float],
    batches: Batches,
    settings: Mapping[str, Any] | None = None,
) -> Calibration:
    """Measure a model for a calibrated policy.

    Args:
        policy_name: a calibrated policy of :data:`disca.cache.registry.POLICIES`.
        host: the network, in evaluation mode.
        schedule: times [steps + 1], decreasing.
        batches: noise [B, C, F, H, W] and condition, with guidance if the host takes it, of each
            uncached run.
        settings: what to note beside the measurements, as JSON values.

    Returns:
        The calibration.

    Raises:
        UserError: an unknown policy or one without calibration, no batch, batches of different
            resolutions, or what :meth:`CalibratedPolicy.fit` raises.
    """
    cls = calibrated_class(policy_name)
    times = tuple(float(time) for time in schedule)
    shapes: list[tuple[int, ...]] = []
    tensors = cls.fit(host, times, _with_shapes(batches, shapes))
    return Calibration(
        policy_name, times, shapes[0], weights_digest(host), tensors, dict(settings or {})
    )


def _with_shapes(
    batches: Batches, shapes: list[tuple[int, ...]]
) -> Iterator[tuple[Tensor, Condition]]:
    """Pass the batches on, noting the shape of their latents, which has to stay the same."""
    for noise, cond in batches:
        shapes.append(tuple(noise.shape[1:]))
        if shapes[-1] != shapes[0]:
            raise UserError(
                f"a calibration is for one resolution, got latents [C, F, H, W] = "
                f"{list(shapes[0])} and {list(shapes[-1])}"
            )
        yield noise, cond
    if not shapes:
        raise UserError("a calibration needs at least one clip, got none")


@torch.no_grad()
def observe(
    host: Host,
    schedule: Sequence[float],
    batches: Batches,
    run: Callable[[State], State] | None = None,
) -> Iterator[tuple[int, State, State]]:
    """Sample without a cache and yield what goes into the blocks and what comes out, step by step.

    Args:
        host: the network.
        schedule: times [steps + 1].
        batches: noise [B, C, F, H, W] and condition of each run.
        run: runs the blocks; ``host.run`` by default.

    Yields:
        The step, counted from 0 in each batch, the state before and the state after the blocks.
    """
    run = host.run if run is None else run
    for noise, cond in batches:
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        for index, (t, r) in enumerate(pairwise(schedule)):
            start, end = x.new_full((len(x),), t), x.new_full((len(x),), r)
            before = host.embed(x, start, end if host.mean_flow else None, cond)
            after = run(before)
            yield index, before, after
            x = mean_velocity_step(x, host.head(after), start, end)


def _command(policy: str, model: str, steps: int) -> str:
    return f"'disca calibrate --policy {policy} --model {model} --steps {steps} --out DIR'"
