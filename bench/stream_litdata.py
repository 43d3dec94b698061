"""The function that litdata's writer calls; it has to be importable from a process that litdata starts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from stream_data import TrackSet, latent_of


@functools.cache
def _set(folder: str, seed: int) -> TrackSet:
    return TrackSet(Path(folder), seed)


def sample(job: tuple[str, int, int]) -> dict[str, Any]:
    """A track as litdata stores it."""
    folder, seed, track = job
    return {"id": track, "latents": np.asarray(latent_of(track, _set(folder, seed).lengths[track], seed))}
