"""One shard: a safetensors file of packed tracks that describes itself.

Tensors of a shard of ``n`` tracks:

* ``latents [frames, C]``: all tracks one after the other; ``offsets`` int64 ``[n + 1]``: their first frames;
  ``crc32c`` uint32 ``[n]``: CRC-32C of the bytes of each track's latent;
* for each conditioning tensor, ``conditioning.NAME`` with its own ``.offsets`` and ``.crc32c``: the tracks' tensors
  one after the other along their first axis, ``[n, ...]`` where all have one shape;
* ``tracks``: JSON text, one ``[id, conditioning, info]`` a track.

The header is padded with spaces so that the data start at a multiple of 4096 bytes. ``__metadata__`` holds one
entry, ``attr_engine``: JSON with the format, the shape of one row of each conditioning tensor (``rows``), the padding
latent, whatever the writer wants readers to know (``extra``), and a checksum of all that the tracks' own do not
cover.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError, one_line
from attr_engine.files import whole_file
from attr_engine.latents import native
from attr_engine.latents.errors import ReadError
from attr_engine.latents.header import (
    DTYPES,
    FLOATS,
    ITEM_BYTES,
    MAX_HEADER,
    NAMES,
    Entry,
    open_file,
    read_at,
    read_header,
)

FORMAT = "attr_engine.latents/2"
LATENTS = "latents"
CONDITIONING = "conditioning."
ALIGN = 4096
MAX_SMALL = 1 << 30
FILE_NAME = re.compile(r"shard-[0-9]{5,9}\.safetensors")
_FIELD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Track:
    """A track on its way to disk.

    Attributes:
        id: its id.
        latent: ``[n, C]``, frame-major, contiguous.
        tensors: conditioning tensors by name, contiguous, at least one axis each.
        conditioning: JSON text.
        info: JSON text.
    """

    id: str
    latent: Tensor
    tensors: dict[str, Tensor]
    conditioning: str
    info: str


def octets(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, of any dtype (numpy has no bfloat16)."""
    # The stride of a lone or missing item may be anything, which view() refuses.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def field_name(name: Any) -> bool:
    """Whether a conditioning tensor can have this name."""
    return isinstance(name, str) and bool(_FIELD_NAME.fullmatch(name))


def is_newer(found: Any) -> bool:
    """Whether a format is one of a later version."""
    family, _, number = FORMAT.rpartition("/")
    newer = re.fullmatch(re.escape(family) + "/([0-9]{1,6})", str(found))
    return newer is not None and int(newer[1]) > int(number)


# -- writing --------------------------------------------------------------------------------------


def write_shard(path: Path, tracks: Sequence[Track], meta: Mapping[str, Any]) -> int:
    """Write a shard, whole or not at all, and return its size in bytes."""
    parts: dict[str, tuple[str, list[int], list[Any]]] = {}

    def add(name: str, tensors: list[Tensor], shape: list[int]) -> None:
        parts[name] = (NAMES[tensors[0].dtype], shape, [octets(x) for x in tensors])
        offsets = np.cumsum([0, *(len(x) for x in tensors)], dtype=np.int64)
        sums = np.array([native.crc32c(octets(x)) for x in tensors], dtype=np.uint32)
        prefix = "" if name == LATENTS else f"{name}."
        parts[f"{prefix}offsets"] = ("I64", [len(offsets)], [offsets.data.cast("B")])
        parts[f"{prefix}crc32c"] = ("U32", [len(sums)], [sums.data.cast("B")])

    latents = [track.latent for track in tracks]
    add(LATENTS, latents, [sum(map(len, latents)), latents[0].shape[1]])
    for name in tracks[0].tensors:
        tensors = [track.tensors[name] for track in tracks]
        same = len({x.shape for x in tensors}) == 1
        shape = [len(tensors), *tensors[0].shape] if same else [sum(map(len, tensors)), *tensors[0].shape[1:]]
        add(CONDITIONING + name, tensors, shape)
    rows = "[" + ",\n".join(f"[{json.dumps(t.id)},{t.conditioning},{t.info}]" for t in tracks) + "]"
    parts["tracks"] = ("U8", [len(rows.encode())], [memoryview(rows.encode())])
    # Larger items first, so that every tensor is aligned to its items.
    order = sorted(parts, key=lambda name: (-ITEM_BYTES[parts[name][0]], name != LATENTS, name))
    shapes = {name: list(value.shape[1:]) for name, value in tracks[0].tensors.items()}
    head = encode_header({name: parts[name] for name in order}, {"format": FORMAT, **meta, "rows": shapes})
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(head)
        for name in order:
            for piece in parts[name][2]:
                file.write(piece)
        return file.tell()


