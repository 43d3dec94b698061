"""FAISS on the rows of an index: runs in the environment of the peers, prints JSON.

``python index_faiss.py WAY FOLDER THREADS REPEAT``; the folder was written by ``index_speed.py``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from safetensors.numpy import load_file

TRAIN = 50_000  # rows that centres and ranges are fitted to
# For each kind of index: its name in FAISS' factory, the name of what is searched deeper, and how deep.
WAYS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "exact float32": ("Flat", "", (0,)),
    "exact 8 bits": ("SQ8", "", (0,)),
    "IVF 8 bits": ("IVF1024,SQ8", "nprobe", (1, 8, 32, 128)),
    "HNSW 8 bits": ("HNSW16_SQ8", "efSearch", (64, 256, 1024)),
}


def main() -> None:
    way, folder, threads, repeat = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    faiss.omp_set_num_threads(threads)
    rows = np.load(folder / "features.npy", mmap_mode="r")
    scales = load_file(folder / "solver.safetensors")["scales"]
    queries, best = np.load(folder / "queries.npy"), np.load(folder / "best.npy")
    kind, knob, depths = WAYS[way]
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(len(rows), min(TRAIN, len(rows)), replace=False))
    if not index.is_trained:
        index.train(whole(rows[some], scales[some]))
    for first in range(0, len(rows), 2**16):
        index.add(whole(rows[first : first + 2**16], scales[first : first + 2**16]))
    built = time.perf_counter() - start
    out = []
    for depth in depths:
        if knob:
            faiss.ParameterSpace().set_index_parameter(index, knob, depth)
        out.append(
            {
                **search(index, queries, best, repeat),
                "built": built,
                "depth": f"{knob} {depth}" if knob else "",
            }
        )
    print(json.dumps(out))


def whole(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return (rows.astype(np.float32) * scales[:, None].astype(np.float32)).astype(np.float32)


def search(index: Any, queries: np.ndarray, best: np.ndarray, repeat: int) -> dict[str, Any]:
    """One query at a time."""
    seconds, found = [], []
    index.search(queries[:1], best.shape[1])
    for i in range(max(repeat, len(queries))):
        start = time.perf_counter()
        answer = index.search(queries[i % len(queries)][None], best.shape[1])[1][0]
        seconds.append(time.perf_counter() - start)
        if i < len(queries):
            found.append(answer)
    recall = {f"recall_{k}": float(np.mean([len(set(f[:k]) & set(b[:k])) / k for f, b in zip(found, best, strict=True)]))
              for k in (10, 50)}  # fmt: skip
    return {"seconds": seconds, "median": statistics.median(seconds), **recall}


if __name__ == "__main__":
    main()
