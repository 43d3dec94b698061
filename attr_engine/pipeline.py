"""All of it, in a run directory: Fisher, one update a query and strength, one scoring pass for all.

Every stage keeps what it finished; the same command carries on after a kill, to the same bits.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attr_engine import progress
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.effects import Effects
from attr_engine.fisher import Fisher, FisherSettings, check_fisher, combine, fisher_units, sum_unit
from attr_engine.jobs import FISHER_SETTINGS, Job, Query, check, make_queries, update_key
from attr_engine.latents.batch import Tracks
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.result import Attribution
from attr_engine.runs import LOCKS, open_run
from attr_engine.score import scores
from attr_engine.scoring import EFFECTS, score_stage
from attr_engine.settings import Settings, to_json
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import once, rank, run_units
from attr_engine.unlearn import query_gradient, unlearn_query

FISHER, SCORES_PARQUET, SCORES_CSV = "fisher.safetensors", "scores.parquet", "scores.csv"


def _fisher_settings(job: Job) -> FisherSettings:
    s = job.run.settings
    return FisherSettings(s.layers, job.plan, s.fisher_draws, s.mask_fisher, job.rows, s.gradients)


def fisher_stage(job: Job) -> Fisher:
    """Fit the Fisher, or read it; the settings are written down first."""
    path, key = job.run.path / FISHER, job.key(*FISHER_SETTINGS)
    job.run.record()
    known = Path(job.run.settings.cache) / f"fisher-{key}.safetensors" if job.run.settings.cache else path
    if not path.exists() and known.exists():
        Fisher.load(known, key).save(path, key)
    if not path.exists():
        check_fisher(job.model, job.tracks, _fisher_settings(job))
        _sum_units(job, path, key)
    fisher = Fisher.load(path, key)
    if not known.exists():
        with once(job.run.path / LOCKS / "cache.lock", known) as mine:
            if mine:
                fisher.save(known, key)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    return fisher


def _sum_units(job: Job, finished: Path, key: str) -> None:
    """Sum the units that nobody else sums; then one process adds them up."""
    settings, total = _fisher_settings(job), len(job.tracks)
    units = fisher_units(total, settings)
    paths = [finished.with_suffix("") / f"{i:02d}.safetensors" for i in range(len(units))]
    show = progress.bar("Fisher", "track")

    def known() -> int:
        return sum(len(unit) for unit, path in zip(units, paths, strict=True) if path.exists())

    def compute(i: int) -> None:
        checkpoint, before = paths[i].with_suffix(".so-far.safetensors"), known()
        sums, used = sum_unit(
            job.model, job.tracks, settings, units[i], checkpoint, key, lambda n: show(before + n, total)
        )
        save_tensors(paths[i], sums, {"key": key, "used": sorted(used)})
        checkpoint.unlink(missing_ok=True)

    with job.run.stage("fisher"):
        run_units(paths, compute, finished, job.run.path / LOCKS / "fisher", lambda _: show(known(), total))
    with once(job.run.path / LOCKS / "fisher.lock", finished) as mine:
        if mine:
            sums = ((values, meta["used"]) for values, meta in (load_tensors(p, key) for p in paths))
            combine(sums, total * settings.draws).save(finished, key)


def update_stage(job: Job, fisher: Fisher, finished: Path | None = None) -> None:
    """Unlearn every query at every strength; not those that are missing because ``finished`` was made of them."""
    s = job.run.settings
    parameters = select_parameters(job.model, s.layers)
    show = progress.bar("unlearning", "query")
    units = [(query, function) for query in job.queries for function in job.row_functions]
    # Strengths are written in their order: with the last one all are there.
    paths = [job.update_path(query, job.made(function)[-1], function) for query, function in units]
    with job.run.stage("unlearn"):
        run_units(
            paths,
            lambda i: _update_query(job, fisher, parameters, *units[i]),
            finished,
            job.run.path / LOCKS / "update",
            lambda done: show(done, len(units)),
        )


def _update_query(
    job: Job, fisher: Fisher, parameters: Mapping[str, torch.nn.Parameter], query: Query, name: str
) -> None:
    """Unlearn one query at every strength that has no file yet."""
    s, function = job.run.settings, ROW_FUNCTIONS[name]
    missing = [x for x in job.made(name) if not job.update_path(query, x, name).exists()]
    if not missing:
        return
    batch = query.tracks.batch([query.index], job.model.frames)
    first = query_gradient(
        job.model, parameters, batch, range(s.update_draws), job.plan, s.mask_update, job.rows, function
    )
    for strength in missing:
        update = unlearn_query(
            job.model, query.tracks, query.index, fisher, job.plan, len(job.tracks), strength, s.unit,
            s.steps, s.update_draws, s.damping, s.mask_update, job.rows, first, function,
        )  # fmt: skip
        dtype = torch.bfloat16 if s.update_dtype == "bfloat16" else None
        update.save(job.update_path(query, strength, name), update_key(job, query, name), dtype)


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
    if rank() == 0:
        result.to_parquet(job.run.path / SCORES_PARQUET)
        result.to_csv(job.run.path / SCORES_CSV)
    return result


def drop_updates(job: Job) -> None:
    """Remove the updates once nothing needs them, unless they were to be kept."""
    if rank() == 0 and not job.run.settings.keep_updates:
        shutil.rmtree(job.run.path / "updates", ignore_errors=True)


def run_job(job: Job) -> Attribution:
    """Run every stage that is not done yet."""
    check(job)
    fisher = fisher_stage(job)
    finished = job.run.path / EFFECTS
    if not finished.exists():
        update_stage(job, fisher, finished)
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
