"""Refusing: a track is held responsible only where it stands out more than tracks do for pieces that no track made.

A finished run over such pieces (noise, other generators, held-out music) is the control. Its scores give a threshold for how far the
best track of a query stands out; below it no share is given out, and what is not given out is unattributable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine.errors import UserError
from attr_engine.result import Attribution
from attr_engine.settings import Settings

_MAD = 1.4826  # standard deviation of a normal distribution whose median absolute deviation is 1


def prominence(scores: np.ndarray) -> np.ndarray:
    """How far each track stands out of all tracks of a query: ``(score - median) / (1.4826 median |score - median|)``.

    Args:
        scores: ``[..., N]``; NaN (not measured) stays NaN and is left out of the medians.

    Returns:
        ``[..., N]`` float64; it does not change when all scores are shifted or multiplied by a positive number.
    """
    centred = scores - np.nanmedian(scores, axis=-1, keepdims=True)
    spread = _MAD * np.nanmedian(np.abs(centred), axis=-1, keepdims=True)
    return np.asarray(centred / np.where(spread > 0, spread, np.inf))


def threshold(controls: np.ndarray, rate: float) -> float:
    """The prominence that the best track of a piece that nobody made exceeds with a probability of at most ``rate``.

    The ``ceil((1 - rate) (n + 1))``-th smallest of n controls (conformal prediction: Vovk et al. 2005): exact on average where
    queries that no track made are drawn as the controls were.

    Args:
        controls: ``[n]``, prominence of the best track of every control.
        rate: between 0 and 1.

    Raises:
        UserError: too few controls to promise such a rate.
    """
    if not 0.0 < rate < 1.0:
        raise UserError(
            f"a rate of false accepts of {rate} is impossible: use one between 0 and 1, such as 0.05"
        )
    place = math.ceil((1.0 - rate) * (len(controls) + 1))
    if place > len(controls):
        raise UserError(
            f"{len(controls)} controls cannot promise a rate of false accepts of {rate:g}: it takes {math.ceil(1 / rate) - 1} at least"
        )
    return float(np.sort(controls)[place - 1])


@dataclass(frozen=True)
class Controls:
    """What pieces that no training track made look like.

    Attributes:
        limit: prominence above which a track is held responsible.
        count: controls.
        rate: of false accepts that the limit promises.
    """

    limit: float
    count: int
    rate: float

    def responsible(self, scores: np.ndarray) -> np.ndarray:
        """Which tracks of a query stand out more than the controls' best: bool ``[N]``."""
        return prominence(scores) > self.limit


def read_controls(path: Path, result: Attribution, function: str, strength: float, rate: float) -> Controls:
    """Controls from the scores of a finished run, which must be of the same model, tracks and settings.

    Args:
        path: run directory, or its table of scores.
        result: that is to be judged.
        function: score function.
        strength: of the update.
        rate: of false accepts.

    Raises:
        UserError: it cannot be read, is of something else (what differs is named), or has too few queries.
    """
    file = path / "scores.parquet" if path.is_dir() else path
    found = Attribution.from_parquet(file)
    _same(file, found, result, function)
    rows = [u for u, (_, x) in enumerate(found.updates) if x == strength]
    if not rows:
        raise UserError(
            f"{file} has no scores at strength {strength:g}: score the controls with the same --strengths"
        )
    best = np.nanmax(prominence(found.values[function][rows]), axis=1)
    return Controls(threshold(best, rate), len(rows), rate)


_MAY_DIFFER: Sequence[str] = (
    "queries", "self_influence", "data", "model", "weights", "threads", "rows", "memory", "unit_tracks", "functions", "strengths",
)  # fmt: skip


def _same(file: Path, controls: Attribution, result: Attribution, function: str) -> None:
    for name in ("model", "data"):
        if controls.meta.get(name) != result.meta.get(name):
            raise UserError(
                f"the controls {file} are of another {name}: score them by the model and tracks of this run"
            )
    if function not in controls.values:
        raise UserError(
            f"the controls {file} have no scores by {function!r}: score them with --functions {function}"
        )
    old, new = controls.meta.get("settings") or {}, result.meta.get("settings") or {}
    changed = [name for name in new if name not in _MAY_DIFFER and old.get(name) != new[name]]
    if changed:
        raise UserError(
            f"the controls {file} were scored with another {changed[0]} ({old.get(changed[0])!r}, not {new[changed[0]]!r}): use the same"
        )


def controls_of_run(s: Settings, result: Attribution) -> Controls | None:
    """What the settings' controls say of the leading function and strength; None without controls."""
    if not s.controls:
        return None
    return read_controls(Path(s.controls), result, s.functions[0], s.strengths[0], s.false_accepts)
