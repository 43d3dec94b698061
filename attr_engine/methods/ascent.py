"""Two plain ways to unlearn: gradient ascent on the loss, and training against wrong conditioning (random labelling)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan, Noised, losses, work_dtype
from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks, stable_text
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
    training_plan,
)
from attr_engine.models.protocol import Denoiser
from attr_engine.unlearn import check_settings, group_gradient
from attr_engine.updates import applied, norm

_POOL = 64  # training tracks whose conditioning stands in where what is forgotten has none but its own


def ascend(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], source: Tracks, forget: Sequence[int], plan: DrawPlan,
    strength: float, steps: int, draws: int, masked: bool, null: str = "auto", rows: int = ROWS,
) -> Outcome:  # fmt: skip
    """Gradient ascent on ``min(L, L_null)``: steps along the plain gradient of the mean loss, each ``strength / steps`` long.

    It is :func:`attr_engine.unlearn.unlearn_query` with the identity in the place of the Fisher, until losses of single draws reach
    the null loss: these have no gradient any more, and where all have reached it the ascent ends.

    Args:
        model: theta_0; unchanged on return.
        parameters: which are changed.
        source: the set that holds what is to be forgotten.
        forget: places there; several are unlearned jointly.
        plan: of the draws; step k uses draws ``k * draws`` and on.
        strength: sum of the lengths of all steps, relative to the norm of the parameters.
        steps: at most.
        draws: a track and step.
        masked: M_U.
        null: see :func:`attr_engine.methods.unlearner.null_loss`.
        rows: a pass.

    Raises:
        UserError: unusable settings, or a gradient that is zero or not finite.
    """
    check_settings(strength, "size", steps, 0.0)
    plan.check(draws, "the number of update draws")
    bound = null_loss(model, source, forget, plan, masked, null, rows)
    delta = {n: torch.zeros_like(p, dtype=work_dtype(model)) for n, p in parameters.items()}
    whole, mean = norm(parameters), math.nan
    for k in range(steps):
        seen: list[Tensor] = []

        def bounded(model: Denoiser, noised: Noised, seen: list[Tensor] = seen) -> Tensor:
            seen.append(losses(model, noised).clamp(max=bound))
            return seen[-1]

        with applied(model, delta):
            fresh = range(k * draws, (k + 1) * draws)
            gradient = group_gradient(model, parameters, source, forget, fresh, plan, masked, rows, bounded)
        found = torch.cat([x.detach() for x in seen])
        mean = float(found.mean())
        if bool((found >= bound).all()):
            return Outcome(delta, k, mean, bound)
        long = norm(gradient)
        if not 0.0 < long < math.inf:
            raise UserError(
                f"the gradient of {source.ids[forget[0]]!r} has norm {long}: the layers do not see it, or it holds NaN"
            )
        for name, value in delta.items():
            value.add_(gradient[name], alpha=strength / steps * whole / long)
    return Outcome(delta, steps, mean, bound)


def shuffled(labels: Sequence[str], rng: np.random.Generator) -> list[int]:
    """A random permutation that gives as few places as possible a label equal to their own.

    Places of one label stand together, in random order, and all are turned by the number of the most frequent label: no place
    keeps its label unless that label has more than half of them, and then only as many as must.
    """
    order = rng.permutation(len(labels))
    rank = {label: i for i, label in enumerate(dict.fromkeys(labels[i] for i in order))}
    groups = sorted(order.tolist(), key=lambda i: rank[labels[i]])
    turn = max(labels.count(label) for label in rank)
    out = [0] * len(labels)
    for place, i in enumerate(groups):
        out[i] = groups[(place + turn) % len(groups)]
    return out


def wrong_labels(
    own: Sequence[Mapping[str, Any]], pool: Sequence[Mapping[str, Any]], rng: np.random.Generator
) -> list[Mapping[str, Any]]:
    """The conditioning of rows, shuffled among them; of the pool, at random, where that leaves a row its own."""
    texts = [stable_text(c) for c in own]
    out = [own[i] for i in shuffled(texts, rng)]
    for i, text in enumerate(texts):
        if stable_text(out[i]) == text:
            different = [c for c in pool if stable_text(c) != text]
            out[i] = different[int(rng.integers(len(different)))] if different else out[i]
    return out


def relabelled(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], source: Tracks, forget: Sequence[int], tracks: Tracks, steps: int,
    lr: float, batch: int, masked: bool, seed: int, rows: int = ROWS,
) -> Outcome:  # fmt: skip
    """Train what is to be forgotten against wrong conditioning: Adam on its loss, labels shuffled anew in every step.

    Args:
        model: theta_0; unchanged on return.
        parameters: which are trained.
        source: the set that holds what is to be forgotten.
        forget: places there.
        tracks: the training tracks, some of whose conditioning stands in where all of ``forget`` has the same.
        steps: of Adam.
        lr: likewise.
        batch: rows a step.
        masked: whether only valid frames count.
        seed: of labels and noise.
        rows: a pass.

    Raises:
        UserError: no other conditioning is there, unusable settings, or an update that diverges.
    """
    if batch < 1:
        raise UserError(f"relabelling with {batch} rows a step: use at least 1")
    plan, loss = training_plan(seed), math.nan
    few = np.random.default_rng([seed, 6]).choice(len(tracks), min(_POOL, len(tracks)), replace=False)
    pool = tracks.batch(few.tolist(), model.frames).conditioning
    name = source.ids[forget[0]]

    def gradient(step: int) -> dict[str, Tensor]:
        nonlocal loss
        chosen, draws = even_rows(forget, batch, step)
        right = source.batch(chosen, model.frames)
        wrong = wrong_labels(right.conditioning, pool, np.random.default_rng([seed, 7, step]))
        if all(stable_text(a) == stable_text(b) for a, b in zip(right.conditioning, wrong, strict=True)):
            raise UserError(
                f"no track has another conditioning than {name!r}: a model without text or numbers cannot be relabelled"
            )
        loss, found = loss_and_gradient(
            model, parameters, replace(right, conditioning=wrong), draws, plan, masked, rows
        )
        return found

    delta, done = descend(model, parameters, gradient, steps, lr)
    return Outcome(delta, done, loss)


@method("ascent", "unlearning", "the query unlearned by plain gradient ascent, without the Fisher")
@dataclass(frozen=True)
class Ascent:
    """:func:`ascend`, then a score function of what it does."""

    strength: float = option(1e-2, "lengths of all steps together, relative to the weights")
    steps: int = option(4, "of gradient ascent")
    score: str = option("loss_change", "loss_change, skew or displacement")
    null: str = option("auto", "untrained network's loss, which ends it: untrained, zero, or auto")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedUnlearner:
        """Nothing is computed: every query is unlearned by itself."""
        s = work.settings
        plan = DrawPlan(s.seed, s.plan, s.replicates)

        def unlearn(query: Query, parameters: Mapping[str, nn.Parameter]) -> Outcome:
            return ascend(
                model, parameters, query.tracks, query.indices, plan, self.strength, self.steps, s.update_draws, s.mask_update,
                self.null, s.rows or ROWS,
            )  # fmt: skip

        return fitted(self, model, tracks, work, self.score, plan, s.score_draws, unlearn)


@method(
    "relabel", "unlearning", "the query trained against the conditioning of other tracks (random labelling)"
)
@dataclass(frozen=True)
class Relabel:
    """:func:`relabelled`, then a score function of what it does."""

    steps: int = option(100, "of Adam")
    lr: float = option(2e-4, "of Adam: a tenth of what the model was trained with")
    batch: int = option(16, "rows a step")
    score: str = option("loss_change", "loss_change, skew or displacement")

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedUnlearner:
        """Nothing is computed: every query is relabelled by itself."""
        s = work.settings

        def unlearn(query: Query, parameters: Mapping[str, nn.Parameter]) -> Outcome:
            return relabelled(
                model, parameters, query.tracks, query.indices, tracks, self.steps, self.lr, self.batch, s.mask_update, s.seed,
                s.rows or ROWS,
            )  # fmt: skip

        plan = DrawPlan(s.seed, s.plan, s.replicates)
        return fitted(self, model, tracks, work, self.score, plan, s.score_draws, unlearn)
