"""From tracks to groups: scores of windows, recordings, duplicates, artists or owners, as sums, means or maxima of single scores.

A sum of single scores is not the score of the group: tracks that stand for each other each score little, and summed scores can
be near chance for groups (GUDA, ICML 2026; METHOD section 2). What a group did is found by unlearning it jointly; such rows fit
into the same table, with ``how="joint"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.result import Attribution, order_of, ranks

if TYPE_CHECKING:
    import pyarrow as pa

    from attr_engine.effects import Effects

FORMAT = "attr_engine.groups/1"
AGGREGATES = ("sum", "mean", "max", "count")
UNKNOWN, SEVERAL = "(unknown)", "(several)"


@dataclass(frozen=True)
class Level:
    """One step up.

    Attributes:
        name: such as ``"artist"``.
        groups: the group of every track, N; :data:`UNKNOWN` where there is none.
        how: one of :data:`AGGREGATES`.
    """

    name: str
    groups: Sequence[str]
    how: str = "sum"


@dataclass(frozen=True)
class Groups:
    """Scores of the G groups of a level under U updates.

    Attributes:
        level: name.
        how: how the scores came about, e.g. ``"sum"``, ``"sum of max"``; ``"joint"`` where groups were unlearned jointly.
        names: G, in the order of their first tracks.
        values: function name to scores, float64 ``[U, G]``; NaN where nothing was measured.
        errors: function name to standard errors ``[U, G]``; NaN = not known.
        tracks: int64 ``[G]``, training tracks in the group.
        unmeasured: function name to int64 ``[U, G]``, how many of them have no score.
    """

    level: str
    how: str
    names: Sequence[str]
    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    tracks: np.ndarray
    unmeasured: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RollUp:
    """Groups of one level or several, the last one the highest.

    Attributes:
        updates: (query id, strength) of every update, U.
        levels: the groups.
        meta: of the scores.
        notes: sentences about what is worth knowing: unknown groups, scores that are missing, errors that are not known.
    """

    updates: Sequence[tuple[str, float]]
    levels: Sequence[Groups]
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def top(self, k: int, update: int, function: str) -> list[tuple[int, str, float, float, int, int]]:
        """(rank, group, score, standard error, tracks, unmeasured) of the first k groups of the highest level."""
        g = self.levels[-1]
        values, errors, missing = (x[function][update] for x in (g.values, g.errors, g.unmeasured))
        return [
            (n + 1, g.names[i], float(values[i]), float(errors[i]), int(g.tracks[i]), int(missing[i]))
            for n, i in enumerate(order_of(values)[:k])
        ]

    def to_parquet(self, path: str | Path) -> None:
        """Write one row a (level, function, query, strength, group); docs/results.md describes the columns."""
        from attr_engine import scorefile

        header = {"format": FORMAT, "meta": dict(self.meta), "notes": list(self.notes)}
        scorefile.write_parquet(Path(path), _schema(), self._tables(), header)

    def to_csv(self, path: str | Path) -> None:
        """Write the same rows as :meth:`to_parquet` as CSV."""
        from attr_engine import scorefile

        scorefile.write_csv(Path(path), _schema(), self._tables())

    def _tables(self) -> Iterator[pa.Table]:
        import pyarrow as pa

        from attr_engine.scorefile import distinct, known, repeated

        for g in self.levels:
            n, names, tracks = len(g.names), distinct(g.names), pa.array(g.tracks)
            for function, values in g.values.items():
                for u, (query, strength) in enumerate(self.updates):
                    columns = [
                        repeated(query, n), pa.array(np.full(n, float(strength))), repeated(function, n),
                        repeated(g.level, n), repeated(g.how, n), names, pa.array(ranks(values[u])), known(values[u]),
                        known(g.errors[function][u]), tracks, pa.array(g.unmeasured[function][u]),
                    ]  # fmt: skip
                    yield pa.table(columns, _schema().names)


def _schema() -> pa.Schema:
    import pyarrow as pa

    from attr_engine.scorefile import TEXT

    kinds = {
        "query": TEXT, "strength": pa.float64(), "function": TEXT, "level": TEXT, "how": TEXT, "group": TEXT,
        "rank": pa.int32(), "score": pa.float64(), "standard_error": pa.float64(), "tracks": pa.int32(),
        "unmeasured": pa.int32(),
    }  # fmt: skip
    return pa.schema([pa.field(n, t, nullable=n in ("score", "standard_error")) for n, t in kinds.items()])


@dataclass(frozen=True)
class _Step:
    """How the groups below (first: the tracks) lie in the groups of a level."""

    member: np.ndarray  # [items below] group of each
    of_track: np.ndarray  # [N] group of each track
    names: list[str]


@dataclass(frozen=True)
class _Scores:
    """Of the items of a level under one update; ``replicates`` ``[items, R]`` are their means over each replicate's draws."""

    values: np.ndarray
    errors: np.ndarray
    replicates: np.ndarray | None


