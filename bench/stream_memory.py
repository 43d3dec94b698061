"""How much memory does streaming take, and how soon is the first batch there, as the data set grows?

Makes sparse data sets (files with holes, which read as zeros and take no room), streams each in a process of its
own and writes ``bench/results/stream_memory.json``::

    python bench/stream_memory.py --gigabytes 1 10 100
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record

CHANNELS, LONGEST, BATCH, BUFFERS = 64, 2584, 32, 4
SHARD = 256 << 20
ROOT = Path(__file__).resolve().parent.parent


class Hole:
    """Zeros that are not written."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def make_sparse(folder: Path, gigabytes: float) -> None:
    """Write a data set of zeros of 258 to 2584 frames a track, fp16, as files with holes."""
    from attr_engine.latents import native, shardfile
    from attr_engine.latents.build import build_manifest

    rng = np.random.default_rng(0)
    sums: dict[int, int] = {}
    left, files, tracks = int(gigabytes * 1e9), [], 0
    while left > 0:
        lengths = []
        while sum(lengths) * CHANNELS * 2 < min(SHARD, left):
            lengths.append(int(rng.integers(258, LONGEST + 1)))
        for n in set(lengths) - set(sums):
            sums[n] = native.crc32c(bytes(n * CHANNELS * 2))
        left -= sum(lengths) * CHANNELS * 2
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        crc = np.array([sums[n] for n in lengths], dtype=np.uint32)
        rows = json.dumps(
            [[f"t{tracks + i}", {"seconds_total": 1.0}, {}] for i in range(len(lengths))]
        ).encode()
        tracks += len(lengths)
        parts = {
            "offsets": ("I64", [len(offsets)], [memoryview(offsets).cast("B")]),
            "crc32c": ("U32", [len(crc)], [memoryview(crc).cast("B")]),
            "latents": ("F16", [int(offsets[-1]), CHANNELS], [Hole(int(offsets[-1]) * CHANNELS * 2)]),
            "tracks": ("U8", [len(rows)], [memoryview(rows)]),
        }
        meta = {"format": shardfile.FORMAT, "padding": None, "extra": {}, "rows": {}}
        name = f"shard-{len(files):05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(shardfile.encode_header(parts, meta))
            for _, _, pieces in parts.values():
                for piece in pieces:
                    if isinstance(piece, Hole):
                        file.seek(piece.nbytes, os.SEEK_CUR)
                    else:
                        file.write(piece)
        files.append(name)
    build_manifest(folder, files)


def stream(folder: Path) -> dict[str, float]:
    """Stream a data set once; what it took."""
    import torch  # noqa: F401  (imports are not what is measured)

    from attr_engine.latents import LatentDataset

    LatentDataset(folder)  # the manifest is in the page cache from here on
    before = _resident()
    start = time.perf_counter()
    data = LatentDataset(folder)
    with data.stream(BATCH, LONGEST, buffers=BUFFERS) as batches:
        first, highest, count = 0.0, 0, 0
        for batch in batches:
            first = first or time.perf_counter() - start
            count += len(batch.ids)
            highest = max(highest, _resident())
    payload = int(data.lengths.sum()) * CHANNELS * 2
    return {
        "tracks": count, "payload_gb": payload / 1e9, "first_batch_ms": 1e3 * first,
        "seconds": time.perf_counter() - start, "ring_mb": BUFFERS * BATCH * LONGEST * CHANNELS * 2 / 1e6,
        "resident_before_mb": before / 1e6, "resident_growth_mb": (highest - before) / 1e6,
    }  # fmt: skip


def _resident() -> int:
    """Resident bytes of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "stream_memory.json"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(stream(Path(args.one))))
        return
    environment, results = record.environment(), []
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            make_sparse(Path(folder), gigabytes)
            command = [sys.executable, __file__, "--one", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
        print("  ".join(f"{name} {value:.5g}" for name, value in results[-1].items()))
    record.write({"environment": environment, "results": results}, Path(args.out))


if __name__ == "__main__":
    main()
