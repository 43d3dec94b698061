"""Every way in which scores are judged, as tables; each number with its interval, the controls beside it (METHOD section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attr_engine import judge
from attr_engine.controls import control_scores
from attr_engine.counterfactuals import HALF, RANDOM, WHOLE, Truth
from attr_engine.evaluate import clusters, families_of, parents_of
from attr_engine.jobs import Query
from attr_engine.judge import Estimate
from attr_engine.latents.batch import Tracks
from attr_engine.report.data import Table

SHORT = 10.0  # seconds; below it the paper's both-masked update returned the same tracks for every query
TOP = 10  # tracks that a user looks at: of recall, and where one track may stand for many queries
Cell = str | float | int | None


@dataclass(frozen=True)
class Case:
    """What is judged.

    Attributes:
        tracks: the training tracks, N.
        queries: Q.
        methods: name to scores ``[Q, N]``; the first one is what the others are compared with.
    """

    tracks: Tracks
    queries: Sequence[Query]
    methods: Mapping[str, np.ndarray]

    def only(self, keep: Sequence[bool]) -> Case:
        """Some of the queries."""
        chosen = np.flatnonzero(keep)
        return Case(
            self.tracks,
            [self.queries[i] for i in chosen],
            {name: s[chosen] for name, s in self.methods.items()},
        )

    @property
    def own(self) -> list[bool]:
        """Which queries are training tracks."""
        return [q.kind == "training track" for q in self.queries]


def with_controls(case: Case, base: np.ndarray, frames: int, seed: int = 0) -> Case:
    """A case with the controls after its methods.

    Args:
        case: to be judged.
        base: loss of every track under theta_0, ``[N]``.
        frames: F of the model.
        seed: of the random control.
    """
    queries = [(q.tracks, q.index) for q in case.queries]
    controls = control_scores(case.tracks, queries, base, frames, seed)
    named = {
        f"{name} (control)": s for name, s in controls.items() if not np.isnan(s).any()
    }  # a table may have no losses
    return Case(case.tracks, case.queries, {**case.methods, **named})


def tables(case: Case, truth: Truth | None = None) -> list[Table]:
    """All tables that the queries and the retrained models allow.

    Raises:
        UserError: the models are of other tracks than the scores.
    """
    if truth is not None:
        truth.check(case.tracks)
    asked = case.only([not own for own in case.own])
    found: list[Table | None] = [planted_table(asked), self_table(case)]
    if len(asked.queries) > 1:
        found.append(collapse_table(asked))
    if truth is not None and asked.queries:
        found = [lds_table(asked, truth), removal_table(asked, truth), group_table(asked, truth), *found]
    return [t for t in found if t is not None]


def _numbers(found: Estimate) -> list[Cell]:
    if found.count == 0:  # such as the correlation of a control that is the same for every query
        return ["", "", ""]
    return [round(found.value, 4), round(found.low, 4), round(found.high, 4)]


def _paired(values: Mapping[str, np.ndarray]) -> list[list[Cell]]:
    """A row a method: mean with interval, and the difference of the first method with its interval, paired by query."""
    first, rows = next(iter(values)), []
    for name, each in values.items():
        difference: list[Cell] = (
            ["", "", ""] if name == first else _numbers(judge.bootstrap(values[first] - each))
        )
        rows.append([name, *_numbers(judge.bootstrap(each)), *difference])
    return rows


_PAIRED = ["low", "high", "first minus this", "low", "high"]


def lds_table(case: Case, truth: Truth) -> Table | None:
    """Linear datamodelling score over the random halves; None where there are none."""
    if HALF not in truth.what:
        return None
    kept, losses = truth.halves()
    losses = losses[:, :, truth.columns([q.id for q in case.queries])]
    values = {name: judge.lds(scores, kept, losses.mean(axis=0)) for name, scores in case.methods.items()}
    rows = _paired(values)
    note = f"{len(case.queries)} queries, {len(kept)} random halves, {len(losses)} training seed(s) each."
    if len(losses) > 1:
        top = judge.ceiling(losses)
        rows.append(
            ["retraining with another seed (split half)", *_numbers(judge.bootstrap(top.seeds)), "", "", ""]
        )
        rows.append(
            ["attainable: sqrt of the reliability", *_numbers(judge.bootstrap(top.attainable)), "", "", ""]
        )
        note += " Split half: what one seed's losses score against another's; attainable: a perfect prediction against their mean."
    return Table("Linear datamodelling score (LDS)", ["method", "LDS", *_PAIRED], rows, note)


def removal_table(case: Case, truth: Truth) -> Table | None:
    """How much worse queries become without the top k of each method."""
    found: dict[str, list[float]] = {}
    asked: dict[str, list[int]] = {}
    for m, what in enumerate(truth.what):
        if what.startswith("top of "):
            name, _, query = what.removeprefix("top of ").partition(" for ")
            asked.setdefault(f"{name}\n{query}", []).append(m)
    if not asked:
        return None
    known = {q.id for q in case.queries}
    seeds = {int(truth.seeds[m]) for rows in asked.values() for m in rows}
    chance = [m for m in truth.rows_of(RANDOM) if int(truth.seeds[m]) in seeds]
    randoms: dict[str, float] = {}
    for key, rows in asked.items():
        name, query = key.split("\n")
        if query in known:
            column = truth.columns([query])[0]
            found.setdefault(name, []).append(truth.rise(rows, column))
            randoms[query] = truth.rise(chance, column)
    if not found:
        return None
    if len({len(values) for values in found.values()}) > 1:
        return None  # a run that is still going on: not every method was asked for every query
    values = {name: np.array(v) for name, v in found.items()}
    values["random tracks"] = np.array(list(randoms.values()))
    k = int((~truth.kept[next(iter(asked.values()))[0]]).sum())
    note = (
        f"Loss of the query, in percent above that of models trained on everything, without the top {k} of each method; "
        f"{len(randoms)} queries."
    )
    return Table(
        f"Removal of the top {k}, retrained", ["method", "loss, % more", *_PAIRED], _paired(values), note
    )


def group_table(case: Case, truth: Truth) -> Table | None:
    """Families and artists that were left out: do sums of scores say which queries suffer?"""
    groups = list(
        dict.fromkeys(what for what in truth.what if "=" in what and not what.startswith("top of "))
    )
    if not groups or len(case.queries) < 3:
        return None
    columns, base = truth.columns([q.id for q in case.queries]), truth.mean_loss(WHOLE)
    values: dict[str, list[float]] = {name: [] for name in case.methods}
    for group in groups:
        out = ~truth.kept[truth.what.index(group)]
        rise = (truth.mean_loss(group) / base - 1)[columns]
        for name, scores in case.methods.items():
            values[name].append(float(judge.spearman(scores[:, out].sum(axis=1), rise)))
    note = (
        f"{len(groups)} groups, {len(columns)} queries: rank correlation over queries between the sum of a group's scores and how much "
        "the query's loss rises without the group; the mean over groups."
    )
    rows = _paired({name: np.array(v) for name, v in values.items()})
    return Table("Leave one group out", ["method", "correlation", *_PAIRED], rows, note)


def _ids(info: Mapping[str, Any], name: str) -> frozenset[str]:
    return parents_of({"parents": info.get(name)})


def planted_table(case: Case) -> Table | None:
    """Average precision of planted relatives, by the relation of the query.

    Relevant are the tracks that a query's metadata name as ``near`` (copies of the same original that are near copies of each
    other), else its ``parents``. Other relatives are taken out of the ranking, because whether they count is not known.
    """
    by_relation: dict[str, list[int]] = {}
    relatives: dict[int, tuple[frozenset[str], frozenset[str]]] = {}  # relevant, and left out of the ranking
    for i, query in enumerate(case.queries):
        info = query.tracks.info[query.index]
        if parents_of(info):
            by_relation.setdefault(str(info.get("relation") or "related"), []).append(i)
            parents = _windows(case, parents_of(info))
            near = _windows(case, _ids(info, "near")) or parents
            relatives[i] = near, parents | (_halves(case, parents) - near)
    if not by_relation:
        return None
    rows: list[list[Cell]] = []
    for name, scores in case.methods.items():
        for relation, chosen in by_relation.items():
            found = [judge.precision_without(scores[i], case.tracks.ids, *relatives[i]) for i in chosen]
            recall = [judge.recall_without(TOP, scores[i], case.tracks.ids, *relatives[i]) for i in chosen]
            rows.append(
                [name, relation, len(chosen), *(x for v in (found, recall) for x in _numbers(judge.bootstrap(np.array(v))))]
            )  # fmt: skip
    note = (
        f"Mean average precision, and how many of the relevant tracks ({TOP} at most) are in the top {TOP}. "
        "Relevant: near copies of the query's original (itself, exact copies, gain, noise, lossy); other relatives "
        "and splices that hold a part of it are left out of the ranking."
    )
    columns = ["method", "query is", "queries", "mAP", "low", "high", f"recall@{TOP}", "low", "high"]
    return Table("Planted relations", columns, rows, note)


def _windows(case: Case, names: frozenset[str]) -> frozenset[str]:
    """Training tracks of these names, and the windows of recordings of these names."""
    rows = zip(case.tracks.ids, case.tracks.info, strict=True)
    return frozenset(name for name, info in rows if name in names or str(info.get("parent") or "") in names)


def _halves(case: Case, parents: frozenset[str]) -> frozenset[str]:
    """Training tracks that hold a part of a parent's family: splices."""
    rows = list(zip(case.tracks.ids, case.tracks.info, strict=True))
    families = {str(info["family"]) for name, info in rows if name in parents and info.get("family")}
    return frozenset(name for name, info in rows if families & families_of(info))


