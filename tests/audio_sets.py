"""Tracks with audio on disk, and an embedding of windows, for tests of black-box methods."""

from pathlib import Path

import numpy as np
import soundfile
from helpers import ToyTracks, make_tracks

from attr_engine.latents.ingest import file_hash

RATE = 8000


def audio_tracks(
    rng: np.random.Generator, folder: Path, seconds: list[float], prefix: str = "t"
) -> ToyTracks:
    """Tracks whose audio is noise of these lengths, as an ingest would describe them; ``audio`` holds it, ``[samples]`` each."""
    folder.mkdir(parents=True, exist_ok=True)
    tracks = make_tracks(rng, len(seconds), 3, 10, prefix)
    tracks.extra, tracks.audio = {"root": str(folder)}, []
    for i, length in enumerate(seconds):
        path = folder / f"{prefix}{i}.wav"
        soundfile.write(path, rng.uniform(-0.5, 0.5, round(length * RATE)), RATE, subtype="FLOAT")
        tracks.audio.append(soundfile.read(path, dtype="float32")[0])
        tracks.info[i].update(source=path.name, sha256=file_hash(path), parent="", start=0.0, seconds=length)
    return tracks


class Projection:
    """A random map of windows to ``E`` numbers, which counts what it was given."""

    name, rate, window, hop = "projection", RATE, 0.5, 0.2

    def __init__(self, seed: int, width: int = 7) -> None:
        self.seed, self.width, self.calls = seed, width, 0

    @property
    def fingerprint(self) -> str:
        return f"projection {self.seed} {self.width}"

    def embed(self, windows: np.ndarray) -> np.ndarray:
        self.calls += len(windows)
        assert windows.dtype == np.float32 and len(windows) <= 32
        maps = np.random.default_rng([self.seed, windows.shape[1]]).normal(
            size=(windows.shape[1], self.width)
        )
        # In float64, row by row: what a row gives does not depend on the other rows.
        return np.stack([x.astype(np.float64) @ maps for x in windows]).astype(np.float32)
