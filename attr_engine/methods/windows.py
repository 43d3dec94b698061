"""Windows of audio, and the embeddings of all windows of all tracks, kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.files import whole_file, write_json
from attr_engine.latents.batch import Tracks
from attr_engine.latents.recordings import Recordings
from attr_engine.methods.embedder import Embedder
from attr_engine.models.checkpoint import read_json
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors, save_tensors

SHORT = ("", "repeat", "refuse")
_VECTORS, _META = "vectors.npy", "windows.json"
_PART = 16  # tracks whose embeddings are kept together until all are there
_AT_ONCE = 32  # windows that are given to an embedder


@dataclass(frozen=True)
class Cut:
    """How audio becomes windows.

    Windows start every ``hop`` seconds; the last one ends where the audio ends. Audio that is shorter than a window is
    one window, in which it is repeated until the window is full.

    Attributes:
        window: seconds.
        hop: seconds from window to window.
        short: ``"repeat"``, or ``"refuse"`` audio that is shorter than a window.
    """

    window: float
    hop: float
    short: str = "repeat"

    def starts(self, samples: int, rate: int) -> tuple[list[int], int]:
        """Where the windows of so many samples start, and how long they are, in samples."""
        size, step = max(1, round(self.window * rate)), max(1, round(self.hop * rate))
        if samples <= size:
            return [0], size
        starts = list(range(0, samples - size + 1, step))
        return (starts if starts[-1] + size == samples else [*starts, samples - size]), size

    def windows(self, audio: np.ndarray, rate: int, name: str) -> Iterator[np.ndarray]:
        """Windows float32 ``[at most 32, samples]`` of audio ``[n]``.

        Args:
            audio: float32, at least one sample.
            rate: Hz.
            name: of the track or query, for the message.

        Raises:
            UserError: the audio is shorter than a window and ``short`` is ``"refuse"``.
        """
        starts, size = self.starts(len(audio), rate)
        if len(audio) < size:
            if self.short == "refuse":
                longest = math.floor(1000 * len(audio) / rate) / 1000
                raise UserError(
                    f"{name!r} lasts {longest:g} s, a window {self.window:g} s: use window={longest:g} or less, or short=repeat, "
                    "which plays it again until the window is full"
                )
            audio = np.resize(audio, size)
        for first in range(0, len(starts), _AT_ONCE):
            yield np.stack([audio[s : s + size] for s in starts[first : first + _AT_ONCE]])


def cut_of(embedder: Embedder, window: float, hop: float, short: str) -> Cut:
    """The windows that a user asked for; 0 stands for the embedder's own.

    Audio that is shorter than a window is refused where the user gave the window, and repeated where it is the embedder's own.

    Raises:
        UserError: a window or hop that cannot be, or an unknown ``short``.
    """
    if short not in SHORT:
        raise UserError(f"short is {short!r}: use repeat or refuse")
    for name, seconds in (("window", window), ("hop", hop)):
        if not (seconds == 0 or 1 / embedder.rate <= seconds < math.inf):
            raise UserError(
                f"a {name} of {seconds:g} seconds cannot be: give seconds, or 0 for that of {embedder.name}"
            )
    size = window or embedder.window
    return Cut(size, hop or min(embedder.hop, size), short or ("refuse" if window else "repeat"))


def unit(
    vectors: np.ndarray, centre: np.ndarray | float = 0.0, scale: np.ndarray | float = 1.0
) -> np.ndarray:
    """Rows ``(x - centre) * scale`` at length 1, float32; a row of zeros stays zeros: its cosine with everything is 0."""
    wide = (np.asarray(vectors, dtype=np.float64) - centre) * scale
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(wide / np.where(length > 0, length, 1.0), dtype=np.float32)


def embed_audio(embedder: Embedder, audio: np.ndarray, cut: Cut, name: str) -> np.ndarray:
    """Embeddings float32 ``[n, E]`` of all windows of one track or query; no other track has a part in them.

    Raises:
        UserError: the audio is too short, or the embedder gave something else than finite numbers ``[n, E]``.
    """
    found = []
    for windows in cut.windows(audio, embedder.rate, name):
        vectors = np.asarray(embedder.embed(windows))
        if vectors.ndim != 2 or len(vectors) != len(windows) or vectors.shape[1] < 1:
            raise UserError(
                f"{embedder.name} gave {list(vectors.shape)} for {len(windows)} windows of {name!r}: it has to give one row a window"
            )
        if vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
            raise UserError(
                f"{embedder.name} gave numbers for {name!r} that are not finite: leave the track out, or use another embedding"
            )
        found.append(vectors.astype(np.float32, copy=False))
    return np.concatenate(found)


@dataclass(frozen=True)
class TrackWindows:
    """Embeddings of the windows of all tracks.

    Attributes:
        vectors: float32 ``[W, E]``, rows of length 1 (or 0), track by track; may lie in a file.
        bounds: int64 ``[N + 1]``: the windows of track i are rows ``bounds[i]`` to ``bounds[i + 1]``, one at least.
        key: of what they were made of.
        centre: float64 ``[E]``, subtracted from an embedding before it is brought to length 1; 0 where nothing is.
        scale: float64 ``[E]``, what it is multiplied with then.
    """

    vectors: np.ndarray
    bounds: np.ndarray
    key: str
    centre: np.ndarray | float = 0.0
    scale: np.ndarray | float = 1.0


def audio_key(tracks: Tracks) -> str:
    """What audio the tracks are said to have, which their fingerprint leaves out."""
    return key_of([[i.get(k) for k in ("sha256", "parent", "start", "seconds")] for i in tracks.info])


def track_windows(
    embedder: Embedder, tracks: Tracks, cut: Cut, standardised: bool, folder: Path, progress: Callable[[int, int], None]
) -> TrackWindows:  # fmt: skip
    """Embed all windows of all tracks, or open what an earlier call left; an interrupted one goes on.

    Args:
        embedder: makes the embeddings.
        tracks: with audio.
        cut: the windows.
        standardised: whether every dimension gets mean 0 and standard deviation 1 over all windows of the tracks.
        folder: of this embedder; every choice of tracks and windows has a folder of its own in it.
        progress: called with (tracks done, tracks).

    Raises:
        UserError: a track without audio, too short for a window, or a damaged file.
    """
    key = key_of(embedder.fingerprint, tracks.fingerprint, audio_key(tracks), vars(cut), standardised)
    here = folder / f"windows-{key}"
    if (here / _META).exists():
        return _open(here, key)
    parts = list(_parts(embedder, tracks, cut, here, key, progress))
    _join(here, key, parts, standardised)
    for path in parts:
        path.unlink()
    return _open(here, key)


def _parts(
    embedder: Embedder, tracks: Tracks, cut: Cut, here: Path, key: str, progress: Callable[[int, int], None]
) -> Iterator[Path]:
    """Files of the embeddings of some tracks each, made where they are not there yet."""
    recordings = Recordings(embedder.rate)
    for first in range(0, len(tracks), _PART):
        last = min(first + _PART, len(tracks))
        path = here / f"part-{first:08d}.safetensors"
        if not path.exists():
            rows = [
                embed_audio(embedder, recordings.audio(tracks, i)[0], cut, tracks.ids[i])
                for i in range(first, last)
            ]
            counts = torch.tensor([len(r) for r in rows])
            save_tensors(
                path, {"vectors": torch.from_numpy(np.concatenate(rows)), "counts": counts}, {"key": key}
            )
        progress(last, len(tracks))
        yield path


def _join(here: Path, key: str, parts: Sequence[Path], standardised: bool) -> None:
    """All parts as one array on disk, which is never in memory as a whole; the meta file, written last, says that it is there."""
    counts: list[int] = []
    widths: set[int] = set()
    for path in parts:
        tensors = load_tensors(path, key)[0]
        counts += tensors["counts"].tolist()
        widths.add(tensors["vectors"].shape[1])
    if len(widths) != 1:
        raise UserError(
            f"{here} holds embeddings of {len(widths)} sizes, but one embedder gives one: delete it"
        )
    width = widths.pop()
    centre, scale = _spread(parts, key, sum(counts)) if standardised else (np.zeros(width), np.ones(width))
    with whole_file(here / _VECTORS) as new:
        # Written, not mapped: where a disk is full, a write is refused, and a map ends the process.
        with open(new, "wb") as out:
            header = {"descr": "<f4", "fortran_order": False, "shape": (sum(counts), width)}
            np.lib.format.write_array_header_1_0(out, header)
            for path in parts:
                vectors = load_tensors(path, key)[0]["vectors"].numpy()
                out.write(unit(vectors, centre, scale).tobytes())
    meta = {"key": key, "width": width, "counts": counts, "centre": centre.tolist(), "scale": scale.tolist()}
    write_json(here / _META, meta)


def _spread(parts: Sequence[Path], key: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of every dimension over all windows, and one over its standard deviation; 0 where it is the same in all of them."""

    def mean(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        sums = [of(load_tensors(path, key)[0]["vectors"].double().numpy()).sum(axis=0) for path in parts]
        return np.asarray(np.sum(sums, axis=0) / count)

    centre = mean(lambda rows: rows)
    deviation = np.sqrt(mean(lambda rows: np.square(rows - centre)))
    # Rounding of what is the same everywhere must not decide.
    tells = deviation > 1e-6 * np.abs(centre)
    return centre, np.where(tells, 1 / np.where(tells, deviation, 1.0), 0.0)


def _open(here: Path, key: str) -> TrackWindows:
    """What :func:`_join` wrote."""
    meta = read_json(here / _META, "list of windows")
    try:
        vectors = np.load(here / _VECTORS, mmap_mode="c", allow_pickle=False)
        bounds = np.concatenate([[0], np.cumsum(np.asarray(meta["counts"], dtype=np.int64))])
        together = meta["key"] == key and vectors.dtype == np.float32
        together = together and vectors.shape == (bounds[-1], meta["width"])
        centre, scale = np.array(meta["centre"], dtype=np.float64), np.array(meta["scale"], dtype=np.float64)
        together = together and centre.shape == scale.shape == (meta["width"],)
    except (OSError, KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{here} cannot be read ({error}): delete it, it will be made again") from error
    if not together:
        raise UserError(f"{here} holds files that do not belong together: delete it, it will be made again")
    return TrackWindows(vectors, bounds, key, centre, scale)
