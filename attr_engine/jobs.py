"""What a run computes: model, training tracks, queries, and the directory that holds the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from attr_engine.diffusion import DrawPlan
from attr_engine.errors import UserError
from attr_engine.files import write_json
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.memory import fit_rows
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser, check_inference, select_parameters
from attr_engine.persample import SQUARES
from attr_engine.runs import LOCKS, Run, key_of
from attr_engine.score import FIRST_ORDER, RIDGE, score_function
from attr_engine.settings import Settings, to_json
from attr_engine.strength import SEARCHED, search_rows
from attr_engine.units import held
from attr_engine.unlearn import check_settings

ROWS = "rows.json"
FISHER_SETTINGS = ("fisher_draws", "mask_fisher", "rows", "gradients")
SMALLEST_BFLOAT16 = 1e-2  # size of an update whose effect on a bfloat16 model is right to about a hundredth
UPDATE_SETTINGS = (
    *FISHER_SETTINGS, "unit", "steps", "damping", "mask_update", "update_draws", "update_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Query:
    """One query: where its latent is, and under which id its scores stand; or a group of tracks, unlearned jointly."""

    tracks: Tracks
    index: int
    kind: str
    group: str = ""
    members: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """Id of the query, or name of the group."""
        return self.group or self.tracks.ids[self.index]

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of whatever is unlearned."""
        return self.members or (self.index,)


