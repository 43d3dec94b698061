"""Methods side by side: the same queries asked of each, what it said and what it cost, judged by the same tables."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine.counterfactuals import Truth
from attr_engine.errors import UserError
from attr_engine.evaluation import Case, Cell, tables, with_controls
from attr_engine.files import write_json, writing_in
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import METHODS, Method, Workspace, model_key, no_progress, parse
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser
from attr_engine.pipeline import SCORES_PARQUET
from attr_engine.report.data import Table
from attr_engine.result import Attribution, order_of
from attr_engine.retrain import query_losses
from attr_engine.runs import key_of
from attr_engine.score import RIDGE
from attr_engine.settings import Settings, decisive
from attr_engine.tensorfile import load_tensors, save_tensors

WORK = "work"
_PATHS = ("model", "weights", "data", "queries")
BASE_DRAWS = 8  # of the control by training loss


@dataclass(frozen=True)
class Answer:
    """What a method said and what that took.

    Attributes:
        name: as it was asked for, options and all.
        scores: float64 ``[Q, N]``, larger = more responsible.
        once: seconds of ``fit``, over all sittings.
        each: seconds a query.
        kept: bytes in its folder after ``fit``.
    """

    name: str
    scores: np.ndarray
    once: float
    each: float
    kept: int


def without_needs() -> list[str]:
    """Methods that work as they are, without a checkpoint or the like; the engine's default first."""
    return sorted(
        (name for name, entry in METHODS.items() if not entry.needs), key=lambda name: name != RIDGE
    )


