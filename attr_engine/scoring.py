"""Scoring in durable units: what several units share is made once, what theta_0 says may be kept for other runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.cascade import candidates, index_key
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.effectfile import read_parts, save_parts
from attr_engine.effects import Base, Effects, Keep, measure_effects, measure_tangents
from attr_engine.errors import UserError
from attr_engine.influence import DIRECTION_BYTES, measure_influence
from attr_engine.jobs import UPDATE_SETTINGS, Job, update_key
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import select_parameters
from attr_engine.monitor import Progress
from attr_engine.race import Part, Race, Tally
from attr_engine.runs import LOCKS, key_of
from attr_engine.score import FIRST_ORDER
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import held, once, run_units
from attr_engine.updates import Directions, Unlearned, Update, free_bytes

EFFECTS = "effects.safetensors"
RACE_SETTINGS = ("top", "race_draws", "confidence", "race_share")


@dataclass(frozen=True)
class Unit:
    """Some tracks on some draws under some updates: what is measured at a time.

    Attributes:
        tracks: indices of training tracks.
        updates: indices of updates, in the order of the result.
        draws: which.
    """

    tracks: Sequence[int]
    updates: Sequence[int]
    draws: range


def whole_units(job: Job, draws: range) -> list[Unit]:
    """Every track under every update, cut into units."""
    size, total, updates = job.run.settings.unit_tracks, len(job.scored), range(job.updates)
    return [Unit(range(i, min(i + size, total)), updates, draws) for i in range(0, total, size)]


class Scorer:
    """Measures units of a job. Updates are read when they are first needed."""

    def __init__(self, job: Job) -> None:
        s = job.run.settings
        self._job = job
        self._parameters = select_parameters(job.model, s.layers)
        device = next(job.model.module.parameters()).device
        room = s.resident * 1e9 if s.resident >= 0 else 0.0 if s.memory else free_bytes(device) / 3
        self._loads = {name: _loads(job, name) for name in job.row_functions}
        # Tangents are of queries, at the first strength of each.
        step = 1 if job.way == "passes" else len(job.made("loss"))
        self._forward = self._loads["loss"][::step]
        self._unlearned = Unlearned(job.model, self._forward, room)
        self._directions = {
            name: Directions(self._parameters, self._loads[name], max(room, DIRECTION_BYTES))
            for name in job.first_order
        }

    def __call__(self, unit: Unit, tick: Callable[[], None] = lambda: None) -> Effects:
        """Effects of the unit's updates on its tracks; forward passes under updates only where a score needs them."""
        job, s = self._job, self._job.run.settings
        batch = job.scored.batch(unit.tracks, job.model.frames)
        influence = {}
        for name in job.first_order:
            directions = self._directions[name]
            if len(unit.updates) < job.updates:
                some = [self._loads[name][u] for u in unit.updates]
                directions = Directions(self._parameters, some, DIRECTION_BYTES)
            influence[name], base = measure_influence(
                job.model, self._parameters, batch, directions, job.plan, unit.draws, s.mask_score, job.rows,
                ROW_FUNCTIONS[name], s.gradients, tick,
            )  # fmt: skip
        if not job.needs_forward:
            nothing = np.empty((0, *base.shape))
            return Effects(base, nothing, nothing, influence)
        keep = _keep(job, unit)
        if job.way == "passes":
            effects = measure_effects(
                job.model,
                batch,
                self._unlearned,
                job.plan,
                unit.draws,
                s.mask_score,
                job.rows,
                keep,
                tick,
                unit.updates,
            )
        else:
            effects = self._at_every_strength(unit, batch, keep, tick)
        return replace(effects, influence=influence)

    def _at_every_strength(self, unit: Unit, batch: Batch, keep: Keep, tick: Callable[[], None]) -> Effects:
        """The same from the tangents of the queries that the updates are of."""
        job, s = self._job, self._job.run.settings
        strengths = s.strengths
        queries = list(dict.fromkeys(u // len(strengths) for u in unit.updates))
        updates = self._unlearned if job.way == "difference" else self._forward
        tangents = measure_tangents(
            job.model,
            batch,
            updates,
            job.plan,
            unit.draws,
            s.mask_score,
            job.rows,
            job.way,
            keep,
            tick,
            queries,
        )
        every = tangents.at(strengths)
        pairs = [q * len(strengths) + k for q in queries for k in range(len(strengths))]
        place = {u: row for row, u in enumerate(pairs)}
        rows = [place[u] for u in unit.updates]
        return Effects(every.base, every.unlearned[rows], every.displacement[rows])


def _loads(job: Job, function: str) -> list[Callable[[], Update]]:
    """One function an update that reads it: in the order of the result, or one a query where tangents serve all strengths."""
    return [
        partial(Update.load, job.update_path(q, x, function), update_key(job, q, function))
        for q in job.queries
        for x in job.made(function)
    ]


def _keep(job: Job, unit: Unit) -> Keep:
    """Keeps what theta_0 says of a unit under ``--cache``, for every run with this model, these tracks and this draw plan."""
    key = job.cache_key(key_of(job.key("mask_score", "rows", layers=False), job.scored.fingerprint))
    folder = job.cache_path(key)
    if folder is None:
        return lambda measure: measure()
    tracks = f"{unit.tracks[0]}-{key_of(list(unit.tracks))}"
    path = folder / f"{tracks}-{unit.draws.start}-{unit.draws.stop}.safetensors"

    def keep(measure: Callable[[], Base]) -> Base:
        if path.exists():
            return Base(**load_tensors(path, key)[0])
        base = measure()
        with held(path.with_suffix(".lock")) as mine:
            if mine and not path.exists():  # where another run writes the same, it will be the same
                save_tensors(path, vars(base), {"key": key})
        return base

    return keep


def score_key(job: Job) -> str:
    """Key of the effects: whatever they depend on."""
    s = job.run.settings
    queries: list[Any] = [(q.id, q.tracks.fingerprint, *q.members) for q in job.queries]
    queries += [] if job.pieces is None else [job.pieces.fingerprint]
    leading = [job.measured[0]] if s.top else []
    leading += [index_key(job), str(s.rescore)] if s.index else []
    measured = [name in job.measured for name in FIRST_ORDER] if job.first_order else []
    names = ("strengths", "mask_score", "score_draws", "unit_tracks", *RACE_SETTINGS)
    return key_of(job.key(*UPDATE_SETTINGS, *names), job.way, job.needs_forward, queries, *measured, *leading)


def score_stage(job: Job) -> list[Part]:
    """Measure tracks under every update, unit by unit; each unit is durable once done.

    Returns:
        One part with every track; of a race its rounds, of a cascade the candidates of every query.
    """
    folder, key = job.run.path, score_key(job)
    finished = folder / EFFECTS
    if not finished.exists():
        _measure_all(job, key, finished)
    parts = read_parts(finished, key)
    for name in ("units", LOCKS):
        shutil.rmtree(folder / name, ignore_errors=True)
    return parts


def _measure_all(job: Job, key: str, finished: Path) -> None:
    """Every round, and the file that is made of them; returns as soon as another process has made it."""
    with job.run.stage("score"):
        parts = _rounds(job, key, finished)
    # After the stage's time is on disk: what is finished does not enter the stage again.
    with once(job.run.path / LOCKS / "score.lock", finished) as mine:
        if mine:
            save_parts(finished, parts, {"key": key, **_names(job)})


def _rounds(job: Job, key: str, finished: Path) -> list[Part]:
    """One round where all tracks get all draws; of a race as many as it takes. Less, if another process has finished."""
    s, scorer, parts = job.run.settings, Scorer(job), list[Part]()
    show = job.run.progress("score", "unit", f"scoring {len(job.scored)} tracks under {job.updates} updates")
    units, number, before = first_units(job), 0, 0
    while units:
        paths = [job.run.path / "units" / f"{number:02d}-{i:06d}.safetensors" for i in range(len(units))]
        measure_units(job, scorer, units, paths, key, finished, show, before)
        try:
            new = _merged([part for path in paths for part in read_parts(path, key)])
        except UserError:
            if finished.exists():  # another process has made it meanwhile, and cleared up
                return []
            raise
        for part in new:
            check_finite(job, part)
        parts += new
        before, number = before + len(units), number + 1
        units = next_units(job, parts) if s.top else []
    return parts


def _names(job: Job) -> dict[str, Any]:
    """What the rows of the effects are, for readers that have nothing else."""
    return {
        "tracks": list(job.scored.ids),
        "updates": job.named_updates,
        "replicates": job.run.settings.replicates,
    }


def first_units(job: Job) -> list[Unit]:
    """Every track under every update; of a cascade the candidates of every query under its own."""
    s = job.run.settings
    draws = range(min(s.race_draws, s.score_draws) if s.top else s.score_draws)
    if not s.index:
        return whole_units(job, draws)
    strengths = len(s.strengths)
    return [
        Unit(some[i : i + s.unit_tracks].tolist(), range(q * strengths, (q + 1) * strengths), draws)
        for q, some in enumerate(candidates(job))
        for i in range(0, len(some), s.unit_tracks)
    ]


def race_of(job: Job) -> Race:
    """The rules that the settings give."""
    s = job.run.settings
    return Race(s.top, s.confidence, s.score_draws, s.race_share)


def next_units(job: Job, parts: Sequence[Part]) -> list[Unit]:
    """More draws for those tracks whose place in the top k is not decided."""
    s, race = job.run.settings, race_of(job)
    tally = Tally.of(parts, job.measured[0], job.updates, len(job.scored), s.replicates, s.plan == "shared")
    # A backward pass serves all updates; forward passes are made under one.
    alone = job.needs_forward or s.index
    together = [[u] for u in range(job.updates)] if alone else [list(range(job.updates))]
    return [
        Unit([int(i) for i in chosen[k : k + s.unit_tracks]], group, range(there, min(2 * there, race.most)))
        for group in together
        for there, chosen in race.next(tally, group).items()
        for k in range(0, len(chosen), s.unit_tracks)
    ]


def measure_units(
    job: Job, scorer: Scorer, units: Sequence[Unit], paths: Sequence[Path], key: str, finished: Path, show: Progress, before: int
) -> None:  # fmt: skip
    """Measure the units that nobody else measures; return when the files of all are there."""

    def compute(i: int) -> None:
        unit = units[i]
        effects = scorer(unit, show.within(_passes(job, unit)))
        part = Part(np.asarray(unit.tracks), unit.updates, unit.draws, effects)
        save_parts(paths[i], [part], {"key": key})

    locks = job.run.path / LOCKS / f"score-{paths[0].stem.split('-')[0]}"
    run_units(paths, compute, finished, locks, lambda done: show(before + done, before + len(units)))


def _passes(job: Job, unit: Unit) -> int:
    """How many passes through the model a unit takes."""
    s = job.run.settings
    made = len(unit.updates) if job.way == "passes" else len({u // len(s.strengths) for u in unit.updates})
    rows = len(unit.tracks) * len(unit.draws)
    backward = len(job.first_order) * -(-rows // (job.rows if s.gradients == "batch" else 1))
    return backward + (1 + made) * -(-rows // job.rows) * job.needs_forward


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Parts with the same updates and draws as one, tracks in their order."""
    groups: dict[tuple[tuple[int, ...], range], list[Part]] = {}
    for part in parts:
        groups.setdefault((tuple(part.updates), part.draws), []).append(part)
    return [
        Part(np.concatenate([p.tracks for p in some]), updates, draws, joined([p.effects for p in some]))
        for (updates, draws), some in groups.items()
    ]


def joined(parts: Sequence[Effects]) -> Effects:
    """Effects of all tracks from those of units, in their order."""
    return Effects(
        np.concatenate([p.base for p in parts]),
        np.concatenate([p.unlearned for p in parts], axis=1),
        np.concatenate([p.displacement for p in parts], axis=1),
        {name: np.concatenate([p.influence[name] for p in parts], axis=1) for name in parts[0].influence},
    )


def check_finite(job: Job, part: Part) -> None:
    """Refuse infinite effects.

    Raises:
        UserError: names the query and the track.
    """
    for values in (part.effects.unlearned, part.effects.displacement, *part.effects.influence.values()):
        bad = ~np.isfinite(values).all(axis=-1)
        if bad.any():
            u, i = (int(x[0]) for x in np.nonzero(bad))
            query = job.queries[part.updates[u] // len(job.run.settings.strengths)].id
            raise UserError(
                f"unlearning {query!r} made the loss of track {job.scored.ids[part.tracks[i]]!r} infinite or NaN: "
                "use a smaller strength or more damping"
            )