def self_table(case: Case) -> Table | None:
    """Rank of unlearned training tracks among all, by length; copies of a track count as one with it."""
    own = case.only(case.own)
    if not own.queries:
        return None
    targets, copies = [q.id for q in own.queries], clusters(case.tracks.ids, case.tracks.info)
    seconds = np.array([_seconds(q) for q in own.queries])
    parts = {
        "all": np.ones(len(targets), bool),
        "no exact copy": np.array([len(copies[t]) == 1 for t in targets]),
    }
    parts[f"under {SHORT:g} s"] = seconds < SHORT
    rows: list[list[Cell]] = []
    for name, scores in own.methods.items():
        place = judge.self_ranks(scores, case.tracks.ids, targets, copies)
        for part, chosen in parts.items():
            if chosen.any():
                some = place[chosen]
                rows.append([name, part, int(chosen.sum()), *_numbers(judge.bootstrap(some)),
                             float(np.median(some)), int(some.max())])  # fmt: skip
    note = f"Rank among {len(case.tracks)} tracks, by other draws than it was unlearned with; a track and its exact copies count as one."
    columns = ["method", "targets", "count", "mean rank", "low", "high", "median", "worst"]
    return Table("Rank of a training track when it is itself unlearned", columns, rows, note)


def _seconds(query: Query) -> float:
    value = query.tracks.info[query.index].get("seconds")
    return float(value) if isinstance(value, int | float) else float("nan")


def collapse_table(case: Case) -> Table:
    """Does a method answer the same whatever it is asked?"""
    rows: list[list[Cell]] = []
    for name, scores in case.methods.items():
        if not np.ptp(scores, axis=1).all():
            continue
        found = judge.collapse(scores, TOP)
        hub = judge.share(round(found.hub_share * len(scores)), len(scores))
        rows.append(
            [
                name,
                round(found.correlation, 4),
                round(found.first_energy, 4),
                *_numbers(hub),
                case.tracks.ids[found.hub],
            ]
        )
    note = (
        f"{len(case.queries)} queries. Mean rank correlation between the scores of two queries; energy of the first singular vector; the "
        f"largest part of the queries that have one track in their top {TOP}."
    )
    columns = [
        "method",
        "correlation",
        "first singular vector",
        f"one track in top {TOP}",
        "low",
        "high",
        "track",
    ]
    return Table("Collapse and hubs", columns, rows, note)
