"""All of it, in a run directory: Fisher, one update a query and strength, one scoring pass for all.

Every stage keeps what it finished; the same command carries on after a kill, to the same bits.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine import progress
from attr_engine.diffusion import DrawPlan
from attr_engine.errors import UserError
from attr_engine.fisher import Fisher, fit_fisher
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.result import Attribution
from attr_engine.runs import Run, key_of, open_run
from attr_engine.score import Effects, measure_effects, score_function, scores
from attr_engine.settings import Settings, to_json
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.unlearn import Update, check_settings, query_gradient, unlearn_query

FISHER, SCORES_PARQUET, SCORES_CSV, EFFECTS = (
    "fisher.safetensors",
    "scores.parquet",
    "scores.csv",
    "effects.safetensors",
)


@dataclass(frozen=True)
class Query:
    """One query: where its latent is, and under which id its scores stand."""

    tracks: Tracks
    index: int
    kind: str

    @property
    def id(self) -> str:
        """Id of the query."""
        return self.tracks.ids[self.index]


@dataclass(frozen=True)
class Job:
    """What the stages share: model, data, queries and the run that they write to."""

    run: Run
    model: Denoiser
    tracks: Tracks
    queries: tuple[Query, ...]

    @property
    def plan(self) -> DrawPlan:
        """The draw plan of the settings."""
        s = self.run.settings
        return DrawPlan(s.seed, s.plan, s.replicates)

    @property
    def dtype(self) -> str:
        """Dtype of the model as it is: a caller of :func:`attribute` may not have set it in the settings."""
        return str(next(self.model.module.parameters()).dtype).removeprefix("torch.")

    def key(self, *names: str) -> str:
        """Key of a stage: model, data, the draw plan and the named settings."""
        values = {**to_json(self.run.settings), "dtype": self.dtype}
        shared = ("layers", "seed", "plan", "replicates", "dtype")
        return key_of(
            self.model.fingerprint, self.tracks.fingerprint, {n: values[n] for n in (*shared, *names)}
        )

    def update_path(self, query: Query, strength: float) -> Path:
        """Where the update of a query lies; ids are hashed, because they may hold anything."""
        return self.run.path / "updates" / f"{key_of(query.id)}@{strength!r}.safetensors"


_FISHER_SETTINGS = ("fisher_draws", "mask_fisher", "rows", "gradients")
UPDATE_SETTINGS = (*_FISHER_SETTINGS, "unit", "steps", "damping", "mask_update", "update_draws")


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


def check(job: Job) -> None:
    """Refuse whatever later stages would refuse, before any of them has cost time."""
    s = job.run.settings
    check_tracks(job.tracks, job.model.channels, job.model.frames, "training")
    for query in job.queries:
        check_tracks(query.tracks, job.model.channels, job.model.frames, "query")
    select_parameters(job.model, s.layers)
    if job.model.module.training:
        raise UserError(
            "the model is in training mode, where dropout would differ from pass to pass: call .eval()"
        )
    for name in s.functions:
        score_function(name)
    if not s.functions or not s.strengths:
        raise UserError("name at least one score function and one strength")
    for strength in s.strengths:
        check_settings(strength, s.unit, s.steps, s.damping)
        if s.strengths.count(strength) > 1:
            raise UserError(f"the strength {strength} stands twice in the settings: name each once")
    for draws, what in ((s.fisher_draws, "Fisher"), (s.update_draws, "update"), (s.score_draws, "score")):
        job.plan.check(draws, f"the number of {what} draws")
    if min(s.rows, s.unit_tracks, s.top) < 1 or s.threads < 0:
        raise UserError("rows, unit_tracks and top must be at least 1, threads at least 0")


def plan_of(job: Job) -> str:
    """What the run is going to cost, in passes through the model."""
    s, n = job.run.settings, len(job.tracks)
    updates = len(job.queries) * len(s.strengths)
    backward = n * s.fisher_draws + (len(job.queries) + updates * (s.steps - 1)) * s.update_draws
    return (
        f"{len(job.queries)} queries, {updates} updates, {n} tracks: {backward} gradients "
        f"and {n * s.score_draws * (updates + 1)} forward passes"
    )


def fisher_stage(job: Job) -> Fisher:
    """Fit the Fisher, or read it; the settings are written down first."""
    s, path = job.run.settings, job.run.path / FISHER
    key, checkpoint = job.key(*_FISHER_SETTINGS), job.run.path / "fisher-so-far.safetensors"
    job.run.record()
    if path.exists():
        fisher = Fisher.load(path, key)
        checkpoint.unlink(missing_ok=True)
        return fisher
    with job.run.stage("fisher"):
        fisher = fit_fisher(
            job.model, job.tracks, s.layers, job.plan, s.fisher_draws, s.mask_fisher, checkpoint, key,
            progress.bar("Fisher", "track"), s.rows, s.gradients,
        )  # fmt: skip
    fisher.save(path, key)
    checkpoint.unlink(missing_ok=True)
    return fisher


def update_stage(job: Job, fisher: Fisher) -> None:
    """Unlearn every query at every strength."""
    s, key = job.run.settings, job.key(*UPDATE_SETTINGS)
    parameters = select_parameters(job.model, s.layers)
    show = progress.bar("unlearning", "query")
    show(0, len(job.queries))
    with job.run.stage("unlearn"):
        for done, query in enumerate(job.queries):
            missing = [x for x in s.strengths if not job.update_path(query, x).exists()]
            if missing:
                batch = query.tracks.batch([query.index], job.model.frames)
                draws = range(s.update_draws)
                first = query_gradient(job.model, parameters, batch, draws, job.plan, s.mask_update, s.rows)
            for strength in missing:
                update = unlearn_query(
                    job.model, query.tracks, query.index, fisher, job.plan, len(job.tracks), strength, s.unit,
                    s.steps, s.update_draws, s.damping, s.mask_update, s.rows, first,
                )  # fmt: skip
                update.save(job.update_path(query, strength), key_of(key, query.tracks.fingerprint))
            show(done + 1, len(job.queries))


def _units(job: Job) -> Iterator[tuple[int, list[int]]]:
    size = job.run.settings.unit_tracks
    for unit, first in enumerate(range(0, len(job.tracks), size)):
        yield unit, list(range(first, min(first + size, len(job.tracks))))


def score_stage(job: Job) -> Effects:
    """Measure every track under every update, unit by unit; each unit is durable once done."""
    s, folder = job.run.settings, job.run.path
    queries = [(q.id, q.tracks.fingerprint) for q in job.queries]
    key = key_of(job.key(*UPDATE_SETTINGS, "strengths", "mask_score", "score_draws", "unit_tracks"), queries)
    if (folder / EFFECTS).exists():
        effects = _effects(load_tensors(folder / EFFECTS, key)[0])
        shutil.rmtree(folder / "units", ignore_errors=True)
        return effects
    update_key = job.key(*UPDATE_SETTINGS)
    loads: list[Callable[[], Update]] = [
        partial(Update.load, job.update_path(q, x), key_of(update_key, q.tracks.fingerprint))
        for q in job.queries
        for x in s.strengths
    ]
    units = list(_units(job))
    show = progress.bar(f"scoring {len(job.tracks)} tracks under {len(loads)} updates", "unit")
    parts = []
    show(0, len(units))
    with job.run.stage("score"):
        for unit, indices in units:
            path = folder / "units" / f"{unit:06d}.safetensors"
            if path.exists():
                parts.append(_effects(load_tensors(path, key)[0]))
            else:
                batch = job.tracks.batch(indices, job.model.frames)
                parts.append(
                    measure_effects(job.model, batch, loads, job.plan, s.score_draws, s.mask_score, s.rows)
                )
                save_tensors(path, _tensors(parts[-1]), {"key": key})
            show(unit + 1, len(units))
    effects = Effects(
        np.concatenate([p.base for p in parts]),
        np.concatenate([p.unlearned for p in parts], axis=1),
        np.concatenate([p.displacement for p in parts], axis=1),
    )
    _check_finite(job, effects)
    save_tensors(folder / EFFECTS, _tensors(effects), {"key": key})
    shutil.rmtree(folder / "units")
    return effects


def _tensors(effects: Effects) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in vars(effects).items()}


def _effects(tensors: dict[str, torch.Tensor]) -> Effects:
    return Effects(**{name: tensors[name].numpy() for name in ("base", "unlearned", "displacement")})


def _check_finite(job: Job, effects: Effects) -> None:
    bad = ~(np.isfinite(effects.unlearned) & np.isfinite(effects.displacement)).all(axis=-1)
    if bad.any():
        u, i = (int(x[0]) for x in np.nonzero(bad))
        query = job.queries[u // len(job.run.settings.strengths)].id
        raise UserError(
            f"unlearning {query!r} made the loss of track {job.tracks.ids[i]!r} infinite or NaN: use a smaller strength or more damping"
        )


def finish(job: Job, effects: Effects) -> Attribution:
    """Turn effects into scores and write them as Parquet and CSV."""
    s = job.run.settings
    by_function = scores(effects, s.functions, s.replicates)
    meta: dict[str, Any] = {
        "settings": to_json(s),
        "model": job.model.fingerprint,
        "data": job.tracks.fingerprint,
        "objective": job.model.objective,
        "dtype": job.dtype,
        "frames": job.model.frames,
    }
    result = Attribution(
        tracks=list(job.tracks.ids),
        updates=[(q.id, x) for q in job.queries for x in s.strengths],
        values={name: value for name, (value, _) in by_function.items()},
        errors={name: error for name, (_, error) in by_function.items()},
        base=effects.base.mean(axis=-1),
        meta=meta,
    )
    result.to_parquet(job.run.path / SCORES_PARQUET)
    result.to_csv(job.run.path / SCORES_CSV)
    return result


def drop_updates(job: Job) -> None:
    """Remove the updates once nothing needs them, unless they were to be kept."""
    if not job.run.settings.keep_updates:
        shutil.rmtree(job.run.path / "updates", ignore_errors=True)


def run_job(job: Job) -> Attribution:
    """Run every stage that is not done yet."""
    check(job)
    fisher = fisher_stage(job)
    if not (job.run.path / EFFECTS).exists():
        update_stage(job, fisher)
    return finish(job, score_stage(job))


def attribute(
    model: Denoiser,
    tracks: Tracks,
    queries: Tracks | Sequence[Tracks] | None = None,
    settings: Settings | None = None,
    out: str | Path | None = None,
) -> Attribution:
    """Attribute queries to training tracks.

    Args:
        model: theta_0.
        tracks: the training tracks.
        queries: a set of queries, or several; may be left out where ``settings.self_influence`` names
            training tracks.
        settings: paths in it are not read here; everything else is.
        out: run directory, kept; the same call carries on there. Default: a temporary one.

    Returns:
        Scores and standard errors of every track for every query and strength.

    Raises:
        UserError: anything unusable, by name.
    """
    settings = settings or Settings()
    if out is None:
        with tempfile.TemporaryDirectory(prefix="attr-engine-") as folder:
            return attribute(model, tracks, queries, settings, folder)
    with open_run(out, settings) as run:
        sets: Any = queries if isinstance(queries, list | tuple) else [] if queries is None else [queries]
        job = Job(run, model, tracks, make_queries(tracks, sets, settings.self_influence))
        result = run_job(job)
        drop_updates(job)
        return result
