"""Methods that unlearn a query in a way of their own and score every track by what that did to it: what they share."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan, Noised, losses, noised_rows, row_losses, work_dtype
from attr_engine.effects import measure_effects
from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.batch import Batch, Tracks, check_tracks
from attr_engine.methods.base import Workspace, model_key
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.models.stable_audio import create_model
from attr_engine.runs import key_of
from attr_engine.score import score_function
from attr_engine.settings import UNLEARNING
from attr_engine.tensorfile import load_tensors, open_tensors, save_tensors
from attr_engine.updates import Unlearned, Update, applied, free_bytes, norm, swapped

NULLS = ("auto", "untrained", "zero")
ROWS = 16  # a pass, where the settings leave it open
_NULL_DRAWS = 32  # a track
_BLOCK = 16  # queries that are unlearned before the tracks are scored under all of them
_BETAS = (0.9, 0.98)  # those of attr_engine.train, which continues here


@dataclass(frozen=True)
class Outcome:
    """What unlearning came to.

    Attributes:
        delta: parameter name to ``theta_unlearned - theta_0``, float32 (float64 for a float64 model).
        steps: that were taken.
        loss: of what is to be forgotten, on the draws of the last look; NaN where nothing was looked at.
        null: the loss that ends the unlearning; infinity where none does.
        ended: whether it was reached, or all steps that were asked for were taken where none is to be reached.
    """

    delta: dict[str, Tensor]
    steps: int
    loss: float = math.nan
    null: float = math.inf
    ended: bool = True

    def size(self, parameters: Mapping[str, nn.Parameter]) -> float:
        """Norm of the update relative to the norm of the parameters."""
        return norm(self.delta) / norm(parameters)


def training_plan(seed: int) -> DrawPlan:
    """Draws of training rows: of every track its own, so that they depend on no batch; scores have another purpose and others."""
    return DrawPlan(seed, "track", 1)


def even_rows(indices: Sequence[int], count: int, step: int) -> tuple[list[int], list[int]]:
    """Tracks and draws of a step that goes through some tracks in turn: each as often as the others, no draw twice."""
    numbers = range(step * count, (step + 1) * count)
    return [indices[j % len(indices)] for j in numbers], [j // len(indices) for j in numbers]


def loss_and_gradient(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], batch: Batch, draws: Sequence[int], plan: DrawPlan, masked: bool,
    rows: int, bound: float = math.inf,
) -> tuple[float, dict[str, Tensor]]:  # fmt: skip
    """Mean of ``min(loss, bound)`` over one draw of every row of a batch, and its gradient in the work dtype; ``rows`` of them a pass."""
    mean = {name: torch.zeros_like(p, dtype=work_dtype(model)) for name, p in parameters.items()}
    pairs, seen = list(enumerate(draws)), []
    for first in range(0, len(pairs), rows):
        with torch.enable_grad():
            noised = noised_rows(model, batch, pairs[first : first + rows], plan, "update", masked)
            found = losses(model, noised).clamp(max=bound)
            total = found.sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        seen.append(found.detach())
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                mean[name].add_(g, alpha=1.0 / len(pairs))
    return float(torch.cat(seen).mean()), mean


def descend(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], gradient: Callable[[int], Mapping[str, Tensor] | None], steps: int,
    lr: float,
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """Adam with the betas of the training, at one learning rate, until ``gradient`` (of a step, at the weights so far) is None.

    Returns:
        The update and the number of steps.

    Raises:
        UserError: unusable settings, or a gradient that is not finite.
    """
    if steps < 1 or not 0.0 < lr < math.inf:
        raise UserError(f"{steps} steps with lr {lr}: use at least 1 step and a positive lr")
    delta = {n: torch.zeros_like(p, dtype=work_dtype(model)) for n, p in parameters.items()}
    optimizer = torch.optim.Adam(delta.values(), lr=lr, betas=_BETAS)
    for k in range(steps):
        with applied(model, delta):
            found = gradient(k)
        if found is None:
            return delta, k
        if not math.isfinite(norm(found)):
            raise UserError(f"unlearning diverged at step {k} (the gradient is not finite): use a smaller lr")
        for name, value in delta.items():
            value.grad = found[name]
        optimizer.step()
    return delta, steps


def _untrained(model: Denoiser, how: str) -> dict[str, Tensor] | None:
    """Weights of an untrained network of the model's kind, of the engine's own seed; None where a prediction of zero stands for it."""
    config = getattr(model, "config", None)
    if how not in NULLS or (how == "untrained" and config is None):
        raise UserError(
            f"the null loss is {how!r}: use one of {', '.join(NULLS)}; 'untrained' is for models that have a config to build "
            "another one from"
        )
    if how == "zero" or config is None:
        return None
    bare = copy.deepcopy(dict(config))
    bare["model"].pop("pretransform", None)  # only the denoiser is wanted, and conditioners may be large
    bare["model"]["conditioning"] = {**bare["model"]["conditioning"], "configs": []}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = dict(create_model(bare).model.named_parameters())
    return {name: fresh[name].detach().to(p) for name, p in model.module.named_parameters()}


@torch.no_grad()
def null_loss(
    model: Denoiser, tracks: Tracks, indices: Sequence[int], plan: DrawPlan, masked: bool, how: str = "auto", rows: int = ROWS,
) -> float:  # fmt: skip
    """Mean loss of some tracks under a model that knows nothing: where unlearning has nothing left to do.

    Args:
        model: theta_0.
        tracks: the set that holds them.
        indices: their places there.
        plan: of the draws, which are those of updates.
        masked: whether only valid frames count.
        how: ``"untrained"``: of an untrained network, built from the model's config with a fixed seed; ``"zero"``: of a prediction of
            zero, which is the mean square of the target; ``"auto"``: the first where the model has a config, else the second.
        rows: (track, draw) pairs a pass.

    Raises:
        UserError: unknown ``how``, or a model without a config where one is needed.
    """
    weights, seen = _untrained(model, how), []
    for i in indices:
        batch = tracks.batch([i], model.frames)
        for first in range(0, _NULL_DRAWS, rows):
            pairs = [(0, d) for d in range(first, min(first + rows, _NULL_DRAWS))]
            noised = noised_rows(model, batch, pairs, plan, "update", masked)
            if weights is None:
                seen.append(_zero_losses(noised))
            else:
                with swapped(model, weights):
                    seen.append(losses(model, noised))
    return float(torch.cat(seen).mean())


def _zero_losses(noised: Noised) -> Tensor:
    return row_losses(torch.zeros_like(noised.x), noised)


# -- as a method --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedUnlearner:
    """Scores by what unlearning a query does to every track, on the same draws before and after.

    Attributes:
        model: theta_0.
        tracks: the training tracks.
        work: where updates and scores are kept.
        unlearn: of a query.
        function: score function, one of ``UNLEARNING``.
        plan: of the score draws.
        draws: a track.
        key: of the method and its options.
    """

    model: Denoiser
    tracks: Tracks
    work: Workspace
    unlearn: Callable[[Query], Outcome]
    function: str
    plan: DrawPlan
    draws: int
    key: str

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Scores float64 ``[Q, N]``; every query's are kept, and its update until they are.

        Raises:
            UserError: an unusable query, or scores that are not finite.
        """
        for query in queries:
            check_tracks(query.tracks, self.model.channels, self.model.frames, "query")
        keys = [key_of(self.key, q.tracks.fingerprint, *q.indices) for q in queries]
        missing = {k: q for k, q in zip(keys, queries, strict=True) if not self._path(k, "scores").exists()}
        # A block's updates lie on disk together, and a killed call loses the scores of one block at most.
        for block in (list(missing)[i : i + _BLOCK] for i in range(0, len(missing), _BLOCK)):
            show = self.work.progress("unlearning", "query")
            for done, key in enumerate(block):
                show(done, len(block))
                if not self._path(key, "update").exists():
                    self._unlearn(key, missing[key])
            show(len(block), len(block))
            self._measure({key: missing[key] for key in block})
        return np.stack([load_tensors(self._path(k, "scores"), k)[0]["scores"].numpy() for k in keys])

    def _path(self, key: str, kind: str) -> Path:
        return self.work.folder / f"{key}.{kind}.safetensors"

    def _unlearn(self, key: str, query: Query) -> None:
        found = self.unlearn(query)
        about = {"steps": found.steps, "loss": found.loss, "null": found.null, "ended": found.ended}
        if not found.ended:
            warnings.warn(
                f"{query.id!r} was not unlearned after {found.steps} steps: its loss is {found.loss:.4g}, the unlearning ends at "
                f"{found.null:.4g}; its scores are those of what there is. Allow more steps, or a larger lr",
                stacklevel=3,
            )
        if not found.steps:
            warnings.warn(
                f"{query.id!r} needs no unlearning: its loss is {found.loss:.4g}, where it ends at {found.null:.4g}; all its scores "
                "are 0",
                stacklevel=3,
            )
        save_tensors(self._path(key, "update"), found.delta, {"key": key, "query": query.id, **about})

    def _measure(self, missing: Mapping[str, Query]) -> None:
        s, model = self.work.settings, self.model
        loads = [lambda k=k: _update(self._path(k, "update"), k) for k in missing]
        unlearned = Unlearned(model, loads, free_bytes(next(model.module.parameters()).device) / 3)
        parts, show = [], self.work.progress("scoring", "track")
        for first in range(0, len(self.tracks), s.unit_tracks):
            show(first, len(self.tracks))
            some = range(first, min(first + s.unit_tracks, len(self.tracks)))
            effects = measure_effects(
                model, self.tracks.batch(some, model.frames), unlearned, self.plan, self.draws, s.mask_score, s.rows or ROWS
            )  # fmt: skip
            parts.append(score_function(self.function)(effects).mean(axis=-1))
        show(len(self.tracks), len(self.tracks))
        for (key, query), row in zip(missing.items(), np.concatenate(parts, axis=1), strict=True):
            if not np.isfinite(row).all():
                raise UserError(
                    f"unlearning {query.id!r} made the loss of a track infinite: use a smaller lr or strength"
                )
            about = open_tensors(self._path(key, "update"), key)[1]
            save_tensors(
                self._path(key, "scores"), {"scores": torch.from_numpy(np.ascontiguousarray(row))}, about
            )
            self._path(key, "update").unlink()


