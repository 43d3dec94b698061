"""CRC-32C and batch gathering: the C++ extension where it is installed, the same in numpy where it is not.

Both give the same bytes and raise the same exceptions with the same messages; ``csrc/gather.h`` is the C++
half. A *row* is one latent frame, ``row_bytes`` long; a track is a run of rows; a batch is ``[tracks, frames,
row_bytes]`` bytes.
"""

from __future__ import annotations

import errno
import functools
import importlib
import operator
import os
import stat
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    _native: ModuleType | None = importlib.import_module("attr_engine._native")
except ImportError:  # there was no compiler where it was installed
    _native = None

__all__ = ["ChecksumError", "available", "crc32c", "gather"]


class ChecksumError(ValueError):
    """The bytes of a track are not those that were checksummed: the file is damaged."""


if _native is not None:
    ChecksumError = _native.ChecksumError  # type: ignore[misc]


def available() -> bool:
    """Return whether the C++ extension is installed; without it everything works, slower."""
    return _native is not None


def crc32c(data: Any, value: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of a buffer.

    Args:
        data: A C-contiguous buffer of any type: bytes, memoryview, numpy array.
        value: The checksum of what came before, to carry on from.

    Raises:
        TypeError: ``data`` is not a buffer.
        ValueError: ``data`` is not contiguous, or ``value`` is not an unsigned 32-bit number.
    """
    return _crc32c(data, value) if _native is None else _native.crc32c(data, value)


def gather(
    fd: int,
    data_offset: int,
    row_bytes: int,
    starts: Any,
    lengths: Any,
    out: Any,
    frames: int,
    pad_row: Any = None,
    checksums: Any = None,
) -> None:
    """Read tracks of different lengths from a file into a padded batch.

    Every argument is checked against the size of the file before ``out`` is touched. The GIL is released
    while reading, and the file's position is neither used nor moved, so threads may share ``fd``. After an
    exception from the reading itself, what ``out`` holds is unspecified. The message of an exception about
    one track starts with ``track i:``, i being its index in this call.

    Args:
        fd: File descriptor of a regular file, open for reading.
        data_offset: Byte of the file at which row 0 starts.
        row_bytes: Bytes of one row.
        starts: First row of each track, int64 buffer ``[n]``.
        lengths: Rows of each track, 0 to ``frames``, int64 buffer ``[n]``.
        out: Writable C-contiguous buffer of ``n * frames * row_bytes`` bytes. (A torch tensor is no buffer:
            pass ``tensor.view(torch.uint8).numpy()``.)
        frames: Rows that every track is padded to.
        pad_row: ``row_bytes`` bytes to pad with; zeros where it is None.
        checksums: CRC-32C of the bytes of each track, uint32 buffer ``[n]``; unchecked where it is None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is wrong in itself, or a track lies outside the file or is longer than
            ``frames``.
        ChecksumError: A track's bytes do not have the checksum given for it.
        OSError: The file could not be read, or became shorter while it was being read.
    """
    call = _gather if _native is None else _native.gather
    call(fd, data_offset, row_bytes, starts, lengths, out, frames, pad_row, checksums)


# The fallback --------------------------------------------------------------------------------------------

_INT32 = (-(2**31), 2**31 - 1)
_INT64 = (-(2**63), 2**63 - 1)
_UINT32 = (0, 2**32 - 1)

# Checksummed in blocks of _BLOCK bytes; within a block, lanes of _STEPS bytes side by side.
_BLOCK = 1 << 22
_STEPS = 1 << 8

_Register = npt.NDArray[np.uint32]


def _integer(name: str, number: Any, bounds: tuple[int, int]) -> int:
    index = operator.index(number)
    low, high = bounds
    if not low <= index <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {index}")
    return index


def _buffer(name: str, data: Any) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"{name} must be a buffer, not {type(data).__name__}") from None
    if not view.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    return view


def _vector(name: str, data: Any, dtype: type[np.generic], codes: str) -> list[int]:
    """Copy a one-dimensional integer buffer, so that it cannot change between check and use."""
    view = _buffer(name, data)
    item = np.dtype(dtype)
    code = view.format[1:] if view.format[:1] in ("@", "=", "<") else view.format
    if view.ndim != 1 or view.itemsize != item.itemsize or len(code) != 1 or code not in codes:
        raise ValueError(f"{name} must be a one-dimensional buffer of {item.name}")
    return [int(number) for number in np.frombuffer(view, dtype=item)] if view.nbytes else []


@functools.cache
def _crc_table() -> _Register:
    """Return the register after each single byte, ``[256]``."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return table


@functools.cache
def _crc_zeros(power: int) -> _Register:
    """Return the linear map of the register over ``2**power`` zero bytes: the image of each bit, ``[32]``."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if power == 0:
        return (bits >> np.uint32(8)) ^ _crc_table()[bits & np.uint32(0xFF)]
    half = _crc_zeros(power - 1)
    return _crc_apply(half, half)


def _crc_apply(columns: _Register, registers: _Register) -> _Register:
    """Apply a linear map, ``[32]`` images of the bits, to registers ``[n]``."""
    out = np.zeros_like(registers)
    for bit in range(32):
        out ^= columns[bit] * ((registers >> np.uint32(bit)) & np.uint32(1))
    return out


def _crc_block(data: npt.NDArray[np.uint8], register: int) -> int:
    """Run the register over ``data``, ``[n]``, n >= 1, by lanes of ``_STEPS`` bytes that are then joined."""
    lanes = -(-(data.size + 4) // _STEPS)
    padded = np.zeros(lanes * _STEPS, dtype=np.uint8)  # zeros in front leave a zero register as it is
    head = padded.size - data.size
    padded[head:] = data
    # A register that meets data is a zero register that meets the data XOR the register's bytes; what is left
    # of a register after fewer than four bytes is XORed in at the end.
    padded[head : head + 4] ^= np.array([register], dtype="<u4").view(np.uint8)[: data.size]
    late = register >> (8 * data.size) if data.size < 4 else 0

    table = _crc_table()
    registers = np.zeros(lanes, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, _STEPS).T):  # [lanes] bytes
        registers = table[(registers ^ column) & np.uint32(0xFF)] ^ (registers >> np.uint32(8))
    power = _STEPS.bit_length() - 1
    while registers.size > 1:
        if registers.size % 2:
            registers = np.concatenate([np.zeros(1, dtype=np.uint32), registers])
        registers = _crc_apply(_crc_zeros(power), registers[0::2]) ^ registers[1::2]
        power += 1
    return int(registers[0]) ^ late


def _crc32c(data: Any, value: int = 0) -> int:
    """Do what :func:`crc32c` does, in numpy."""
    view = _buffer("data", data)
    register = _integer("value", value, _UINT32) ^ 0xFFFFFFFF
    octets = np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)
    for start in range(0, octets.size, _BLOCK):
        register = _crc_block(octets[start : start + _BLOCK], register)
    return register ^ 0xFFFFFFFF


def _check_shape(
    data_offset: int, row_bytes: int, starts: list[int], lengths: list[int], out_bytes: int, frames: int
) -> None:
    """Check what can be checked without the file."""
    if data_offset < 0:
        raise ValueError(f"data_offset is {data_offset}: it must not be negative")
    if row_bytes < 1:
        raise ValueError(f"row_bytes is {row_bytes}: it must be at least 1")
    if frames < 1:
        raise ValueError(f"frames is {frames}: it must be at least 1")
    product = f"{len(starts)} tracks x {frames} frames x {row_bytes} bytes"
    need = len(starts) * frames * row_bytes
    if max(frames * row_bytes, need) > _INT64[1]:
        raise ValueError(f"{product} do not fit in 64 bits")
    if out_bytes != need:
        raise ValueError(f"out has {out_bytes} bytes but {product} need {need}")


def _check_tracks(
    fd: int, data_offset: int, row_bytes: int, starts: list[int], lengths: list[int], frames: int
) -> None:
    """Check every track against the file."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise _read_error(f"asking for the size of file descriptor {fd} failed", error) from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"file descriptor {fd} is not a regular file")
    if data_offset > status.st_size:
        raise ValueError(f"data_offset is {data_offset} but the file has {status.st_size} bytes")
    rows = (status.st_size - data_offset) // row_bytes
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if start < 0:
            raise ValueError(f"track {i}: its start is {start}: it must not be negative")
        if length < 0:
            raise ValueError(f"track {i}: its length is {length}: it must not be negative")
        if length > frames:
            raise ValueError(f"track {i}: it has {length} rows but the batch has room for {frames}")
        if start + length > rows:
            raise ValueError(
                f"track {i}: {length} rows from row {start} lie outside the file, which has {rows} rows of "
                f"{row_bytes} bytes from byte {data_offset}"
            )


def _read_error(sentence: str, error: OSError) -> OSError:
    """Return an OSError whose text is the sentence alone and whose errno is kept."""
    code = error.errno or errno.EIO
    raised = OSError(f"{sentence}: {os.strerror(code)}")
    raised.errno = code
    return raised


def _read_track(fd: int, track: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from byte ``offset`` of the file."""
    end = offset + view.nbytes
    while view.nbytes:
        try:
            got = os.preadv(fd, [view], offset)
        except OSError as error:
            raise _read_error(f"track {track}: reading at byte {offset} failed", error) from None
        if got == 0:
            raise OSError(
                f"track {track}: the file ends at byte {offset}, before byte {end}: it became shorter while "
                "it was being read"
            )
        view, offset = view[got:], offset + got


def _gather(
    fd: int,
    data_offset: int,
    row_bytes: int,
    starts: Any,
    lengths: Any,
    out: Any,
    frames: int,
    pad_row: Any = None,
    checksums: Any = None,
) -> None:
    """Do what :func:`gather` does, in numpy; the checks and their order are those of ``csrc``."""
    fd = _integer("fd", fd, _INT32)
    data_offset = _integer("data_offset", data_offset, _INT64)
    row_bytes = _integer("row_bytes", row_bytes, _INT64)
    frames = _integer("frames", frames, _INT64)
    starts = _vector("starts", starts, np.int64, "lq")
    lengths = _vector("lengths", lengths, np.int64, "lq")
    target = _buffer("out", out)
    if target.readonly:
        raise ValueError("out is read-only: pass a writable buffer")
    if pad_row is not None:
        pad_row = _buffer("pad_row", pad_row)
        if pad_row.nbytes != row_bytes:
            raise ValueError(f"pad_row has {pad_row.nbytes} bytes but row_bytes is {row_bytes}")
        pad_row = np.frombuffer(pad_row, dtype=np.uint8) if row_bytes else None
    if checksums is not None:
        checksums = _vector("checksums", checksums, np.uint32, "IL")

    if len(lengths) != len(starts):
        raise ValueError(f"lengths has {len(lengths)} items but starts has {len(starts)}")
    if checksums is not None and len(checksums) != len(starts):
        raise ValueError(f"checksums has {len(checksums)} items but starts has {len(starts)}")
    _check_shape(data_offset, row_bytes, starts, lengths, target.nbytes, frames)
    _check_tracks(fd, data_offset, row_bytes, starts, lengths, frames)
    if not starts:
        return

    batch = np.frombuffer(target, dtype=np.uint8).reshape(len(starts), frames, row_bytes)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        offset = data_offset + start * row_bytes
        track = batch[i, :length].reshape(-1)
        _read_track(fd, i, track.data, offset)
        if checksums is not None:
            found = _crc32c(track)
            if found != checksums[i]:
                raise ChecksumError(
                    f"track {i}: the {track.nbytes} bytes from byte {offset} have the CRC-32C 0x{found:08x} "
                    f"but 0x{checksums[i]:08x} was recorded: the file is damaged"
                )
        batch[i, length:] = 0 if pad_row is None else pad_row
