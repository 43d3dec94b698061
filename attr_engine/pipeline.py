"""All of it, in a run directory: Fisher, one update a query and strength, one scoring pass for all.

Every stage keeps what it finished; the same command carries on after a kill, to the same bits.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.cascade import index_key
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.errors import UserError
from attr_engine.files import write_json
from attr_engine.fisher import Fisher, FisherSettings, check_fisher, combine, fisher_units, sum_unit
from attr_engine.jobs import FISHER_SETTINGS, Job, Query, check, make_job, update_key
from attr_engine.latents.batch import Tracks
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.monitor import Cancel, Progress
from attr_engine.race import Part, Tally
from attr_engine.result import Attribution, run_metadata
from attr_engine.ridge import Solved, ridge_stage
from attr_engine.runs import LOCKS, key_of, open_run
from attr_engine.score import RIDGE, scores
from attr_engine.scoring import EFFECTS, score_stage
from attr_engine.settings import Settings
from attr_engine.strength import kept_rows, search_rows
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import once, rank, run_units
from attr_engine.unlearn import group_gradient, unlearn_query
from attr_engine.updates import Update

FISHER, SCORES_PARQUET, SCORES_CSV = "fisher.safetensors", "scores.parquet", "scores.csv"
SIZES = "sizes.json"


def _fisher_settings(job: Job) -> FisherSettings:
    s = job.run.settings
    return FisherSettings(s.layers, job.plan, s.fisher_draws, s.mask_fisher, job.rows, s.gradients)


def fisher_stage(job: Job) -> Fisher:
    """Fit the Fisher, or read it; the settings are written down first."""
    path, key = job.run.path / FISHER, job.key(*FISHER_SETTINGS)
    job.run.record()
    known = job.cache_path(f"fisher-{job.cache_key(key)}.safetensors") or path
    if not path.exists() and known.exists():
        with once(job.run.path / LOCKS / "fisher.lock", path) as mine:
            if mine:
                Fisher.load(known, key).save(path, key)
    if not path.exists():
        check_fisher(job.model, job.tracks, _fisher_settings(job))
        _sum_units(job, path, key)
    fisher = Fisher.load(path, key)
    if not known.exists():
        with once(known.with_suffix(".lock"), known) as mine:  # other runs may write it too
            if mine:
                fisher.save(known, key)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    return fisher


def _sum_units(job: Job, finished: Path, key: str) -> None:
    """Sum the units that nobody else sums; then one process adds them up."""
    settings, total = _fisher_settings(job), len(job.tracks)
    units = fisher_units(total, settings)
    paths = [finished.with_suffix("") / f"{i:02d}.safetensors" for i in range(len(units))]
    show = job.run.progress("fisher", "track", "Fisher")

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
        run_units(
            paths,
            compute,
            finished,
            job.run.path / LOCKS / "fisher",
            lambda done: show(total if done == len(units) else known(), total),
        )
    with once(job.run.path / LOCKS / "fisher.lock", finished) as mine:
        if mine:
            sums = ((values, meta["used"]) for values, meta in (load_tensors(p, key) for p in paths))
            combine(sums, total * settings.draws).save(finished, key)


def update_stage(job: Job, fisher: Fisher, finished: Path | None = None) -> None:
    """Unlearn every query at every strength; not those that are missing because ``finished`` was made of them."""
    s = job.run.settings
    parameters = select_parameters(job.model, s.layers)
    show = job.run.progress("unlearn", "query", "unlearning")
    units = [(query, function) for query in job.queries for function in job.row_functions]
    # Strengths are written in their order: with the last one all are there.
    paths = [job.update_path(query, job.made(function)[-1], function) for query, function in units]
    with job.run.stage("unlearn"):
        run_units(
            paths,
            lambda i: _update_query(job, fisher, parameters, *units[i], show),
            finished,
            job.run.path / LOCKS / "update",
            lambda done: show(done, len(units)),
        )
    _write_sizes(job)


def _sizes_key(job: Job) -> str:
    return key_of(
        [update_key(job, q) for q in job.queries], [q.id for q in job.queries], job.run.settings.strengths
    )


def _write_sizes(job: Job) -> None:
    """Keep how large every update is, beyond the updates themselves; there is nothing to tell where a strength is the size."""
    path = job.run.path / SIZES
    if job.run.settings.unit == "size" or path.exists():
        return
    with once(job.run.path / LOCKS / "sizes.lock", path) as mine:
        if not mine:
            return
        rows = []
        for query, function in ((q, f) for q in job.queries for f in job.row_functions):
            for strength in job.made(function):
                update = Update.load(
                    job.update_path(query, strength, function), update_key(job, query, function)
                )
                found = {
                    "query": query.id,
                    "strength": strength,
                    "of": function,
                    "size": update.size,
                    "lr": update.lr,
                }
                rows.append({**found, **update.reaction})
        write_json(path, {"key": _sizes_key(job), "updates": rows})


def sizes(job: Job) -> list[dict[str, Any]]:
    """How large every update of a run is, where a strength is not the size: once the updates were made.

    Returns:
        Of each update ``query``, ``strength``, ``of`` (what was raised), ``size``, ``lr``, and what
        :func:`attr_engine.strength.find_size` found; empty where a strength is the size, or an earlier version unlearned.

    Raises:
        UserError: the file belongs to other settings.
    """
    path = job.run.path / SIZES
    if job.run.settings.unit == "size" or not path.exists():
        return []
    kept = read_json(path, "table of sizes")
    if kept.get("key") != _sizes_key(job):
        raise UserError(
            f"{path} belongs to other settings, another model or other data: delete it, or choose another --out"
        )
    return list(kept["updates"])


def _update_query(
    job: Job,
    fisher: Fisher,
    parameters: Mapping[str, torch.nn.Parameter],
    query: Query,
    name: str,
    show: Progress,
) -> None:
    """Unlearn one query at every strength that has no file yet."""
    s, function = job.run.settings, ROW_FUNCTIONS[name]
    missing = [x for x in job.made(name) if not job.update_path(query, x, name).exists()]
    if not missing:
        return
    rows = len(query.indices) * s.update_draws
    searches = len(missing) * -(-search_rows(s, rows) // job.rows)
    tick = show.within(-(-rows // job.rows) * (1 + len(missing) * (s.steps - 1)) + searches)
    draws = range(s.update_draws)
    first = group_gradient(
        job.model,
        parameters,
        query.tracks,
        query.indices,
        draws,
        job.plan,
        s.mask_update,
        job.rows,
        function,
        tick,
    )
    for strength in missing:
        update = unlearn_query(
            job.model, query.tracks, query.indices, fisher, job.plan, len(job.tracks), strength, s.unit,
            s.steps, s.update_draws, s.damping, s.mask_update, job.rows, first, function, tick, kept_rows(s),
        )  # fmt: skip
        dtype = torch.bfloat16 if s.update_dtype == "bfloat16" else None
        update.save(job.update_path(query, strength, name), update_key(job, query, name), dtype)


def _comparable(tally: Tally, top: int) -> np.ndarray:
    """Scores ``[U, N]``, which in a race with shared draws stand for means over the same ones."""
    if not top or not tally.shared:
        return tally.means
    return np.stack([tally.adjusted(u, top)[0] for u in range(len(tally.draws))])


def finish(job: Job, parts: Sequence[Part], solved: Solved | None = None) -> Attribution:
    """Turn effects into scores, put those of kernel ridge regression beside them, and write them as Parquet and CSV."""
    s, n = job.run.settings, len(job.scored)
    if len(parts) == 1 and len(parts[0].tracks) == n:
        by_function = scores(parts[0].effects, job.measured, s.replicates)
    else:
        shared = s.plan == "shared"
        tallies = {name: Tally.of(parts, name, job.updates, n, s.replicates, shared) for name in job.measured}
        by_function = {name: (_comparable(tally, s.top), tally.errors) for name, tally in tallies.items()}
    if solved is not None:
        by_function[RIDGE] = (solved.scores, solved.errors)
    base = np.full(n, np.nan)  # where only gradients were taken, no loss was measured
    draws = np.full((job.updates, n), 0 if job.measured else s.score_draws, dtype=np.int64)
    for part in reversed(parts):  # of a track in several parts the first one tells
        base[part.tracks] = part.effects.base.mean(axis=-1)
        draws[np.ix_(np.asarray(part.updates), part.tracks)] += len(part.draws)
    result = Attribution(
        tracks=list(job.scored.ids),
        updates=job.named_updates,
        values={name: by_function[name][0] for name in s.functions},
        errors={name: by_function[name][1] for name in s.functions},
        base=base,
        meta=run_metadata(job, fisher=job.key(*FISHER_SETTINGS))
        | ({"updates": found} if (found := sizes(job)) else {}),
        draws=draws,
    )
    if job.pieces is not None:
        result = by_group(result)
    if rank() == 0:
        result.to_parquet(job.run.path / SCORES_PARQUET)
        result.to_csv(job.run.path / SCORES_CSV)
    return result


def drop_updates(job: Job) -> None:
    """Remove the updates once nothing needs them, unless they were to be kept."""
    if rank() == 0 and not job.run.settings.keep_updates:
        shutil.rmtree(job.run.path / "updates", ignore_errors=True)


def check_all(job: Job) -> None:
    """Refuse whatever later stages would refuse, an index of something else too, before anything is computed."""
    check(job)
    if job.run.settings.index:
        index_key(job)


def run_job(job: Job) -> Attribution:
    """Run every stage that is not done yet."""
    check_all(job)
    solved = ridge_stage(job) if RIDGE in job.run.settings.functions else None
    if not job.measured:
        return finish(job, [], solved)
    fisher = fisher_stage(job)
    finished = job.run.path / EFFECTS
    if not finished.exists():
        update_stage(job, fisher, finished)
    return finish(job, score_stage(job), solved)


def by_group(result: Attribution) -> Attribution:
    """What groups did to pieces as a table of groups by piece: its tracks are groups, its queries pieces.

    Args:
        result: of a run whose queries are groups (:func:`attr_engine.jobs.make_groups`).

    Returns:
        The same scores, errors and draws; ``base`` is NaN, which is of pieces there.
    """
    strengths = list(dict.fromkeys(x for _, x in result.updates))
    groups = list(dict.fromkeys(name for name, _ in result.updates))

    def turned(values: np.ndarray) -> np.ndarray:
        """``[groups * strengths, pieces]`` to ``[pieces * strengths, groups]``."""
        cube = values.reshape(len(groups), len(strengths), len(result.tracks))
        return cube.transpose(2, 1, 0).reshape(-1, len(groups))

    return Attribution(
        tracks=groups,
        updates=[(piece, x) for piece in result.tracks for x in strengths],
        values={name: turned(v) for name, v in result.values.items()},
        errors={name: turned(v) for name, v in result.errors.items()},
        base=np.full(len(groups), np.nan),
        meta={**result.meta, "rows": "jointly unlearned groups"},
        draws=turned(result.draws),
    )


def attribute(
    model: Denoiser,
    tracks: Tracks,
    queries: Tracks | Sequence[Tracks] | None = None,
    settings: Settings | None = None,
    out: str | Path | None = None,
    cancel: Cancel | None = None,
    bars: bool = False,
) -> Attribution:
    """Attribute queries to training tracks, or to groups of them.

    With ``settings.groups`` the tracks of a group are unlearned jointly, and a group is the more responsible the more the query
    suffers. Sums of the scores of single tracks can be near chance for groups (GUDA, ICML 2026): what two tracks say alike is lost
    only when both are unlearned.

    Args:
        model: theta_0.
        tracks: the training tracks.
        queries: a set of queries, or several; may be left out where ``settings.self_influence`` names
            training tracks.
        settings: paths in it are not read here; everything else is.
        out: run directory, kept; the same call carries on there. Default: a temporary one.
        cancel: says when to stop, such as a ``threading.Event``; looked at between passes.
        bars: whether to draw progress bars on standard error.

    Returns:
        Scores and standard errors of every track, or group, for every query and strength.

    Raises:
        UserError: anything unusable, by name.
        Cancelled: ``cancel`` was set; what is finished is in ``out``, and the same call carries on.
    """
    settings = settings or Settings()
    if out is None:
        with tempfile.TemporaryDirectory(prefix="attr-engine-") as folder:
            return attribute(model, tracks, queries, settings, folder, cancel, bars)
    with open_run(out, settings, cancel, bars) as run:
        sets: Any = queries if isinstance(queries, list | tuple) else [] if queries is None else [queries]
        job = make_job(run, model, tracks, sets)
        result = run_job(job)
        drop_updates(job)
        return result
