"""How long does a query of a large index take, and what do its few bits lose?"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers_env
import stream_report
import torch

from attr_engine.files import write_json
from attr_engine.index import FEATURES, IDS, META, SOLVER, Index, IndexSettings
from attr_engine.index_numbers import NUMBERS, largest, stored
from attr_engine.index_store import FORMAT
from attr_engine.tensorfile import save_tensors

HERE = Path(__file__).parent
PEERS = peers_env.Environment(HERE / ".venv-index-peers", HERE / "requirements-index.txt", ("faiss-cpu",))
QUERIES, FAMILY, TOP = 8, 8, (10, 50)
# Of a product over both lengths: 1e-6 by attr_engine/index_numbers.py, and the query is rounded too.
ROUNDING = 2e-6
CHUNK = 2**16  # rows that are made at a time
Row = dict[str, Any]


class Rows:
    """Rows as those of an index are: families of near tracks, directions that fall off, all sharing one of them.

    Args:
        tracks: N.
        width: d.
        seed: of everything.
    """

    def __init__(self, tracks: int, width: int, seed: int) -> None:
        self.tracks, self.width, self._seed = tracks, width, seed
        rng = np.random.default_rng(seed)
        place = np.arange(1, width + 1)
        self._mix = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
        self._spectrum = (1.0 / np.sqrt(1.0 + place / (width / 8))).astype(np.float32)
        self._common = (2.0 * self._spectrum * rng.normal(size=width)).astype(np.float32)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Places and float32 rows; the same ones each time."""
        for first in range(0, self.tracks, CHUNK):
            here = slice(first, min(first + CHUNK, self.tracks))
            rng = np.random.default_rng([self._seed, first])
            count = here.stop - first
            centers = rng.standard_normal((-(-count // FAMILY), self.width), dtype=np.float32)
            own = rng.standard_normal((count, self.width), dtype=np.float32)
            x = np.repeat(centers, FAMILY, axis=0)[:count] + 0.7 * own
            x *= rng.lognormal(0.0, 0.5, (count, 1)).astype(np.float32)
            yield here, (x * self._spectrum + self._common) @ self._mix

    def queries(self) -> np.ndarray:
        """Float32 ``[QUERIES, d]``: variations of some rows."""
        _, rows = next(self.chunks())
        rng = np.random.default_rng(self._seed + 1)
        chosen = rows[rng.choice(len(rows), QUERIES, replace=False)]
        noise = rng.standard_normal(chosen.shape, dtype=np.float32) * self._spectrum
        return chosen + 0.7 * noise @ self._mix


def write(rows: Rows, numbers: str, folder: Path) -> tuple[Index, np.ndarray, np.ndarray]:
    """An index of these rows, what float32 rows score in float64, ``[QUERIES, N]``, and what a row can lose of it, ``[N]``.

    A score is off by at most the length of its query times the last: what storing took from the row, and the product's rounding.
    """
    folder.mkdir(parents=True)
    queries, exact = rows.queries().astype(np.float64), np.zeros((QUERIES, rows.tracks))
    scales, lost = np.zeros(rows.tracks), np.zeros(rows.tracks)
    shape = (rows.tracks, rows.width)
    out = np.lib.format.open_memmap(folder / FEATURES, mode="w+", dtype=NUMBERS[numbers], shape=shape)
    for here, x in rows.chunks():
        wide = x.astype(np.float64)
        exact[:, here] = queries @ wide.T
        kept, scales[here] = stored(wide, numbers)
        out[here] = kept
        lost[here] = np.linalg.norm(wide - scales[here, None] * kept, axis=1)
        lost[here] += ROUNDING * np.linalg.norm(wide, axis=1)
    out.flush()
    del out
    settings = IndexSettings(numbers=numbers)
    meta = {"format": FORMAT, "key": "bench", "model": "", "data": "", "tracks": rows.tracks, "width": rows.width,
            "settings": settings.__dict__}  # fmt: skip
    tensors = {"transform": torch.eye(rows.width, dtype=torch.float64), "scales": torch.from_numpy(scales)}
    save_tensors(folder / SOLVER, tensors, {"key": "bench"})
    write_json(folder / IDS, list(range(rows.tracks)))
    write_json(folder / META, meta)
    return Index.open(folder), exact, lost


def times(work: Callable[[int], Any], repeat: int) -> list[float]:
    """Seconds of some calls."""
    out = []
    for i in range(repeat):
        start = time.perf_counter()
        work(i)
        out.append(time.perf_counter() - start)
    return out


def recalls(found: list[np.ndarray], exact: np.ndarray) -> dict[str, float]:
    """Recall at each of ``TOP`` of rankings, best first, against the exact scores."""
    return {f"recall_{k}": float(np.mean([len(np.intersect1d(f[:k], largest(e, k))) / k
                                          for f, e in zip(found, exact, strict=True)])) for k in TOP}  # fmt: skip


def measure(
    tracks: int, width: int, numbers: str, folder: Path, repeat: int, threads: Sequence[int], peers: Sequence[str]
) -> list[Row]:  # fmt: skip
    """Ours with each number of threads, and FAISS with the first of them, on the same rows."""
    rows = Rows(tracks, width, seed=0)
    index, exact, lost = write(rows, numbers, folder)
    queries = torch.from_numpy(rows.queries())
    size = index.features.nbytes / 1e6
    common = {"tracks": tracks, "width": width, "numbers": numbers, "megabytes": size}
    out: list[Row] = []
    for n in threads:
        torch.set_num_threads(n)
        ours = _ours(index, queries, exact, lost, repeat)
        out.append({**common, "threads": n, "way": "ours, all scores", **ours})
    np.save(folder / "queries.npy", queries.numpy())
    np.save(folder / "best.npy", np.stack([largest(e, TOP[-1]) for e in exact]))
    del exact, lost
    for way in peers:
        command = [
            str(PEERS.python()),
            str(HERE / "index_faiss.py"),
            way,
            str(folder),
            str(threads[0]),
            str(repeat),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        reason = stream_report.plain(done.stderr.strip()[-300:])
        answer = json.loads(done.stdout) if done.returncode == 0 else [{"failed": reason}]
        out += [{**common, "threads": threads[0], "way": f"FAISS {way}", **row} for row in answer]
    return out


def wrong(rows: Sequence[Row]) -> bool:
    """Whether a row of ours has no times, because its scores were wrong; FAISS may fail."""
    return any("failed" in row for row in rows if row["way"].startswith("ours"))


def _ours(index: Index, queries: torch.Tensor, exact: np.ndarray, lost: np.ndarray, repeat: int) -> Row:
    """All scores of one query at a time, and the best of them; what is wrong is not timed."""
    found = [index.score(q[None])[0] for q in queries]
    off = [np.abs(s - e) for s, e in zip(found, exact, strict=True)]
    error = max(float(o.max() / np.abs(e).max()) for o, e in zip(off, exact, strict=True))
    if not all((o <= float(q.norm()) * lost).all() for o, q in zip(off, queries, strict=True)):
        reason = f"off by {error:.2g} of the largest score, more than its rows lost"
        return {"error": error, "failed": f"WRONG: {reason}"}
    opened = Index.open(index.folder)  # its pages are not in the page table yet
    first = times(lambda i: opened.score(queries[:1]), 1)[0]
    seconds = times(lambda i: opened.score(queries[i % QUERIES][None]), repeat)
    top = times(lambda i: largest(found[i % QUERIES], TOP[-1]), repeat)
    return {"first": first, "seconds": seconds, "median": statistics.median(seconds), "top_seconds": top,
            "top_median": statistics.median(top), "error": error,
            **recalls([largest(s, TOP[-1]) for s in found], exact)}  # fmt: skip