def roll_up(result: Attribution, levels: Sequence[Level], effects: Effects | None = None) -> RollUp:
    """Aggregate the scores of tracks over groups, level by level: each level aggregates the groups of the one before.

    Standard errors: draws of different tracks are independent under the plan ``track``, so the squares of errors add up.
    Under the plan ``shared`` they are not, and the error of a sum is the spread of the sums of single replicates, for which
    the per-draw effects are needed; without them it is NaN for every group of more than one measured item, and a note
    says so. The error of a maximum is that of the item that attains it. All of them leave out the noise of the update.

    Args:
        result: scores of tracks.
        levels: from the lowest to the highest.
        effects: per-draw numbers of the same run (:func:`attr_engine.read_effects`); used where the plan of draws is not
            known to be ``track``.

    Returns:
        The groups of every level. Tracks without a score count as unmeasured and not as 0. A group below whose tracks
        belong to several groups of a level goes to the group ``(several)`` of that level.

    Raises:
        UserError: an unknown aggregate, a level for other tracks, or effects of another run.
    """
    for level in levels:
        if level.how not in AGGREGATES:
            raise UserError(f"unknown aggregate {level.how!r}; known: {', '.join(AGGREGATES)}")
        if len(level.groups) != len(result.tracks):
            raise UserError(
                f"the level {level.name!r} has {len(level.groups)} groups for {len(result.tracks)} tracks: give one a track"
            )
    settings = result.meta.get("settings") or {}
    independent = settings.get("plan") == "track"
    steps = _steps(levels, len(result.tracks))
    found: list[dict[str, list[_Scores]]] = [{f: [] for f in result.values} for _ in levels]
    for function, values in result.values.items():
        for u in range(len(result.updates)):
            means = None
            if effects is not None and not independent:
                means = _replicates(result, effects, function, u, settings)
            scores = _Scores(values[u], result.errors[function][u], means)
            for level, step, rows in zip(levels, steps, found, strict=True):
                scores = _aggregate(level.how, scores, step.member, len(step.names), independent)
                rows[function].append(_Scores(scores.values, scores.errors, None))
    groups = []
    for k, (level, step, rows) in enumerate(zip(levels, steps, found, strict=True)):
        count = len(step.names)
        missing = {
            f: np.stack([np.bincount(step.of_track[np.isnan(row)], minlength=count) for row in v])
            for f, v in result.values.items()
        }
        groups.append(
            Groups(
                level.name,
                " of ".join(below.how for below in reversed(levels[: k + 1])),
                step.names,
                {f: np.stack([x.values for x in v]) for f, v in rows.items()},
                {f: np.stack([x.errors for x in v]) for f, v in rows.items()},
                np.bincount(step.of_track, minlength=count),
                missing,
            )
        )
    return RollUp(result.updates, groups, result.meta, _notes(result, groups, independent, effects is None))


def _steps(levels: Sequence[Level], n: int) -> list[_Step]:
    out, below, count = [], np.arange(n), n
    for level in levels:
        codes: dict[str, int] = {}
        of_track = np.array([codes.setdefault(name, len(codes)) for name in level.groups], dtype=np.int64)
        lowest, highest = np.full(count, len(codes)), np.full(count, -1)
        np.minimum.at(lowest, below, of_track)
        np.maximum.at(highest, below, of_track)
        known = list(codes)
        # Numbered anew, because all tracks of a group may have gone to (several).
        codes = {}
        texts = [known[a] if a == b else SEVERAL for a, b in zip(lowest, highest, strict=True)]
        member = np.array([codes.setdefault(name, len(codes)) for name in texts], dtype=np.int64)
        below, count = member[below], len(codes)
        out.append(_Step(member, below, list(codes)))
    return out


def _aggregate(how: str, below: _Scores, member: np.ndarray, count: int, independent: bool) -> _Scores:
    """Scores of ``count`` groups from those of their members; members without a score are left out."""
    kept = np.flatnonzero(~np.isnan(below.values))
    measured = np.bincount(member[kept], minlength=count)
    if how == "count":
        r = 0 if below.replicates is None else below.replicates.shape[1]
        same = np.repeat(measured[:, None].astype(np.float64), r, axis=1) if r else None
        return _Scores(measured.astype(np.float64), np.zeros(count), same)
    if how == "max":
        return _maximum(below, kept, member[kept], count)
    return _total(below, kept, member[kept], measured, how == "mean", independent)


