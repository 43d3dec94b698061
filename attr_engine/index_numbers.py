"""Numbers of an index on disk: rows of vectors in 32, 16 or 8 bits, and their products with a few vectors.

A row ``y`` is stored as ``s * x``: ``x`` in the format of the index, ``s`` one float64 scale a row, so that rows of any length
fit. Integers are ``round(127 y / max |y|)``. The products go over the file once, a block at a time that stays in the
cache: nothing else of the size of the index is ever made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUMBERS: dict[str, type] = {"float16": np.float16, "float32": np.float32, "int8": np.int8}
"""Name to numpy type of what a number is stored as."""

_BLOCK = (
    2**20
)  # numbers made float32 at a time: 4 MiB, which stay in the cache; larger ones go out to memory and back
_STEPS = 127  # of an 8-bit number, on either side of zero


def stored(rows: np.ndarray, numbers: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as they are stored.

    Args:
        rows: float64 ``[n, width]``, finite.
        numbers: name in :data:`NUMBERS`.

    Returns:
        ``x`` ``[n, width]`` in that type, and the scales ``s``, float64 ``[n]``, with ``rows`` about ``s[:, None] * x``. Rows of zeros have
        the scale 0.
    """
    if numbers == "int8":
        scales = np.abs(rows).max(axis=1) / _STEPS
    else:
        scales = np.linalg.norm(rows, axis=1)  # of unit vectors no number is too large for 16 bits
    unit = rows / np.where(scales > 0.0, scales, 1.0)[:, None]
    return (np.rint(unit) if numbers == "int8" else unit).astype(NUMBERS[numbers]), scales


def products(rows: np.ndarray, vectors: Tensor) -> Tensor:
    """Inner products of all stored rows with a few vectors.

    Args:
        rows: ``[N, width]`` of a type in :data:`NUMBERS`; may be mapped from a file.
        vectors: float32 ``[Q, width]``.

    Returns:
        float32 ``[Q, N]``; against float64 sums of the same numbers the error is below ``1e-6 |row| |vector|``.
    """
    height = max(1, _BLOCK // max(1, rows.shape[1]))
    buffer = torch.empty(min(height, len(rows)), rows.shape[1])
    columns = vectors.T.contiguous()
    out = torch.empty(len(vectors), len(rows))
    for first in range(0, len(rows), height):
        block = torch.from_numpy(rows[first : first + height])
        wide = buffer[: len(block)].copy_(block)  # torch's casts are vectorised, numpy's of 16 bits are not
        out[:, first : first + len(block)] = (wide @ columns).T
    return out


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the largest scores, largest first, ties by position: as a stable sort of all of them, without sorting them.

    Args:
        scores: ``[N]``, no NaN.
        count: how many; all where there are fewer.

    Returns:
        int64 ``[min(count, N)]``.
    """
    count = min(count, len(scores))
    if count < 1:
        return np.zeros(0, dtype=np.int64)
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > last)
    chosen = np.concatenate([above, np.flatnonzero(scores == last)[: count - len(above)]])
    return chosen[np.lexsort((chosen, -scores[chosen]))]