def encode_header(parts: Mapping[str, tuple[str, list[int], list[Any]]], meta: dict[str, Any]) -> bytes:
    """The start of a shard, up to its data.

    Args:
        parts: tensors in the order of their data: (dtype, shape, pieces of bytes); of payload only the ``nbytes`` of the
            pieces are asked for.
        meta: JSON for the readers.
    """
    header: dict[str, Any] = {}
    reached, small = 0, 0
    for name, (dtype, shape, pieces) in parts.items():
        begin, reached = reached, reached + sum(piece.nbytes for piece in pieces)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, reached]}
        for piece in pieces if is_small(name) else ():
            small = native.crc32c(piece, small)
    meta = {**meta, "crc32c": _sign(meta, header, small)}
    header = {"__metadata__": {"attr_engine": json.dumps(meta)}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    if size > MAX_HEADER:
        raise UserError(f"the header would take {size} bytes, {MAX_HEADER} are allowed: put less into extra")
    if sum(piece.nbytes for piece in parts["tracks"][2]) > MAX_SMALL:
        raise UserError(
            f"the tracks' texts take more than {MAX_SMALL} bytes in one shard: use smaller shards"
        )
    return struct.pack("<Q", size) + text.ljust(size)


def is_small(name: str) -> bool:
    """Whether a tensor is one of those that describe the tracks, and not payload with checksums of its own."""
    field = name.startswith(CONDITIONING) and field_name(name.removeprefix(CONDITIONING))
    return name != LATENTS and not field


def _sign(meta: Mapping[str, Any], header: Mapping[str, Any], small: int) -> int:
    """CRC-32C of everything in a shard that the tracks' checksums do not cover."""
    plain = {name: value for name, value in meta.items() if name != "crc32c"}
    table = {name: value for name, value in header.items() if name != "__metadata__"}
    return native.crc32c(json.dumps([plain, table], sort_keys=True).encode(), small)


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What a shard says of itself.

    Attributes:
        size: bytes of the file.
        meta: JSON of the header.
        dtype: safetensors name of the latents' dtype.
        channels: C.
        fields: conditioning tensors: name to (dtype, shape of one row).
        offsets: per tensor (latents under ``""``), int64 ``[n + 1]``.
        checksums: per tensor, uint32 ``[n]``.
        rows: one ``[id, conditioning, info]`` a track.
        head: CRC-32C of all that is not covered by the tracks' own checksums.
    """

    size: int
    meta: dict[str, Any]
    dtype: str
    channels: int
    fields: dict[str, tuple[str, tuple[int, ...]]]
    offsets: dict[str, np.ndarray]
    checksums: dict[str, np.ndarray]
    rows: list[list[Any]]
    head: int


def read_contents(path: Path) -> Contents:
    """Read all of a shard but the latents and the conditioning tensors themselves.

    Raises:
        ReadError: it cannot be read, or is not what :func:`write_shard` writes.
    """
    fd, size = open_file(path)
    try:
        entries, data, text = read_header(fd, size)
        head = native.crc32c(struct.pack("<Q", len(text)) + text)
        small = {}
        for name, entry in entries.items():
            if is_small(name):
                if entry.end - entry.begin > MAX_SMALL:
                    sentence = f"its '{name}' takes {entry.end - entry.begin} bytes, {MAX_SMALL} are allowed"
                    raise ReadError("header", -1, -1, sentence)
                small[name] = read_at(fd, entry.end - entry.begin, data + entry.begin)
                head = native.crc32c(small[name], head)
        try:
            return _contents(size, text, entries, small, head)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else one_line(error)
            raise ReadError("header", -1, -1, f"it is no shard of {FORMAT}: {what}") from None
    finally:
        os.close(fd)


def _contents(
    size: int, text: bytes, entries: Mapping[str, Entry], small: Mapping[str, bytearray], head: int
) -> Contents:
    header = json.loads(text)
    meta = json.loads(header["__metadata__"]["attr_engine"])
    if is_newer(meta["format"]):
        raise ReadError("newer", -1, -1, f"its format is {meta['format']!r}, this version reads {FORMAT!r}")
    if meta["format"] != FORMAT:
        raise ValueError(f"its format is {meta['format']!r}")
    small_sum = 0
    for part in small.values():
        small_sum = native.crc32c(part, small_sum)
    if meta["crc32c"] != _sign(meta, header, small_sum):
        raise ValueError("its header and its list of tracks do not match their checksum")
    latents = entries[LATENTS]
    if len(latents.shape) != 2 or latents.shape[1] < 1 or latents.dtype not in FLOATS:
        raise ValueError("its latents are not [frames, channels] of floats")
    rows = json.loads(small["tracks"])
    for row in rows:
        name, conditioning, info = row
        if not isinstance(name, str) or not isinstance(conditioning, dict) or not isinstance(info, dict):
            raise TypeError("its list of tracks has a wrong row")
    fields, offsets, checksums = {}, {}, {}
    for name, entry in entries.items():
        prefix = "" if name == LATENTS else f"{name}."
        if name in small:
            continue
        starts = np.frombuffer(small[f"{prefix}offsets"], dtype=np.int64)
        sums = np.frombuffer(small[f"{prefix}crc32c"], dtype=np.uint32)
        if (entries[f"{prefix}offsets"].dtype, entries[f"{prefix}crc32c"].dtype) != ("I64", "U32"):
            raise ValueError(f"the offsets or checksums of its {name!r} have another dtype")
        if len(sums) != len(rows) or len(starts) != len(rows) + 1:
            raise ValueError(f"its {name!r} has offsets or checksums for another number of tracks")
        short = name.removeprefix(CONDITIONING) if prefix else ""
        row = (latents.shape[1],)
        if short:
            row = tuple(meta["rows"][short])
            fields[short] = (entry.dtype, row)
        if starts[0] != 0 or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"the offsets of its {name!r} do not rise from 0")
        if entry.dtype not in DTYPES or math.prod(entry.shape) != int(starts[-1]) * math.prod(row):
            raise ValueError(f"the offsets of its {name!r} do not end where its rows end")
        offsets[short], checksums[short] = starts, sums
    return Contents(size, meta, latents.dtype, latents.shape[1], fields, offsets, checksums, rows, head)
