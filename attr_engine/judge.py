"""How attributions are judged, in numbers with intervals: METHOD section 5. Scores are ``[Q, N]``, larger = more responsible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attr_engine.errors import UserError
from attr_engine.evaluate import average_precision, recall_at, self_rank
from attr_engine.result import order_of

LEAST_MODELS = 3  # of two, any rank correlation is 1 or -1
_RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval.

    Attributes:
        value: mean of what was measured.
        low: lower end of the interval.
        high: upper end.
        count: how many were measured.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(values: np.ndarray, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean over items with its percentile interval, items drawn again with replacement.

    Args:
        values: ``[n]``; NaN (an item that has no such number) is left out.
        level: of the interval.
        seed: of the resampling.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan, 0)
    picks = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def share(hits: int, count: int, level: float = 0.95) -> Estimate:
    """A rate of yes among ``count`` with its Wilson interval, which is not empty where all or none said yes.

    Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    from statistics import NormalDist

    if count < 1:
        return Estimate(np.nan, np.nan, np.nan, 0)
    z, p = NormalDist().inv_cdf((1 + level) / 2), hits / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(p * (1 - p) / count + z * z / (4 * count**2)))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), count)


# -- retraining ---------------------------------------------------------------------------------


def _rank_rows(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties by their mean; centred and of length 1, so that products are Spearman's rho."""
    order = np.argsort(values, axis=-1, kind="stable")
    ranked = np.empty(values.shape)
    sorted_values = np.take_along_axis(values, order, axis=-1)
    place = np.arange(values.shape[-1], dtype=np.float64)
    for index in np.ndindex(values.shape[:-1]):
        _, inverse, counts = np.unique(sorted_values[index], return_inverse=True, return_counts=True)
        means = np.bincount(inverse, weights=place) / counts
        ranked[index][order[index]] = means[inverse]
    ranked -= ranked.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(ranked, axis=-1, keepdims=True)
    return np.asarray(ranked / np.where(length > 0, length, np.nan))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis; NaN where one side is constant."""
    return np.asarray((_rank_rows(np.asarray(a, float)) * _rank_rows(np.asarray(b, float))).sum(axis=-1))


def lds(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Linear datamodelling score of every query (Park et al. 2023, TRAK, section 3).

    Args:
        scores: ``[Q, N]``.
        kept: bool ``[M, N]``, which tracks each of M models was trained on.
        losses: ``[M, Q]``, of the queries under them.

    Returns:
        ``[Q]``: correlation over models between the sum of the scores of a model's tracks and how low its loss is.

    Raises:
        UserError: shapes that do not fit, or fewer than 3 models.
    """
    if len(kept) != len(losses) or kept.shape[1] != scores.shape[1] or losses.shape[1] != len(scores):
        raise UserError(
            f"scores {scores.shape}, tracks of models {kept.shape} and losses {losses.shape} do not fit"
        )
    if len(kept) < LEAST_MODELS:
        raise UserError(f"{len(kept)} models tell no correlation: train at least {LEAST_MODELS} subsets")
    return spearman(scores @ kept.T.astype(np.float64), -losses.T)


@dataclass(frozen=True)
class Ceiling:
    """What retraining agrees with itself about.

    Attributes:
        seeds: per query ``[Q]``: correlation over subsets between the losses of two seeds (mean over pairs of seeds); what
            a perfect but once retrained answer would score against another single seed.
        attainable: ``[Q]``: correlation of a perfect prediction with the mean over all seeds, ``sqrt`` of its reliability by
            Spearman and Brown's formula.
    """

    seeds: np.ndarray
    attainable: np.ndarray


def ceiling(losses: np.ndarray) -> Ceiling:
    """The noise ceiling of a linear datamodelling score.

    Args:
        losses: ``[S, M, Q]`` of S seeds, at least 2.

    Raises:
        UserError: a single seed, which says nothing about noise.
    """
    count = len(losses)
    if count < 2:
        raise UserError("one training seed tells no noise ceiling: train at least 2")
    pairs = [spearman(losses[a].T, losses[b].T) for a in range(count) for b in range(a)]
    agree = np.mean(pairs, axis=0)
    # A few subsets leave some queries below zero by chance; their reliability is then zero, not imaginary.
    reliable = np.clip(count * agree / (1 + (count - 1) * agree), 0.0, 1.0)
    return Ceiling(agree, np.sqrt(reliable))


# -- planted relations --------------------------------------------------------------------------


def precision_without(
    scores: np.ndarray, tracks: Sequence[str], relevant: frozenset[str], ignored: frozenset[str]
) -> float:
    """Average precision of the relevant tracks, the ignored ones (relatives of another kind) taken out of the ranking."""
    return average_precision(*_without(scores, tracks, relevant, ignored), relevant)


def recall_without(
    k: int, scores: np.ndarray, tracks: Sequence[str], relevant: frozenset[str], ignored: frozenset[str]
) -> float:
    """Part of the relevant tracks (at most k of them count) in the top k of the same ranking."""
    return recall_at(k, *_without(scores, tracks, relevant, ignored), relevant)


def _without(
    scores: np.ndarray, tracks: Sequence[str], relevant: frozenset[str], ignored: frozenset[str]
) -> tuple[np.ndarray, list[str]]:
    keep = [i for i, name in enumerate(tracks) if name in relevant or name not in ignored]
    return scores[keep], [tracks[i] for i in keep]


# -- collapse -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collapse:
    """Whether a method answers the same whatever it is asked.

    Attributes:
        correlation: mean rank correlation between the scores of two queries.
        first_energy: part of the squared scores, each query's centred and of length 1, in the first singular vector.
        hub_share: the largest part of the queries that have one track in their top k.
        hub: index of that track.
    """

    correlation: float
    first_energy: float
    hub_share: float
    hub: int


def collapse(scores: np.ndarray, k: int = 10) -> Collapse:
    """Diagnostics of collapse and hubness over Q queries ``[Q, N]``.

    Raises:
        UserError: fewer than 2 queries.
    """
    count, tracks = scores.shape
    if count < 2:
        raise UserError("collapse is seen over several queries: give at least 2")
    unit = _rank_rows(scores)
    products = unit @ unit.T
    pairs = products[np.triu_indices(count, 1)]
    centred = scores - scores.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    energy = np.linalg.svd(centred / np.where(length > 0, length, 1.0), compute_uv=False) ** 2
    hits = np.bincount(order_of(scores)[:, :k].ravel(), minlength=tracks)
    return Collapse(
        float(np.nanmean(pairs)), float(energy[0] / max(energy.sum(), 1e-300)),
        float(hits.max() / count), int(hits.argmax()),
    )  # fmt: skip


# -- rank of itself -----------------------------------------------------------------------------


def self_ranks(
    scores: np.ndarray, tracks: Sequence[str], targets: Sequence[str], clusters: Mapping[str, frozenset[str]]
) -> np.ndarray:
    """Rank of every unlearned training track; the best of a track and its exact copies, which count as one.

    Args:
        scores: ``[T, N]``, a row a target.
        tracks: ids, N.
        targets: ids, T.
        clusters: track to itself and its copies.

    Returns:
        int64 ``[T]``. Copies of other tracks that stand before it count each.
    """
    return np.array([self_rank(row, tracks, clusters[t]) for row, t in zip(scores, targets, strict=True)])
