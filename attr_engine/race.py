"""Racing for the top k: few draws for every track, more only for those whose place in the top k is not decided.

Every draw of a track is one of R independently shifted replicates of the timestep sequence, so the spread of the R means is the
error of a score (:func:`attr_engine.diffusion.standard_error`). It has R - 1 degrees of freedom, which is noisy: the variance a race
reckons with is the mean of a track's own and of that of the tracks around the border of the top k. Rounds double the draws of the
tracks whose interval reaches across the border, until there is none or the race has taken its share of exhaustive scoring;
tracks that were left behind take part again if the border comes down to them. (Successive elimination: Even-Dar et al. 2006;
with a budget, nearest to the border first: Gabillon et al. 2012.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from attr_engine.effects import Effects
from attr_engine.score import score_function


@dataclass(frozen=True)
class Part:
    """Effects of some updates on some tracks, on some draws.

    Attributes:
        tracks: indices, ``[n]``.
        updates: indices, ``[u]``.
        draws: the range that the last axis of the effects stands for.
        effects: of shape ``[u, n, len(draws)]``.
    """

    tracks: np.ndarray
    updates: Sequence[int]
    draws: range
    effects: Effects


@dataclass
class Tally:
    """Sums of per-draw scores of U updates and N tracks, by replicate.

    Attributes:
        sums: float64 ``[U, N, R]``.
        draws: int64 ``[U, N]``, how many draws are in them; 0 where nothing was measured.
    """

    sums: np.ndarray
    draws: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.draws = np.zeros(self.sums.shape[:2], dtype=np.int64)

    @staticmethod
    def of(parts: Sequence[Part], function: str, updates: int, tracks: int, replicates: int) -> Tally:
        """Add up the scores of some parts by one function."""
        tally = Tally(np.zeros((updates, tracks, replicates)))
        for part in parts:
            tally.add(part, function)
        return tally

    def add(self, part: Part, function: str) -> None:
        """Add the scores of a part; its draws must follow those that are there."""
        per_draw = score_function(function)(part.effects)
        rounds = per_draw.reshape(*per_draw.shape[:2], -1, self.sums.shape[2])
        where = np.ix_(np.asarray(part.updates), part.tracks)
        self.sums[where] += rounds.sum(axis=2)
        self.draws[where] += per_draw.shape[2]

    @property
    def means(self) -> np.ndarray:
        """``[U, N]``; NaN where nothing was measured."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums.sum(axis=2) / np.where(self.draws > 0, self.draws, np.nan))

    @property
    def errors(self) -> np.ndarray:
        """Standard errors ``[U, N]``; NaN where nothing was measured, or with one replicate."""
        replicates = self.sums.shape[2]
        if replicates < 2:
            return np.full(self.draws.shape, np.nan)
        with np.errstate(invalid="ignore"):
            means = self.sums / np.where(self.draws > 0, self.draws / replicates, np.nan)[..., None]
        return np.asarray(means.std(axis=2, ddof=1) / math.sqrt(replicates))


@dataclass(frozen=True)
class Race:
    """The rules of a race.

    Attributes:
        top: k.
        confidence: that a track is on the right side of the border, in (0, 1).
        most: draws a track at most.
        share: of the (track, draw) pairs of exhaustive scoring with ``most`` draws that one update may take.
    """

    top: int
    confidence: float
    most: int
    share: float

    def undecided(self, means: np.ndarray, errors: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """How near the border every track is, in units of what decides: below 1 it is not decided.

        Args:
            means: ``[N]``, NaN for what takes no part.
            errors: ``[N]``.
            draws: ``[N]``.

        Returns:
            float64 ``[N]``, infinite for what takes no part.
        """
        runs = np.flatnonzero(np.isfinite(means))
        out = np.full(len(means), np.inf)
        if len(runs) <= self.top:
            return out
        order = runs[np.argsort(-means[runs], kind="stable")]
        inside, outside = order[self.top - 1], order[self.top]
        around = order[max(0, self.top // 2) : self.top * 2]
        per_draw = errors**2 * draws
        pooled = float(per_draw[around].mean())
        variance = (per_draw + pooled) / 2 / np.maximum(draws, 1)
        # A track inside is compared with the best outside, and the other way round.
        rival = np.where(means >= means[inside], outside, inside)
        distance = np.abs(means - means[rival])
        reach = NormalDist().inv_cdf(0.5 + self.confidence / 2) * np.sqrt(variance + variance[rival])
        with np.errstate(invalid="ignore", divide="ignore"):
            out[runs] = np.where(reach[runs] > 0, distance[runs] / reach[runs], np.inf)
        return out

    def next(self, means: np.ndarray, errors: np.ndarray, draws: np.ndarray) -> Mapping[int, np.ndarray]:
        """Whose draws are doubled next, for updates whose effects are measured together.

        Args:
            means: ``[V, N]``, NaN for what takes no part.
            errors: ``[V, N]``.
            draws: ``[N]``, that are there.

        Returns:
            Number of draws that are there to tracks ``[n]`` that get as many again (no more than ``most``); empty where the race
            is over.
        """
        near = np.min([self.undecided(m, e, draws) for m, e in zip(means, errors, strict=True)], axis=0)
        wanted = np.flatnonzero((near < 1) & (draws < self.most))
        more = np.minimum(draws, self.most - draws)
        room = self.share * self.most * int((draws > 0).sum()) - int(draws.sum())
        nearest = wanted[np.argsort(near[wanted], kind="stable")]
        taken = np.sort(nearest[np.cumsum(more[nearest]) <= room])
        return {int(n): taken[draws[taken] == n] for n in np.unique(draws[taken])}
