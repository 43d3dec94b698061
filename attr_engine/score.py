"""Scores: what unlearning a query does to every track, on the track's own draws.

``tau[q, i] = mean over draws of s(L_d(z_i; theta_0), L_d(z_i; theta_q), displacement, influence)``. The same
draws serve theta_0 and theta_q, so the difference is paired (METHOD section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import (
    DrawPlan,
    Noised,
    frame_losses,
    noised_rows,
    predict,
    row_losses,
    standard_error,
)
from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser
from attr_engine.unlearn import Update, applied


@dataclass(frozen=True)
class Effects:
    """Per-draw numbers of N tracks under U updates; float64, larger displacement = larger effect.

    Attributes:
        base: ``[N, D]``, loss under theta_0.
        unlearned: ``[U, N, D]``, loss under theta_0 + update.
        displacement: ``[U, N, D]``, mean squared change of the prediction over the counted elements.
        influence: name of a function of :data:`attr_engine.diffusion.ROW_FUNCTIONS` to ``[U, N, D]``, what
            :func:`attr_engine.influence.measure_influence` found.
    """

    base: np.ndarray
    unlearned: np.ndarray
    displacement: np.ndarray
    influence: Mapping[str, np.ndarray] = field(default_factory=dict)


def loss_change(effects: Effects) -> np.ndarray:
    """``L(theta_q) - L(theta_0)``: the paper's score (arXiv 2506.18312)."""
    return np.asarray(effects.unlearned - effects.base)


def skew(effects: Effects) -> np.ndarray:
    """``(L_u - L_t) / (L_u + L_t + 1e-3)``: normalised skew (MUCS, arXiv 2605.17938)."""
    return np.asarray((effects.unlearned - effects.base) / (effects.unlearned + effects.base + 1e-3))


def displacement(effects: Effects) -> np.ndarray:
    """``|f(theta_q) - f(theta_0)|^2``: how far the prediction moves (METHOD section 6)."""
    return effects.displacement


def influence(effects: Effects) -> np.ndarray:
    """Inner product of the track's loss gradient and the update: the loss change to first order."""
    return _influence(effects, "loss")


def norm_influence(effects: Effects) -> np.ndarray:
    """The same of the squared norm of the prediction, of query and track: the target function of D-TRAK."""
    return _influence(effects, "squared_norm")


def _influence(effects: Effects, function: str) -> np.ndarray:
    if function not in effects.influence:
        raise UserError(
            f"the influence of the {function} was not measured: put what measure_influence returns into Effects.influence"
        )
    return effects.influence[function]


ScoreFunction = Callable[[Effects], np.ndarray]
SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "displacement": displacement,
    "influence": influence,
    "loss_change": loss_change,
    "norm_influence": norm_influence,
    "skew": skew,
}
"""Name to function of :class:`Effects`, giving per-draw scores ``[U, N, D]``; add your own here."""


FIRST_ORDER = {"influence": "loss", "norm_influence": "squared_norm"}
"""Score functions that need no forward pass under an update, and the function whose gradients they take."""


def score_function(name: str) -> ScoreFunction:
    """Look up a score function.

    Raises:
        UserError: unknown name.
    """
    if name not in SCORE_FUNCTIONS:
        raise UserError(f"unknown score function {name!r}; known: {', '.join(SCORE_FUNCTIONS)}")
    return SCORE_FUNCTIONS[name]


def _rows(model: Denoiser, batch: Batch, plan: DrawPlan, draws: int, masked: bool, rows: int) -> list[Noised]:
    pairs = [(i, d) for i in range(len(batch.ids)) for d in range(draws)]
    return [
        noised_rows(model, batch, pairs[k : k + rows], plan, "score", masked)
        for k in range(0, len(pairs), rows)
    ]


@torch.no_grad()
def measure_effects(
    model: Denoiser,
    batch: Batch,
    updates: Sequence[Callable[[], Update]],
    plan: DrawPlan,
    draws: int,
    masked: bool = False,
    rows: int = 16,
) -> Effects:
    """Losses and displacements of a few tracks under every update.

    Args:
        model: theta_0; unchanged on return.
        batch: the tracks, padded to the model's frames.
        updates: one function an update that returns it, so that they need not all be in memory.
        plan: draw plan; the purpose is ``score``.
        draws: D, a multiple of the plan's replicates.
        masked: M_L, whether only valid frames of the tracks count.
        rows: (track, draw) pairs a forward pass.
    """
    plan.check(draws, "the number of score draws")
    noised = _rows(model, batch, plan, draws, masked, rows)
    base = [predict(model, n) for n in noised]

    def table(chunks: Iterable[Tensor]) -> np.ndarray:
        return np.asarray(torch.cat(list(chunks)).cpu().numpy().reshape(len(batch.ids), draws))

    unlearned = np.empty((len(updates), len(batch.ids), draws))
    moved = np.empty_like(unlearned)
    for u, load in enumerate(updates):
        found, displaced = [], []
        with applied(model, load().delta):
            for n, before in zip(noised, base, strict=True):
                after = predict(model, n)
                found.append(row_losses(after, n))
                displaced.append(kernels.per_draw_loss(after, before, n.counted))
        unlearned[u], moved[u] = table(found), table(displaced)
    return Effects(table(row_losses(p, n) for p, n in zip(base, noised, strict=True)), unlearned, moved)


def scores(
    effects: Effects, functions: Sequence[str], replicates: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score and standard error of every track under every update.

    Returns:
        Function name to (scores ``[U, N]``, standard errors ``[U, N]``), float64.

    Raises:
        UserError: unknown function.
    """
    out = {}
    for name in functions:
        per_draw = score_function(name)(effects)
        out[name] = (per_draw.mean(axis=-1), standard_error(per_draw, replicates))
    return out


@torch.no_grad()
def frame_effects(
    model: Denoiser, batch: Batch, update: Update, plan: DrawPlan, draws: int, rows: int = 16
) -> Mapping[str, np.ndarray]:
    """Where in the tracks an update acts.

    Returns:
        ``"displacement"`` and ``"loss_change"``: float64 ``[B, F]``, averaged over channels and draws.
    """
    noised = _rows(model, batch, plan, draws, False, rows)
    base = [predict(model, n) for n in noised]
    moved, change = [], []
    with applied(model, update.delta):
        for n, before in zip(noised, base, strict=True):
            after = predict(model, n)
            moved.append((after - before).square().double().mean(dim=1))
            change.append(frame_losses(after, n) - frame_losses(before, n))

    def per_frame(chunks: Sequence[Tensor]) -> np.ndarray:
        frames = torch.cat(list(chunks)).cpu().numpy()
        return np.asarray(frames.reshape(len(batch.ids), draws, -1).mean(axis=1))

    return {"displacement": per_frame(moved), "loss_change": per_frame(change)}