def _update(path: Path, key: str) -> Update:
    delta, meta = open_tensors(path, key)
    return Update(meta["query"], 1.0, "size", delta, 0.0, 0.0)


def fitted(
    method: Any, model: Denoiser, tracks: Tracks, work: Workspace, function: str, plan: DrawPlan, draws: int,
    unlearn: Callable[[Query, Mapping[str, nn.Parameter]], Outcome],
) -> FittedUnlearner:  # fmt: skip
    """A :class:`FittedUnlearner`; nothing is shared by all queries but what is checked here.

    Raises:
        UserError: tracks or options that cannot be used.
    """
    s = work.settings
    check_tracks(tracks, model.channels, model.frames, "training")
    parameters = select_parameters(model, s.layers)
    plan.check(draws, "the number of score draws")
    if function not in UNLEARNING:
        raise UserError(f"scores are by {function!r}: use one of {', '.join(UNLEARNING)}")
    settings = (s.layers, s.seed, s.mask_update, s.mask_score, s.update_draws, str(work_dtype(model)))
    key = key_of(
        type(method).__name__, vars(method), model_key(model), tracks.fingerprint, settings, vars(plan), draws, function
    )  # fmt: skip
    work.folder.mkdir(parents=True, exist_ok=True)
    return FittedUnlearner(model, tracks, work, lambda q: unlearn(q, parameters), function, plan, draws, key)


def others(tracks: Tracks, query: Query) -> list[int]:
    """Training tracks that are not the query itself: what is to be kept."""
    own = set(query.indices) if query.tracks.fingerprint == tracks.fingerprint else set()
    return [i for i in range(len(tracks)) if i not in own]
