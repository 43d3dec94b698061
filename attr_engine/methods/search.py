"""Search in embeddings of windows: exactly in blocks, or approximately with FAISS at a recall that was measured.

Scores of all tracks (:func:`track_scores`) are always exact. Only who wants the best few of very many asks :func:`nearest_tracks`,
which may use an approximate :class:`Searcher`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.files import whole_file, write_json
from attr_engine.methods.windows import TrackWindows
from attr_engine.models.checkpoint import read_json
from attr_engine.runs import key_of

_ROWS = 2**13  # vectors that are multiplied at a time: their products with some queries stay in the cache
_ADDED = 2**16  # vectors that FAISS is given at a time
_TRAIN = 64  # vectors a cell that its centre is fitted to
_LINKS, _EFFORT = 16, 64  # of HNSW: links a vector; how many are looked at to choose them
KINDS = ("ivf", "hnsw")
_META = "search.json"


class Searcher(Protocol):
    """Finds the nearest vectors."""

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products float32 ``[Q, k]``, largest first, and rows int64 ``[Q, k]``, -1 where none was found."""
        ...


@dataclass(frozen=True)
class Exact:
    """Looks at every vector; of vectors that are equally near, any may be found.

    Attributes:
        vectors: float32 ``[W, E]``, may lie in a file.
    """

    vectors: np.ndarray

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Searcher`; k is at most W."""
        wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        found = []
        for first in range(0, len(self.vectors), _ROWS):
            scores = wanted @ torch.from_numpy(self.vectors[first : first + _ROWS]).T  # [Q, rows]
            values, rows = scores.topk(min(k, scores.shape[1]), dim=1)
            found.append((values, rows + first))
        values, place = torch.cat([v for v, _ in found], dim=1).topk(min(k, len(self.vectors)), dim=1)
        return values.numpy(), torch.cat([r for _, r in found], dim=1).gather(1, place).numpy()


def track_scores(query: np.ndarray, windows: TrackWindows) -> np.ndarray:
    """Largest inner product of any of a query's windows with any window of each track, exact.

    Args:
        query: float32 ``[n, E]``, the windows of one query.
        windows: of the tracks.

    Returns:
        float64 ``[N]``, of products in float32.
    """
    wanted = torch.from_numpy(np.ascontiguousarray(query))
    best = np.empty(len(windows.vectors), dtype=np.float32)
    for first in range(0, len(best), _ROWS):
        rows = torch.from_numpy(windows.vectors[first : first + _ROWS])
        best[first : first + _ROWS] = (wanted @ rows.T).amax(dim=0).numpy()
    return np.maximum.reduceat(best, windows.bounds[:-1]).astype(np.float64)


def nearest_tracks(
    query: np.ndarray, windows: TrackWindows, k: int, searcher: Searcher
) -> tuple[np.ndarray, np.ndarray]:
    """The best tracks of one query: hits on windows, each track with its best one.

    More windows are asked for until none that was not found could change the answer: with :class:`Exact` it is that of
    :func:`track_scores`.

    Args:
        query: float32 ``[n, E]``, the windows of the query.
        windows: of the tracks, which the searcher was made of.
        k: how many tracks.
        searcher: finds windows.

    Returns:
        Tracks int64 ``[m]`` and scores float64 ``[m]``, best first; m is k, or less where there are, or were found, fewer.
    """
    total = len(windows.vectors)
    wanted = min(4 * k, total)
    while True:
        scores, rows = searcher.nearest(query, wanted)
        hit = rows >= 0
        tracks = np.searchsorted(windows.bounds, rows[hit], side="right") - 1
        order = np.argsort(-scores[hit], kind="stable")
        _, first = np.unique(tracks[order], return_index=True)  # the best hit of every track
        chosen = order[np.sort(first)[:k]]
        best = scores[hit][chosen]
        if wanted == total or (len(best) == k and best[-1] >= scores[:, -1].max()):
            return tracks[chosen], best.astype(np.float64)
        wanted = min(4 * wanted, total)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"approximate search needs {error.name}: pip install 'attr-engine[search]'"
        ) from error
    return faiss


@dataclass(frozen=True)
class Approximate:
    """An index of FAISS (Johnson et al. 2017, arXiv 1702.08734): ``ivf``, cells around centres, or ``hnsw``, a graph.

    Attributes:
        index: FAISS' own.
        meta: ``kind``; ``depth``, the cells or candidates that a query looks at; of queries that the depth was not chosen by
            ``recall``, of their ``k`` nearest windows, and ``track_recall``, of the ``k`` best tracks by :func:`nearest_tracks`.
    """

    index: Any
    meta: dict[str, Any]

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Searcher`."""
        values, rows = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        return values, rows

    def set_depth(self, depth: int) -> None:
        """Have queries look at so many cells or candidates."""
        if self.meta["kind"] == "hnsw":
            self.index.hnsw.efSearch = depth
        else:
            self.index.nprobe = depth


def approximate(
    windows: TrackWindows, kind: str, folder: Path, held_out: np.ndarray, k: int = 10, least: float = 0.95
) -> Approximate:
    """Build an approximate index, or open it where an earlier call left it.

    Args:
        windows: of the tracks.
        kind: one of :data:`KINDS`.
        folder: keeps the index.
        held_out: float32 ``[H, E]``, queries like those to come, at least two. The even ones choose the depth: the smallest of
            1, 2, 4, ... with which the recall of windows reaches ``least``; what is kept was measured on the odd ones.
        k: recall is of the k nearest windows, or the k best tracks.
        least: recall of windows wanted.

    Raises:
        UserError: FAISS is missing, the kind is unknown, or no depth reaches the recall.
    """
    faiss = _faiss()
    if kind not in KINDS or len(held_out) < 2 or not 1 <= k <= len(windows.vectors):
        raise UserError(
            f"a search of kind {kind!r} with {len(held_out)} held-out queries and k = {k} cannot be: use {' or '.join(KINDS)}, "
            f"two queries at least, and 1 to {len(windows.vectors)} neighbours"
        )
    asked = hashlib.sha256(np.ascontiguousarray(held_out, dtype=np.float32).tobytes()).hexdigest()
    key = key_of(windows.key, kind, asked, k, least, _LINKS, _EFFORT, _TRAIN)
    path, about = folder / f"{kind}-{key}.faiss", folder / f"{kind}-{key}.json"
    if about.exists():
        meta = read_json(about, "description of an index")
        found = Approximate(faiss.read_index(str(path)), meta)
        found.set_depth(meta["depth"])
        return found
    found = Approximate(_build(faiss, windows.vectors, kind), {"kind": kind, "k": k})
    found.meta.update(_measured(found, windows.vectors, held_out, k, least))
    found.meta["track_recall"] = track_recall(found, windows, held_out[1::2], k)
    with whole_file(path) as new:
        faiss.write_index(found.index, str(new))
    write_json(about, found.meta)
    return found


def _build(faiss: Any, vectors: np.ndarray, kind: str) -> Any:
    """An index of all vectors, which are given to it in blocks."""
    count, width = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EFFORT
    else:
        cells = max(1, min(round(count**0.5), count // _TRAIN))
        index = faiss.index_factory(width, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # a small set is searched as well as it can be, without warnings
        some = np.random.default_rng(0).choice(count, min(_TRAIN * cells, count), replace=False)
        index.train(np.ascontiguousarray(vectors[np.sort(some)]))
    for first in range(0, count, _ADDED):
        index.add(np.ascontiguousarray(vectors[first : first + _ADDED]))
    return index


def _measured(
    found: Approximate, vectors: np.ndarray, held_out: np.ndarray, k: int, least: float
) -> dict[str, Any]:
    """The depth that the even queries choose, and the recall of the odd ones at it."""
    kind, truth = found.meta["kind"], Exact(vectors).nearest(held_out, k)[1]
    depth, most = (k, len(vectors)) if kind == "hnsw" else (1, found.index.nlist)
    while True:
        found.set_depth(depth)
        rows = found.nearest(held_out, k)[1]
        if recall(rows[::2], truth[::2]) >= least:
            return {"depth": depth, "recall": recall(rows[1::2], truth[1::2])}
        if depth >= most:
            raise UserError(
                f"no depth of {kind} finds {least:.0%} of the {k} nearest of the held-out queries: use the exact search"
            )
        depth = min(2 * depth, most)


def track_recall(searcher: Searcher, windows: TrackWindows, queries: np.ndarray, k: int) -> float:
    """Recall of what :func:`nearest_tracks` answers with, each of ``queries`` ``[Q, E]`` one of a single window."""
    shares = []
    for query in queries[:, None]:
        truth = np.argsort(-track_scores(query, windows), kind="stable")[:k]
        shares.append(len(np.intersect1d(nearest_tracks(query, windows, k, searcher)[0], truth)) / len(truth))
    return float(np.mean(shares))


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours ``[Q, k]`` that were found ``[Q, k]``, mean over queries."""
    return float(np.mean([len(np.intersect1d(f, t)) / len(t) for f, t in zip(found, truth, strict=True)]))
