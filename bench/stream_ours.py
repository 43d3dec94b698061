"""attr_engine's stream: the variants that are measured, and the checks that they have to pass."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stream_data import BATCH, BUFFERS, FRAMES, TrackSet, drop_from_cache, name_of, resident_share

PLAIN = {"checksums": False, "nonfinite": "allow"}
CHECKED = {"checksums": True, "nonfinite": "allow"}
DEFAULT = {"checksums": True, "nonfinite": "refuse"}


def variants(threads: int) -> dict[str, dict[str, Any]]:
    """Options of ``LatentDataset.stream`` by the name of the row; ``default`` is what a user gets."""
    out = {
        "default": DEFAULT,
        "no checks": PLAIN,
        "checksums only": CHECKED,
        "shuffled": {**DEFAULT, "order": "shuffle"},
        "by length": {**DEFAULT, "order": "length"},
        "float32": {**DEFAULT, "dtype": torch.float32},
        "float32, no checks": {**PLAIN, "dtype": torch.float32},
        "map": {**DEFAULT, "source": "map"},
        "map, no checks": {**PLAIN, "source": "map"},
    }
    out = {name: {**options, "threads": threads} for name, options in out.items()}
    if threads > 1:
        for name in ("default", "no checks", "float32, no checks"):
            out[f"{name}, 1 thread"] = {**out[name], "threads": 1}
    return out


def reason_not_there() -> str:
    """Why the stream cannot be measured here; empty where it can."""
    try:
        from attr_engine.latents import LatentDataset, native
    except ImportError as error:
        return f"attr_engine cannot be imported: {error}"
    if not hasattr(LatentDataset, "stream"):
        return "this version of attr_engine has no LatentDataset.stream"
    if not native.available():
        return "the C++ extension of attr_engine is not built"
    return ""


class Ours:
    """The engine's stream over a data set.

    Args:
        tracks: what is on disk.
    """

    def __init__(self, tracks: TrackSet) -> None:
        from attr_engine.latents import LatentDataset

        self._tracks = tracks
        self.data = LatentDataset(tracks.folder)

    def batches(self, **options: Any) -> Iterator[Any]:
        """Batches of a stream with these options."""
        with self.data.stream(batch=BATCH, frames=FRAMES, buffers=BUFFERS, **options) as stream:
            yield from stream

    def run(self, options: dict[str, Any]) -> float:
        """Seconds of one pass, from asking for the stream to the end of it: its ring and threads included."""
        start = time.perf_counter()
        frames = sum(int(batch.valid.sum()) for batch in self.batches(**options))
        seconds = time.perf_counter() - start
        if frames != sum(self._tracks.lengths):
            raise RuntimeError(f"the stream delivered {frames} frames of {sum(self._tracks.lengths)}")
        return seconds

    def check(self, options: dict[str, Any], payload: np.ndarray) -> str:
        """Compare every value of one pass, padding too, with ``payload``; the reason where one differs."""
        begins = np.concatenate([[0], np.cumsum(self._tracks.lengths)])
        number = {name_of(i): i for i in range(len(self._tracks))}
        order: list[int] = []
        for batch in self.batches(**options):
            latents = batch.latents.transpose(1, 2)
            if not latents.is_contiguous() or latents.shape[1] != FRAMES:
                return f"a batch has the shape {tuple(latents.shape)} and the strides {latents.stride()}"
            if latents.dtype != options.get("dtype", torch.float16):
                return f"a batch holds {latents.dtype}"
            for row, (name, valid) in enumerate(zip(batch.ids, batch.valid.tolist(), strict=True)):
                track = number[name]
                expected = payload[begins[track] : begins[track + 1]]
                if not np.array_equal(latents[row, :valid].numpy(), expected.astype(latents.numpy().dtype)):
                    return f"{name} is not what was written"
                if latents[row, valid:].any():
                    return f"the padding of {name} is not zero"
                order.append(track)
        if sorted(order) != list(range(len(self._tracks))):
            return f"{len(order)} tracks came, {len(set(order))} different ones of {len(self._tracks)}"
        wanted = options.get("order", "sequential")
        if wanted == "sequential" and order != sorted(order):
            return "the tracks are out of order"
        lengths = [self._tracks.lengths[track] for track in order]
        if wanted == "length" and lengths not in (sorted(lengths), sorted(lengths, reverse=True)):
            return "the tracks are not ordered by length"
        if wanted == "shuffle" and order == sorted(order):
            return "the tracks are not shuffled"
        return ""


def _dd(paths: list[Path]) -> None:
    for path in paths:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)


def cold(tracks: TrackSet, options: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """The stream and ``dd`` in turns, each after the set's pages were dropped.

    Returns:
        Seconds of both, and the share of the pages that was still in memory at the start of each (other
        processes that map the files would hold them there).
    """
    paths = [shard.path for shard in tracks.shards]
    ours = Ours(tracks)
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: ours.run(options), "dd": lambda: _dd(paths)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    left: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        # Who goes first changes, so that neither always reads what the disk's own cache just saw.
        for name in sorted(runs, reverse=bool(repetition % 2)):
            gc.collect()
            drop_from_cache(paths)
            left[name].append(resident_share(paths))
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "resident_share_at_start": left}


def first_batch(folder: Path, repetitions: int) -> list[float]:
    """Seconds from opening a data set to holding its first batch; once before that, uncounted, to warm up."""
    from attr_engine.latents import LatentDataset

    seconds = []
    for _ in range(repetitions + 1):
        gc.collect()
        start = time.perf_counter()
        with LatentDataset(folder).stream(batch=BATCH, frames=FRAMES, buffers=BUFFERS) as stream:
            batch = next(iter(stream))
            seconds.append(time.perf_counter() - start)
        assert len(batch.ids) == BATCH
    return seconds[1:]
