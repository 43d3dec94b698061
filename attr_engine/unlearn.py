"""Unlearning a query: ``theta_{k+1} = theta_k + lr / N (F + damping)^-1 grad L(z_q; theta_k)``.

METHOD section 1. F is fixed at theta_0; every step has fresh draws; the loss of the query rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan, Noised, RowFunction, losses, noised_rows, work_dtype
from attr_engine.errors import UserError
from attr_engine.fisher import check_damping
from attr_engine.latents.batch import Batch, Tracks, check_tracks
from attr_engine.models.protocol import Denoiser
from attr_engine.persample import summed_gradient
from attr_engine.strength import KEPT_ROWS, SEARCHED, Response, find_size
from attr_engine.updates import Update, applied

_TRACKS = 64  # of a group that are in memory at a time
UNITS = ("size", "lr", *SEARCHED)
"""What a strength can be: the norm of the whole update relative to the norm of the weights, the paper's learning rate, or how far the
query itself is unlearned (:mod:`attr_engine.strength`)."""


class Curvature(Protocol):
    """What turns a gradient into the direction of an update: :class:`attr_engine.fisher.Fisher`, or another with its methods."""

    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter that is updated, by name."""
        ...

    def precondition(self, gradient: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """``(H + damping * unit)^-1 gradient`` in the names and shapes of ``gradient``; the curvature says what its unit is."""
        ...


def query_gradient(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    draws: range,
    plan: DrawPlan,
    masked: bool,
    rows: int,
    function: RowFunction = losses,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Gradient of the query's loss, or of another function of it, averaged over draws (and over the tracks of a batch).

    It is in the work dtype; ``tick`` is called before every pass, and what it raises ends it.
    """
    mean = {name: torch.zeros_like(p, dtype=work_dtype(model)) for name, p in parameters.items()}
    pairs = [(i, draw) for i in range(len(batch.ids)) for draw in draws]
    for first in range(0, len(pairs), rows):
        tick()
        rows_here = noised_rows(model, batch, pairs[first : first + rows], plan, "update", masked)
        gradient = summed_gradient(model, parameters, rows_here, function)
        for name, g in gradient.items():
            if g is not None:
                mean[name].add_(g, alpha=1.0 / len(pairs))
    return mean


def group_gradient(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    tracks: Tracks,
    indices: Sequence[int],
    *more: Any,
) -> dict[str, Tensor]:
    """:func:`query_gradient`, averaged over some tracks of a set, of which a few are in memory at a time."""
    mean: dict[str, Tensor] = {}
    for first in range(0, len(indices), _TRACKS):
        some = indices[first : first + _TRACKS]
        found = query_gradient(model, parameters, tracks.batch(some, model.frames), *more)
        if len(some) == len(indices):
            return found
        for name, g in found.items():
            mean.setdefault(name, torch.zeros_like(g)).add_(g, alpha=len(some) / len(indices))
    return mean


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(
        torch.sqrt(sum((t.detach().double().square().sum() for t in tensors.values()), torch.zeros(())))
    )


def check_settings(strength: float, unit: str, steps: int, damping: float, loss: bool = True) -> None:
    """Refuse what cannot be computed; ``loss`` says whether the loss alone is what is raised.

    Raises:
        UserError: names the setting.
    """
    if unit not in UNITS or not 0.0 < strength < math.inf or steps < 1:
        raise UserError(
            f"strength {strength} in unit {unit!r} with {steps} steps: use a positive strength, one of {', '.join(UNITS)}, at least 1 step"
        )
    if unit in SEARCHED and steps > 1:
        raise UserError(
            f"the size of an update is looked for along one direction, and {steps} steps have {steps}: use --steps 1 with unit {unit!r}, "
            "or --unit size"
        )
    if unit == "null_loss" and strength > 1.0:
        raise UserError(
            f"strength {strength} in unit 'null_loss' is a part of the way to the null loss: use one above 0 and at most 1"
        )
    if unit == "null_loss" and not loss:
        raise UserError(
            "unit 'null_loss' is about the loss, and an update that raises the squared norm (norm_influence) need not raise it: leave that "
            "score function out, or use --unit displacement"
        )
    check_damping(damping)


def _passes(
    model: Denoiser,
    tracks: Tracks,
    indices: Sequence[int],
    draws: range,
    plan: DrawPlan,
    masked: bool,
    rows: int,
) -> list[Callable[[], Noised]]:
    """What makes the noised rows of an update's gradient, pass by pass; the tracks of a pass are read when it is made."""
    pairs = [(i, draw) for i in indices for draw in draws]

    def make(some: Sequence[tuple[int, int]]) -> Noised:
        here = list(dict.fromkeys(i for i, _ in some))
        batch = tracks.batch(here, model.frames)
        return noised_rows(model, batch, [(here.index(i), d) for i, d in some], plan, "update", masked)

    return [partial(make, pairs[k : k + rows]) for k in range(0, len(pairs), rows)]


def unlearn_query(
    model: Denoiser,
    queries: Tracks,
    index: int | Sequence[int],
    fisher: Curvature,
    plan: DrawPlan,
    training_tracks: int,
    strength: float = 1e-2,
    unit: str = "size",
    steps: int = 1,
    draws: int = 64,
    damping: float = 0.1,
    masked: bool = True,
    rows: int = 16,
    first_gradient: Mapping[str, Tensor] | None = None,
    function: RowFunction = losses,
    tick: Callable[[], None] = lambda: None,
    kept_rows: int = KEPT_ROWS,
) -> Update:
    """Unlearn one query from theta_0.

    Args:
        model: theta_0; unchanged on return.
        queries: the set that holds the query.
        index: its index there; or several, which are unlearned jointly: the mean of their losses is raised.
        fisher: the diagonal Fisher of the layer group that is updated, or another curvature of it.
        plan: draw plan; the purpose is ``update``, step k uses draws ``k * draws`` and on.
        training_tracks: N of the formula.
        strength: with ``unit="lr"`` the paper's learning rate; with ``unit="size"`` the norm of the
            whole update relative to the norm of the parameters (each step has ``1/steps`` of it); with the others what the query has to
            reach, from which its size follows (:mod:`attr_engine.strength`).
        unit: one of :data:`UNITS`.
        steps: how many updates, each with a gradient of its own; 1 where a size is looked for.
        draws: draws a step, a multiple of the plan's replicates.
        damping: relative to the mean of the Fisher over all parameters of the group; of another curvature, see there.
        masked: M_U, whether only valid frames of the query count.
        rows: draws a backward pass (memory; not part of the result's definition).
        first_gradient: what :func:`query_gradient` gives at theta_0, where it is known already: it is
            the same for every strength.
        function: what is raised, of (model, noised rows) ``[B]``: the loss, or another function of the query whose
            preconditioned gradient is wanted (:data:`attr_engine.diffusion.ROW_FUNCTIONS`).
        tick: called before every pass; what it raises ends the unlearning.
        kept_rows: of a query with so many rows (tracks times draws) at most, the rows and their predictions stay in memory while a size is
            looked for; of others, they are made again for every size.

    Raises:
        UserError: an unusable query or setting, a gradient that is zero or not finite, or a query that cannot be unlearned so far.
    """
    check_tracks(queries, model.channels, model.frames, "query")
    plan.check(draws, "the number of update draws")
    check_settings(strength, unit, steps, damping, function is losses)
    shapes = fisher.shapes()
    parameters = {n: p for n, p in model.module.named_parameters() if n in shapes}
    strange = [n for n, shape in shapes.items() if n not in parameters or shape != parameters[n].shape]
    if strange:
        raise UserError(f"the Fisher is of another model: its {strange[0]!r} does not fit this one")
    weight_norm = _norm(parameters)
    indices = [index] if isinstance(index, int) else list(index)
    name = queries.ids[indices[0]]
    named = name if len(indices) == 1 else f"{name} and {len(indices) - 1} more"
    delta = {n: torch.zeros_like(p, dtype=work_dtype(model)) for n, p in parameters.items()}
    first_lr, reaction = 0.0, dict[str, float]()
    for k in range(steps):
        if k == 0 and first_gradient is not None:
            gradient: Mapping[str, Tensor] = first_gradient
        else:
            with applied(model, delta):
                fresh = range(k * draws, (k + 1) * draws)
                gradient = group_gradient(
                    model, parameters, queries, indices, fresh, plan, masked, rows, function, tick
                )
        direction = fisher.precondition(gradient, damping)
        length = _norm(direction)
        if not 0.0 < length < float("inf"):
            raise UserError(
                f"the gradient of query {named!r} has norm {length}: the layers {list(delta)[:1]}... do not see it, or it holds NaN"
            )
        size = strength / steps
        if unit in SEARCHED:
            makes = _passes(model, queries, indices, range(draws), plan, masked, rows)
            keep = len(indices) * draws <= kept_rows
            response = Response(model, direction, weight_norm / length, makes, keep, tick)
            size, reaction = find_size(response, strength, unit, named)
        lr = strength if unit == "lr" else size * weight_norm * training_tracks / length
        first_lr = first_lr or lr
        for n in delta:
            delta[n] += (lr / training_tracks) * direction[n]
    return Update(name, strength, unit, delta, first_lr, _norm(delta) / weight_norm, reaction)
