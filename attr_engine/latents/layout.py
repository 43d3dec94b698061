"""How the tensors of a data set lie in its shards, and how those of a batch lie in a buffer."""

from __future__ import annotations

import functools
import math
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.latents import native
from attr_engine.latents.batch import Batch, Lazy
from attr_engine.latents.header import DTYPES, FLOATS, NAMES
from attr_engine.latents.manifest import columns_of
from attr_engine.latents.shardfile import CONDITIONING, LATENTS

if TYPE_CHECKING:
    from attr_engine.latents.store import LatentDataset

_PAGE = 4096


class Reading:
    """Where the tensors of a data set lie, as the readers want to know it.

    Args:
        meta: metadata of its manifest.
        columns: numbers of its manifest, one a track.
        paths: of its shards.
    """

    def __init__(
        self, meta: Mapping[str, Any], columns: Mapping[str, np.ndarray], paths: Sequence[Path]
    ) -> None:
        self.paths = list(paths)
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
            self._ring = allocate(slots, slot_bytes)
        return self._ring

    def shards(self, reader: str, mapped: bool) -> Any:
        """The files, for one reader; they stay open as long as the data set."""
        # After a fork a lock of the parent's may be held by a thread that is not there.
        key = (reader, mapped, os.getpid())
        if key not in self._shards:
            specs = [(name, dtype, math.prod(row)) for name, dtype, row, *_ in self.tensors]
            files = [(str(path), size) for path, size in zip(self.paths, self.sizes, strict=True)]
            self._shards[key] = native.reader(reader).Shards(files, specs, mapped)
        return self._shards[key]


class Layout:
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
        self.fields: list[dict[str, Any]] = []
        begins = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
        self.begins, self.ends = begins, ends
        self.slot_bytes = 0
        for number, (name, stored, row, start, rows, crc) in enumerate(reading.tensors):
            own = np.ascontiguousarray(rows[tracks], dtype=np.int64)
            longest = np.maximum.reduceat(own, begins) if len(ends) else np.empty(0, dtype=np.int64)
            padded = longest if frames is None or number else np.full(len(ends), frames, dtype=np.int64)
            target = NAMES[dtype] if number == 0 else stored
            items = math.prod(row) * DTYPES[target].itemsize
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


class _Names(Lazy[str]):
    """Ids of a batch, looked up when they are asked for: the threads that read need the time."""

    def __init__(self, data: LatentDataset, tracks: np.ndarray) -> None:
        self._data, self._tracks = data, tracks

    @functools.cached_property
    def _names(self) -> list[str]:
        return self._data.names(self._tracks)

    def __len__(self) -> int:
        return len(self._tracks)

    def item(self, index: int) -> str:
        """The id of one track."""
        return self._names[index]


class _Conditioning(Lazy[dict[str, Any]]):
    """Conditioning of a batch: JSON values and views of its padded tensors, put together when asked for."""

    def __init__(
        self, data: LatentDataset, tracks: np.ndarray, fields: Sequence[Mapping[str, Any]], here: slice,
        tensors: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._data, self._tracks = data, tracks
        self._fields = [(f["name"], f["rows"][here], x) for f, x in zip(fields, tensors, strict=True)]

    def __len__(self) -> int:
        return len(self._tracks)

    def item(self, index: int) -> dict[str, Any]:
        """The conditioning of one track."""
        values = dict(self._data.conditioning[int(self._tracks[index])])
        values.update({name: tensor[index, : rows[index]] for name, rows, tensor in self._fields})
        return values


def allocate(slots: int, slot_bytes: int, pinned: bool = False) -> Any:
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
