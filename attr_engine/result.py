"""The answer: every score with its standard error and number of draws, ranked; Parquet and CSV out, Parquet in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attr_engine.errors import UserError

if TYPE_CHECKING:
    from attr_engine.jobs import Job


def order_of(scores: np.ndarray, stage: np.ndarray | None = None) -> np.ndarray:
    """Positions from the most responsible track to the least.

    Args:
        scores: ``[..., N]``; larger first, NaN last, ties by position.
        stage: ``[..., N]`` integers; a larger one comes before a smaller one, whatever the scores.

    Returns:
        ``[..., N]`` int64.
    """
    if stage is None:
        return np.argsort(-scores, axis=-1, kind="stable")
    return np.lexsort((-scores, -stage), axis=-1)


def ranks(scores: np.ndarray, stage: np.ndarray | None = None) -> np.ndarray:
    """1-based rank of every track in :func:`order_of`: ``[..., N]`` int64."""
    order = order_of(scores, stage)
    out = np.empty_like(order)
    np.put_along_axis(out, order, np.broadcast_to(np.arange(1, scores.shape[-1] + 1), order.shape), axis=-1)
    return out


@dataclass(frozen=True)
class Scored:
    """One track in one ranking."""

    track: str
    rank: int
    score: float
    standard_error: float
    draws: int


@dataclass(frozen=True)
class Attribution:
    """Scores of every training track for every query.

    Attributes:
        tracks: ids, N.
        updates: (query id, strength) of every update, U.
        values: function name to scores, float64 ``[U, N]``; larger = more responsible, NaN = not measured.
        errors: function name to standard errors ``[U, N]``, NaN with a single replicate.
        base: mean loss of every track under theta_0, ``[N]``.
        meta: settings, hashes, precision and whatever else belongs to the run.
        draws: int64 ``[U, N]``, how many draws a score is the mean of; 0 for a track that was not measured.
        stage: int64 ``[U, N]`` where tracks were measured in stages, else None: how far a track came. It ranks before
            every track of a smaller stage, whatever their scores, because those that were left behind have noisier ones.
            Tracks that were ranked but not measured may have negative stages in the order of that ranking.

    Raises:
        UserError: draws or stages of another shape, or that are no integers.
    """

    tracks: Sequence[str]
    updates: Sequence[tuple[str, float]]
    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    base: np.ndarray
    meta: Mapping[str, Any]
    draws: np.ndarray
    stage: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = (len(self.updates), len(self.tracks))
        for name, given in (("draws", self.draws), ("stage", self.stage)):
            if given is not None and (given.shape != shape or given.dtype.kind != "i"):
                raise UserError(f"{name} are {given.dtype} {list(given.shape)}: give integers {list(shape)}")

    def order(self, function: str, update: int) -> np.ndarray:
        """Positions of the tracks from rank 1 on, int64 ``[N]``."""
        stage = None if self.stage is None else self.stage[update]
        return order_of(self.values[function][update], stage)

    def ranks(self, function: str, update: int) -> np.ndarray:
        """Rank of every track, int64 ``[N]``, the inverse of :meth:`order`."""
        stage = None if self.stage is None else self.stage[update]
        return ranks(self.values[function][update], stage)

    def row(self, query: str, strength: float | None = None) -> int:
        """Index of an update; without a strength the first one of the query.

        Raises:
            UserError: unknown query or strength.
        """
        for u, (name, value) in enumerate(self.updates):
            if name == query and (strength is None or value == strength):
                return u
        known = ", ".join(sorted({name for name, _ in self.updates})[:5])
        raise UserError(f"no scores for query {query!r} at strength {strength}; queries: {known}")

    def top(
        self,
        k: int = 10,
        query: str | None = None,
        function: str | None = None,
        strength: float | None = None,
    ) -> list[Scored]:
        """The k most responsible tracks.

        Args:
            k: how many.
            query: id; may be left out where there is one query.
            function: score function; default the first.
            strength: default the first.

        Raises:
            UserError: unknown query, function or strength, or a query is needed.
        """
        if query is None:
            names = {name for name, _ in self.updates}
            if len(names) != 1:
                raise UserError(f"there are {len(names)} queries: say which one")
            query = next(iter(names))
        function = function or next(iter(self.values))
        if function not in self.values:
            raise UserError(f"no scores by {function!r}; known: {', '.join(self.values)}")
        u = self.row(query, strength)
        score, error, draws = self.values[function][u], self.errors[function][u], self.draws[u]
        return [
            Scored(self.tracks[i], n + 1, float(score[i]), float(error[i]), int(draws[i]))
            for n, i in enumerate(self.order(function, u)[:k])
        ]

    def to_parquet(self, path: str | Path) -> None:
        """Write one row a (query, strength, function, track); docs/results.md describes the columns."""
        from attr_engine import scorefile as f

        f.write_parquet(Path(path), f.SCHEMA, f.score_tables(self), f.header_of(self))

    def to_csv(self, path: str | Path) -> None:
        """Write the same rows as :meth:`to_parquet` as CSV."""
        from attr_engine import scorefile as f

        f.write_csv(Path(path), f.SCHEMA, f.score_tables(self))

    @staticmethod
    def from_parquet(path: str | Path) -> Attribution:
        """Read what :meth:`to_parquet` wrote; :func:`attr_engine.read_scores` reads a part of it.

        Raises:
            UserError: missing or damaged file, another format, or rows that were moved.
        """
        from attr_engine.scorefile import read_parts

        return Attribution(**read_parts(Path(path)))


def run_metadata(job: Job, fisher: str) -> dict[str, Any]:
    """What a result says of the run that made it; no times, so that the same run gives the same bytes.

    Args:
        job: the run.
        fisher: key of the Fisher, which names everything that it was fitted with.
    """
    from attr_engine.runs import environment, key_of
    from attr_engine.settings import decisive

    settings = decisive(job.run.settings)
    return {
        "settings": settings,
        "config": key_of(settings),
        "model": job.model.fingerprint,
        "data": job.tracks.fingerprint,
        "queries": [job.pieces.fingerprint]
        if job.pieces
        else list(dict.fromkeys(q.tracks.fingerprint for q in job.queries)),
        "fisher": fisher,
        "objective": job.model.objective,
        "frames": job.model.frames,
        "effects_by": job.way,
        "precision": {"model": job.dtype, "losses": "float64"},
        "versions": environment()["versions"],
    }
