"""MUCS: mirrored unlearning by fine-tuning, and the normalised skew on draws that all tracks share (arXiv 2605.17938)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan
from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import Workspace, method, option
from attr_engine.methods.unlearner import (
    ROWS,
    FittedUnlearner,
    Outcome,
    descend,
    even_rows,
    fitted,
    loss_and_gradient,
    null_loss,
    others,
    training_plan,
)
from attr_engine.models.protocol import Denoiser


@dataclass(frozen=True)
class Mirroring:
    """How :func:`mirrored` fine-tunes.

    Attributes:
        weight: lambda of the formula.
        lr: of Adam.
        stop: part of the null loss at which it ends.
        steps: at most.
        batch: rows a step, of what is kept and of what is forgotten each.
        null: what the null loss is of, see :func:`attr_engine.methods.unlearner.null_loss`.
        seed: of order and noise.
        masked: whether only valid frames of what is forgotten count; of what is kept all do, as in training.
        rows: a pass (memory; not part of the result's definition).
    """

    weight: float = 0.2
    lr: float = 2e-4
    stop: float = 0.95
    steps: int = 300
    batch: int = 16
    null: str = "auto"
    seed: int = 0
    masked: bool = True
    rows: int = ROWS


def kept_rows(indices: Sequence[int], count: int, step: int, seed: int) -> tuple[list[int], list[int]]:
    """Tracks and draws of a step's rows from what is kept: tracks at random, no draw twice; of (seed, step) alone."""
    chosen = np.random.default_rng([seed, 5, step]).integers(len(indices), size=count)
    return [indices[int(i)] for i in chosen], list(range(step * count, (step + 1) * count))


def mirrored(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], source: Tracks, forget: Sequence[int], tracks: Tracks,
    keep: Sequence[int], how: Mirroring,
) -> Outcome:  # fmt: skip
    """Fine-tune on ``retain - lambda * forget`` until ``forget >= stop * L_null``.

    ``retain`` is the mean loss of a step's rows, ``forget`` the mean of ``min(loss, L_null)``: rows that are forgotten are left alone.
    ``L_null`` is one number (:func:`null_loss`). Whether to stop is seen from the step's own rows, before it is taken.

    Args:
        model: theta_0; unchanged on return.
        parameters: which are trained.
        source: the set that holds what is to be forgotten.
        forget: places there.
        tracks: the training tracks.
        keep: places there of what is to be kept.
        how: see there.

    Returns:
        ``ended`` says whether the loss was reached.

    Raises:
        UserError: nothing to keep, unusable settings, or an update that diverges.
    """
    if not keep or how.batch < 1 or not 0.0 <= how.weight < np.inf or not 0.0 < how.stop <= 1.0:
        raise UserError(
            f"fine-tuning on {len(keep)} tracks to keep, {how.batch} rows a step, lambda {how.weight}, to {how.stop} of the null loss: "
            "use at least one track and row, lambda at least 0, and a stop above 0 and at most 1"
        )
    plan = training_plan(how.seed)
    null = null_loss(model, source, forget, plan, how.masked, how.null, how.rows)
    loss = np.nan

    def gradient(step: int) -> dict[str, Tensor] | None:
        nonlocal loss
        chosen, draws = even_rows(forget, how.batch, step)
        batch = source.batch(chosen, model.frames)
        loss, rising = loss_and_gradient(model, parameters, batch, draws, plan, how.masked, how.rows, null)
        if loss >= how.stop * null:
            return None
        chosen, draws = kept_rows(keep, how.batch, step, how.seed)
        batch = tracks.batch(chosen, model.frames)
        _, total = loss_and_gradient(model, parameters, batch, draws, plan, False, how.rows)
        for name, g in rising.items():
            total[name].sub_(g, alpha=how.weight)
        return total

    delta, steps = descend(model, parameters, gradient, how.steps, how.lr)
    return Outcome(delta, steps, loss, how.stop * null, loss >= how.stop * null)


@method(
    "mucs",
    "unlearning",
    "fine-tuning away the query, skew on draws that all tracks share (Serra et al. 2026)",
)
@dataclass(frozen=True)
class Mucs:
    """:func:`mirrored`, then :func:`attr_engine.score.skew`."""

    weight: float = option(0.2, "lambda: weight of forgetting against keeping")
    lr: float = option(2e-4, "of Adam: a tenth of what the model was trained with")
    stop: float = option(0.95, "part of an untrained network's loss at which the query is forgotten")
    steps: int = option(300, "at most")
    batch: int = option(16, "rows a step of the query, and of training tracks")
    draws: int = option(100, "draws for the scores, the same for all tracks")
    null: str = option("auto", "untrained network's loss: untrained, zero (predicts zero), or auto")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedUnlearner:
        """Nothing is computed: every query is fine-tuned away by itself."""
        s = work.settings
        how = Mirroring(
            self.weight, self.lr, self.stop, self.steps, self.batch, self.null, s.seed, s.mask_update, s.rows or ROWS
        )  # fmt: skip

        def unlearn(query: Query, parameters: Mapping[str, nn.Parameter]) -> Outcome:
            keep = others(tracks, query)
            return mirrored(model, parameters, query.tracks, query.indices, tracks, keep, how)

        plan = DrawPlan(s.seed, "shared", s.replicates)
        return fitted(self, model, tracks, work, "skew", plan, self.draws, unlearn)
