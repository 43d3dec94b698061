"""The audio that a track of a data set was made from, or that a generated piece was decoded to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.latents.audio import SUFFIXES, read_audio
from attr_engine.latents.batch import Tracks
from attr_engine.latents.ingest import file_hash

_WAY_OUT = "put the audio there, or ingest it anew"


class Recordings:
    """Reads the audio of tracks; the file that was read last is kept, because windows of one follow each other.

    Args:
        rate: Hz wanted.
        channels: wanted, 1 or 2.
        what: the tracks are, for messages: ``"track"`` or ``"query"``.
    """

    def __init__(self, rate: int, channels: int = 1, what: str = "track") -> None:
        self.rate, self.channels, self.what = rate, channels, what
        self._last: tuple[Path, str] | None = None
        self._audio = np.zeros((channels, 0), dtype=np.float32)

    def audio(self, tracks: Tracks, index: int) -> np.ndarray:
        """The audio of one track; of a window of a recording, that window.

        A manifest is data from outside: a file is read only where it lies in the data set's folder of audio, has
        the suffix of audio and the SHA-256 that it had when it was ingested.

        Returns:
            float32 ``[channels, samples]``, at least one sample.

        Raises:
            UserError: there is no such file, it is another one, it cannot be read, or the window lies outside it.
        """
        info, name = tracks.info[index], f"the {self.what} {tracks.ids[index]!r}"
        path, digest = _file_of(tracks, index, name)
        if self._last != (path, digest):
            self._last = None
            if file_hash(path) != digest:
                raise UserError(f"{path} is not the file that {name} was made from: {_WAY_OUT}")
            self._audio = read_audio(path, self.rate, self.channels)
            self._last = (path, digest)
        if not info.get("parent"):
            return self._audio
        start, seconds = _number(info, "start"), _number(info, "seconds")
        first = round(start * self.rate) if start is not None else 0
        if (
            start is None
            or seconds is None
            or not first < self._audio.shape[1]
            or round(seconds * self.rate) < 1
        ):
            raise UserError(
                f"{name} is said to start at {info.get('start')} s of {path} and to last "
                f"{info.get('seconds')} s, which is not in the file: ingest it anew"
            )
        return self._audio[:, first : first + round(seconds * self.rate)]


def track_audio(tracks: Tracks, index: int, rate: int) -> np.ndarray:
    """One channel of the audio of one track, float32 ``[samples]``; see :meth:`Recordings.audio`."""
    return Recordings(rate).audio(tracks, index)[0]


def _file_of(tracks: Tracks, index: int, name: str) -> tuple[Path, str]:
    """Where the audio of a track has to be, and its SHA-256."""
    info, root = tracks.info[index], getattr(tracks, "extra", {}).get("root")
    source, digest = info.get("source"), info.get("sha256")
    if not (
        isinstance(root, str) and isinstance(source, str) and isinstance(digest, str) and root and source
    ):
        raise UserError(f"the data set does not say which audio {name} was made from: ingest it from audio")
    inside, path = Path(source), Path(root) / source
    if inside.is_absolute() or ".." in inside.parts or path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{name} is said to be made from {source!r}, which is no audio in {root}: ingest it anew"
        )
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero
        there = False
    if not there:
        raise UserError(f"{name} has no audio at {path}: {_WAY_OUT}")
    return path, digest


def _number(info: Mapping[str, Any], key: str) -> float | None:
    """An entry that is a finite number of at least 0."""
    value = info.get(key)
    fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    return float(value) if fine and value is not None else None
