"""Draws: which noise and which timestep a track meets, and the loss that follows.

A draw is one (t, noise) pair. Draw ``d`` of track ``i`` depends on (seed, purpose, id_i, d) and on
nothing else: not on the batch, the order or the padded length. Timesteps come from ``R``
replicates of the additive golden-ratio sequence, each with its own shift: draw ``d`` is element
``d // R`` of replicate ``d % R``, ``t = frac(u(seed, purpose, id, d % R) + 0.6180339887... (d // R))``.
Every prefix is spread over [0, 1), draws can be added later, and the spread between replicates is
an honest standard error (the points within one replicate are dependent).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0

Purpose = Literal["fisher", "update", "score"]


def _hash64(*parts: object) -> int:
    """Hash the parts to 64 bits; lengths are part of the input, so that no two lists collide."""
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class DrawPlan:
    """How draws are keyed.

    Attributes:
        seed: any integer.
        kind: ``"track"``: every track has draws of its own; ``"shared"``: the id is left out and
            every track meets the same timesteps and noise, frame by frame.
        replicates: R, independently shifted copies of the timestep sequence, at least 1.
    """

    seed: int = 0
    kind: str = "track"
    replicates: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("track", "shared"):
            raise UserError(f"unknown draw plan {self.kind!r}; known: 'track', 'shared'")
        if self.replicates < 1:
            raise UserError(f"replicates must be at least 1, not {self.replicates}")

    def _owner(self, track: str) -> str:
        return "" if self.kind == "shared" else track

    def timestep(self, purpose: Purpose, track: str, draw: int) -> float:
        """Timestep in [0, 1) of one draw."""
        replicate, element = draw % self.replicates, draw // self.replicates
        shift = _hash64("t", self.seed, purpose, self._owner(track), replicate) / 2.0**64
        return math.fmod(shift + GOLDEN * element, 1.0)

    def key(self, purpose: Purpose, track: str, draw: int) -> int:
        """64-bit key of the noise of one draw, as a signed integer."""
        key = _hash64("noise", self.seed, purpose, self._owner(track), draw)
        return key - 2**64 if key >= 2**63 else key

    def check(self, draws: int, what: str) -> None:
        """Refuse a number of draws that does not fill the replicates evenly."""
        if draws < 1 or draws % self.replicates:
            raise UserError(
                f"{what} is {draws}: it must be a positive multiple of the {self.replicates} replicates "
                "of the timestep sequence (change it, or --replicates)"
            )


@dataclass(frozen=True)
class Noised:
    """Rows ready for the model: one row is one (track, draw) pair.

    Attributes:
        x: clean latents ``[B, C, F]``, float32 or float64.
        keys: of each row's noise, int64 ``[B]``.
        t: timesteps ``[B]`` float64.
        objective: ``"v"`` or ``"rectified_flow"``.
        x_t: noised latents ``[B, C, F]``.
        target: ``[B, C, F]`` in the dtype of ``x``; None where the loss kernel makes the noise again.
        counted: bool ``[B, F]``.
        conditioning: what the model's ``conditioning`` returned for these rows.
    """

    x: Tensor
    keys: Tensor
    t: Tensor
    objective: str
    x_t: Tensor
    target: Tensor | None
    counted: Tensor
    conditioning: Any


def work_dtype(model: Denoiser) -> torch.dtype:
    """Dtype of latents, targets and accumulators: float64 for float64 models, else float32."""
    return torch.float64 if next(model.module.parameters()).dtype == torch.float64 else torch.float32


def noised_rows(
    model: Denoiser,
    batch: Batch,
    rows: Sequence[tuple[int, int]],
    plan: DrawPlan,
    purpose: Purpose,
    masked: bool,
) -> Noised:
    """Noise the tracks of a batch.

    Args:
        model: gives objective, device and conditioning.
        batch: tracks padded to the model's frames.
        rows: (index in batch, draw) pairs, one a row.
        plan: the draw plan.
        purpose: ``"fisher"``, ``"update"`` or ``"score"``.
        masked: whether only valid frames count in the loss.

    Returns:
        The rows, in the order asked for.
    """
    device, dtype = next(model.module.parameters()).device, work_dtype(model)
    tracks = [batch.ids[i] for i, _ in rows]
    keys = [plan.key(purpose, track, d) for track, (_, d) in zip(tracks, rows, strict=True)]
    times = [plan.timestep(purpose, track, d) for track, (_, d) in zip(tracks, rows, strict=True)]
    index = torch.as_tensor([i for i, _ in rows])
    x = batch.latents[index].to(device=device, dtype=dtype)
    noise_keys = torch.tensor(keys, device=device)
    t = torch.tensor(times, dtype=torch.float64, device=device)
    target: Tensor | None = None
    if kernels.fused(device):
        x_t = kernels.noised(x, noise_keys, t, model.objective)
    else:  # on a CPU making the noise again would cost as much as a small model
        e = kernels.noise(noise_keys, x.shape[1], x.shape[2])
        x_t, target = kernels.mix(x, e, t, model.objective), kernels.v_target(x, e, t, model.objective)
    counted = batch.mask()[index].to(device)
    return Noised(
        x=x,
        keys=noise_keys,
        t=t,
        objective=model.objective,
        x_t=x_t,
        target=target,
        counted=counted if masked else torch.ones_like(counted),
        conditioning=model.conditioning([batch.conditioning[i] for i, _ in rows]),
    )


def predict(model: Denoiser, noised: Noised) -> Tensor:
    """Predicted v (or flow) of every row, ``[B, C, F]`` in the work dtype."""
    return model.predict(noised.x_t, noised.t, noised.conditioning).to(noised.x.dtype)


def row_losses(prediction: Tensor, noised: Noised) -> Tensor:
    """Masked mean squared error of predictions ``[B, C, F]``: float64 ``[B]``, differentiable."""
    if noised.target is not None:
        return kernels.per_draw_loss(prediction, noised.target, noised.counted)
    gradient = prediction.requires_grad and torch.is_grad_enabled()
    parts = (noised.x, noised.keys, noised.t, noised.counted, noised.objective)
    return kernels.v_loss(prediction, *parts, with_gradient=gradient)[0]


def frame_losses(prediction: Tensor, noised: Noised) -> Tensor:
    """Squared error of every frame, the mean over channels: float64 ``[B, F]``, 0 where not counted."""
    if noised.target is not None:
        squared = (prediction - noised.target).square()
        return squared.sum(dim=1, dtype=torch.float64) / squared.shape[1] * noised.counted
    parts = (noised.x, noised.keys, noised.t, noised.counted, noised.objective)
    return kernels.v_loss(prediction, *parts, per_frame=True, with_gradient=False)[1]


def losses(model: Denoiser, noised: Noised) -> Tensor:
    """Per-draw loss of every row, float64 ``[B]``, differentiable."""
    return row_losses(predict(model, noised), noised)


def squared_norms(model: Denoiser, noised: Noised) -> Tensor:
    """Mean square of every row's prediction over the counted elements, float64 ``[B]``, differentiable.

    The function whose gradients D-TRAK (Zheng et al., ICLR 2024) takes in place of the loss's.
    """
    prediction = predict(model, noised)
    return kernels.per_draw_loss(prediction, torch.zeros_like(prediction), noised.counted)


RowFunction = Callable[[Denoiser, Noised], Tensor]
"""The number of each row ``[B]`` whose gradient is wanted."""

ROW_FUNCTIONS: dict[str, RowFunction] = {"loss": losses, "squared_norm": squared_norms}
"""Name to function of (model, noised rows): per-track functions of the influence family."""


def standard_error(values: np.ndarray, replicates: int) -> np.ndarray:
    """Standard error of the mean over draws, from the spread between replicates.

    Args:
        values: per-draw values ``[..., D]``; draw d belongs to replicate ``d % replicates``.
        replicates: R.

    Returns:
        ``[...]``; NaN where R is 1, because one replicate says nothing about its own error.
    """
    if replicates < 2:
        return np.full(values.shape[:-1], np.nan)
    means = values.reshape(*values.shape[:-1], -1, replicates).mean(axis=-2)
    return np.asarray(means.std(axis=-1, ddof=1) / math.sqrt(replicates))
