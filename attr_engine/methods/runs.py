"""The engine's own scores as methods: each is a run (:mod:`attr_engine.pipeline`) in the method's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from attr_engine.jobs import Job, Query, make_job
from attr_engine.latents.batch import Chosen, Tracks
from attr_engine.methods.base import Workspace, method, option
from attr_engine.methods.passes import check_single
from attr_engine.models.protocol import Denoiser
from attr_engine.pipeline import check_all, drop_updates, fisher_stage, run_job
from attr_engine.ridge import index_stage
from attr_engine.runs import key_of, open_run
from attr_engine.score import RIDGE
from attr_engine.settings import Settings


@dataclass(frozen=True)
class _Score:
    """A score function of a run. ``fit`` makes what all queries share, the index or the Fisher, and keeps it."""

    function: ClassVar[str]

    def settings(self, s: Settings) -> Settings:
        """Settings of the run."""
        raise NotImplementedError

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> FittedScore:
        s = replace(
            self.settings(work.settings), functions=(self.function,), self_influence=(), queries=(), groups="", top=0, index="",
            cache=str(work.folder / "cache"),
        )  # fmt: skip
        # Any track may stand for the queries: nothing of it is computed.
        with _opened(model, tracks, work, s, [Chosen(tracks, [0])]) as job:
            check_all(job)
            if self.function == RIDGE:
                index_stage(job)
            else:
                fisher_stage(job)
            # What is kept was made with so many rows a pass, which another run might choose otherwise.
            return FittedScore(model, tracks, work, replace(s, rows=job.rows, memory=0.0))


@dataclass(frozen=True)
class FittedScore:
    """A score function whose index or Fisher is there."""

    model: Denoiser
    tracks: Tracks
    work: Workspace
    settings: Settings

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Run it for queries, one set each: queries of several sets may stand in any order."""
        check_single(queries)
        sets = [Chosen(q.tracks, [q.index]) for q in queries]
        with _opened(self.model, self.tracks, self.work, self.settings, sets) as job:
            result = run_job(job)
            drop_updates(job)
            return np.stack([result.values[self.settings.functions[0]][result.row(q.id)] for q in queries])


@contextlib.contextmanager
def _opened(
    model: Denoiser, tracks: Tracks, work: Workspace, s: Settings, sets: Sequence[Tracks]
) -> Iterator[Job]:
    """A run in a folder of its own for what is asked."""
    key = key_of(model.fingerprint, tracks.fingerprint, [x.fingerprint for x in sets], vars(s))
    with open_run(work.folder / f"run-{key}", s) as run:
        yield make_job(run, model, tracks, sets)


@method(
    RIDGE,
    "gradient",
    "kernel ridge regression, squared-norm gradients, projected: D-TRAK (Zheng et al. 2024); the default",
)
@dataclass(frozen=True)
class Ridge(_Score):
    """:mod:`attr_engine.ridge`."""

    function: ClassVar[str] = RIDGE
    damping: float = option(0.3, "lambda, relative to the mean squared length of the tracks' gradients")
    rank: int = option(16, "rows that every weight's gradient is projected to")

    def settings(self, s: Settings) -> Settings:
        """Of its run."""
        return replace(s, ridge=self.damping, projection_rank=self.rank)


@dataclass(frozen=True)
class _Unlearning(_Score):
    strength: float = option(1e-2, "of the update, in its unit")
    unit: str = option("size", "of a strength: size relative to the weights, lr, null_loss or displacement")
    damping: float = option(0.1, "added to the Fisher, relative to its mean")

    def settings(self, s: Settings) -> Settings:
        """Of its run."""
        return replace(s, strengths=(self.strength,), unit=self.unit, damping=self.damping)


@method(
    "loss_change", "unlearning", "how much worse a track gets when the query is unlearned (Choi et al. 2025)"
)
@dataclass(frozen=True)
class LossChange(_Unlearning):
    """:func:`attr_engine.score.loss_change`."""

    function: ClassVar[str] = "loss_change"


@method(
    "skew", "unlearning", "the same, normalised by the losses (Serra et al. 2026), under the Fisher update"
)
@dataclass(frozen=True)
class Skew(_Unlearning):
    """:func:`attr_engine.score.skew`."""

    function: ClassVar[str] = "skew"


@method("displacement", "unlearning", "how far the prediction for a track moves when the query is unlearned")
@dataclass(frozen=True)
class Displacement(_Unlearning):
    """:func:`attr_engine.score.displacement`."""

    function: ClassVar[str] = "displacement"


@method(
    "influence", "gradient", "influence function of the loss with the diagonal Fisher (Koh and Liang 2017)"
)
@dataclass(frozen=True)
class Influence(_Unlearning):
    """:func:`attr_engine.score.influence`."""

    function: ClassVar[str] = "influence"


@method("norm_influence", "gradient", "the same of the squared norm of the prediction, the target of D-TRAK")
@dataclass(frozen=True)
class NormInfluence(_Unlearning):
    """:func:`attr_engine.score.norm_influence`."""

    function: ClassVar[str] = "norm_influence"
