"""The header of a safetensors file, and reading from a file that may be anything; ``csrc/header.cpp`` in Python."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attr_engine.errors import one_line
from attr_engine.latents.errors import ReadError

# What is read before any checksum can be checked; the caps keep a hostile file from filling memory. A header of
# ours has a handful of tensors; the other is for each tensor that describes the tracks.
MAX_HEADER = 1 << 20
MAX_RANK = 8
_TEXT = rb'"(?:[^"\\]|\\.)*"'
_PAIR = rb"%b\s*:\s*%b\s*" % (_TEXT, _TEXT)
_METADATA = re.compile(rb'"__metadata__"\s*:\s*\{\s*(?:%b(?:,\s*%b)*)?\}' % (_PAIR, _PAIR), re.DOTALL)
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ITEM_BYTES = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, "U16": 2, "U32": 4, "U64": 8}


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors header; ``begin`` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(text: bytes, payload: int) -> dict[str, Entry]:
    """Tensors of a safetensors header that ``payload`` bytes of data follow, in the order of their data.

    Raises:
        ValueError: not JSON, or anything that safetensors would refuse; a few words.
    """
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number, parse_int=_integer
        )
        if not text.startswith(b"{") or not isinstance(header, dict):
            raise ValueError("it does not start with '{'")
        entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
        # A name that can be spelled in two ways could hide a double.
        if b"\\" in _METADATA.sub(b"", text):
            raise ValueError("a name holds an escape")
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not text")
    except (KeyError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no header ({one_line(error)})") from error
    reached = 0
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    for entry in ordered.values():
        if entry.begin != reached:
            raise ValueError("the tensors overlap or leave a hole")
        reached = entry.end
    if reached != payload:
        raise ValueError(f"the tensors take {reached} bytes, the file has {payload} for them")
    return ordered


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _integer(text: str) -> int:
    if text.startswith("-") or len(text) > 19:
        raise ValueError("a size or offset is not a whole number from 0 up, or does not fit in 64 bits")
    return int(text)


def _entry(value: Any) -> Entry:
    if set(value) != {"dtype", "shape", "data_offsets"} or not isinstance(value["shape"], list):
        raise ValueError("a tensor lacks dtype, shape or data_offsets, or has more")
    if (
        not isinstance(value["data_offsets"], list)
        or len(value["data_offsets"]) != 2
        or len(value["shape"]) > MAX_RANK
    ):
        raise ValueError("a tensor has a wrong shape or wrong offsets")
    for number in (*value["data_offsets"], *value["shape"]):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError("a size or offset is not a whole number from 0 up")
    if value["dtype"] not in ITEM_BYTES:
        raise ValueError("a tensor has an unknown dtype")
    size = ITEM_BYTES[value["dtype"]]
    for number in value["shape"]:
        size *= number
        if size >= 2**63:
            raise ValueError("the size of a tensor does not fit in 64 bits")
    begin, end = value["data_offsets"]
    if end - begin != size:
        raise ValueError("a tensor does not take the bytes that its shape needs")
    return Entry(value["dtype"], tuple(value["shape"]), begin, end)


def open_file(path: str | Path, index: int = -1) -> tuple[int, int]:
    """(file descriptor, size) of a regular file; the last part of the path is no symbolic link.

    Raises:
        ReadError: ``missing`` or ``unreadable``.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise ReadError(kind, index, -1, error.strerror or one_line(error)) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ReadError("unreadable", index, -1, "it is not a regular file")
    return fd, status.st_size


def read_at(fd: int, size: int, offset: int, index: int = -1, track: int = -1) -> bytearray:
    """``size`` bytes from byte ``offset``.

    Raises:
        ReadError: ``truncated`` where the file ends before, ``unreadable`` where the system refuses.
    """
    out = bytearray(size)
    view, at = memoryview(out), offset
    while view.nbytes:
        try:
            got = os.preadv(fd, [view], at)
        except OSError as error:
            sentence = f"reading at byte {at} failed: {error.strerror}"
            raise ReadError("unreadable", index, track, sentence) from None
        if got == 0:
            raise ReadError(
                "truncated", index, track,
                f"it ends at or before byte {at}, before byte {offset + size}: it became shorter while it was being read",
            )  # fmt: skip
        view, at = view[got:], at + got
    return out


def read_header(fd: int, size: int, index: int = -1) -> tuple[dict[str, Entry], int, bytes]:
    """(tensors, byte at which the data start, text of the header) of a file of ``size`` bytes.

    Raises:
        ReadError: ``header``, ``truncated`` or ``unreadable``.
    """
    if size < 8:
        raise ReadError("truncated", index, -1, "it ends in its header")
    (length,) = struct.unpack("<Q", read_at(fd, 8, 0, index))
    if not 0 < length <= min(MAX_HEADER, size - 8):
        sentence = f"its length is given as {length} bytes, the file has {size}"
        raise ReadError("header", index, -1, sentence)
    text = bytes(read_at(fd, length, 8, index))
    try:
        return parse_header(text, size - 8 - length), 8 + length, text
    except ValueError as error:
        raise ReadError("header", index, -1, str(error)) from None
