"""Tail patch: one training step on a track that a method names; does the query's loss fall, and more than after a random track?

A cheap stand-in for retraining: it sees what more of a track would do to this model, not what the model would be without it
(Chang et al., Scalable Influence and Fact Tracing for Large Language Model Pretraining, ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan
from attr_engine.errors import UserError
from attr_engine.evaluation import Case
from attr_engine.jobs import Query
from attr_engine.judge import bootstrap
from attr_engine.latents.batch import Chosen, Tracks
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.report.data import Table
from attr_engine.result import order_of
from attr_engine.retrain import JUDGE_SEED, query_losses
from attr_engine.unlearn import query_gradient
from attr_engine.updates import applied, norm

SIZE = 1e-3  # of a step, relative to the norm of the weights
DRAWS = 32  # of a step's gradient, and of a query's loss
RANDOM = "random tracks"


def descent_step(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    tracks: Tracks,
    index: int,
    size: float = SIZE,
    draws: int = DRAWS,
    rows: int = 16,
) -> dict[str, Tensor]:
    """One step of plain gradient descent on the loss of a track, all frames counted as in training.

    Args:
        model: theta_0; unchanged.
        parameters: which are trained.
        tracks: the training tracks.
        index: of the track.
        size: norm of the step relative to the norm of the parameters: the same for every track, however large its gradient.
        draws: that the loss is the mean of; they are the judge's own, and no noise of theirs is met again by a query.
        rows: draws a backward pass.

    Returns:
        Parameter name to the change of it.

    Raises:
        UserError: the gradient is zero or not finite.
    """
    batch, plan = tracks.batch([index], model.frames), DrawPlan(JUDGE_SEED, "shared", 1)
    gradient = query_gradient(model, parameters, batch, range(draws), plan, False, rows)
    length = norm(gradient)
    if not 0.0 < length < float("inf"):
        raise UserError(
            f"the gradient of track {tracks.ids[index]!r} has norm {length}: check its latent for NaN"
        )
    scale = -size * norm(parameters) / length
    return {name: g * scale for name, g in gradient.items()}


def loss_falls(
    model: Denoiser,
    tracks: Tracks,
    queries: Sequence[Query],
    wanted: np.ndarray,
    size: float = SIZE,
    draws: int = DRAWS,
    rows: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """How much the loss of queries falls after one step on a track; every track is stepped on once, from theta_0.

    Args:
        model: theta_0; unchanged on return.
        tracks: the training tracks, N.
        queries: Q.
        wanted: bool ``[Q, N]``.
        size: of a step, see :func:`descent_step`.
        draws: of a step's gradient; and of a query's loss, the same before and after.
        rows: draws a pass.
        progress: called with (tracks done, tracks).

    Returns:
        float64 ``[Q, N]``, percent of the loss under theta_0, above 0 where it falls; NaN where not wanted.

    Raises:
        UserError: an unusable size or number of draws, or a gradient that is zero or not finite.
    """
    if not 0.0 < size < float("inf") or draws < 1:
        raise UserError(f"a step of size {size} by {draws} draws: use a positive size and at least 1 draw")
    alone = [Chosen(q.tracks, [q.index]) for q in queries]
    parameters, out = select_parameters(model, ("all",)), np.full(wanted.shape, np.nan)
    before = np.array([query_losses(model, q, draws, rows).mean() for q in alone])
    chosen = np.flatnonzero(wanted.any(axis=0))
    for done, i in enumerate(chosen):
        progress(done, len(chosen))
        with applied(model, descent_step(model, parameters, tracks, int(i), size, draws, rows)):
            for q in np.flatnonzero(wanted[:, i]):
                out[q, i] = 100 * (1 - query_losses(model, alone[q], draws, rows).mean() / before[q])
    progress(len(chosen), len(chosen))
    return out


def tail_table(
    case: Case,
    model: Denoiser,
    k: int,
    size: float = SIZE,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """Mean fall of a query's loss after a step on one of the top k tracks of each method, against k random tracks.

    Queries that are training tracks are left out: their own track would be what is seen.

    Args:
        case: to be judged.
        model: theta_0, of which the scores are.
        k: tracks a query and method.
        size: of a step, see :func:`descent_step`.
        draws: see :func:`loss_falls`.
        seed: of the random tracks.
        progress: called with (tracks done, tracks).

    Raises:
        UserError: k tracks are none or more than there are, or no query is left.
    """
    case, n = case.only([not own for own in case.own]), len(case.tracks)
    if not 1 <= k <= n:
        raise UserError(f"a tail patch of the top {k} of {n} tracks: use from 1 to {n}")
    if not case.queries:
        raise UserError(
            "a tail patch needs queries that are no training tracks: score some, or leave out --tail-patch"
        )
    rng = np.random.default_rng(seed)
    tops = {name: order_of(scores)[:, :k] for name, scores in case.methods.items()}
    tops[RANDOM] = np.stack([rng.choice(n, k, replace=False) for _ in case.queries])
    wanted = np.zeros((len(case.queries), n), dtype=bool)
    for top in tops.values():
        np.put_along_axis(wanted, top, True, axis=1)
    found = loss_falls(model, case.tracks, case.queries, wanted, size, draws, progress=progress)
    means = {name: np.take_along_axis(found, top, axis=1).mean(axis=1) for name, top in tops.items()}
    rows: list[list[str | float | int | None]] = []
    for name, each in means.items():
        fall, more = bootstrap(each), bootstrap(each - means[RANDOM])
        against = ["", "", ""] if name == RANDOM else [round(x, 4) for x in (more.value, more.low, more.high)]
        rows.append([name, *(round(x, 4) for x in (fall.value, fall.low, fall.high)), *against])
    note = (
        f"Percent that a query's loss falls by after one step of gradient descent on a track ({size:g} of the norm of the weights, "
        f"{draws} draws), mean over the top {k} of each method; {len(case.queries)} queries. One step on theta_0 is not the truth of "
        "influence: retraining is."
    )
    columns = ["method", "loss falls by, %", "low", "high", "more than random tracks", "low", "high"]
    return Table(f"Tail patch: a step on each of the top {k}", columns, rows, note)
