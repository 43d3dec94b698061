"""One peer of bench/stream.py in a process of its own, started by stream_client.py.

A line ``check`` or ``run`` on stdin is answered by a line of JSON on stdout; whatever a peer prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from stream_data import CHANNELS, DTYPE, FRAMES, ROW_BYTES, latent_of
from stream_readers import CHANNEL_MAJOR, PEERS, Batch, Source


def check(name: str, source: Source, batches: Iterable[Batch]) -> str:
    """One whole pass: the first batch is compared value by value, of the others the lengths."""
    seen: list[int] = []
    for ids, latents, valid in batches:
        array = np.asarray(latents)
        if name in CHANNEL_MAJOR:
            array = array.transpose(0, 2, 1)
        if array.shape != (len(ids), FRAMES, CHANNELS) or array.dtype != DTYPE:
            return f"a batch has the shape {array.shape} and the dtype {array.dtype}"
        if valid != [source.set.lengths[i] for i in ids]:
            return "the valid lengths are wrong"
        for row, i in enumerate(ids if not seen else ()):
            if not np.array_equal(array[row, : valid[row]], latent_of(i, valid[row], source.seed)):
                return f"track {i} is not what was written"
            if array[row, valid[row] :].any():
                return f"the padding of track {i} is not zero"
        seen += ids
    return (
        "" if sorted(seen) == list(range(source.count)) else f"{len(set(seen))} tracks of {source.count} came"
    )


def run(source: Source, batches: Iterable[Batch]) -> float:
    """Seconds of one pass."""
    start = time.perf_counter()
    frames = sum(sum(valid) for _, _, valid in batches)
    seconds = time.perf_counter() - start
    if frames != source.begins[-1]:
        raise RuntimeError(f"{frames} frames of {source.begins[-1]} came")
    return seconds


def main() -> None:
    """Answer questions about one peer until stdin ends."""
    name, folder, work, seed, share, threads, workers = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import torch

        # Copies of single tracks are too short to share: with more threads every torch reader was slower.
        torch.set_num_threads(1)
        source = Source(Path(folder), Path(work), int(seed), float(share), int(threads))
        batches = PEERS[name](source, int(workers))
    except Exception as error:  # whatever a peer raises is its result
        answer = {
            "missing" if isinstance(error, ImportError) else "failed": f"{type(error).__name__}: {error}"
        }
        print(json.dumps(answer), file=answers, flush=True)
        return
    for line in sys.stdin:
        try:
            if line.strip() == "check":
                reason = check(name, source, batches())
                answer = {"failed": reason} if reason else {"payload": source.begins[-1] * ROW_BYTES}
            else:
                answer = {"seconds": run(source, batches())}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
