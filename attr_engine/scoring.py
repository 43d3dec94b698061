"""Scoring in durable units: what several units share is made once, what theta_0 says may be kept for other runs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from attr_engine import progress
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.effects import Base, Effects, Keep, measure_effects, measure_tangents
from attr_engine.errors import UserError
from attr_engine.influence import DIRECTION_BYTES, measure_influence
from attr_engine.jobs import UPDATE_SETTINGS, Job, update_key
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import select_parameters
from attr_engine.runs import LOCKS, key_of
from attr_engine.score import FIRST_ORDER
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import held, once, run_units
from attr_engine.updates import Directions, Unlearned, Update, free_bytes

EFFECTS = "effects.safetensors"
_INFLUENCE = "influence."


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
    size, total, updates = job.run.settings.unit_tracks, len(job.tracks), range(job.updates)
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
        self._unlearned = Unlearned(job.model, self._loads["loss"], room)
        self._directions = {
            name: Directions(self._parameters, self._loads[name], max(room, DIRECTION_BYTES))
            for name in job.first_order
        }

    def __call__(self, unit: Unit, tick: Callable[[], None] = lambda: None) -> Effects:
        """Effects of the unit's updates on its tracks; forward passes under updates only where a score needs them."""
        job, s = self._job, self._job.run.settings
        batch = job.tracks.batch(unit.tracks, job.model.frames)
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
        if s.strengths_by == "passes":
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
        updates = self._unlearned if s.strengths_by == "difference" else self._loads["loss"]
        tangents = measure_tangents(
            job.model,
            batch,
            updates,
            job.plan,
            unit.draws,
            s.mask_score,
            job.rows,
            s.strengths_by,
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
    s = job.run.settings
    if not s.cache:
        return lambda measure: measure()
    device = next(job.model.module.parameters()).device.type
    key = key_of(job.key("mask_score", "rows", layers=False), device)
    tracks = f"{unit.tracks[0]}-{key_of(list(unit.tracks))}"
    path = Path(s.cache) / key / f"{tracks}-{unit.draws.start}-{unit.draws.stop}.safetensors"

    def keep(measure: Callable[[], Base]) -> Base:
        if path.exists():
            return Base(**load_tensors(path, key)[0])
        base = measure()
        with held(path.with_suffix(".lock")) as mine:
            if mine and not path.exists():  # where another run writes the same, it will be the same
                save_tensors(path, vars(base), {"key": key})
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink()
        return base

    return keep


def score_key(job: Job) -> str:
    """Key of the effects: whatever they depend on."""
    queries = [(q.id, q.tracks.fingerprint) for q in job.queries]
    measured = [name in job.run.settings.functions for name in FIRST_ORDER] if job.first_order else []
    names = ("strengths", "strengths_by", "mask_score", "score_draws", "unit_tracks")
    return key_of(job.key(*UPDATE_SETTINGS, *names), queries, *measured)


def score_stage(job: Job) -> Effects:
    """Measure every track under every update, unit by unit; each unit is durable once done."""
    s, folder, key = job.run.settings, job.run.path, score_key(job)
    finished = folder / EFFECTS
    if not finished.exists():
        units = whole_units(job, range(s.score_draws))
        paths = [folder / "units" / f"{i:06d}.safetensors" for i in range(len(units))]
        measure_units(job, Scorer(job), units, paths, key, finished)
        # After the stage's time is on disk: what is finished does not enter the stage again.
        with once(folder / LOCKS / "score.lock", finished) as mine:
            if mine:
                effects = joined([from_tensors(load_tensors(path, key)[0]) for path in paths])
                check_finite(job, effects, range(len(job.tracks)))
                save_tensors(finished, to_tensors(effects), {"key": key})
    effects = from_tensors(load_tensors(finished, key)[0])
    for name in ("units", LOCKS):
        shutil.rmtree(folder / name, ignore_errors=True)
    return effects


def measure_units(
    job: Job, scorer: Scorer, units: Sequence[Unit], paths: Sequence[Path], key: str, finished: Path | None
) -> None:
    """Measure the units that nobody else measures; return when the files of all are there."""
    what = f"scoring {len(job.tracks)} tracks under {job.updates} updates"
    show = progress.bar(what, "unit")

    def compute(i: int) -> None:
        where = {"first": units[i].tracks[0], "count": len(units[i].tracks)}
        save_tensors(paths[i], to_tensors(scorer(units[i])), {"key": key, **where})

    with job.run.stage("score"):
        run_units(
            paths, compute, finished, job.run.path / LOCKS / "score", lambda done: show(done, len(units))
        )


def joined(parts: Sequence[Effects]) -> Effects:
    """Effects of all tracks from those of units, in their order."""
    return Effects(
        np.concatenate([p.base for p in parts]),
        np.concatenate([p.unlearned for p in parts], axis=1),
        np.concatenate([p.displacement for p in parts], axis=1),
        {name: np.concatenate([p.influence[name] for p in parts], axis=1) for name in parts[0].influence},
    )


def to_tensors(effects: Effects) -> dict[str, torch.Tensor]:
    """Effects as named tensors, ``influence.<function>`` for those to first order."""
    arrays = {name: value for name, value in vars(effects).items() if name != "influence"}
    arrays |= {_INFLUENCE + name: value for name, value in effects.influence.items()}
    return {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in arrays.items()}


def from_tensors(tensors: dict[str, torch.Tensor]) -> Effects:
    """What :func:`to_tensors` made tensors of."""
    first_order = {n.removeprefix(_INFLUENCE): t for n, t in tensors.items() if n.startswith(_INFLUENCE)}
    base, unlearned, moved = (tensors[name].numpy() for name in ("base", "unlearned", "displacement"))
    return Effects(base, unlearned, moved, {name: value.numpy() for name, value in first_order.items()})


def check_finite(job: Job, effects: Effects, tracks: Sequence[int]) -> None:
    """Refuse infinite effects.

    Raises:
        UserError: names the query and the track.
    """
    for values in (effects.unlearned, effects.displacement, *effects.influence.values()):
        bad = ~np.isfinite(values).all(axis=-1)
        if bad.any():
            u, i = (int(x[0]) for x in np.nonzero(bad))
            query = job.queries[u // len(job.run.settings.strengths)].id
            raise UserError(
                f"unlearning {query!r} made the loss of track {job.tracks.ids[tracks[i]]!r} infinite or NaN: "
                "use a smaller strength or more damping"
            )
