"""The reader of ``csrc`` in plain Python: the oracle of its tests, and what runs where it was not built.

``Shards`` and ``Stream`` take the same arguments as those of ``attr_engine._native`` and raise the same kinds of
:class:`ReadError`. There is no ring and no thread: every batch has memory of its own and is read when it is
asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from attr_engine.latents import native
from attr_engine.latents.errors import ReadError
from attr_engine.latents.header import DTYPES, Entry, open_file, read_at, read_header

_OPEN = 64


class Shard:
    """One open file, its size checked; tensors are found by name."""

    def __init__(self, index: int, path: str, size: int, tensors: Sequence[tuple[str, str, int]]) -> None:
        self.index = index
        self.fd, found = open_file(path, index)
        sizes = f"it has {found} bytes, {size} were recorded"
        if found != size:
            raise ReadError("truncated" if found < size else "mismatch", index, -1, sizes)
        entries, self.data, _ = read_header(self.fd, found, index)
        self.tensors = [self._place(entries, *spec) for spec in tensors]

    def _place(self, entries: Mapping[str, Entry], name: str, dtype: str, row_items: int) -> tuple[int, int]:
        """(first byte in the file, rows) of a tensor."""
        if name not in entries:
            raise ReadError("mismatch", self.index, -1, f"it has no tensor '{name}'")
        entry = entries[name]
        if entry.dtype != dtype:
            raise ReadError("mismatch", self.index, -1, f"its '{name}' is {entry.dtype}, not {dtype}")
        items = int(np.prod(entry.shape, dtype=object))
        if items % row_items:
            raise ReadError("mismatch", self.index, -1, f"its '{name}' has no rows of {row_items} items")
        return self.data + entry.begin, items // row_items

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Shards:
    """The files of a data set.

    Args:
        shards: (path, size in bytes) of each.
        tensors: (name, dtype, items a row) of each tensor that is to be read.
        map: no difference here: a file is always read, never mapped.
    """

    def __init__(
        self, shards: Sequence[tuple[str, int]], tensors: Sequence[tuple[str, str, int]], map: bool
    ) -> None:
        del map
        self.shards, self.tensors = list(shards), list(tensors)
        self._open: dict[int, Shard] = {}

    def open(self, index: int) -> Shard:
        """Open a shard, or return it where it is open."""
        shard = self._open.pop(index, None) or Shard(index, *self.shards[index], self.tensors)
        self._open[index] = shard
        if len(self._open) > _OPEN:
            del self._open[next(iter(self._open))]
        return shard


class Slot(bytearray):
    """The bytes of one batch."""

    batch = 0

    def guard(self, tensor: Any) -> None:
        """Nothing to guard: the memory is never used again."""


class Stream:
    """Batches in plan order; see ``csrc/stream.h`` for the arguments."""

    def __init__(
        self, shards: Shards, shard_of: Any, ends: Any, fields: Sequence[Mapping[str, Any]], ring: Any,
        slot_bytes: int, threads: int, first: int,
    ) -> None:  # fmt: skip
        del ring, threads
        self._shards, self._shard_of, self._ends = shards, np.asarray(shard_of), np.asarray(ends)
        self._fields, self._slot_bytes, self._next = list(fields), slot_bytes, first
        self._closed = False
        self._check(first)

    def _check(self, first: int) -> None:
        begins = np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends
        if not 0 <= first <= len(self._ends) or (self._ends <= begins).any():
            raise ReadError("argument", -1, -1, "the first batch or the batches of the plan are wrong")
        for i, shard in enumerate(self._shard_of):
            if not 0 <= shard < len(self._shards.shards):
                raise ReadError("argument", -1, i, f"there is no shard {shard}")
        for field in self._fields:
            frames = np.repeat(field["frames"], self._ends - begins)
            wrong = np.flatnonzero((field["rows"] < 0) | (field["starts"] < 0) | (field["rows"] > frames))
            if len(wrong):
                i = int(wrong[0])
                sentence = f"it has {field['rows'][i]} rows but the batch has room for {frames[i]}"
                raise ReadError("argument", -1, i, sentence)

    def next(self, patience: float) -> Slot | None:
        """The next batch, None at the end."""
        del patience
        if self._closed:
            raise ReadError("closed", -1, -1, "the stream is closed")
        if self._next == len(self._ends):
            return None
        batch = self._next
        first = 0 if batch == 0 else int(self._ends[batch - 1])
        slot = Slot(self._slot_bytes)
        slot.batch = batch
        for i in range(first, int(self._ends[batch])):
            for field in self._fields:
                self._read(slot, field, batch, i, i - first)
        self._next += 1
        return slot

    def _read(self, slot: Slot, field: Mapping[str, Any], batch: int, track: int, place: int) -> None:
        name, dtype, row_items = self._shards.tensors[field["tensor"]]
        index = int(self._shard_of[track])
        shard = self._shards.open(index)
        start, rows = int(field["starts"][track]), int(field["rows"][track])
        offset, held = shard.tensors[field["tensor"]]
        if start + rows > held:
            sentence = f"{rows} rows from row {start} lie outside its '{name}', which has {held}"
            raise ReadError("mismatch", index, track, sentence)
        row = row_items * DTYPES[dtype].itemsize
        data = read_at(shard.fd, rows * row, offset + start * row, index, track)
        if field["checksums"] is not None:
            found, recorded = native.crc32c(data), int(field["checksums"][track])
            if found != recorded:
                raise ReadError(
                    "checksum", index, track,
                    f"the {len(data)} bytes of its '{name}' have the CRC-32C 0x{found:08x} but 0x{recorded:08x} was "
                    "recorded: the file is damaged",
                )  # fmt: skip
        target = dtype if field["to"] is None else field["to"]
        values = torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])
        cast = values.to(DTYPES[target])
        if field["refuse_nonfinite"]:
            self._refuse(values, row_items, index, track, f"its '{name}' holds NaN or infinity")
            self._refuse(cast, row_items, index, track, f"its '{name}' does not fit into the dtype asked for")
        row_out = row_items * DTYPES[target].itemsize
        frames = int(field["frames"][batch])
        begin = field["slot_offset"] + place * frames * row_out
        valid = begin + rows * row_out
        slot[begin:valid] = cast.contiguous().view(torch.uint8).numpy().tobytes()
        pad = bytes(row_out) if field["pad_row"] is None else bytes(field["pad_row"])
        slot[valid : begin + frames * row_out] = pad * (frames - rows)

    @staticmethod
    def _refuse(values: torch.Tensor, row_items: int, index: int, track: int, what: str) -> None:
        bad = torch.nonzero(~torch.isfinite(values))
        if len(bad):
            raise ReadError("nonfinite", index, track, f"{what}, first in row {int(bad[0]) // row_items}")

    def close(self) -> None:
        """Nothing runs that would have to be stopped."""
        self._closed = True
