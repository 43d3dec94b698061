"""Batches of a data set, read ahead by threads of the C++ reader (or by Python, which says so)."""

from __future__ import annotations

import functools
import math
import mmap
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents import native
from attr_engine.latents.batch import Batch
from attr_engine.latents.errors import ReadError, StreamClosed, named
from attr_engine.latents.header import DTYPES, FLOATS, NAMES
from attr_engine.latents.manifest import columns_of
from attr_engine.latents.plan import Plan, first_batch
from attr_engine.latents.shardfile import CONDITIONING, LATENTS

if TYPE_CHECKING:
    from attr_engine.latents.store import LatentDataset

_PAGE = 4096


class Reading:
    """Where the tensors of a data set lie, as the readers want to know it.

    Args:
        folder: of the data set.
        meta: metadata of its manifest.
        columns: numbers of its manifest, one a track.
        paths: of its shards.
    """

    def __init__(
        self, folder: Path, meta: Mapping[str, Any], columns: Mapping[str, np.ndarray], paths: Sequence[Path]
    ) -> None:
        self.folder, self.paths = folder, list(paths)
        self.dtype = DTYPES[meta["dtype"]]
        self.sizes = [shard[1] for shard in meta["shards"]]
        self.shard = columns["shard"]
        # (tensor, dtype, shape of a row, start, rows, checksum): the latents first
        self.tensors = [
            (
                LATENTS,
                meta["dtype"],
                (meta["channels"],),
                columns["start"],
                columns["frames"],
                columns["crc32c"],
            )
        ]
        for name, (dtype, row) in meta["fields"].items():
            start, rows, crc = (columns[column] for column in columns_of(name))
            self.tensors.append((CONDITIONING + name, dtype, tuple(row), start, rows, crc))
        self.padding = meta["padding"]
        self._shards: dict[tuple[str, bool, int], Any] = {}
        self._ring: Any = None

    def ring(self, slots: int, slot_bytes: int) -> Any:
        """Memory for a ring; that of the last stream again where it is gone and had the same size.

        Giving memory back and having the system clear it anew costs as much as reading a third of it.
        """
        size = slots * slot_bytes
        # One reference is this object's and one the call's: nobody else has a batch, or a stream, in it.
        if self._ring is None or len(self._ring) != size or sys.getrefcount(self._ring) > 2:
            self._ring = None
            self._ring = _memory(slots, slot_bytes)
        return self._ring

    def shards(self, reader: str, mapped: bool) -> Any:
        """The files, for one reader; they stay open as long as the data set."""
        # After a fork a lock of the parent's may be held by a thread that is not there.
        key = (reader, mapped, os.getpid())
        if key not in self._shards:
            specs = [(name, dtype, int(np.prod(row))) for name, dtype, row, *_ in self.tensors]
            files = [(str(path), size) for path, size in zip(self.paths, self.sizes, strict=True)]
            self._shards[key] = native.reader(reader).Shards(files, specs, mapped)
        return self._shards[key]


