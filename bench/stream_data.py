"""The tracks that bench/stream.py streams, and the shards they lie in, read without attr_engine.

Peers run in an environment without attr_engine and must not depend on its reader to be right, so this file
imports it only where a data set is written.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH, FRAMES, CHANNELS, BUFFERS = 32, 2584, 64, 8
SHORTEST = 258
DTYPE = np.dtype(np.float16)
ROW_BYTES = CHANNELS * DTYPE.itemsize
FIRST_BATCH_TRACKS = 115_000


def tracks_for(gigabytes: float) -> int:
    """How many tracks of the benchmark's lengths hold about this much payload."""
    return max(2 * BATCH, round(gigabytes * 1e9 / (ROW_BYTES * (SHORTEST + FRAMES) / 2)))


def name_of(track: int) -> str:
    """The id of a track."""
    return f"track-{track:07d}"


def lengths_of(tracks: int, seed: int) -> np.ndarray:
    """Valid frames of every track, int64 ``[tracks]``, uniform from ``SHORTEST`` to ``FRAMES``."""
    return np.random.default_rng(seed).integers(SHORTEST, FRAMES + 1, size=tracks)


def latent_of(track: int, frames: int, seed: int) -> np.ndarray:
    """The latent of a track, float16 ``[frames, CHANNELS]``."""
    values = np.random.default_rng([seed, track]).standard_normal((frames, CHANNELS), dtype=np.float32)
    return values.astype(DTYPE)


def _whole(folder: Path) -> bool:
    """Whether the data set is there; one that this version cannot read is refused rather than measured."""
    from attr_engine.errors import UserError
    from attr_engine.latents import LatentDataset

    if not (folder / "manifest.parquet").exists():
        return False
    try:
        LatentDataset(folder)
    except UserError as error:
        raise SystemExit(f"{error}\nwith another version's data in --work: remove {folder}") from error
    return True


def make_tracks(folder: Path, tracks: int, seed: int) -> None:
    """Write the data set with attr_engine's own writer; one that is whole is kept."""
    from attr_engine.latents import LatentWriter

    if _whole(folder):
        return
    writer = LatentWriter(folder, shard_bytes=256 << 20)
    for track, frames in enumerate(lengths_of(tracks, seed).tolist()):
        writer.add(name_of(track), latent_of(track, frames, seed).T, {}, {})
    writer.close()


def make_tiny_tracks(folder: Path, tracks: int) -> None:
    """Write a data set of many tracks of one or two frames: what opening costs depends on their number."""
    from attr_engine.latents import LatentWriter

    if _whole(folder):
        return
    writer = LatentWriter(folder)
    latent = np.ones((CHANNELS, 2), dtype=DTYPE)
    for track in range(tracks):
        writer.add(name_of(track), latent[:, : 1 + track % 2], {"prompt": "piano", "seconds_total": 1.0}, {})
    writer.close()


@dataclass(frozen=True)
class Shard:
    """A shard file: where its first frame lies and how many frames it has."""

    path: Path
    offset: int
    frames: int


class TrackSet:
    """Where every track lies, from the headers of the shards alone.

    Args:
        folder: a data set written by :func:`make_tracks`.
        seed: it was written with.

    Attributes:
        shards: in order.
        shard_of: shard of each track.
        starts: first frame of each track in its shard.
        lengths: frames of each track.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.shards: list[Shard] = []
        self.shard_of: list[int] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        for number, path in enumerate(sorted(folder.glob("shard-*.safetensors"))):
            header, begin = read_header(path)
            latents, offsets = header["latents"], header["offsets"]
            if latents["dtype"] != "F16" or latents["shape"][1] != CHANNELS:
                raise ValueError(f"{path.name} holds {latents}, expected float16 of {CHANNELS} channels")
            first, last = offsets["data_offsets"]
            bounds = np.fromfile(path, dtype="<i8", count=(last - first) // 8, offset=begin + first).tolist()
            self.shards.append(Shard(path, begin + latents["data_offsets"][0], latents["shape"][0]))
            self.shard_of += [number] * (len(bounds) - 1)
            self.starts += bounds[:-1]
            self.lengths += [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)

    def payload(self, tracks: int | None = None) -> int:
        """Bytes of the first ``tracks`` tracks (default: of all), without any padding."""
        return sum(self.lengths[:tracks]) * ROW_BYTES

    def load(self) -> np.ndarray:
        """All frames of all tracks in ordinary memory, ``[frames, CHANNELS]``; this also warms the page cache."""
        out = np.empty((sum(shard.frames for shard in self.shards), CHANNELS), dtype=DTYPE)
        done = 0
        for shard in self.shards:
            with open(shard.path, "rb") as file:
                file.seek(shard.offset)
                wanted = memoryview(out[done : done + shard.frames]).cast("B")
                if file.readinto(wanted) != len(wanted):
                    raise ValueError(f"{shard.path.name} is cut short")
            done += shard.frames
        return out

    def check(self, frames: np.ndarray) -> str:
        """Compare what :meth:`load` returned with the generator, for some tracks; the reason where it differs."""
        if not np.array_equal(self.lengths, lengths_of(len(self), self.seed)):
            return "the lengths are not those of the seed"
        begins = np.concatenate([[0], np.cumsum(self.lengths)])
        for track in {*range(0, len(self), max(1, len(self) // 50)), len(self) - 1}:
            expected = latent_of(track, self.lengths[track], self.seed)
            if not np.array_equal(frames[begins[track] : begins[track + 1]], expected):
                return f"track {track} is not what the seed gives"
        return ""


def read_header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and the byte at which its data start."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Ask the kernel to forget the pages of these files; pages that somebody maps stay."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(paths: Iterable[Path]) -> float:
    """The share of the pages of these files that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    held = total = 0
    for path in paths:
        with open(path, "rb") as file:
            # A private map can be written to, which ctypes asks for; nothing is, and no page is touched.
            map_ = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        pages = -(-len(map_) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(map_)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(map_)), states)
        del start
        map_.close()
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        held += int((np.frombuffer(states, dtype=np.uint8) & 1).sum())
        total += pages
    return held / max(1, total)
