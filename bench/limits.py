"""What the machine can do, measured in the run that it is compared with: copies, reads of the page cache, matrix products."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

BYTES = 2**26  # of a copy and of a file: more than the caches of most processors


def _rates(work: Callable[[], object], amount: float, repeat: int) -> list[float]:
    """Billions a second, after a run that does not count."""
    work()
    out = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        out.append(float(f"{amount / (time.perf_counter() - start) / 1e9:.5g}"))
    return out


def memcpy(repeat: int) -> list[float]:
    """GB/s of one thread that copies ordinary memory, bytes counted once."""
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    return _rates(lambda: np.copyto(target, source), BYTES, repeat)


def page_cache(repeat: int) -> list[float]:
    """GB/s of one thread that reads a file which was just written."""
    into = memoryview(bytearray(BYTES))
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(into)

        def read() -> None:
            file.seek(0)
            assert file.readinto(into) == BYTES, "the file was cut"

        return _rates(read, BYTES, repeat)


def products(rows: int, columns: int, inner: int, repeat: int) -> list[float]:
    """GFLOP/s of torch's float32 product ``[rows, inner] @ [inner, columns]``, on its threads."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    return _rates(lambda: torch.mm(left, right, out=out), 2.0 * rows * columns * inner, repeat)


def widest(rows: int, frames: int, width: int) -> tuple[int, int, int]:
    """The largest product of a pass through a DiT of this width, that into its feed-forward layers: rows, columns, inner."""
    return rows * frames, 4 * width, width


def measure(shapes: Sequence[tuple[int, int, int]], repeat: int) -> dict[str, list[float]]:
    """All of them, by name with unit; ``shapes`` are (rows, columns, inner) of products, each measured once."""
    found = {"memcpy, GB/s": memcpy(repeat), "page cache, GB/s": page_cache(repeat)}
    for shape in dict.fromkeys(shapes):
        found[f"product {shape[0]}x{shape[2]} by {shape[2]}x{shape[1]}, GFLOP/s"] = products(*shape, repeat)
    return found
