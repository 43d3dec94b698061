"""Results over all queries: rank of oneself, planted relations, the controls beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attr_engine import evaluate
from attr_engine.controls import control_scores
from attr_engine.jobs import Job, Query
from attr_engine.latents.batch import Tracks
from attr_engine.report.data import Table
from attr_engine.result import Attribution
from attr_engine.score import RIDGE
from attr_engine.settings import Settings

_UNITS = {
    "size": "relative size", "lr": "lr", "null_loss": "part of the way to the null loss", "displacement": "relative displacement"
}  # fmt: skip


def text_of(info: Mapping[str, Any], *names: str) -> str:
    """The first of the named entries that holds something, as text."""
    return next((str(info[n]) for n in names if info.get(n) not in (None, "")), "")


def number_of(info: Mapping[str, Any], name: str) -> float | None:
    """An entry as a number of at most a billion, None where it is anything else."""
    value = info.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        return None
    return float(value)


def rankings_of(s: Settings) -> list[tuple[str, float]]:
    """Every score function at every strength; ridge once, which has the same scores at all."""
    return [(f, x) for f in s.functions for x in (s.strengths[:1] if f == RIDGE else s.strengths)]


def strength_text(job: Job, strength: float, function: str = "") -> str:
    """A strength with its unit; of ridge its lambda."""
    if function == RIDGE:
        return f"lambda {job.run.settings.ridge:g}"
    return f"{_UNITS[job.run.settings.unit]} {strength:g}"


def relatives(tracks: Tracks, query: Query) -> dict[str, str]:
    """Training tracks with a known relation to a query, and its name.

    For a training track: its family. For another query: the ids in its ``parents``, and every window of a
    recording that is named there.
    """
    rows = list(zip(tracks.ids, tracks.info, strict=True))
    if query.kind == "training track":
        family = tracks.info[query.index].get("family")
        members = [(name, row) for name, row in rows if family and row.get("family") == family]
    else:
        parents = evaluate.parents_of(query.tracks.info[query.index])
        members = [(name, row) for name, row in rows if name in parents or str(row.get("parent")) in parents]
    found = {name: text_of(row, "relation") or "related" for name, row in members}
    if query.kind == "training track":
        found[query.id] = "itself"
    return found


def controls_of(job: Job, result: Attribution) -> dict[str, np.ndarray]:
    """Scores of every control for the queries of a job, name to ``[Q, N]``."""
    queries = [(q.tracks, q.index) for q in job.queries]
    found = control_scores(job.tracks, queries, result.base, job.model.frames, job.run.settings.seed)
    return {
        name: scores for name, scores in found.items() if not np.isnan(scores).all()
    }  # ridge alone measures no loss


def result_tables(job: Job, result: Attribution, controls: Mapping[str, np.ndarray]) -> list[Table]:
    """Every table that the queries of a job allow."""
    found = (self_table(job, result), relation_table(job, result, controls), size_table(job, result))
    return [t for t in found if t is not None]


def self_table(job: Job, result: Attribution) -> Table | None:
    """Rank of each training track when it is itself unlearned."""
    s = job.run.settings
    targets = [q for q in job.queries if q.kind == "training track"]
    if not targets:
        return None
    copies = evaluate.clusters(job.tracks.ids, job.tracks.info)
    settings = rankings_of(s)
    places = np.array(
        [
            [
                evaluate.self_rank(-result.ranks(f, result.row(q.id, x)), result.tracks, copies[q.id])
                for f, x in settings
            ]
            for q in targets
        ]
    )
    seconds = [number_of(q.tracks.info[q.index], "seconds") for q in targets]
    rows: list[list[str | float | int | None]] = [
        [q.id, round(float(n), 1) if n else None, *place]
        for q, n, place in zip(targets, seconds, places.tolist(), strict=True)
    ]
    for what, summary in (("mean", np.mean), ("median", np.median), ("worst", np.max)):
        rows.append([what, "", *np.round(summary(places, axis=0), 1).tolist()])
    columns = ["training track", "seconds", *[f"{f}, {strength_text(job, x, f)}" for f, x in settings]]
    note = f"Rank among {len(job.tracks)} tracks; 1 is right. A track and its exact copies count as one. Necessary, not sufficient."
    return Table("Rank of a training track when it is itself unlearned", columns, rows, note)


def relation_table(job: Job, result: Attribution, controls: Mapping[str, np.ndarray]) -> Table | None:
    """Mean average precision of the known parents of held-out queries, beside the controls."""
    s = job.run.settings
    related = [(q, set(relatives(job.tracks, job.queries[q]))) for q in range(len(job.queries))]
    cases = [(q, names) for q, names in related if names and job.queries[q].kind != "training track"]
    if not cases:
        return None

    def line(name: str, strength: str, scores: np.ndarray) -> list[str | float | int | None]:
        precision = [evaluate.average_precision(scores[q], result.tracks, names) for q, names in cases]
        recall = [evaluate.recall_at(10, scores[q], result.tracks, names) for q, names in cases]
        error = float(np.std(precision, ddof=1) / np.sqrt(len(precision))) if len(precision) > 1 else None
        return [
            name,
            strength,
            round(float(np.mean(precision)), 4),
            None if error is None else round(error, 4),
            round(float(np.mean(recall)), 4),
        ]

    rows = []
    for f, x in rankings_of(s):
        places = np.stack([result.ranks(f, result.row(q.id, x)) for q in job.queries])
        rows.append(line(f, strength_text(job, x, f), -places))
    for name, scores in controls.items():
        rows.append(line(f"{name} (control)", "", scores))
    note = (
        f"{len(cases)} held-out queries with known parents among {len(job.tracks)} tracks. "
        "Being of one family is not the truth of influence: retraining is."
    )
    return Table(
        "Held-out queries: are their known parents found?",
        ["score", "strength", "mAP", "standard error", "recall at 10"],
        rows,
        note,
    )


def size_table(job: Job, result: Attribution) -> Table | None:
    """How large the updates are, and what they do to their own queries, where a strength is not the size."""
    rows = [row for row in result.meta.get("updates", ()) if row["of"] == "loss"]
    if not rows:
        return None
    names = ("size", "lr", "loss_before", "loss_after", "null_loss", "displacement")
    numbers = [name for name in names if name in rows[0]]

    def line(query: str, strength: float, values: Sequence[float]) -> list[str | float | int | None]:
        return [query, strength_text(job, strength), *(float(f"{x:.4g}") for x in values)]

    lines = [line(row["query"], row["strength"], [row[n] for n in numbers]) for row in rows]
    for x in dict.fromkeys(row["strength"] for row in rows):
        found = np.array([[row[n] for n in numbers] for row in rows if row["strength"] == x])
        for what, summary in (("smallest", np.min), ("median", np.median), ("largest", np.max)):
            lines.append(line(what, x, summary(found, axis=0)))
    columns = {"size": "relative size", "lr": "learning rate", "displacement": "relative displacement"}
    note = (
        "Size: norm of the update relative to the norm of the weights. Losses, the null loss (of predicting nothing) and the change of the "
        "prediction relative to its power are means over the query's update draws."
    )
    return Table(
        "Size of each update",
        ["query", "strength", *(columns.get(n, n.replace("_", " ")) for n in numbers)],
        lines,
        note,
    )


def markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown, a heading each; what would end a cell or start markup is escaped."""
    out = []
    for table in tables:
        header = [" | ".join(map(_cell, table.columns)), " | ".join("---" for _ in table.columns)]
        lines = [f"| {line} |" for line in [*header, *(" | ".join(map(_cell, row)) for row in table.rows)]]
        out.append("\n".join([f"### {_cell(table.title)}", _cell(table.note), "", *lines]))
    return "\n\n".join(out) + "\n"


def _cell(value: str | float | int | None) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = " ".join(str("" if value is None else value).split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
