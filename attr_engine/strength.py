"""Strengths that every query turns into a size of its own: how large its update has to be for the query itself to be unlearned so far.

The direction is the update's (METHOD section 1). What is looked for is its size x, the norm relative to the weights, by forward passes
on the draws that the query's gradient was taken on, masked as they were (M_U). With means over those draws:

- ``null_loss``: ``(L(x) - L(0)) / (L_null - L(0)) = s``, ``L_null`` the loss of predicting nothing, the mean square of the target. An
  untrained network says nothing where its last layer begins at zero; MUCS (arXiv 2605.17938) stops at 0.95 of such a network's loss.
- ``displacement``: ``mean |f(x) - f(0)|^2 / mean |f(0)|^2 = s``, f the prediction.

Sizes a factor of 4 apart bracket the strength, halves of the bracket (of its logarithm) close in. Which sizes can be tried does not depend
on the strength, so a larger strength never gets a smaller size, however the loss rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import Noised, predict, row_losses
from attr_engine.errors import UserError
from attr_engine.models.protocol import Denoiser
from attr_engine.settings import Settings
from attr_engine.updates import swapped, unlearned_weights

SEARCHED = ("null_loss", "displacement")
"""Units of a strength whose size is looked for, query by query."""

TOLERANCE = 1e-2  # of what is reached, relative to the strength
SMALLEST, FIRST, LARGEST, _FACTOR = 2.0**-20, 2.0**-8, 1.0, 4.0
KEPT_ROWS = 256  # of a query, with their predictions: as many as a unit of scoring holds
_MOST_TRIED = 30
_USUALLY_TRIED = 16  # where the strength grows no faster than the square of the size: 7 to bracket, 9 halves


def kept_rows(s: Settings) -> int:
    """Rows of a query that may stay in memory while its size is looked for; none under a bound on memory."""
    return 0 if s.memory else KEPT_ROWS


def search_rows(s: Settings, rows: int) -> int:
    """Rows that go through the model at most to find one size, for a query of so many rows (tracks times draws)."""
    if s.unit not in SEARCHED:
        return 0
    return rows * (1 + _USUALLY_TRIED * (1 if rows <= kept_rows(s) else 2))


class Response:
    """What an update does to its own query.

    Args:
        model: theta_0; unchanged between calls.
        direction: of the update, parameter name to tensor.
        scale: that makes the direction as long as the weights.
        passes: each makes the noised rows of a pass; together the draws of the update.
        keep: whether the rows and their predictions under theta_0 stay in memory; else they are made again for every size.
        tick: called before every pass; what it raises ends it.

    Attributes:
        loss: mean loss under theta_0, over the rows.
        null: mean loss of predicting 0.
        power: mean square of the prediction under theta_0.
    """

    @torch.no_grad()
    def __init__(
        self, model: Denoiser, direction: Mapping[str, Tensor], scale: float, passes: Sequence[Callable[[], Noised]],
        keep: bool = True, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._model, self._direction, self._scale = model, direction, scale
        self._passes, self._tick = passes, tick
        self._kept: dict[int, tuple[Noised, Tensor]] = {}
        self._rows, sums = 0, np.zeros(3)
        for k in range(len(passes)):
            rows, before = self._before(k)
            if keep:
                self._kept[k] = rows, before
            nothing = torch.zeros_like(before)
            power = kernels.per_draw_loss(before, nothing, rows.counted)
            sums += [float(x.sum()) for x in (row_losses(before, rows), row_losses(nothing, rows), power)]
            self._rows += len(rows.t)
        self.loss, self.null, self.power = (float(x) for x in sums / self._rows)

    def _before(self, k: int) -> tuple[Noised, Tensor]:
        """Rows of a pass and their predictions under theta_0."""
        if k in self._kept:
            return self._kept[k]
        self._tick()
        rows = self._passes[k]()
        return rows, predict(self._model, rows)

    @torch.no_grad()
    def at(self, size: float) -> tuple[float, float]:
        """Mean loss, and mean squared change of the prediction, under an update of a relative size."""
        length = size * self._scale
        weights = unlearned_weights(self._model, {n: length * d for n, d in self._direction.items()})
        loss = moved = 0.0
        for k in range(len(self._passes)):
            rows, before = self._before(k)
            self._tick()
            with swapped(self._model, weights):
                after = predict(self._model, rows)
            loss += float(row_losses(after, rows).sum())
            moved += float(kernels.per_draw_loss(after, before, rows.counted).sum())
        return loss / self._rows, moved / self._rows


def find_size(response: Response, strength: float, unit: str, query: str) -> tuple[float, dict[str, float]]:
    """The size of an update at which its query is unlearned as far as a strength asks.

    Args:
        response: of the query.
        strength: s of the module's formulas, above 0.
        unit: one of :data:`SEARCHED`.
        query: named in messages.

    Returns:
        The size, between :data:`SMALLEST` and :data:`LARGEST`, at which the strength is reached to a relative :data:`TOLERANCE`; and what
        was measured there: ``loss_before``, ``loss_after``, ``null_loss`` (means over the draws of the update), ``displacement`` (relative
        to the power of the prediction) and ``reached`` (what s is there).

    Raises:
        UserError: the query cannot be unlearned so far, or not so little, or it has no way to go.
    """
    if unit == "null_loss" and not response.loss < response.null:
        raise UserError(
            f"the loss of query {query!r} is {response.loss:.4g}, and predicting nothing has {response.null:.4g}: the model knows nothing "
            "of it that could be unlearned; leave it out, or use --unit size"
        )
    if not response.power > 0.0:
        raise UserError(f"the model predicts nothing for query {query!r}, or NaN: leave it out")

    size, low, high = FIRST, 0.0, math.inf
    for _ in range(_MOST_TRIED):
        loss, moved = response.at(size)
        displacement = moved / response.power
        reached = displacement
        if unit == "null_loss":
            reached = (loss - response.loss) / (response.null - response.loss)
        if abs(reached - strength) <= TOLERANCE * strength:
            return size, {
                "loss_before": response.loss, "loss_after": loss, "null_loss": response.null, "displacement": displacement,
                "reached": reached,
            }  # fmt: skip
        if reached < strength:
            low = size
        else:  # NaN and infinity, too, are too far
            high = size
        if low >= LARGEST or high <= SMALLEST:
            raise _out_of_reach(query, strength, unit, size, reached)
        size = low * _FACTOR if math.isinf(high) else high / _FACTOR if low == 0.0 else math.sqrt(low * high)
    raise UserError(
        f"unlearning query {query!r} jumps past {unit} {strength:g} at a relative size of {high:.3g} (it reached {reached:.4g}): use "
        "another strength, or a wider --dtype"
    )


def _out_of_reach(query: str, strength: float, unit: str, size: float, reached: float) -> UserError:
    """Why there is no size between the smallest and the largest."""
    what = "as large as the weights" if size >= LARGEST else f"of a relative size of {size:.1g}"
    other = "smaller" if size >= LARGEST else "larger"
    return UserError(
        f"an update {what} takes query {query!r} to {unit} {reached:.3g}, where {strength:g} was asked for: use a {other} strength, leave "
        "the query out, or use --unit size"
    )


def spread(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a strength on the sizes of the updates that raise the loss, given what :func:`attr_engine.pipeline.sizes` says of updates."""
    lines = []
    for strength in dict.fromkeys(row["strength"] for row in rows):
        sizes = [row["size"] for row in rows if row["strength"] == strength and row["of"] == "loss"]
        lines.append(
            f"strength {strength:g}: relative sizes {min(sizes):.3g} to {max(sizes):.3g}, median {float(np.median(sizes)):.3g}"
        )
    return lines
