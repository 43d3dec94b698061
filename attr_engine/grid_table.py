"""What the cells of a grid say, as the paper's table 1: Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.files import write_json, write_text
from attr_engine.report.data import Table
from attr_engine.report.tables import markdown
from attr_engine.result import Attribution
from attr_engine.settings import Settings

TABLE = "table1"
SHORT_SECONDS = 10.0  # targets below it have a column of their own, as in the paper
ORDERS = ("best", "grid")
_PAPER = ("layers", "mask_update", "mask_score", "strength", "steps", "damping")
_NAMES = {"mask_update": "M_U", "mask_score": "M_L", "mask_fisher": "M_F"}
_RESAMPLES = 2000


@dataclass(frozen=True)
class Judged:
    """What one unlearned target says.

    Attributes:
        target: its id.
        rank: of itself, from 1; half-integers where scores tie.
        short: whether it is shorter than :data:`SHORT_SECONDS`.
        top: mean embedding similarity to the first k tracks, NaN where a track has no finite score.
        bottom: to the last k.
    """

    target: str
    rank: float
    short: bool
    top: float
    bottom: float


@dataclass(frozen=True)
class Row:
    """One cell.

    Attributes:
        settings: of the run that holds it.
        function: score function.
        strength: of the update.
        run: name of the run's folder.
        judged: one entry a target.
        frechet: Frechet distances after some of the targets, NaN where the pieces are not finite.
        error: why there is nothing, or "".
    """

    settings: Settings
    function: str
    strength: float
    run: str
    judged: Sequence[Judged] = ()
    frechet: Sequence[float] = ()
    error: str = ""


def rank_of(scores: np.ndarray, members: Collection[int]) -> float:
    """Rank of the best of some tracks among all the others; :func:`attr_engine.evaluate.self_rank` where no scores tie.

    Tracks with the same score share the middle of their places: an update that changes nothing gives the middle of the ranking, not
    the place of the track in the data set. What has no finite score comes last.

    Args:
        scores: ``[N]``.
        members: indices of the track and its exact copies, which count as one.
    """
    values = np.where(np.isnan(scores), -np.inf, scores)
    inside = np.zeros(len(values), dtype=bool)
    inside[list(members)] = True
    best, others = values[inside].max(), values[~inside]
    if best == -np.inf:
        return float(len(others) + 1)
    return 1.0 + int((others > best).sum()) + int((others == best).sum()) / 2


def judge(
    result: Attribution, function: str, update: int, members: Collection[int], similarity: np.ndarray, k: int, short: bool
) -> Judged:  # fmt: skip
    """Judge one update of a training track.

    Args:
        result: scores of all tracks.
        function: by which score.
        update: which update.
        members: indices of the unlearned track and its exact copies; they are left out of the top and the bottom.
        similarity: of the unlearned track to every track, ``[N]``.
        k: how many tracks are at the top and at the bottom, fewer where there are not as many.
        short: whether the track is a short one.
    """
    scores = result.values[function][update]
    top = bottom = math.nan
    if np.isfinite(scores).all():
        order = np.array([i for i in result.order(function, update) if int(i) not in members])
        top, bottom = float(similarity[order[:k]].mean()), float(similarity[order[-k:]].mean())
    return Judged(result.updates[update][0], rank_of(scores, members), short, top, bottom)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean (percentiles of resampled means); None of fewer than two values."""
    if len(values) < 2:
        return None
    picks = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float | None:
    """The mean; None where there is nothing, or something that is not finite."""
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def record(row: Row, axes: Sequence[str] = ()) -> dict[str, Any]:
    """A cell as JSON values; None where something is not known."""
    s = row.settings
    ranks = [j.rank for j in row.judged]
    low, high = interval(ranks) or (None, None)
    short = [j.rank for j in row.judged if j.short]
    return {
        "layers": "+".join(s.layers),
        "mask_update": s.mask_update,
        "mask_score": s.mask_score,
        "strength": row.strength,
        "unit": s.unit,
        "steps": s.steps,
        "damping": s.damping,
        "function": row.function,
        **{name: getattr(s, name) for name in axes if name not in _PAPER and name != "unit"},
        "mean_rank": _mean(ranks),
        "mean_rank_low": low,
        "mean_rank_high": high,
        "median_rank": float(np.median(ranks)) if ranks else None,
        "worst_rank": max(ranks, default=None),
        "mean_rank_short": _mean(short),
        "short_targets": len(short),
        "top_similarity": _mean([j.top for j in row.judged]),
        "bottom_similarity": _mean([j.bottom for j in row.judged]),
        "frechet": _mean(row.frechet),
        "error": row.error,
        "run": row.run,
    }


def ordered(rows: Sequence[Row], order: str) -> list[Row]:
    """Cells with the smallest mean, then median, then worst rank first; or as they stand. What could not be computed comes last."""

    def key(row: Row) -> tuple[float, ...]:
        ranks = [j.rank for j in row.judged]
        return (float(np.mean(ranks)), float(np.median(ranks)), max(ranks)) if ranks else (math.inf,)

    return sorted(rows, key=key) if order == "best" else list(rows)


def text_of(value: Any) -> str:
    """A setting as a table shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_of(rows: Sequence[Row], axes: Sequence[str], k: int, note: str) -> Table:
    """The paper's table 1, with a column for every further setting of the grid."""
    more = [name for name in axes if name not in _PAPER]
    more += ["function"] if len({row.function for row in rows}) > 1 else []
    columns = [_NAMES.get(name, name.replace("_", " ")) for name in (*_PAPER, *more)]
    columns += [
        "mean rank", "median", "worst", f"mean rank < {SHORT_SECONDS:g} s", f"top-{k} similarity",
        f"bottom-{k} similarity", "Frechet distance",
    ]  # fmt: skip
    lines: list[list[str | float | int | None]] = []
    for row in rows:
        r = record(row, axes)
        measured = [
            (r["mean_rank"], 1),
            (r["median_rank"], 1),
            (r["worst_rank"], 1),
            (r["mean_rank_short"], 1),
        ]
        measured += [(r["top_similarity"], 3), (r["bottom_similarity"], 3), (r["frechet"], 2)]
        # A number that is not known is an empty field; why there is none stands in the first one.
        numbers = [None if value is None else round(value, digits) for value, digits in measured]
        lines.append([*(text_of(r[name]) for name in (*_PAPER, *more)), *numbers])
        if row.error:
            lines[-1][len(_PAPER) + len(more)] = f"not computed: {row.error}"
    return Table("Training tracks unlearned, and their rank among all", columns, lines, note)


def write(
    folder: Path, rows: Sequence[Row], axes: Sequence[str], k: int, notes: Sequence[str], about: dict[str, Any]
) -> str:  # fmt: skip
    """Write ``table1.md``, ``.csv`` and ``.json``; returns the Markdown."""
    table = table_of(rows, axes, k, "")
    text = (
        markdown([table]).replace("\n\n\n", "\n\n") + "\n" + "\n".join(f"* {note}" for note in notes) + "\n"
    )
    write_text(folder / f"{TABLE}.md", text)
    records = [record(row, axes) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(folder / f"{TABLE}.csv", out.getvalue())
    cells = [
        {
            **one,
            "ranks": {j.target: j.rank for j in row.judged},
            "frechets": [x if math.isfinite(x) else None for x in row.frechet],
        }
        for one, row in zip(records, rows, strict=True)
    ]
    write_json(folder / f"{TABLE}.json", {**about, "notes": list(notes), "cells": cells})
    return text
