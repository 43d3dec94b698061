"""How robust is a ranking: to what happens to a query, to the draws, to the checkpoint?

Every query is perturbed (:mod:`attr_engine.perturb`) and its versions are scored as queries of their own; their rankings are
compared with that of the query as it is. How much rankings differ for want of draws alone is seen with another seed, and how much
they agree whatever is asked with another query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attr_engine import progress
from attr_engine.diffusion import DrawPlan
from attr_engine.errors import UserError
from attr_engine.jobs import make_job, make_queries
from attr_engine.judge import bootstrap, spearman
from attr_engine.latents.batch import Tracks
from attr_engine.latents.ingest import Encoder
from attr_engine.latents.store import LatentDataset
from attr_engine.models.protocol import Denoiser
from attr_engine.perturb import PERTURBATIONS, perturb_queries
from attr_engine.pipeline import drop_updates, run_job
from attr_engine.report.data import Table
from attr_engine.result import Attribution, order_of, ranks
from attr_engine.runs import open_run
from attr_engine.settings import Settings

TOP = 10  # tracks whose overlap is counted
RUNS, VERSIONS, CACHE = "runs", "versions", "cache"
Cell = str | float | int | None
Scores = dict[tuple[str, float], np.ndarray]  # (function, strength) to [Q, N]


@dataclass(frozen=True)
class Agreement:
    """How rankings of the same queries agree.

    Attributes:
        correlation: Spearman's, over all tracks, ``[Q]``; NaN where all scores of a query are the same.
        shared: part of the first ranking's top k that is in the other's, ``[Q]``.
        place: rank of the first ranking's best track in the other, ``[Q]``.
    """

    correlation: np.ndarray
    shared: np.ndarray
    place: np.ndarray


def agreement(scores: np.ndarray, others: np.ndarray, k: int = TOP) -> Agreement:
    """Compare rankings query by query.

    Args:
        scores: ``[Q, N]``, larger = more responsible.
        others: ``[Q, N]``, the same queries and tracks.
        k: how many tracks are the top; no more than there are.
    """
    k = min(k, scores.shape[1])
    first, second = order_of(scores), order_of(others)
    shared = [
        len(set(a) & set(b)) / k for a, b in zip(first[:, :k].tolist(), second[:, :k].tolist(), strict=True)
    ]
    place = np.take_along_axis(ranks(others), first[:, :1], axis=1)[:, 0]
    return Agreement(spearman(scores, others), np.array(shared), place)


def _among_queries(scores: np.ndarray) -> Agreement:
    """The agreement of each query's ranking with those of the others, on average."""
    turned = [agreement(scores, np.roll(scores, n, axis=0)) for n in range(1, len(scores))]
    return Agreement(
        *(np.mean([getattr(t, name) for t in turned], axis=0) for name in ("correlation", "shared", "place"))
    )


def _ask(
    model: Denoiser, tracks: Tracks, sets: Sequence[LatentDataset], s: Settings, folder: Path, bars: bool
) -> tuple[Attribution, Settings]:
    """Scores of sets of queries by a run of its own, and its settings with as many rows a pass as it had."""
    s = replace(s, queries=tuple(str(q.path) for q in sets))
    with open_run(folder, s, bars=bars) as run:
        job = make_job(run, model, tracks, sets)
        result = run_job(job)
        drop_updates(job)
        # Rows belong to the key of an index: chosen anew in every run, each might need another one.
        return result, replace(s, rows=job.rows, memory=0.0)


def _scores(result: Attribution, names: Sequence[str]) -> Scores:
    """Rows of some queries, function by function and strength by strength."""
    strengths = dict.fromkeys(x for _, x in result.updates)
    row = {update: u for u, update in enumerate(result.updates)}
    return {
        (function, x): values[[row[name, x] for name in names]]
        for function, values in result.values.items()
        for x in strengths
    }