def _maximum(below: _Scores, kept: np.ndarray, group: np.ndarray, count: int) -> _Scores:
    order = np.lexsort((-below.values[kept], group))
    groups, first = np.unique(group[order], return_index=True)
    at = kept[order[first]]

    def pick(values: np.ndarray) -> np.ndarray:
        out = np.full((count, *values.shape[1:]), np.nan)
        out[groups] = values[at]
        return out

    means = None if below.replicates is None else pick(below.replicates)
    return _Scores(pick(below.values), pick(below.errors), means)


def _total(
    below: _Scores, kept: np.ndarray, group: np.ndarray, measured: np.ndarray, mean: bool, independent: bool
) -> _Scores:
    divisor = np.where(measured == 0, np.nan, measured if mean else 1.0)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, weights=values[kept], minlength=len(measured))

    values = total(below.values) / divisor
    if below.replicates is not None:
        means = np.stack([total(column) for column in below.replicates.T], axis=1) / divisor[:, None]
        return _Scores(values, _spread(means), means)
    # A power of two, so that no square overflows or vanishes and a single error stays as it is.
    unit = np.ldexp(1.0, np.frexp(np.nanmax(below.errors[kept], initial=0.0))[1] - 1)
    errors = np.sqrt(total(np.square(below.errors / unit))) * unit / divisor
    return _Scores(values, errors if independent else np.where(measured > 1, np.nan, errors), None)


def _spread(means: np.ndarray) -> np.ndarray:
    """Standard errors of the means over replicates ``[items, R]`` (see :func:`attr_engine.diffusion.standard_error`)."""
    if means.shape[1] < 2:
        return np.full(len(means), np.nan)
    return np.asarray(means.std(axis=1, ddof=1) / math.sqrt(means.shape[1]))


def _replicates(
    result: Attribution, effects: Effects, function: str, u: int, settings: Mapping[str, Any]
) -> np.ndarray:
    """Mean score of every track over the draws of each replicate, ``[N, R]``; NaN where a track has no draws."""
    from attr_engine.effects import Effects
    from attr_engine.score import score_function

    another = UserError(
        "the effects are not those of these scores: give the effects.safetensors of the same run"
    )
    count, part = settings.get("replicates"), slice(u, u + 1)
    one = Effects(
        effects.base, effects.unlearned[part], effects.displacement[part],
        {name: values[part] for name, values in effects.influence.items()},
    )  # fmt: skip
    per_draw = score_function(function)(one)  # [1, N, D]
    if (
        not isinstance(count, int)
        or count < 1
        or per_draw.shape[:2] != (1, len(result.tracks))
        or per_draw.shape[2] % count
    ):
        raise another
    draws = per_draw[0].reshape(len(result.tracks), -1, count)  # draw d belongs to replicate d % R
    there = ~np.isnan(draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(there, draws, 0.0).sum(axis=1) / there.sum(axis=1)
    values = result.values[function][u]
    close = 1e-9 * np.abs(draws[there]).max(initial=0.0)
    if settings.get(
        "top"
    ):  # a race reports scores less what the draws did to all tracks alike: another mean, the same spread
        return means + (values - means.mean(axis=1))[:, None]
    if not np.allclose(means.mean(axis=1), values, rtol=1e-9, atol=close, equal_nan=True):
        raise another
    return means


def _notes(result: Attribution, groups: Sequence[Groups], independent: bool, without: bool) -> list[str]:
    out = []
    for g in groups:
        for name, why in ((UNKNOWN, "have no"), (SEVERAL, "stand in groups below with more than one")):
            if name in g.names:
                out.append(
                    f"{g.tracks[list(g.names).index(name)]} tracks {why} {g.level}: they are the group {name}"
                )
    missing = max((int(np.isnan(v).sum(axis=1).max(initial=0)) for v in result.values.values()), default=0)
    if missing:
        out.append(
            f"up to {missing} of {len(result.tracks)} tracks a query were not measured: groups leave them out"
        )
    added = any(how in g.how for g in groups for how in ("sum", "mean"))
    if all(np.isnan(e).all() for e in result.errors.values()):
        out.append("the tracks' scores have no standard errors, so those of groups are not known")
    elif added and not independent and without:
        plan = (result.meta.get("settings") or {}).get("plan", "unknown")
        out.append(
            f"draws are not independent from track to track (plan {plan}): without the per-draw effects the standard "
            "errors of sums and means are not known"
        )
    if added:
        out.append(
            "sums of single scores are known to fail for groups (GUDA, ICML 2026): unlearn a group jointly to know what it did"
        )
    return out
