"""Diagonal Fisher: ``F_j = mean over tracks i, draws d of (d L_d(z_i) / d theta_j)^2``.

METHOD section 1. The square is taken per (track, draw), not after averaging.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import DrawPlan, Noised, RowFunction, losses, noised_rows, work_dtype
from attr_engine.errors import Cancelled, UserError
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.persample import SQUARES, Make, check_against_loop
from attr_engine.tensorfile import load_tensors, save_tensors

_SECONDS_BETWEEN_CHECKPOINTS = 20.0
UNITS = 16


def check_damping(damping: float) -> None:
    """Refuse a damping that nothing can be divided by.

    Raises:
        UserError: it is negative, infinite or NaN.
    """
    if not 0.0 <= damping < math.inf:
        raise UserError(f"damping is {damping}: it cannot be negative, infinite or NaN")


@dataclass(frozen=True)
class Fisher:
    """A fitted diagonal Fisher.

    Attributes:
        values: parameter name to non-negative tensor in the parameter's shape (float32; float64
            for a float64 model).
        pairs: how many (track, draw) pairs were averaged.
        unused: parameters that the prediction does not depend on; their Fisher is exactly 0.
    """

    values: Mapping[str, Tensor]
    pairs: int
    unused: Sequence[str] = ()

    def mean(self) -> float:
        """Mean over all parameters of the group: the unit of relative damping."""
        total = sum(float(v.double().sum()) for v in self.values.values())
        return total / sum(v.numel() for v in self.values.values())

    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters that it was fitted for, by name."""
        return {name: value.shape for name, value in self.values.items()}

    def precondition(self, gradient: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """``(F + damping * mean F)^-1 gradient`` (METHOD section 1).

        Args:
            gradient: parameter name to a tensor in the parameter's shape; of all parameters, or of some of them.
            damping: relative to the mean of the Fisher over all parameters of the group.

        Returns:
            The direction, by name in the order of ``gradient``: float32, or float64 for a float64 gradient, on its device.

        Raises:
            UserError: an unusable damping, a gradient of another model, or a division by 0.
        """
        absolute = self._absolute(damping)
        check_fits(self.shapes(), gradient)
        direction = {}
        for name, g in gradient.items():
            value = self.values[name].to(device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))
            direction[name] = kernels.precondition_(torch.zeros_like(value), g, value, absolute, 1.0)
        return direction

    def _absolute(self, damping: float) -> float:
        check_damping(damping)
        absolute = damping * self.mean()
        if absolute == 0.0:
            zero = [name for name, value in self.values.items() if not bool((value > 0).all())]
            if zero:
                raise UserError(
                    f"without damping the update divides by the zero Fisher of {zero[0]}: set --damping above 0"
                )
        return absolute

    def save(self, path: Path, key: str) -> None:
        """Write to safetensors, under a key that :meth:`load` checks."""
        save_tensors(path, self.values, {"key": key, "pairs": self.pairs, "unused": list(self.unused)})

    @staticmethod
    def load(path: Path, key: str | None = None) -> Fisher:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: missing or damaged file, or another key than the one asked for.
        """
        values, meta = load_tensors(path, key)
        return Fisher(values, int(meta["pairs"]), tuple(meta["unused"]))


def check_fits(shapes: Mapping[str, torch.Size], gradient: Mapping[str, Tensor]) -> None:
    """Refuse the gradient of a parameter that a curvature was not fitted for.

    Raises:
        UserError: names the parameter.
    """
    for name, g in gradient.items():
        if shapes.get(name) != g.shape:
            raise UserError(
                f"the gradient of {name!r}, of shape {list(g.shape)}, does not fit the curvature: it is of another model, "
                "or was fitted for other layers"
            )


@dataclass(frozen=True)
class FisherSettings:
    """What decides a Fisher, beside model and tracks.

    Attributes:
        layers: layer groups or name patterns.
        plan: draw plan; the purpose is ``fisher``.
        draws: draws a track, a multiple of the plan's replicates.
        masked: whether only valid frames count in the loss (False: as the model was trained).
        rows: (track, draw) pairs a backward pass.
        gradients: ``"batch"``: all rows of a pass at once, after a comparison of the first with the loop;
            ``"loop"``: one row at a time, by autograd alone.
    """

    layers: Sequence[str]
    plan: DrawPlan
    draws: int
    masked: bool = False
    rows: int = 16
    gradients: str = "batch"

    @property
    def step(self) -> int:
        """Tracks a pass."""
        return max(1, self.rows // self.draws)


def fisher_units(tracks: int, settings: FisherSettings) -> list[range]:
    """The fixed units that a Fisher is summed in: at most :data:`UNITS`, of whole passes; indices of their tracks."""
    size = -(-tracks // (UNITS * settings.step)) * settings.step
    return [range(first, min(first + size, tracks)) for first in range(0, tracks, size)]


def check_fisher(
    model: Denoiser, tracks: Tracks, settings: FisherSettings, function: RowFunction = losses
) -> None:
    """Refuse what cannot be fitted, and compare the gradients of the first rows with those of single rows.

    Raises:
        UserError: unusable tracks, layers or number of draws, or a model whose per-sample gradients in a batch
            are not those of single rows.
    """
    s = settings
    check_tracks(tracks, model.channels, model.frames, "training")
    if s.gradients not in SQUARES or s.rows < 1:
        raise UserError(
            f"gradients={s.gradients!r}, rows={s.rows}: use 'batch' or 'loop', and at least one row"
        )
    s.plan.check(s.draws, "the number of Fisher draws")
    parameters = select_parameters(model, s.layers)
    if s.gradients == "batch":
        make, every = fisher_pass(model, tracks, range(min(s.step, len(tracks))), s)
        check_against_loop(model, parameters, make, every[: max(2, min(4, s.rows))], function)


def sum_unit(
    model: Denoiser,
    tracks: Tracks,
    settings: FisherSettings,
    unit: range,
    checkpoint: Path | None = None,
    key: str = "",
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], set[str]]:
    """Sum the squared per-sample gradients of one unit's tracks, in their order.

    Args:
        model: theta_0.
        tracks: the training tracks.
        settings: of the Fisher.
        unit: indices of its tracks.
        checkpoint: where to keep the running sum, so that a killed run goes on bit for bit.
        key: names model, data and settings; a checkpoint under another key is refused.
        progress: called with the tracks of the unit that are done.

    Returns:
        The sums (float32; float64 for a float64 model), and the parameters that the prediction uses.
    """
    s = settings
    parameters = select_parameters(model, s.layers)
    total = {name: torch.zeros_like(p, dtype=work_dtype(model)) for name, p in parameters.items()}
    done, used = 0, set[str]()
    if checkpoint is not None and checkpoint.exists():
        total, meta = load_tensors(checkpoint, key)
        total = {name: value.to(parameters[name].device) for name, value in total.items()}
        done, used = int(meta["done"]), set(meta["used"])
    saved = time.monotonic()
    for first in range(done, len(unit), s.step):
        here = unit[first : first + s.step]
        make, every = fisher_pass(model, tracks, here, s)
        for k in range(0, len(every), s.rows):
            used |= SQUARES[s.gradients](model, parameters, make, every[k : k + s.rows], total)
        done = first + len(here)
        try:
            if progress is not None:
                progress(done)
        except Cancelled:
            if checkpoint is not None:
                save_tensors(checkpoint, total, {"key": key, "done": done, "used": sorted(used)})
            raise
        if checkpoint is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            save_tensors(checkpoint, total, {"key": key, "done": done, "used": sorted(used)})
            saved = time.monotonic()
    return total, used


def combine(sums: Iterable[tuple[Mapping[str, Tensor], Collection[str]]], pairs: int) -> Fisher:
    """The Fisher of all units' sums, added in the order of the units.

    Raises:
        UserError: it is not finite.
    """
    total: dict[str, Tensor] = {}
    used = set[str]()
    for values, here in sums:
        used |= set(here)
        for name, value in values.items():
            total[name] = total[name].add_(value.cpu()) if name in total else value.cpu()
    for name, value in total.items():
        value /= pairs
        if not torch.isfinite(value).all():
            raise UserError(
                f"the Fisher of {name} is not finite: the model or a latent holds NaN, or use --dtype float32"
            )
    return Fisher(total, pairs, tuple(name for name in total if name not in used))


def fit_fisher(
    model: Denoiser,
    tracks: Tracks,
    layers: Sequence[str],
    plan: DrawPlan,
    draws: int,
    masked: bool = False,
    progress: Callable[[int, int], None] | None = None,
    rows: int = 16,
    gradients: str = "batch",
) -> Fisher:
    """Fit the diagonal Fisher of a layer group, in memory.

    Args:
        model: theta_0.
        tracks: the training tracks.
        layers: as in :class:`FisherSettings`, like the arguments that follow.
        plan: likewise.
        draws: likewise.
        masked: likewise.
        progress: called with (tracks done, tracks).
        rows: likewise.
        gradients: likewise.

    Returns:
        The Fisher, accumulated in float32 (float64 for a float64 model), in the order of tracks and units: the same
        bits as those of a run whose units were shared by several processes.

    Raises:
        UserError: as :func:`check_fisher`, or the Fisher is not finite.
    """
    settings = FisherSettings(layers, plan, draws, masked, rows, gradients)
    check_fisher(model, tracks, settings)
    total = len(tracks)
    if progress is not None:
        progress(0, total)

    def sums() -> Iterator[tuple[dict[str, Tensor], set[str]]]:
        for unit in fisher_units(total, settings):
            yield sum_unit(
                model, tracks, settings, unit,
                progress=None if progress is None else lambda n, u=unit: progress(u.start + n, total),  # type: ignore[misc]
            )  # fmt: skip

    return combine(sums(), total * draws)


def fisher_pass(
    model: Denoiser, tracks: Tracks, indices: range, settings: FisherSettings
) -> tuple[Make, list[tuple[int, int]]]:
    """What makes noised rows of some tracks, and all their (track, draw) pairs."""
    batch = tracks.batch(indices, model.frames)

    def make(pairs: Sequence[tuple[int, int]]) -> Noised:
        return noised_rows(model, batch, pairs, settings.plan, "fisher", settings.masked)

    return make, [(i, d) for i in range(len(indices)) for d in range(settings.draws)]
