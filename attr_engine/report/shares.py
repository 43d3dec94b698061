"""Shares: scores of all tracks turned into parts of one whole by a named transform.

A share divides *scores*. It is not a probability that a track made the piece, and it is not a royalty key:
two transforms of the same scores give different shares, so the name is printed wherever a share is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attr_engine.errors import UserError


@dataclass(frozen=True)
class Transform:
    """One way from scores to shares.

    Attributes:
        apply: ``[N]`` float64 finite scores, scaled to at most 1 in size, to ``[N]`` parts >= 0 that sum to 1
            or are all 0.
        formula: the formula in words of the report.
        caveat: what its shares may not be read as.
    """

    apply: Callable[[np.ndarray], np.ndarray]
    formula: str
    caveat: str


def _normalised(parts: np.ndarray) -> np.ndarray:
    """Divide ``parts [N] >= 0`` by their sum; all zeros stay zeros: there is nothing to divide."""
    total = parts.sum()
    return parts / total if total > 0 else np.zeros_like(parts)


def _excess_over_median(scores: np.ndarray) -> np.ndarray:
    """Return ``max(s_i - median(s), 0) / sum_j max(s_j - median(s), 0)``, ``[N]``."""
    return _normalised(np.maximum(scores - np.median(scores), 0.0))


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Return ``exp(z_i) / sum_j exp(z_j)``, ``z = (s - mean(s)) / std(s)``; equal scores give 1/N."""
    centred = scores - scores.mean()
    spread = centred.std()
    z = centred / spread if spread > 0 else np.zeros_like(centred)
    return _normalised(np.exp(z - z.max()))


def _min_max(scores: np.ndarray) -> np.ndarray:
    """Return ``(s_i - min(s)) / sum_j (s_j - min(s))``, ``[N]``."""
    return _normalised(scores - scores.min())


TRANSFORMS: dict[str, Transform] = {
    "excess-over-median": Transform(
        _excess_over_median,
        "max(score - median, 0), divided by its sum over all tracks",
        "The median stands in for a track without influence, so half of all tracks get exactly 0: that is no "
        "proof that they had none. With many tracks the noise of the upper half takes share from the top.",
    ),
    "softmax": Transform(
        _softmax,
        "exp(z) divided by its sum over all tracks, z = (score - mean) / standard deviation over the tracks",
        "Sums to 1 like a probability and is none: the temperature is an arbitrary choice (one standard "
        "deviation), and a share falls when unrelated tracks are added.",
    ),
    "min-max": Transform(
        _min_max,
        "(score - smallest score), divided by its sum over all tracks",
        "One outlier at the bottom moves every share, and an average track gets a share well above 0: not "
        "an amount of influence.",
    ),
}

DEFAULT_TRANSFORM = "excess-over-median"


def shares(scores: np.ndarray, name: str = DEFAULT_TRANSFORM) -> np.ndarray:
    """Turn the scores of all tracks into shares.

    The result does not change when all scores are multiplied by one positive number. Give the scores of *all*
    tracks, not of the top k: what the shown rows leave of 1 is the report's "everything else".

    Args:
        scores: ``[N]``, N >= 1, larger = more responsible, in any unit; any real dtype.
        name: a key of ``TRANSFORMS``.

    Returns:
        ``[N]`` float64, each >= 0, summing to 1; all zeros where no track stands out (for excess-over-median
            none above the median, for min-max all equal), so that everything else is 1.

    Raises:
        UserError: unknown name; scores that are not ``[N]`` with N >= 1; a score that is not finite (the
            message names its index).
    """
    if name not in TRANSFORMS:
        raise UserError(f"unknown share transform {name!r}; known: {', '.join(sorted(TRANSFORMS))}")
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise UserError(
            f"shares need the scores of at least one track as [N], not an array of shape {values.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise UserError(
            f"score {int(bad[0])} of {values.size} is {values[bad[0]]} ({bad.size} are not finite): shares "
            "would hide the fault; score those tracks again or leave them out"
        )
    # Scaled so that differences of huge scores do not overflow; no transform changes under a positive factor.
    largest = float(np.abs(values).max())
    return TRANSFORMS[name].apply(values / largest if largest > 0 else values)
