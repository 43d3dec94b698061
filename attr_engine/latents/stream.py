"""Batches of a data set, read ahead by threads of the C++ reader (or by Python, which says so)."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents import native
from attr_engine.latents.batch import Batch
from attr_engine.latents.errors import ReadError, StreamClosed, named
from attr_engine.latents.header import FLOATS
from attr_engine.latents.layout import Layout, allocate
from attr_engine.latents.plan import Plan, first_batch

if TYPE_CHECKING:
    from attr_engine.latents.store import LatentDataset


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
    layout = Layout(data.reading, tracks, ends, frames, data.dtype, True, True)
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
    you do that. Next to the batches that you hold there has to be room for one more, or :class:`BuffersHeld` is raised.

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
        self._layout = Layout(
            data.reading,
            self._tracks,
            ends,
            frames,
            data.dtype if gpu else self._dtype,
            checksums,
            nonfinite == "refuse",
        )
        self._next = 0 if position is None else first_batch(position, self._digest(), len(ends))
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
            ring = allocate(*size, pinned=True) if gpu else data.reading.ring(*size)
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


def _alias(memory: Tensor) -> Tensor:
    """A tensor of nothing that shares the version counter of ``memory`` and all its views."""
    alias = memory.detach()
    return alias.set_(torch.UntypedStorage(0), 0, (0,), (1,))
