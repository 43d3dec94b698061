"""A cascade: an index names the candidates of every query, which are then measured exactly."""

from __future__ import annotations

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.index import Index
from attr_engine.jobs import Job, Query
from attr_engine.latents.batch import Chosen
from attr_engine.runs import LOCKS, key_of
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.units import once

CANDIDATES = "candidates.safetensors"


def index_key(job: Job) -> str:
    """Key of the index that the settings name, which has to be of the job's model and tracks.

    Raises:
        UserError: it is not, or cannot be read.
    """
    index = Index.open(job.run.settings.index)
    for name, own in (("model", job.model.fingerprint), ("data", job.tracks.fingerprint)):
        if index.meta[name] != own:
            what = "another model" if name == "model" else "other tracks"
            raise UserError(f"{index.folder} is an index of {what}: build one of this model and these tracks")
    return str(index.meta["key"])


def candidates(job: Job) -> list[np.ndarray]:
    """Tracks of every query that are worth measuring, by the index: indices in storage order; found once for a run directory."""
    s, path = job.run.settings, job.run.path / CANDIDATES
    key = key_of(index_key(job), s.rescore, [(q.tracks.fingerprint, q.index) for q in job.queries])
    with once(job.run.path / LOCKS / "candidates.lock", path) as mine:
        if mine:
            save_tensors(path, {"candidates": _search(job)}, {"key": key})
    found = load_tensors(path, key)[0]["candidates"].numpy()
    return [np.sort(row) for row in found]


def _search(job: Job) -> torch.Tensor:
    """``[Q, count]``, best first."""
    index, out = Index.open(job.run.settings.index), dict[int, np.ndarray]()
    by_set: dict[int, list[tuple[int, Query]]] = {}
    for i, query in enumerate(job.queries):
        by_set.setdefault(id(query.tracks), []).append((i, query))
    for some in by_set.values():
        queries = Chosen(some[0][1].tracks, [query.index for _, query in some])
        found = index.candidates(job.model, queries, job.run.settings.rescore)
        out |= {i: row for (i, _), row in zip(some, found, strict=True)}
    return torch.from_numpy(np.stack([out[i] for i in range(len(job.queries))]))
