"""Scores: what unlearning a query does to every track, on the track's own draws.

``tau[q, i] = mean over draws of s(L_d(z_i; theta_0), L_d(z_i; theta_q), displacement, influence)``. The same
draws serve theta_0 and theta_q, so the difference is paired (METHOD section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from attr_engine.diffusion import standard_error
from attr_engine.effects import Effects
from attr_engine.errors import UserError


def loss_change(effects: Effects) -> np.ndarray:
    """``L(theta_q) - L(theta_0)``: the paper's score (arXiv 2506.18312)."""
    return np.asarray(effects.unlearned - effects.base)


def skew(effects: Effects) -> np.ndarray:
    """``(L_u - L_t) / (L_u + L_t + 1e-3)``: normalised skew (MUCS, arXiv 2605.17938)."""
    return np.asarray((effects.unlearned - effects.base) / (effects.unlearned + effects.base + 1e-3))


def displacement(effects: Effects) -> np.ndarray:
    """``|f(theta_q) - f(theta_0)|^2``: how far the prediction moves (METHOD section 6)."""
    return effects.displacement


def influence(effects: Effects) -> np.ndarray:
    """Inner product of the track's loss gradient and the update: the loss change to first order."""
    return _influence(effects, "loss")


def norm_influence(effects: Effects) -> np.ndarray:
    """The same of the squared norm of the prediction, of query and track: the target function of D-TRAK."""
    return _influence(effects, "squared_norm")


def _influence(effects: Effects, function: str) -> np.ndarray:
    if function not in effects.influence:
        raise UserError(
            f"the influence of the {function} was not measured: put what measure_influence returns into Effects.influence"
        )
    return effects.influence[function]


ScoreFunction = Callable[[Effects], np.ndarray]
SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "displacement": displacement,
    "influence": influence,
    "loss_change": loss_change,
    "norm_influence": norm_influence,
    "skew": skew,
}
"""Name to function of :class:`Effects`, giving per-draw scores ``[U, N, D]``; add your own here."""


FIRST_ORDER = {"influence": "loss", "norm_influence": "squared_norm"}
"""Score functions that need no forward pass under an update, and the function whose gradients they take."""


RIDGE = "ridge"
"""Kernel ridge regression in gradient space (:mod:`attr_engine.ridge`): a score that needs no update."""


def score_function(name: str) -> ScoreFunction:
    """Look up a score function.

    Raises:
        UserError: unknown name.
    """
    if name not in SCORE_FUNCTIONS:
        raise UserError(f"unknown score function {name!r}; known: {', '.join([RIDGE, *SCORE_FUNCTIONS])}")
    return SCORE_FUNCTIONS[name]


def scores(
    effects: Effects, functions: Sequence[str], replicates: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score and standard error of every track under every update.

    Returns:
        Function name to (scores ``[U, N]``, standard errors ``[U, N]``), float64.

    Raises:
        UserError: unknown function.
    """
    out = {}
    for name in functions:
        per_draw = score_function(name)(effects)
        out[name] = (per_draw.mean(axis=-1), standard_error(per_draw, replicates))
    return out
