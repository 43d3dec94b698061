"""Unlearning through one number a track: gradient ascent and random labelling, whatever kind of model gives the number.

The model class of Kim et al. 2025 (arXiv 2509.06277) is autoregressive: its loss is exact, there are no timesteps and no noise.
:class:`TrackLoss` is all that these methods ask of a model; :class:`attr_engine.musicgen_loss.MusicGenLoss` is one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine.errors import UserError
from attr_engine.fisher import Fisher
from attr_engine.forget_state import SoFar
from attr_engine.unlearn import Curvature
from attr_engine.updates import norm

Progress = Callable[[int, int], None]
OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
METHODS = ("ascent", "relabel")
_MEASURE, _UPDATE = 0, 1  # steps whose draws are for measuring, and the first for updates


def _silent(done: int, total: int) -> None:
    pass


class Diverged(UserError):
    """Weights or losses are not finite any more; what was kept of the steps is of no use."""


class TrackLoss(Protocol):
    """A model and tracks, by the loss of each track.

    Attributes:
        ids: of the N tracks.
        parameters: what is updated, by name.
        ceiling: the loss of a model that knows nothing; beyond it there is nothing to forget.
        labels: N texts, equal where the model is conditioned alike.
    """

    @property
    def ids(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...  # noqa: D102
    @property
    def ceiling(self) -> float: ...  # noqa: D102
    @property
    def labels(self) -> Sequence[str]: ...  # noqa: D102

    def losses(self, indices: Sequence[int], step: int, labels: Sequence[int] | None = None) -> Tensor:
        """Loss of each track, float64 ``[B]``, differentiable.

        Args:
            indices: of the tracks.
            step: a model whose loss is a mean over draws takes others in every step; one without draws ignores it.
            labels: tracks whose conditioning is taken instead of the tracks' own.
        """
        ...


@dataclass(frozen=True)
class ForgetSettings:
    """How weights are moved.

    Attributes:
        method: ``"ascent"``: the mean over the forget set of ``min(loss, ceiling)`` is raised; ``"relabel"``: the forget set is
            trained under the conditioning of other tracks.
        steps: optimizer steps.
        lr: learning rate.
        optimizer: ``"adam"`` (no weight decay) or ``"sgd"``.
        batch: tracks a step, 0 for the whole forget set.
        rows: tracks a pass through the model (memory; the gradient is their sum, so not part of the result's definition).
        seed: of the tracks of each step and of the labels.
    """

    method: str = "ascent"
    steps: int = 20
    lr: float = 1e-5
    optimizer: str = "adam"
    batch: int = 0
    rows: int = 1
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            UserError: names the setting.
        """
        if self.method not in METHODS or self.optimizer not in OPTIMIZERS:
            raise UserError(
                f"forgetting by {self.method!r} with {self.optimizer!r}: known are {', '.join(METHODS)}, with {', '.join(OPTIMIZERS)}"
            )
        if min(self.steps, self.rows) < 1 or self.batch < 0 or not 0.0 < self.lr < math.inf:
            raise UserError(
                f"{self.steps} steps of {self.batch} tracks, {self.rows} a pass, at learning rate {self.lr}: "
                "steps, rows and learning rate have to be above 0, the batch 0 or more"
            )


@dataclass(frozen=True)
class Forgotten:
    """What forgetting did to the loss of every track.

    Attributes:
        ids: N tracks.
        forget: bool ``[N]``, the forget set; the others are the remain set.
        before: float64 ``[N]``, losses under the weights that were there.
        after: float64 ``[N]``, under those that are there now.
    """

    ids: Sequence[str]
    forget: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def means(self) -> dict[str, dict[str, float]]:
        """Mean loss of both sets, before and after."""
        return {
            name: {"before": float(self.before[chosen].mean()), "after": float(self.after[chosen].mean())}
            for name, chosen in (("forget", self.forget), ("remain", ~self.forget))
        }


def track_losses(
    loss: TrackLoss, indices: Sequence[int], rows: int = 1, progress: Progress = _silent, so_far: SoFar | None = None,
    name: str = "losses",
) -> np.ndarray:  # fmt: skip
    """Losses float64 ``[n]`` of some tracks, all by the draws of step 0; those kept in ``so_far`` are not computed again."""
    so_far = so_far or SoFar()
    kept = so_far.losses(name)
    found = [] if kept is None else [kept]
    for first in range(0 if kept is None else len(kept), len(indices), rows):
        with torch.no_grad():
            found.append(loss.losses(indices[first : first + rows], _MEASURE).cpu())
        done = min(first + rows, len(indices))
        if so_far.due() or done == len(indices):
            so_far.keep_losses(name, torch.cat(found))
        progress(done, len(indices))
    return torch.cat(found).numpy()


def forget(
    loss: TrackLoss, indices: Sequence[int], settings: ForgetSettings, progress: Progress = _silent,
    so_far: SoFar | None = None,
) -> Forgotten:  # fmt: skip
    """Make a model forget some of its tracks; its weights are changed in place.

    Args:
        loss: model and tracks, N.
        indices: the forget set.
        settings: how.
        progress: called with (tracks and steps done, all of them).
        so_far: what a killed call of the same model, tracks and settings has kept, which this one goes on from.

    Raises:
        UserError: an unusable setting or forget set; :class:`Diverged` where a gradient or loss is not finite.
    """
    settings.check()
    everything = range(len(loss.ids))
    chosen = np.isin(everything, indices)
    if not chosen.any() or chosen.all():
        raise UserError(
            f"{int(chosen.sum())} of {len(chosen)} tracks to forget: name some, and leave some that remain"
        )
    if settings.method == "relabel":
        other_labels(loss, indices, settings.seed)  # refused, if it is, before anything is computed
    n = len(everything)

    def after_passes(done_before: int) -> Progress:
        return lambda done, _: progress(done_before + done, 2 * n + settings.steps)

    before = track_losses(loss, everything, settings.rows, after_passes(0), so_far, "before")
    move = ascent if settings.method == "ascent" else relabel
    move(loss, np.flatnonzero(chosen).tolist(), settings, after_passes(n), so_far)
    after = track_losses(loss, everything, settings.rows, after_passes(n + settings.steps), so_far, "after")
    if not np.isfinite(after).all():
        raise Diverged(
            "forgetting diverged: a loss is not finite afterwards; use a smaller --lr, or fewer --steps"
        )
    return Forgotten(list(loss.ids), chosen, before, after)


def ascent(
    loss: TrackLoss, indices: Sequence[int], settings: ForgetSettings, progress: Progress = _silent,
    so_far: SoFar | None = None,
) -> None:  # fmt: skip
    """Raise the losses of the forget set by gradient ascent; a track at the ceiling is left alone."""
    _descend(loss, indices, settings, lambda values: -values.clamp(max=loss.ceiling), None, progress, so_far)


def relabel(
    loss: TrackLoss, indices: Sequence[int], settings: ForgetSettings, progress: Progress = _silent,
    so_far: SoFar | None = None,
) -> None:  # fmt: skip
    """Train the forget set under the conditioning of other tracks, one for each track, chosen at random once.

    Raises:
        UserError: all tracks are conditioned alike.
    """
    labels = other_labels(loss, indices, settings.seed)
    _descend(loss, indices, settings, lambda values: values, labels, progress, so_far)


def other_labels(loss: TrackLoss, indices: Sequence[int], seed: int) -> list[int]:
    """For each track another one that is conditioned otherwise, uniformly at random.

    Raises:
        UserError: there is none.
    """
    rng, labels, out = np.random.default_rng(seed), np.array(loss.labels, dtype=object), []
    for i in indices:
        others = np.flatnonzero(labels != labels[i])
        if not len(others):
            raise UserError(
                f"every track has the text of {loss.ids[i]!r}: random labelling needs different ones, use ascent"
            )
        out.append(int(rng.choice(others)))
    return out


def _descend(
    loss: TrackLoss, indices: Sequence[int], settings: ForgetSettings, of: Callable[[Tensor], Tensor],
    labels: Sequence[int] | None, progress: Progress, so_far: SoFar | None,
) -> None:  # fmt: skip
    """Steps down the mean of ``of(losses)`` over the forget set; a step without any gradient changes nothing."""
    optimizer = OPTIMIZERS[settings.optimizer](loss.parameters.values(), lr=settings.lr)
    so_far = so_far or SoFar()
    for step in range(so_far.steps(loss.parameters, optimizer), settings.steps):
        places = _places(len(indices), step, settings)
        gradient = mean_gradient(loss, [indices[i] for i in places], _UPDATE + step, settings.rows, of,
                                 None if labels is None else [labels[i] for i in places])  # fmt: skip
        if not math.isfinite(length := norm(gradient)):
            raise Diverged(
                f"forgetting diverged at step {step} (the gradient is not finite): use a smaller --lr"
            )
        if length > 0.0:
            for name, p in loss.parameters.items():
                p.grad = gradient[name].to(p.dtype)
            try:
                optimizer.step()
            except RuntimeError as error:  # torch refuses a rate that its numbers cannot hold
                raise Diverged(
                    f"forgetting cannot take steps of lr {settings.lr:g} ({error}): use a smaller --lr"
                ) from error
        if so_far.due():
            so_far.keep_steps(step + 1, loss.parameters, optimizer)
        progress(step + 1, settings.steps)
    optimizer.zero_grad(set_to_none=True)


def _places(count: int, step: int, settings: ForgetSettings) -> list[int]:
    """Places of the forget set that a step takes: all of it, or the next part of an order that is new in every round."""
    size = min(settings.batch or count, count)
    # The last part of a round may be smaller: no track stands twice in a step.
    round_, part = divmod(step, -(-count // size))
    order = np.random.default_rng([settings.seed, round_]).permutation(count)
    return sorted(order[part * size : (part + 1) * size].tolist())


def mean_gradient(
    loss: TrackLoss,
    indices: Sequence[int],
    step: int,
    rows: int = 1,
    of: Callable[[Tensor], Tensor] = lambda values: values,
    labels: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Gradient of the mean over tracks of ``of(loss)``, summed up over passes of a few tracks.

    Returns:
        Parameter name to gradient, float32 (float64 of a float64 model); zeros where the loss does not use a parameter.
    """
    parameters = loss.parameters
    total = {
        n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for n, p in parameters.items()
    }
    for first in range(0, len(indices), rows):
        some = slice(first, first + rows)
        values = of(loss.losses(indices[some], step, None if labels is None else labels[some]))
        gradients = torch.autograd.grad(
            values.sum() / len(indices), list(parameters.values()), allow_unused=True
        )
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                total[name] += g
    return total


def fit_track_fisher(loss: TrackLoss, steps: int = 1, progress: Progress = _silent) -> Fisher:
    """Diagonal Fisher ``F_j = mean over tracks and steps of (dL/dtheta_j)^2``, one track a backward pass.

    Args:
        loss: model and tracks.
        steps: steps whose draws are taken, from the first of updates; 1 where the model has none.
        progress: called with (passes done, passes).
    """
    total: dict[str, Tensor] = {}
    pairs = [(i, step) for i in range(len(loss.ids)) for step in range(steps)]
    for done, (i, step) in enumerate(pairs):
        for name, g in mean_gradient(loss, [i], _UPDATE + step).items():
            total.setdefault(name, torch.zeros_like(g)).addcmul_(g, g, value=1.0 / len(pairs))
        progress(done + 1, len(pairs))
    return Fisher(total, len(pairs))


@contextlib.contextmanager
def moved(parameters: Mapping[str, nn.Parameter], delta: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with ``theta + delta``; afterwards the parameters are theta again, bit for bit."""
    kept = {name: parameters[name].data for name in delta}
    try:
        for name, change in delta.items():
            parameters[name].data = (kept[name] + change).to(kept[name].dtype)
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def loss_changes(
    tracks: TrackLoss,
    queries: TrackLoss,
    curvature: Curvature | None = None,
    size: float = 1e-2,
    damping: float = 0.1,
    rows: int = 1,
    progress: Progress = _silent,
) -> np.ndarray:
    """Scores by unlearning each query: ``tau[q, i] = L(z_i; theta_q) - L(z_i; theta_0)``, one step up the query's loss.

    The step of Choi et al. 2025 (arXiv 2506.18312), ``(F + damping)^-1 grad L(z_q)``, or the plain gradient. Losses before and
    after are of the same draws.

    Args:
        tracks: model and training tracks, N.
        queries: the same model, and the Q queries.
        curvature: F (:func:`fit_track_fisher`), or None for the plain gradient.
        size: norm of the step relative to the norm of the parameters.
        damping: relative to the mean of F.
        rows: tracks a pass.
        progress: called with (queries done, Q).

    Returns:
        float64 ``[Q, N]``, larger = more responsible. The weights are as before.

    Raises:
        UserError: an unusable size, a query of another model, or a gradient that is zero or not finite.
    """
    if not 0.0 < size < math.inf:
        raise UserError(f"a step of relative size {size}: use a positive one")
    if any(p is not tracks.parameters.get(name) for name, p in queries.parameters.items()):
        raise UserError("queries and tracks are of different models or layers: load one model for both")
    everything, weights = range(len(tracks.ids)), norm(tracks.parameters)
    before = track_losses(tracks, everything, rows)
    out = np.zeros((len(queries.ids), len(everything)))
    for q, name in enumerate(queries.ids):
        gradient = mean_gradient(queries, [q], _UPDATE, rows)
        direction = gradient if curvature is None else curvature.precondition(gradient, damping)
        length = norm(direction)
        if not 0.0 < length < math.inf:
            raise UserError(
                f"the gradient of query {name!r} has norm {length}: the layers do not see it, or it holds NaN"
            )
        with moved(tracks.parameters, {n: g * (size * weights / length) for n, g in direction.items()}):
            out[q] = track_losses(tracks, everything, rows) - before
        progress(q + 1, len(out))
    return out
