"""Methods side by side: the same queries asked of each, what it said and what it cost, judged by the same tables."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attr_engine.counterfactuals import Truth
from attr_engine.errors import UserError
from attr_engine.evaluation import Case, Cell, tables, with_controls
from attr_engine.files import write_json, writing_in
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import METHODS, Fitted, Method, Workspace, model_key, no_progress, parse
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
_SECONDS_BETWEEN_RECORDS = 10.0  # of what was spent

Progress = Callable[[str, str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Answer:
    """What a method said and what that took.

    Attributes:
        name: as it was asked for, options and all.
        scores: float64 ``[Q, N]``, larger = more responsible.
        once: seconds of ``fit``, over all sittings.
        each: seconds of ``score``, over all sittings, a query that was scored in them; one that was kept is not scored again.
        kept: bytes that ``fit`` left in its folder.
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
    progress: Progress = no_progress,
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
    work, costs = out / WORK / about, _Costs(out / WORK / f"{about}.json")
    with writing_in(out):
        work.mkdir(parents=True, exist_ok=True)
        before = 0 if costs.first else _bytes(work)
        with costs.counting("once"):
            fitted = chosen.fit(model, tracks, Workspace(work, settings, costs.watched(progress)))
        read = getattr(fitted, "fingerprint", "")
        kept = costs.kept(read, _bytes(work) - before)
        asked = [(q.tracks.fingerprint, q.indices) for q in queries]
        key, path = key_of(about, asked, read), out / SCORES_PARQUET
        known = Attribution.from_parquet(path) if path.exists() else None
        if known is not None and known.meta.get("key") == key:
            return Answer(name, next(iter(known.values.values())), **known.meta["costs"])
        scores, each = _scored(name, fitted, queries, [key_of(read, *q) for q in asked], len(tracks), costs)
        answer = Answer(name, scores, costs.seconds["once"], each, kept)
        _table(answer, tracks, queries, settings, key).to_parquet(path)
        return answer


def _scored(
    name: str, fitted: Fitted, queries: Sequence[Query], keys: Sequence[str], count: int, costs: _Costs
) -> tuple[np.ndarray, float]:
    """Scores ``[Q, N]`` of all queries, those that no earlier call scored asked now; and seconds a query, over all sittings.

    Raises:
        UserError: the method gave no finite ``[Q, N]``.
    """
    path = costs.path.with_suffix(".safetensors")
    rows = load_tensors(path, costs.path.stem)[0] if path.exists() else {}
    missing = {k: q for k, q in zip(keys, queries, strict=True) if k not in rows}
    if missing:
        with costs.counting("scoring"):
            scores = np.asarray(fitted.score(list(missing.values())), dtype=np.float64)
        if scores.shape != (len(missing), count) or not np.isfinite(scores).all():
            raise UserError(
                f"method {name!r} gave scores {list(scores.shape)}, {int((~np.isfinite(scores)).sum())} of them not finite, for "
                f"{len(missing)} queries and {count} tracks: leave it out, or look at its options"
            )
        rows |= {k: torch.from_numpy(row.copy()) for k, row in zip(missing, scores, strict=True)}
        save_tensors(path, rows, {"key": costs.path.stem})
    return np.stack([rows[k].numpy() for k in keys]), costs.seconds["scoring"] / len(rows)


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


class _Costs:
    """Seconds and bytes of a method over all sittings; written down while they pass, so that those of a killed one count.

    Attributes:
        path: the file.
        seconds: of ``fit`` (``once``) and of ``score`` (``scoring``).
    """

    def __init__(self, path: Path) -> None:
        found = read_json(path, "record of costs") if path.exists() else {}
        self.path, self._bytes = path, dict(found.get("kept", {}))
        self.seconds = {what: float(found.get(what, 0.0)) for what in ("once", "scoring")}
        self._what, self._since = "", 0.0

    @property
    def first(self) -> bool:
        """Whether no ``fit`` has ended yet: all that is there is of one."""
        return not self._bytes

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """Count the time of the block as ``once`` or ``scoring``."""
        self._what, self._since = what, time.perf_counter()
        try:
            yield
        finally:
            self._write()
            self._what = ""

    def watched(self, progress: Progress) -> Progress:
        """Progress that writes the time down as it goes."""

        def bar(title: str, unit: str) -> Callable[[int, int], None]:
            show = progress(title, unit)

            def tick(done: int, total: int) -> None:
                if self._what and time.perf_counter() - self._since > _SECONDS_BETWEEN_RECORDS:
                    self._write()
                show(done, total)

            return tick

        return bar

    def kept(self, read: str, made: int) -> int:
        """Bytes that ``fit`` made when it first ended with these files of the user's; ``made`` where that is now."""
        if read not in self._bytes:
            self._bytes[read] = made
            self._write()
        return int(self._bytes[read])

    def _write(self) -> None:
        now = time.perf_counter()
        if self._what:
            self.seconds[self._what] += now - self._since
            self._since = now
        write_json(self.path, {**self.seconds, "kept": self._bytes})


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
