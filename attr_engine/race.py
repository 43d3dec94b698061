"""Racing for the top k: few draws for every track, more only for those whose place in the top k is not decided.

Rounds double the draws of the tracks whose interval reaches across the border of the top k, until there is none or the race has taken
its share of exhaustive scoring; tracks that were left behind take part again if the border comes down to them (successive
elimination: Even-Dar et al. 2006; with a budget, nearest to the border first: Gabillon et al. 2012).

With the plan ``shared`` every track meets the same draws. What a draw does to all of them alike says nothing of their order, and is
most of the noise; and tracks that had other draws cannot be compared as they are. So the mean over the reference, tracks around the
border that had all draws, is taken off, draw by draw, and its mean over all draws put back (a control variate). What is left
spreads over the R replicates of the timestep sequence (:func:`attr_engine.diffusion.standard_error`) with R - 1 degrees of freedom,
which is noisy: the variance that a race reckons with is the mean of a track's own and of the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from attr_engine.diffusion import standard_error
from attr_engine.effects import Effects
from attr_engine.score import score_function

_LEAST = 8  # tracks that go on at a time


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


class Tally:
    """Sums of per-draw scores of U updates and N tracks, by replicate.

    Attributes:
        sums: float64 ``[U, N, R]``.
        draws: int64 ``[U, N]``, how many draws are in them; 0 where nothing was measured.
        shared: whether a draw is the same for all tracks.
    """

    def __init__(
        self, function: str, updates: int, tracks: int, replicates: int, shared: bool = False
    ) -> None:
        self.shared = shared
        self.sums = np.zeros((updates, tracks, replicates))
        self.draws = np.zeros((updates, tracks), dtype=np.int64)
        self._function, self._parts = function, list[Part]()

    @staticmethod
    def of(
        parts: Sequence[Part], function: str, updates: int, tracks: int, replicates: int, shared: bool = False
    ) -> Tally:
        """Add up the scores of some parts by one function."""
        tally = Tally(function, updates, tracks, replicates, shared)
        for part in parts:
            tally.add(part)
        return tally

    def add(self, part: Part) -> None:
        """Add the scores of a part; its draws must follow those that are there."""
        self._parts.append(part)
        per_draw = score_function(self._function)(part.effects)
        rounds = per_draw.reshape(*per_draw.shape[:2], -1, self.sums.shape[2])
        where = np.ix_(np.asarray(part.updates), part.tracks)
        self.sums[where] += rounds.sum(axis=2)
        self.draws[where] += per_draw.shape[2]

    @property
    def means(self) -> np.ndarray:
        """``[U, N]``; NaN where nothing was measured."""
        return np.asarray(self.by_replicate().mean(axis=2))

    @property
    def errors(self) -> np.ndarray:
        """Standard errors ``[U, N]``; NaN where nothing was measured, or with one replicate."""
        return standard_error(self.by_replicate(), self.sums.shape[2])

    def by_replicate(self) -> np.ndarray:
        """Means over the draws of each replicate, ``[U, N, R]``; NaN where nothing was measured."""
        each = np.where(self.draws > 0, self.draws / self.sums.shape[2], np.nan)
        return np.asarray(self.sums / each[..., None])

    def reference(self, update: int, top: int) -> np.ndarray:
        """Tracks with the most draws; where all have the same, those around the border of the top k."""
        draws = self.draws[update]
        most = np.flatnonzero(draws == draws.max())
        if len(most) < int((draws > 0).sum()):
            return most
        order = most[np.argsort(-self.sums[update, most].sum(axis=1), kind="stable")]
        return order[top // 2 : 2 * top]

    def adjusted(self, update: int, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores that may be compared whatever draws they are of, and their errors.

        Args:
            update: which.
            top: k.

        Returns:
            float64 ``[N]`` each; NaN where nothing was measured.
        """
        own, draws, replicates = self.by_replicate()[update], self.draws[update], self.sums.shape[2]
        if not self.shared:
            return own.mean(axis=1), standard_error(own, replicates)
        common = self._common(update, self.reference(update, top))
        rounds = np.cumsum(common.reshape(-1, replicates), axis=0)  # [D / R, R]
        counts = np.maximum(draws // replicates, 1)
        alike = rounds[counts - 1] / counts[:, None]
        rest = own - alike
        return rest.mean(axis=1) + common.mean(), standard_error(rest, replicates)

    def _common(self, update: int, reference: np.ndarray) -> np.ndarray:
        """Mean score of the reference on each of its draws, ``[D]``."""
        found: dict[int, list[np.ndarray]] = {}  # by the first draw of a round
        for part in self._parts:
            here = np.isin(part.tracks, reference)
            if update in part.updates and here.any():
                one = _of_update(part, update)
                found.setdefault(part.draws.start, []).append(score_function(self._function)(one)[0, here])
        return np.concatenate([np.concatenate(found[first]).mean(axis=0) for first in sorted(found)])


def _of_update(part: Part, update: int) -> Effects:
    """Effects of one update of a part, ``[1, n, D]``."""
    row, e = list(part.updates).index(update), part.effects
    influence = {name: values[row : row + 1] for name, values in e.influence.items()}
    return Effects(e.base, e.unlearned[row : row + 1], e.displacement[row : row + 1], influence)


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

    def undecided(
        self, means: np.ndarray, errors: np.ndarray, draws: np.ndarray, reference: np.ndarray
    ) -> np.ndarray:
        """How near the border every track is, in units of what decides: below 1 it is not decided.

        Args:
            means: ``[N]``, NaN for what takes no part.
            errors: ``[N]``.
            draws: ``[N]``.
            reference: indices of the tracks whose variance stands for all.

        Returns:
            float64 ``[N]``, infinite for what takes no part.
        """
        runs = np.flatnonzero(np.isfinite(means))
        out = np.full(len(means), np.inf)
        if len(runs) <= self.top:
            return out
        order = runs[np.argsort(-means[runs], kind="stable")]
        inside, outside = order[self.top - 1], order[self.top]
        per_draw = errors**2 * draws
        pooled = float(per_draw[reference].mean())
        variance = (per_draw + pooled) / 2 / np.maximum(draws, 1)
        # A track inside is compared with the best outside, and the other way round.
        rival = np.where(means >= means[inside], outside, inside)
        distance = np.abs(means - means[rival])
        reach = NormalDist().inv_cdf(0.5 + self.confidence / 2) * np.sqrt(variance + variance[rival])
        with np.errstate(invalid="ignore", divide="ignore"):
            out[runs] = np.where(reach[runs] > 0, distance[runs] / reach[runs], np.inf)
        return out

    def next(self, tally: Tally, updates: Sequence[int]) -> Mapping[int, np.ndarray]:
        """Whose draws are doubled next, for updates whose effects are measured together.

        Args:
            tally: what is known.
            updates: indices; their tracks have the same draws.

        Returns:
            Number of draws that are there to tracks ``[n]`` that get as many again (no more than ``most``); empty where the race
            is over.
        """
        draws = tally.draws[updates[0]]
        near = np.min([
            self.undecided(*tally.adjusted(u, self.top), draws, tally.reference(u, self.top)) for u in updates
        ], axis=0)  # fmt: skip
        wanted = np.flatnonzero((near < 1) & (draws < self.most))
        if (
            tally.shared and 0 < len(wanted) < _LEAST
        ):  # the reference of the next round: its mean stands for all
            level = np.flatnonzero((draws == draws[wanted].max()) & (draws < self.most) & np.isfinite(near))
            beside = level[np.argsort(near[level], kind="stable")][:_LEAST]
            wanted = np.union1d(wanted, beside)
        more = np.minimum(draws, self.most - draws)
        room = self.share * self.most * int((draws > 0).sum()) - int(draws.sum())
        nearest = wanted[np.argsort(near[wanted], kind="stable")]
        taken = np.sort(nearest[np.cumsum(more[nearest]) <= room])
        return {int(n): taken[draws[taken] == n] for n in np.unique(draws[taken])}
