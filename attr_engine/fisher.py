"""Diagonal Fisher: ``F_j = mean over tracks i, draws d of (d L_d(z_i) / d theta_j)^2``.

METHOD section 1. The square is taken per (track, draw), not after averaging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attr_engine.diffusion import DrawPlan, Noised, noised_rows, work_dtype
from attr_engine.errors import UserError
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.persample import SQUARES, Make, check_against_loop
from attr_engine.tensorfile import load_tensors, save_tensors

_SECONDS_BETWEEN_CHECKPOINTS = 20.0


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


def fit_fisher(
    model: Denoiser,
    tracks: Tracks,
    layers: Sequence[str],
    plan: DrawPlan,
    draws: int,
    masked: bool = False,
    checkpoint: Path | None = None,
    key: str = "",
    progress: Callable[[int, int], None] | None = None,
    rows: int = 16,
    gradients: str = "batch",
) -> Fisher:
    """Fit the diagonal Fisher of a layer group.

    Args:
        model: theta_0.
        tracks: the training tracks.
        layers: layer groups or name patterns.
        plan: draw plan; the purpose is ``fisher``.
        draws: draws a track, a multiple of the plan's replicates.
        masked: whether only valid frames count in the loss (False: as the model was trained).
        checkpoint: where to keep the running sum, so that a killed run goes on bit for bit.
        key: names model, data and settings; a checkpoint under another key is refused.
        progress: called with (tracks done, tracks).
        rows: (track, draw) pairs a backward pass.
        gradients: ``"batch"``: all rows of a pass at once, after a comparison of the first with the loop;
            ``"loop"``: one row at a time, by autograd alone.

    Returns:
        The Fisher, accumulated in float32 (float64 for a float64 model), in track order.

    Raises:
        UserError: unusable tracks, layers or number of draws, or a model whose per-sample gradients in a batch
            are not those of single rows.
    """
    check_tracks(tracks, model.channels, model.frames, "training")
    if gradients not in SQUARES or rows < 1:
        raise UserError(f"gradients={gradients!r}, rows={rows}: use 'batch' or 'loop', and at least one row")
    plan.check(draws, "the number of Fisher draws")
    parameters = select_parameters(model, layers)
    step = max(1, rows // draws)  # tracks a pass
    if gradients == "batch":  # before the running sum is there: the comparison holds two such sums of its own
        first_pass, every = _pass(model, tracks, range(min(step, len(tracks))), plan, draws, masked)
        check_against_loop(model, parameters, first_pass, every[: max(2, min(4, rows))])
    total = {name: torch.zeros_like(p, dtype=work_dtype(model)) for name, p in parameters.items()}
    done, used = 0, set[str]()
    if checkpoint is not None and checkpoint.exists():
        total, meta = load_tensors(checkpoint, key)
        total = {name: value.to(parameters[name].device) for name, value in total.items()}
        done, used = int(meta["done"]), set(meta["used"])
    saved = time.monotonic()
    if progress is not None:
        progress(done, len(tracks))

    for first in range(done, len(tracks), step):
        here = range(first, min(first + step, len(tracks)))
        make, every = _pass(model, tracks, here, plan, draws, masked)
        for k in range(0, len(every), rows):
            used |= SQUARES[gradients](model, parameters, make, every[k : k + rows], total)
        if progress is not None:
            progress(here.stop, len(tracks))
        if checkpoint is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            save_tensors(checkpoint, total, {"key": key, "done": here.stop, "used": sorted(used)})
            saved = time.monotonic()
    pairs = len(tracks) * draws
    values = {name: (value / pairs).cpu() for name, value in total.items()}
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"the Fisher of {name} is not finite: the model or a latent holds NaN, or use --dtype float32"
            )
    return Fisher(values, pairs, tuple(name for name in parameters if name not in used))


def _pass(
    model: Denoiser, tracks: Tracks, indices: range, plan: DrawPlan, draws: int, masked: bool
) -> tuple[Make, list[tuple[int, int]]]:
    """What makes noised rows of some tracks, and all their (track, draw) pairs."""
    batch = tracks.batch(indices, model.frames)

    def make(pairs: Sequence[tuple[int, int]]) -> Noised:
        return noised_rows(model, batch, pairs, plan, "fisher", masked)

    return make, [(i, d) for i in range(len(indices)) for d in range(draws)]