@dataclass(frozen=True)
class Job:
    """What the stages share: model, data, queries and the run that they write to."""

    run: Run
    model: Denoiser
    tracks: Tracks
    queries: tuple[Query, ...]
    pieces: Tracks | None = None

    @property
    def scored(self) -> Tracks:
        """Whose loss is looked at: the training tracks; the pieces in question, where groups of training tracks are unlearned."""
        return self.tracks if self.pieces is None else self.pieces

    @property
    def plan(self) -> DrawPlan:
        """The draw plan of the settings."""
        s = self.run.settings
        return DrawPlan(s.seed, s.plan, s.replicates)

    @property
    def dtype(self) -> str:
        """Dtype of the model as it is: a caller of :func:`attribute` may not have set it in the settings."""
        return str(next(self.model.module.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def rows(self) -> int:
        """Rows a pass: as the settings say, or chosen to be fast and to fit into ``memory``, once for a run directory."""
        s = self.run.settings
        if s.rows and s.memory == 0.0:
            return s.rows
        key = key_of(self.key("memory", "score_draws", "unit_tracks", "functions", "gradients"), s.rows)
        path = self.run.path / ROWS
        with held(self.run.path / LOCKS / "rows.lock", wait=True):
            return self._fit_rows(path, key)

    def _fit_rows(self, path: Path, key: str) -> int:
        """Choose the rows, or take what another process chose meanwhile."""
        s = self.run.settings
        if path.exists():
            kept = read_json(path, "number of rows")
            if kept.get("key") == key:
                return int(kept["rows"])
        batch = self.tracks.batch([0], self.model.frames)
        influence = len(self.queries) * len(s.strengths) if self.first_order else 0
        rows = fit_rows(
            self.model, select_parameters(self.model, s.layers), batch, self.plan, s.memory,
            s.unit_tracks * s.score_draws, influence, s.gradients,
        )  # fmt: skip
        rows = min(rows, s.rows or rows)
        write_json(path, {"key": key, "rows": rows})
        return rows

    def key(self, *names: str, layers: bool = True) -> str:
        """Key of a stage: model, data, the draw plan and the named settings; and the layers, where it depends on them."""
        values = {**to_json(self.run.settings), "dtype": self.dtype}
        if "rows" in names:
            values["rows"] = self.rows
        shared = ("seed", "plan", "replicates", "dtype", *(["layers"] if layers else []))
        return key_of(
            self.model.fingerprint, self.tracks.fingerprint, {n: values[n] for n in (*shared, *names)}
        )

    @property
    def measured(self) -> tuple[str, ...]:
        """The score functions that are measured under updates."""
        return tuple(name for name in self.run.settings.functions if name != RIDGE)

    @property
    def first_order(self) -> tuple[str, ...]:
        """Whose gradients the tracks' scores to first order take, each once."""
        named = (FIRST_ORDER[name] for name in self.measured if name in FIRST_ORDER)
        return tuple(dict.fromkeys(named))

    @property
    def needs_forward(self) -> bool:
        """Whether a score function needs forward passes under the updates."""
        return bool(set(self.measured) - set(FIRST_ORDER))

    @property
    def row_functions(self) -> tuple[str, ...]:
        """Whose gradients give updates: the loss's always, others where a score function needs them."""
        return tuple(dict.fromkeys(["loss", *self.first_order]))

    def cache_path(self, name: str) -> Path | None:
        """A file under ``--cache``; None without one."""
        folder = self.run.settings.cache
        return Path(folder) / name if folder else None

    def cache_key(self, key: str) -> str:
        """A key for other runs: bits depend on the device and the threads, too, which one run directory does not change."""
        device = next(self.model.module.parameters()).device.type
        return key_of(
            key, device, torch.get_num_threads() if device == "cpu" else 0, self.run.settings.compile
        )

    @property
    def updates(self) -> int:
        """How many updates there are: queries times strengths."""
        return len(self.queries) * len(self.run.settings.strengths)

    @property
    def named_updates(self) -> list[tuple[str, float]]:
        """(query id, strength) of every update, in the order of the result."""
        return [(q.id, x) for q in self.queries for x in self.run.settings.strengths]

    def made(self, function: str) -> tuple[float, ...]:
        """The strengths at which updates are made: the first one, where tangents alone need them."""
        s, first_order = self.run.settings, function in self.first_order
        return s.strengths if first_order or self.way == "passes" else s.strengths[:1]

    @property
    def way(self) -> str:
        """How effects are measured, one of :data:`attr_engine.effects.WAYS`; errors of each: docs/performance.md."""
        s = self.run.settings
        if s.strengths_by != "auto":
            return s.strengths_by
        drowned = self.dtype == "bfloat16" and s.unit == "size" and min(s.strengths) < SMALLEST_BFLOAT16
        return "tangent" if drowned and s.steps == 1 and s.compile == "off" else "passes"

    def update_path(self, query: Query, strength: float, function: str = "loss") -> Path:
        """Where the update of a query lies; ids are hashed, because they may hold anything."""
        kind = "" if function == "loss" else f".{function}"
        return self.run.path / "updates" / f"{key_of(query.id)}@{strength!r}{kind}.safetensors"


def update_key(job: Job, query: Query, function: str = "loss") -> str:
    """Key of the updates of a query."""
    parts = (job.key(*UPDATE_SETTINGS), query.tracks.fingerprint, *query.members)
    return key_of(*parts) if function == "loss" else key_of(*parts, function)


def _kind_of(info: Mapping[str, Any]) -> str:
    """What the metadata call a query; only the engine itself calls one a training track."""
    kind = str(info.get("kind") or "query")
    return "query" if kind == "training track" else kind


def make_queries(
    tracks: Tracks, queries: Sequence[Tracks], self_influence: Sequence[str] = ()
) -> tuple[Query, ...]:
    """Queries of a run: every track of some sets, and training tracks by id.

    Raises:
        UserError: no query at all, an id that is not a training track, or an id that stands twice.
    """
    out = [Query(q, i, _kind_of(q.info[i])) for q in queries for i in range(len(q))]
    where = {name: i for i, name in enumerate(tracks.ids)}
    for name in self_influence:
        if name not in where:
            raise UserError(f"self-influence target {name!r} is not a training track: check the id")
        out.append(Query(tracks, where[name], "training track"))
    if not out:
        raise UserError("there is no query: give --queries, or --self-influence with ids of training tracks")
    seen: set[str] = set()
    for query in out:
        if query.id in seen:
            raise UserError(f"the query {query.id!r} stands twice: give each query an id of its own")
        seen.add(query.id)
    return tuple(out)


def make_groups(tracks: Tracks, column: str) -> tuple[Query, ...]:
    """One query for every value of a column of the training tracks' metadata: its tracks, to be unlearned jointly.

    Raises:
        UserError: no track has the column, or some have not (the first one is named).
    """
    members: dict[str, list[int]] = {}
    for i in range(len(tracks)):
        value = tracks.info[i].get(column)
        if value in (None, ""):
            raise UserError(
                f"the training track {tracks.ids[i]!r} has no {column!r} in its metadata: add it and ingest again, or group "
                "by another column"
            )
        members.setdefault(str(value), []).append(i)
    return tuple(Query(tracks, some[0], "group", name, tuple(some)) for name, some in members.items())


def make_job(run: Run, model: Denoiser, tracks: Tracks, queries: Sequence[Tracks]) -> Job:
    """What the settings of a run ask of a model, training tracks and sets of queries.

    Raises:
        UserError: no query, an unknown target, an id that stands twice, or groups of what cannot be grouped.
    """
    s, model = run.settings, run.profile.watch(model)
    if not s.groups:
        return Job(run, model, tracks, make_queries(tracks, queries, s.self_influence))
    if len(queries) != 1 or s.self_influence:
        raise UserError(
            f"groups by {s.groups!r} are ranked for one set of queries: give one folder to --queries, and no --self-influence"
        )
    return Job(run, model, tracks, make_groups(tracks, s.groups), queries[0])


def check(job: Job) -> None:
    """Refuse whatever later stages would refuse, before any of them has cost time."""
    s = job.run.settings
    check_tracks(job.tracks, job.model.channels, job.model.frames, "training")
    for queries in {id(q.tracks): q.tracks for q in (*job.queries, Query(job.scored, 0, ""))}.values():
        check_tracks(queries, job.model.channels, job.model.frames, "query")
    select_parameters(job.model, s.layers)
    check_inference(job.model)
    for name in job.measured:
        score_function(name)
    _check_ridge(s)
    if not s.functions or not s.strengths:
        raise UserError("name at least one score function and one strength")
    for strength in s.strengths:
        check_settings(strength, s.unit, s.steps, s.damping, job.row_functions == ("loss",))
        if s.strengths.count(strength) > 1:
            raise UserError(f"the strength {strength} stands twice in the settings: name each once")
    for draws, what in ((s.fisher_draws, "Fisher"), (s.update_draws, "update"), (s.score_draws, "score")):
        job.plan.check(draws, f"the number of {what} draws")
    if min(s.unit_tracks, s.show) < 1 or min(s.rows, s.threads, s.memory, s.profile) < 0:
        raise UserError("unit_tracks and show must be at least 1, rows, threads, memory, profile at least 0")
    if s.rescore < 1 or (s.index and s.groups):
        raise UserError("rescore must be at least 1; an index has no groups: leave out --index or --groups")
    if s.top:
        job.plan.check(s.race_draws, "the number of draws in the first round of a race")
        if s.groups:
            raise UserError("groups do not race: leave out --top or --groups")
        if s.top < 0 or not 0.0 < s.confidence < 1.0 or not 0.0 < s.race_share <= 1.0 or s.replicates < 2:
            raise UserError(
                f"a race for the top {s.top} with confidence {s.confidence} and a share of {s.race_share}: use a top above 0, "
                "both between 0 and 1, and at least 2 replicates, whose spread is the error of a score"
            )
        if s.race_draws >= s.race_share * s.score_draws:
            raise UserError(
                f"a race that begins with {s.race_draws} draws and may take {s.race_share:g} of {s.score_draws} cannot decide: "
                f"set --score-draws above {s.race_draws / s.race_share:g}, or --race-share above {s.race_draws / s.score_draws:g}"
            )
    if job.way != "passes" and (s.steps > 1 or s.unit in SEARCHED):
        raise UserError(
            f"an update of {s.steps} steps by {s.unit} is not linear in its strength: use --strengths-by passes"
        )
    if job.way == "tangent" and s.compile != "off":
        raise UserError(
            "compiled passes have no forward mode: use --compile off, or --strengths-by difference"
        )
    if s.gradients not in SQUARES:
        raise UserError(f"gradients are {s.gradients!r}: use one of {', '.join(SQUARES)}")
    _ = job.rows  # with a bound on memory, whether anything fits is found out here


def _check_ridge(s: Settings) -> None:
    """Refuse what kernel ridge regression cannot do."""
    if RIDGE not in s.functions:
        return
    if s.groups or s.top or s.index:
        what = "--groups" if s.groups else "--top" if s.top else "--index"
        raise UserError(
            f"{what} is about what unlearning does, and ridge scores unlearn nothing: name other --functions, such as loss_change"
        )
    if not 0.0 < s.ridge < float("inf"):
        raise UserError(f"ridge is {s.ridge}: it has to be above 0 and finite")


@dataclass(frozen=True)
class Work:
    """What a stage does, counted.

    Attributes:
        tracks: tracks that are read.
        forward: rows that go through the model without a gradient.
        gradients: rows of which a gradient is taken: summed ones of queries, squared or multiplied ones of tracks.
        written: updates that are made and written.
        read: updates that are read and applied.
    """

    tracks: int = 0
    forward: int = 0
    gradients: int = 0
    written: int = 0
    read: int = 0


def fisher_work(job: Job, tracks: int) -> Work:
    """Of the Fisher of some tracks."""
    return Work(tracks=tracks, gradients=tracks * job.run.settings.fisher_draws)


def update_work(job: Job, missing: Sequence[tuple[Query, int]]) -> Work:
    """Of unlearning, given queries and how many strengths each of them lacks, by one differentiated function."""
    s = job.run.settings
    tracks = sum(len(query.indices) for query, n in missing if n)
    rows = [(len(query.indices) * s.update_draws, n) for query, n in missing]
    gradients = sum(row * (1 + n * (s.steps - 1)) for row, n in rows if n)
    forward = sum(n * search_rows(s, row) for row, n in rows)
    return Work(tracks, forward, gradients, written=sum(n for _, n in missing))


def score_work(job: Job, units: Sequence[int]) -> Work:
    """Of scoring, given how many tracks each unit has; of a race what it takes at most."""
    s, n = job.run.settings, sum(units)
    draws = n * s.score_draws
    if s.top:
        draws = n * min(s.race_draws, s.score_draws)
        draws = max(draws, int(n * s.score_draws * s.race_share))
    queries = 1 if s.index else len(job.queries)  # that a unit is measured under
    made = queries * (len(s.strengths) if job.way == "passes" else 1)
    passes = 3 if job.way == "tangent" else 1  # a tangent beside every product of a pass
    # Paged updates are read for every unit, resident ones once.
    read = made * job.needs_forward * (len(units) if s.resident == 0 else bool(units))
    read += job.updates * len(job.first_order) * bool(units)
    forward = draws * (job.needs_forward + made * passes * job.needs_forward)
    return Work(n, forward, draws * len(job.first_order), read=read)


def ridge_work(job: Job, tracks: int) -> Work:
    """Of the features of some tracks, and of every query."""
    s = job.run.settings
    return Work(tracks, gradients=tracks * s.score_draws + len(job.queries) * s.update_draws)


def unit_sizes(job: Job) -> list[int]:
    """Tracks in each unit of scoring; of a cascade the candidates of one query after the other."""
    s = job.run.settings
    size, tracks = s.unit_tracks, min(len(job.scored), s.rescore) if s.index else len(job.scored)
    return [min(size, tracks - first) for first in range(0, tracks, size)] * (
        len(job.queries) if s.index else 1
    )


def plan_of(job: Job) -> str:
    """What the whole run costs, in passes through the model."""
    stages = [ridge_work(job, len(job.tracks))] if RIDGE in job.run.settings.functions else []
    if job.measured:
        made = [(query, len(job.made(function))) for query in job.queries for function in job.row_functions]
        stages += [
            fisher_work(job, len(job.tracks)),
            update_work(job, made),
            score_work(job, unit_sizes(job)),
        ]
    return (
        f"{len(job.queries)} queries, {job.updates if job.measured else 0} updates, {len(job.scored)} tracks: "
        f"{sum(w.gradients for w in stages)} gradients and {sum(w.forward for w in stages)} forward passes"
        f"{' at most' if job.run.settings.top or job.run.settings.unit in SEARCHED else ''}, {job.rows} rows a pass"
    )