def check_robustness(settings: Settings, perturbations: Sequence[str]) -> None:
    """Refuse what cannot be computed, before anything is.

    Raises:
        UserError: no such perturbation, settings that rank something else than all tracks, or draws that cannot be halved.
    """
    for name in perturbations:
        if name not in PERTURBATIONS:
            raise UserError(f"there is no perturbation {name!r}: choose from {', '.join(PERTURBATIONS)}")
    if settings.groups or settings.top or settings.index:
        what = "groups" if settings.groups else "top" if settings.top else "index"
        raise UserError(f"{what} is set, but robustness is of rankings of all tracks: leave it out")
    plan = DrawPlan(settings.seed, settings.plan, settings.replicates)
    plan.check(settings.score_draws // 2, "half the number of score draws")
    plan.check(settings.update_draws // 2, "half the number of update draws")


def robustness(
    model: Denoiser,
    tracks: Tracks,
    queries: Sequence[LatentDataset],
    encoder: Encoder,
    settings: Settings,
    out: str | Path,
    perturbations: Sequence[str] | None = None,
    checkpoint: Denoiser | None = None,
    bars: bool = False,
) -> Table:
    """Score queries and versions of them, and say how much their rankings agree.

    Args:
        model: theta_0.
        tracks: the training tracks.
        queries: sets of queries with audio on disk.
        encoder: the autoencoder that made their latents.
        settings: of the runs; of its paths only ``cache`` is read (default: a folder in ``out``), and training tracks are no queries.
        out: folder; the same call carries on there.
        perturbations: names of ``PERTURBATIONS``, of which all levels are taken; default all of them.
        checkpoint: another model, which the same queries are asked of.
        bars: whether to draw progress bars on standard error.

    Returns:
        A row for every score function, strength and change: mean rank correlation with the query as it is, mean part of its top
        10 that stays, mean rank of its best track; each with its bootstrap interval over queries.

    Raises:
        UserError: as :func:`check_robustness`; audio that is missing or was encoded by another autoencoder; anything that a run
            refuses.
    """
    chosen, out = list(PERTURBATIONS) if perturbations is None else list(perturbations), Path(out)
    check_robustness(settings, chosen)
    _check_encoder(queries, encoder)
    names = [q.id for q in make_queries(tracks, queries)]
    s = replace(settings, self_influence=(), cache=settings.cache or str(out / CACHE))
    asked, s = _ask(model, tracks, queries, s, out / RUNS / "queries", bars)
    base, found = _scores(asked, names), dict[tuple[str, str], Scores]()
    for name in chosen:
        levels = [level for level, _ in PERTURBATIONS[name]]
        show = progress.bar(f"perturbing: {name}", "query") if bars else None
        sets = [
            perturb_queries(
                q, encoder, out / VERSIONS / str(i) / name, model.frames, {name: levels}, s.seed, show
            )
            for i, q in enumerate(queries)
        ]
        result, _ = _ask(model, tracks, sets, s, out / RUNS / name, bars)
        for level in levels:
            found[name, level] = _scores(result, [f"{query} {name} {level}" for query in names])
    half = replace(s, score_draws=s.score_draws // 2, update_draws=s.update_draws // 2)
    again = {"another seed": (model, replace(s, seed=s.seed + 1)), "half the draws": (model, half)}
    if checkpoint is not None:
        again["another checkpoint"] = (checkpoint, replace(s, model="", weights=""))
    for name, (other, changed) in again.items():
        result, _ = _ask(other, tracks, queries, changed, out / RUNS / name.replace(" ", "-"), bars)
        found[name, ""] = _scores(result, names)
    return robustness_table(base, found)


def _check_encoder(queries: Sequence[LatentDataset], encoder: Encoder) -> None:
    """Refuse an encoder that the queries were not encoded by: every version would differ for that alone."""
    for q in queries:
        if q.extra.get("encoder", encoder.fingerprint) != encoder.fingerprint:
            raise UserError(f"{q.path} was encoded by another autoencoder: give that one with --autoencoder")


def robustness_table(base: Scores, found: Mapping[tuple[str, str], Scores]) -> Table:
    """The table of agreements.

    Args:
        base: scores of the queries as they are.
        found: (what was changed, level) to scores of the same queries.
    """
    rows: list[list[Cell]] = []
    count, tracks = next(iter(base.values())).shape
    k, strengths = min(TOP, tracks), len({x for _, x in base})
    for (function, x), scores in base.items():
        label = function + (f" at {x:g}" if strengths > 1 else "")
        rows += [[label, *what, *_cells(agreement(scores, s[function, x]))] for what, s in found.items()]
        if count > 1:
            rows.append([label, "another query", "", *_cells(_among_queries(scores))])
    note = (
        f"{count} queries, {tracks} tracks; rankings against those of the queries as they are; means, 95 % bootstrap intervals. "
        "Another seed: other draws and another projection, what chance alone does. Half the draws: the first half of the same "
        "ones. Another query: all pairs, what rankings share whatever is asked."
    )
    interval = ["low", "high"]
    columns = [
        "score", "changed", "level", "rank correlation", *interval, f"top {k} shared", *interval, "rank of the best track", *interval,
    ]  # fmt: skip
    return Table("Robustness of the ranking", columns, rows, note)


def _cells(found: Agreement) -> list[Cell]:
    means = [bootstrap(values) for values in (found.correlation, found.shared, found.place)]
    return [round(number, 4) for m in means for number in (m.value, m.low, m.high)]
