"""Scores by kernel ridge regression in gradient space: nothing is unlearned, one gradient a track serves all queries.

``tau[q, i] = sum_j k(q, j) (K + lambda I)^-1[j, i]``, with ``K`` the inner products of the tracks' gradients of the squared norm of
the prediction, and ``lambda`` relative to their mean squared length: D-TRAK (Zheng et al., ICLR 2024). Gradients are projected and
kept in an index (:mod:`attr_engine.index`), which later runs and ``attr-engine search`` can use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine.diffusion import standard_error
from attr_engine.index import Index, IndexSettings, build_index
from attr_engine.jobs import Job, Query
from attr_engine.latents.batch import Chosen
from attr_engine.runs import LOCKS, key_of
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import once

FOLDER, SCORES = "index", "ridge.safetensors"


@dataclass(frozen=True)
class Solved:
    """Scores and standard errors of every track for every update, float64 ``[U, N]``: the same at every strength.

    The errors are those of the query's draws, from the spread between replicates; noise of the tracks' draws, which all queries
    share, is not in them.
    """

    scores: np.ndarray
    errors: np.ndarray


def index_settings(job: Job) -> IndexSettings:
    """Of the index that a run needs; what is fixed here was chosen by retraining (docs/evidence.md)."""
    s = job.run.settings
    return IndexSettings(
        layers=s.layers, draws=s.score_draws, projection="gaussian", rank=s.projection_rank, ridge=s.ridge, masked=s.mask_fisher,
        seed=s.seed, plan=s.plan, rows=job.rows,
    )  # fmt: skip


def index_folder(job: Job) -> Path:
    """Where it is: in the run directory, or under ``--cache`` for other runs too."""
    settings = index_settings(job)
    known = job.cache_path(
        f"index-{job.cache_key(key_of(job.model.fingerprint, job.tracks.fingerprint, vars(settings)))}"
    )
    return known or job.run.path / FOLDER


def index_stage(job: Job) -> Index:
    """Build the index, or take the one that is there."""
    job.run.record()
    with job.run.stage("index"):
        return build_index(job.model, job.tracks, index_folder(job), index_settings(job), recall=False)


def ridge_stage(job: Job) -> Solved:
    """Build the index and ask it for every query."""
    index = index_stage(job)
    path = job.run.path / SCORES
    key = key_of(
        index.meta["key"],
        job.key("update_draws"),
        [(q.tracks.fingerprint, q.index) for q in job.queries],
    )
    with job.run.stage("ridge"), once(job.run.path / LOCKS / "ridge.lock", path) as mine:
        if mine:
            _ask(job, index, path, key)
    found = load_tensors(path, key)[0]
    times = len(job.run.settings.strengths)
    return Solved(*(np.repeat(found[name].numpy(), times, axis=0) for name in ("scores", "errors")))


def _ask(job: Job, index: Index, path: Path, key: str) -> None:
    import torch

    show, found = job.run.progress("ridge", "query", "gradients of queries"), []
    show(0, len(job.queries))
    for some in _by_set(job.queries):
        found.append(scores_of(job, index, some))
        show(sum(len(f[0]) for f in found), len(job.queries))
    scores, errors = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
    save_tensors(path, {"scores": scores, "errors": errors}, {"key": key})


def _by_set(queries: Sequence[Query], most: int = 16) -> list[list[Query]]:
    """Queries in their order, neighbours of one set together."""
    out: list[list[Query]] = []
    for query in queries:
        if out and out[-1][0].tracks is query.tracks and len(out[-1]) < most:
            out[-1].append(query)
        else:
            out.append([query])
    return out


def scores_of(job: Job, index: Index, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and standard errors of all tracks for some queries of one set, float64 ``[Q, N]`` each."""
    s = job.run.settings
    chosen = Chosen(queries[0].tracks, [q.index for q in queries])
    # The same frames count as in the tracks: products of gradients of different functions say less.
    features = index.query_features(job.model, chosen, s.update_draws, None, s.replicates)
    count, replicates, width = features.shape
    each = index.score(features.reshape(-1, width)).reshape(count, replicates, -1)
    return each.mean(axis=1), standard_error(each.transpose(0, 2, 1), replicates)
