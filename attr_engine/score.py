"""Scores: what unlearning a query does to every track, on the track's own draws.

``tau[q, i] = mean over draws of s(L_d(z_i; theta_0), L_d(z_i; theta_q), displacement)``. The same
draws serve theta_0 and theta_q, so the difference is paired (METHOD section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import DrawPlan, Noised, noised_rows, predict, standard_error
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
    """

    base: np.ndarray
    unlearned: np.ndarray
    displacement: np.ndarray


def loss_change(effects: Effects) -> np.ndarray:
    """``L(theta_q) - L(theta_0)``: the paper's score (arXiv 2506.18312)."""
    return np.asarray(effects.unlearned - effects.base)


def skew(effects: Effects) -> np.ndarray:
    """``(L_u - L_t) / (L_u + L_t + 1e-3)``: normalised skew (MUCS, arXiv 2605.17938)."""
    return np.asarray((effects.unlearned - effects.base) / (effects.unlearned + effects.base + 1e-3))


def displacement(effects: Effects) -> np.ndarray:
    """``|f(theta_q) - f(theta_0)|^2``: how far the prediction moves (METHOD section 6)."""
    return effects.displacement


ScoreFunction = Callable[[Effects], np.ndarray]
SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "displacement": displacement,
    "loss_change": loss_change,
    "skew": skew,
}
"""Name to function of :class:`Effects`, giving per-draw scores ``[U, N, D]``; add your own here."""


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

    def table(per_chunk: Sequence[Tensor]) -> np.ndarray:
        return np.asarray(torch.cat(list(per_chunk)).cpu().numpy().reshape(len(batch.ids), draws))

    unlearned, moved = [], []
    for load in updates:
        with applied(model, load().delta):
            predictions = [predict(model, n) for n in noised]
        unlearned.append(
            table(
                [
                    kernels.per_draw_loss(p, n.target, n.counted)
                    for p, n in zip(predictions, noised, strict=True)
                ]
            )
        )
        moved.append(
            table(
                [
                    kernels.per_draw_loss(p, p0, n.counted)
                    for p, p0, n in zip(predictions, base, noised, strict=True)
                ]
            )
        )
    base_losses = table(
        [kernels.per_draw_loss(p, n.target, n.counted) for p, n in zip(base, noised, strict=True)]
    )
    shape = (0, len(batch.ids), draws)
    return Effects(
        base_losses, np.array(unlearned).reshape(-1, *shape[1:]), np.array(moved).reshape(-1, *shape[1:])
    )


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
    with applied(model, update.delta):
        after = [predict(model, n) for n in noised]

    def per_frame(chunks: Sequence[Tensor]) -> np.ndarray:
        frames = torch.cat([c.double().mean(dim=1) for c in chunks]).cpu().numpy()
        return np.asarray(frames.reshape(len(batch.ids), draws, -1).mean(axis=1))

    moved = [(p - p0).square() for p, p0 in zip(after, base, strict=True)]
    change = [
        (p - n.target).square().double() - (p0 - n.target).square().double()
        for p, p0, n in zip(after, base, noised, strict=True)
    ]
    return {"displacement": per_frame(moved), "loss_change": per_frame(change)}