class _Layout:
    """The tensors of a plan's batches: how they lie in a slot.

    Args:
        reading: of the data set.
        tracks: int64 ``[n]`` in plan order.
        ends: int64 ``[batches]``.
        frames: padded length, None for the longest of each batch.
        dtype: of the latents that are delivered.
        checksums: whether they are checked.
        nonfinite: whether NaN and infinity are refused.
    """

    def __init__(
        self, reading: Reading, tracks: np.ndarray, ends: np.ndarray, frames: int | None, dtype: torch.dtype,
        checksums: bool, nonfinite: bool,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        self.fields: list[dict[str, Any]] = []
        begins = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
        self.begins, self.ends = begins, ends
        self.slot_bytes = 0
        for number, (name, stored, row, start, rows, crc) in enumerate(reading.tensors):
            own = np.ascontiguousarray(rows[tracks], dtype=np.int64)
            longest = np.maximum.reduceat(own, begins) if len(ends) else np.empty(0, dtype=np.int64)
            padded = longest if frames is None or number else np.full(len(ends), frames, dtype=np.int64)
            target = NAMES[dtype] if number == 0 else stored
            items = int(np.prod(row)) * DTYPES[target].itemsize
            pad_row = None
            if number == 0 and reading.padding is not None:
                latent = torch.as_tensor(reading.padding, dtype=torch.float64).to(DTYPES[stored]).to(dtype)
                pad_row = latent.view(torch.uint8).numpy().tobytes()
            self.fields.append(
                {"tensor": number, "to": target if target != stored else None,
                 "starts": np.ascontiguousarray(start[tracks], dtype=np.int64), "rows": own,
                 "checksums": np.ascontiguousarray(crc[tracks]) if checksums else None, "frames": padded,
                 "pad_row": pad_row, "refuse_nonfinite": nonfinite and stored in FLOATS, "slot_offset": self.slot_bytes,
                 "name": name.removeprefix(CONDITIONING), "row": row, "dtype": DTYPES[target]}
            )  # fmt: skip
            block = int(((ends - begins) * padded).max(initial=0)) * items
            self.slot_bytes += -(-block // _PAGE) * _PAGE
        self.slot_bytes = max(self.slot_bytes, _PAGE)

    def tensors(self, memory: Tensor, batch: int) -> list[Tensor]:
        """The padded tensors ``[B, rows, ...]`` of a batch, views of its slot, uint8 ``[slot_bytes]``."""
        out = []
        count = int(self.ends[batch] - self.begins[batch])
        for field in self.fields:
            shape = (count, int(field["frames"][batch]), *field["row"])
            begin = field["slot_offset"]
            end = begin + math.prod(shape) * field["dtype"].itemsize
            out.append(memory[begin:end].view(field["dtype"]).view(shape))
        return out

    def batch(self, data: LatentDataset, tracks: np.ndarray, tensors: Sequence[Tensor], batch: int) -> Batch:
        """A batch of the tracks ``tracks`` from its padded tensors."""
        here = slice(int(self.begins[batch]), int(self.ends[batch]))
        return Batch(
            ids=_Names(data, tracks[here]),
            latents=tensors[0].transpose(1, 2),
            valid=torch.from_numpy(self.fields[0]["rows"][here].copy()),
            conditioning=_Conditioning(data, tracks[here], self.fields[1:], here, tensors[1:]),
        )


class _Names(Sequence[str]):
    """Ids of a batch, looked up when they are asked for: the threads that read need the time."""

    def __init__(self, data: LatentDataset, tracks: np.ndarray) -> None:
        self._data, self._tracks = data, tracks

    @functools.cached_property
    def _names(self) -> list[str]:
        return self._data.names(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def __getitem__(self, index: Any) -> Any:
        return self._names[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._names == list(other)

    def __repr__(self) -> str:
        return repr(self._names)


class _Conditioning(Sequence[dict[str, Any]]):
    """Conditioning of a batch: JSON values and views of its padded tensors, put together when asked for."""

    def __init__(
        self, data: LatentDataset, tracks: np.ndarray, fields: Sequence[Mapping[str, Any]], here: slice,
        tensors: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._data, self._tracks = data, tracks
        self._fields = [(f["name"], f["rows"][here], x) for f, x in zip(fields, tensors, strict=True)]

    def __len__(self) -> int:
        return len(self._tracks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        values = dict(self._data.conditioning[int(self._tracks[index])])
        values.update({name: tensor[index, : rows[index]] for name, rows, tensor in self._fields})
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _named(data: LatentDataset, tracks: np.ndarray, error: ReadError) -> Exception:
    path = data.reading.paths[error.shard] if error.shard >= 0 else None
    return named(error, path, data.names(tracks[[error.track]])[0] if error.track >= 0 else None)


def read_once(data: LatentDataset, tracks: np.ndarray, frames: int) -> Batch:
    """One batch of the tracks at ``tracks``, in memory of its own, read by the calling thread.

    Raises:
        UserError: see :meth:`LatentDataset.batch`.
    """
    _check_frames(data, tracks, frames)
    if len(tracks) == 0:
        return Batch(
            [], torch.zeros(0, data.channels, frames, dtype=data.dtype), torch.zeros(0, dtype=torch.int64), []
        )
    ends = np.array([len(tracks)], dtype=np.int64)
    layout = _Layout(data.reading, tracks, ends, frames, data.dtype, True, True)
    try:
        memory = torch.empty(layout.slot_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(
            f"there is no memory for {len(tracks)} tracks of {frames} frames: ask for fewer"
        ) from error
    shard_of = np.ascontiguousarray(data.reading.shard[tracks])
    try:
        stream = native.reader().Stream(
            data.reading.shards("auto", False), shard_of, ends, layout.fields, memory.numpy(),
            layout.slot_bytes, 0, 0,
        )  # fmt: skip
        slot = stream.next(1.0)
    except ReadError as error:
        raise _named(data, tracks, error) from error
    if not native.available():
        memory = torch.frombuffer(slot, dtype=torch.uint8)
    return layout.batch(data, tracks, layout.tensors(memory, 0), 0)


class LatentStream(Iterator[Batch]):
    """Batches in the order of a plan, read ahead by threads into a ring of buffers.

    The tensors of a batch share the memory of the ring for as long as any of them lives; then the buffer is used
    for a later batch. Padding that is known to be in place is not written again: torch operations that change a
    batch in place are noticed, a write through ``.numpy()``, ``.data`` or DLPack is not, so copy before
    you do that. Next to the
    batches that you hold there has to be room for one more, or :class:`BuffersHeld` is raised.

    Several threads may take batches from one stream. After a fork the child has to open its own.

    Args:
        data: the data set.
        batch: tracks a batch.
        frames: padded length of every batch; None pads each to its longest track.
        order: ``"sequential"``, ``"shuffle"`` or ``"length"``.
        seed: of the shuffle.
        epoch: of the shuffle.
        rank: this rank of ``ranks``; it takes every ``ranks``-th batch.
        ranks: how many there are.
        dtype: of the latents; default as stored. On a GPU they are cast there.
        device: where the batches are delivered; for a GPU the ring is pinned, and a buffer is used again only once
            its copy is done.
        threads: that read ahead; 0 reads when a batch is asked for.
        buffers: batches in memory at a time, read ahead and held.
        checksums: whether each track is checked against its CRC-32C.
        nonfinite: ``"refuse"`` or ``"allow"`` NaN and infinity.
        position: carry on from the ``position`` of an earlier stream.
        source: ``"pread"``, or ``"map"`` to read through a memory map. The batches are the same.
        patience: seconds to wait where every buffer is held by a living batch.
        reader: ``"auto"``, ``"native"`` or ``"python"``.

    Raises:
        UserError: a wrong value, a position of another plan, a track that is longer than ``frames``; while reading
            whatever :mod:`attr_engine.latents.errors` lists, when the batch concerned is asked for.
    """

    def __init__(
        self, data: LatentDataset, batch: int = 32, frames: int | None = None, order: str = "sequential", seed: int = 0,
        epoch: int = 0, rank: int = 0, ranks: int = 1, dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu", threads: int = 2, buffers: int = 4, checksums: bool = True,
        nonfinite: str = "refuse", position: dict[str, Any] | None = None, source: str = "pread",
        patience: float = 60.0, reader: str = "auto",
    ) -> None:  # fmt: skip
        _check_options(dtype, threads, buffers, nonfinite, source)
        self.data, self.plan = data, Plan(batch, order, seed, epoch, rank, ranks)
        if frames is not None:
            _check_frames(data, np.arange(len(data)), frames)
        self.device, self._patience = _device(device), patience
        self._dtype = data.dtype if dtype is None else dtype
        gpu = self.device.type != "cpu"
        self._tracks, ends = self.plan.batches(data.lengths)
        self._layout = _Layout(
            data.reading,
            self._tracks,
            ends,
            frames,
            data.dtype if gpu else self._dtype,
            checksums,
            nonfinite == "refuse",
        )
        self._next = first_batch(position, self._digest(), len(ends)) if position is not None else 0
        if reader == "auto" and not native.available():
            warnings.warn("the C++ reader is not installed: streaming in Python, slower", stacklevel=3)
        module = native.reader(reader)
        self._copies: deque[tuple[Any, Any]] = deque()
        self._stream: Any = None
        shard_of = np.ascontiguousarray(data.reading.shard[self._tracks])
        slots = min(buffers, max(1, len(ends)))
        ring = None
        if module.__name__ == "attr_engine._native":
            size = (slots, self._layout.slot_bytes)
            ring = _memory(*size, pinned=True) if gpu else data.reading.ring(*size)
        try:
            self._stream = module.Stream(
                data.reading.shards(reader, source == "map"), shard_of, ends, self._layout.fields, ring,
                self._layout.slot_bytes, threads, self._next,
            )  # fmt: skip
        except ReadError as error:
            raise _named(data, self._tracks, error) from error
        weakref.finalize(self, self._stream.close)

    def _digest(self) -> str:
        return self.plan.digest(self.data.fingerprint)

    @property
    def position(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: pass it as ``position`` to go on with the next batch."""
        return {"batch": self._next, "plan": self._digest()}

    def __len__(self) -> int:
        """Batches of this rank in the whole plan."""
        return len(self._layout.ends)

    def __next__(self) -> Batch:
        if self._stream is None:
            raise StreamClosed("the stream is closed")
        try:
            # Where there is no other thread, nobody could give a buffer back while this one waits.
            slot = self._stream.next(self._patience if threading.active_count() > 1 else 0.0)
        except ReadError as error:
            raise _named(self.data, self._tracks, error) from error
        if slot is None:
            raise StopIteration
        memory = torch.frombuffer(slot, dtype=torch.uint8)
        tensors = self._layout.tensors(memory, slot.batch)
        if not memory.is_inference():
            slot.guard(_alias(memory))
        if self.device.type != "cpu":
            tensors = self._to_device(slot, tensors)
        self._next = max(self._next, slot.batch + 1)
        return self._layout.batch(self.data, self._tracks, tensors, slot.batch)

    def _to_device(self, slot: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device; the buffer is held until the copy is done."""
        while self._copies and self._copies[0][0].query():
            self._copies.popleft()
        copies = [x.to(self.device, non_blocking=True) for x in tensors]
        event = torch.cuda.Event()
        event.record()
        self._copies.append((event, slot))
        if len(self._copies) > 1:  # two copies under way at most: the ring has room for the reader
            self._copies.popleft()[0].synchronize()
        return [copies[0].to(self._dtype), *copies[1:]]

    def close(self) -> None:
        """Stop reading ahead; batches that are held stay valid."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> LatentStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_options(
    dtype: torch.dtype | None, threads: int, buffers: int, nonfinite: str, source: str
) -> None:
    if dtype is not None and dtype not in FLOATS.values():
        raise UserError(f"latents cannot be delivered as {dtype}: use float16, bfloat16, float32 or float64")
    if not (
        isinstance(threads, int) and isinstance(buffers, int) and 0 <= threads <= 256 and 2 <= buffers < 2**20
    ):
        raise UserError(
            f"{threads} threads and {buffers} buffers cannot stream: use 0 to 256 threads and at least 2 buffers, one to "
            "hold and one to fill"
        )
    if nonfinite not in ("refuse", "allow") or source not in ("pread", "map"):
        raise UserError(f"nonfinite={nonfinite!r}, source={source!r}: use refuse or allow, and pread or map")


def _check_frames(data: LatentDataset, tracks: np.ndarray, frames: int) -> None:
    """Refuse a padded length that is none, or that a track does not fit into."""
    if not isinstance(frames, int | np.integer) or not 1 <= frames < 2**31:
        raise UserError(
            f"tracks cannot be padded to {frames!r} frames: use a whole number from 1 to 2^31 - 1"
        )
    too_long = tracks[data.lengths[tracks] > frames]
    if len(too_long):
        i = int(too_long[0])
        raise UserError(
            f"track {data.names(np.array([i]))[0]!r} has {data.lengths[i]} frames, more than the {frames} asked for: cut it"
        )


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise UserError(f"there is no device {device!r}: use 'cpu' or 'cuda'") from error


def _memory(slots: int, slot_bytes: int, pinned: bool = False) -> Any:
    """Memory for a ring: page-aligned, in huge pages where the system has them; pinned for copies to a GPU."""
    try:
        if pinned:
            return torch.empty(slots * slot_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        # Private: shared memory would be in small pages, and a forked child would see it change.
        memory = mmap.mmap(-1, slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (MemoryError, OSError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"there is no memory for {slots} buffers of {slot_bytes} bytes: ask for fewer buffers, a smaller batch or "
            "fewer frames"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them
    return memory


def _alias(memory: Tensor) -> Tensor:
    """A tensor of nothing that shares the version counter of ``memory`` and all its views."""
    alias = memory.detach()
    return alias.set_(torch.UntypedStorage(0), 0, (0,), (1,))