def folder_of(name: str) -> str:
    """A folder's name for a method with its options."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:60]
    return plain if plain == name else f"{plain}-{key_of(name)[:8]}"


def ask(
    name: str, model: Denoiser, tracks: Tracks, queries: Sequence[Query], settings: Settings, out: Path,
    progress: Callable[[str, str], Callable[[int, int], None]] = no_progress,
) -> Answer:  # fmt: skip
    """Fit one method and score all queries, or read what an earlier call finished.

    Args:
        name: what :func:`attr_engine.methods.parse` takes.
        model: theta_0.
        tracks: the training tracks, N.
        queries: Q, each id once.
        settings: layers, draws and so on of white-box methods; its paths are written down for later commands.
        out: folder of the method: ``scores.parquet``, and ``work`` with whatever it keeps.
        progress: makes progress callbacks.

    Raises:
        UserError: the method is unknown, lacks something, or gave no finite ``[Q, N]``.
    """
    _, chosen = parse(name)
    about = _key(chosen, model, tracks, settings)
    work, spent = out / WORK / about, out / WORK / f"{about}.json"
    with writing_in(out):
        work.mkdir(parents=True, exist_ok=True)
        before, started = (
            read_json(spent, "record of costs")["once"] if spent.exists() else 0.0,
            time.perf_counter(),
        )
        try:
            fitted = chosen.fit(model, tracks, Workspace(work, settings, progress))
        finally:
            once = before + time.perf_counter() - started
            write_json(spent, {"once": once})
        asked = [(q.tracks.fingerprint, q.indices) for q in queries]
        key, path = key_of(about, asked, getattr(fitted, "fingerprint", "")), out / SCORES_PARQUET
        known = Attribution.from_parquet(path) if path.exists() else None
        if known is not None and known.meta.get("key") == key:
            return Answer(name, next(iter(known.values.values())), **known.meta["costs"])
        kept = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
        started = time.perf_counter()
        scores = np.asarray(fitted.score(queries), dtype=np.float64)
        each = (time.perf_counter() - started) / len(queries)
        if scores.shape != (len(queries), len(tracks)) or not np.isfinite(scores).all():
            raise UserError(
                f"method {name!r} gave scores {list(scores.shape)}, {int((~np.isfinite(scores)).sum())} of them not finite, for "
                f"{len(queries)} queries and {len(tracks)} tracks: leave it out, or look at its options"
            )
        answer = Answer(name, scores, once, each, kept)
        _table(answer, tracks, queries, settings, key).to_parquet(path)
        return answer


def _key(chosen: Method, model: Denoiser, tracks: Tracks, settings: Settings) -> str:
    """Of what a fitted method depends on, but for files that it reads itself."""
    no = (*_PATHS, "self_influence")
    values = {name: value for name, value in decisive(settings).items() if name not in no}
    return key_of(type(chosen).__name__, vars(chosen), model_key(model), tracks.fingerprint, values)


def _table(
    answer: Answer, tracks: Tracks, queries: Sequence[Query], settings: Settings, key: str
) -> Attribution:
    """Scores in the form that runs have them: for retrain, evaluate and figures."""
    paths = {name: value for name, value in decisive(settings).items() if name in _PATHS}
    costs = {"once": answer.once, "each": answer.each, "kept": answer.kept}
    return Attribution(
        list(tracks.ids), [(q.id, 0.0) for q in queries], {answer.name: answer.scores},
        {answer.name: np.full_like(answer.scores, np.nan)}, np.full(len(tracks), np.nan),
        {"method": answer.name, "key": key, "costs": costs, "settings": paths}, np.ones(answer.scores.shape, dtype=np.int64),
    )  # fmt: skip


def base_losses(model: Denoiser, tracks: Tracks, folder: Path) -> np.ndarray:
    """Loss of every track under theta_0, ``[N]``, kept: for the control by training loss."""
    import torch

    key = key_of(model_key(model), tracks.fingerprint, BASE_DRAWS)
    path = folder / f"base-{key}.safetensors"
    if not path.exists():
        found = query_losses(model, tracks, BASE_DRAWS).mean(axis=1)
        save_tensors(path, {"base": torch.from_numpy(found)}, {"key": key})
    return np.asarray(load_tensors(path, key)[0]["base"].numpy())


def judged(
    answers: Sequence[Answer], tracks: Tracks, queries: Sequence[Query], base: np.ndarray, frames: int, truth: Truth | None
) -> tuple[Case, list[Table]]:  # fmt: skip
    """The case with the controls, and every table about it, the one of all methods first."""
    case = with_controls(Case(tracks, queries, {a.name: a.scores for a in answers}), base, frames)
    found = tables(case, truth)
    return case, [method_table(case, answers, found, truth), *found]


def removed_by(case: Case, truth: Truth | None) -> set[str]:
    """Methods whose own top tracks are those that models were trained without, for every query that was asked in their name."""
    good: dict[str, bool] = {}
    place = {q.id: i for i, q in enumerate(case.queries)}
    for what, kept in zip(truth.what, truth.kept, strict=True) if truth else ():
        name, _, query = what.removeprefix("top of ").partition(" for ")
        if what.startswith("top of ") and name in case.methods and query in place:
            out = set(np.flatnonzero(~kept).tolist())
            own = set(order_of(case.methods[name][place[query]])[: len(out)].tolist())
            good[name] = good.get(name, True) and own == out
    return {name for name, right in good.items() if right}


def method_table(
    case: Case, answers: Sequence[Answer], found: Sequence[Table], truth: Truth | None = None
) -> Table:
    """A row a method: how it was judged and what it cost; controls below."""
    costs = {a.name: a for a in answers}
    removal, removed = _pick(found, "Removal", "loss, % more"), removed_by(case, truth)
    columns: dict[str, Mapping[str, float]] = {
        "LDS": _pick(found, "Linear datamodelling", "LDS"),
        "removal, % more loss": {name: value for name, value in removal.items() if name in removed},
        "rank of itself": _pick(found, "Rank of a training track", "mean rank", {"targets": "all"}),
        "planted mAP": _pick(found, "Planted", "mAP"),
        "one track in top 10": _pick(found, "Collapse", "one track in top 10"),
        "alike for all queries": _pick(found, "Collapse", "correlation"),
    }
    columns = {name: values for name, values in columns.items() if values}
    rows: list[list[Cell]] = []
    for name in case.methods:
        entry, cost = METHODS.get(name.partition(":")[0]), costs.get(name)
        row: list[Cell] = [name, entry.kind if entry and cost else "control"]
        row += [values.get(name, "") for values in columns.values()]
        rows.append([*row, *([round(cost.once, 1), round(cost.each, 3), round(cost.kept / len(case.tracks) / 1e3, 1)]
                             if cost else ["", "", ""])])  # fmt: skip
    note = (
        f"{len(case.queries)} queries, {len(case.tracks)} tracks; intervals in the tables below. Planted mAP: mean over the queries of all "
        "relations. Alike: mean rank correlation between the scores of two queries."
    )
    return Table("Methods", ["method", "looks at", *columns, "seconds once", "seconds a query", "kB a track"], rows, note)  # fmt: skip


def _pick(
    found: Sequence[Table], title: str, column: str, where: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Method to a column of the table with this title; the mean, weighted by queries, where it has several rows."""
    table = next((t for t in found if t.title.startswith(title)), None)
    if table is None:
        return {}
    place = {name: i for i, name in reversed(list(enumerate(table.columns)))}
    sums: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        value, weight = row[place[column]], row[place["queries"]] if "queries" in place else 1
        right = all(row[place[k]] == v for k, v in (where or {}).items())
        if right and isinstance(value, int | float) and isinstance(weight, int | float):
            sums.setdefault(str(row[0]), []).append((value, weight))
    return {
        name: round(sum(v * w for v, w in pairs) / sum(w for _, w in pairs), 4)
        for name, pairs in sums.items()
    }
