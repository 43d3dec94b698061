"""Arrays that others wrote: ``.npy``, members of ``.npz`` and of tars, ``.safetensors``; checked before memory is taken."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import struct
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError, one_line
from attr_engine.latents.errors import ReadError
from attr_engine.latents.header import DTYPES, Entry, parse_header, read_at

MAX_ARRAY = 1 << 30
_MAX_HEADER = 10_000  # numpy's own limit
_MAX_TENSORS = 16 << 20  # header of a .safetensors: some 150,000 tensors
_MAX_RANK = 8
_CHUNK = 1 << 20
_LATENT_NAMES = ("latent", "latents")
_PREFIX = {(1, 0): "<H", (2, 0): "<I"}


def _exactly(file: IO[bytes], size: int) -> bytes:
    out = b""
    while len(out) < size:
        piece = file.read(size - len(out))
        if not piece:
            raise ValueError("it ends in its header")
        out += piece
    return out


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, whether it is in Fortran order, dtype, bytes before the data) of a ``.npy``."""
    version = np.lib.format.read_magic(file)
    if version not in _PREFIX:
        raise ValueError(f"its format is {version}, only 1.0 and 2.0 are read")
    prefix = _exactly(file, struct.calcsize(_PREFIX[version]))
    (length,) = struct.unpack(_PREFIX[version], prefix)
    if length > _MAX_HEADER:
        raise ValueError(f"its header takes {length} bytes")
    text = io.BytesIO(prefix + _exactly(file, length))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(text)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.kind not in "biufc":
        raise ValueError(f"its dtype {dtype} is not one of numbers")
    if len(shape) > _MAX_RANK or not all(0 <= size < 2**63 for size in shape):
        raise ValueError(f"its shape {str(shape)[:80]} cannot be")
    return shape, fortran, dtype, 8 + len(prefix) + length


def read_npy(file: IO[bytes], size: int, what: str) -> np.ndarray:
    """Read one ``.npy`` from a stream that has to hold it and nothing else.

    Args:
        file: at its first byte.
        size: bytes that the stream is said to hold; no more than its header describes are read.
        what: how the message calls it.

    Returns:
        The array, of any shape and numeric dtype, in native byte order.

    Raises:
        UserError: it is no ``.npy``, has another size than its header describes, holds objects (pickle), or takes
            more than 1 GiB.
    """
    try:
        shape, fortran, dtype, start = _header(file)
        need = math.prod(shape) * dtype.itemsize
        if need != size - start:
            raise ValueError(f"its header describes {need} bytes of data, {size - start} are there")
        if need > MAX_ARRAY:
            raise ValueError(f"it takes {need} bytes, more than {MAX_ARRAY}")
        raw = np.empty(need, dtype=np.uint8)
        view, at = raw.data, 0
        while at < need:
            got = file.readinto(view[at : at + _CHUNK])  # type: ignore[attr-defined]
            if not got:
                raise ValueError(f"it ends after {at} of {need} bytes of data")
            at += got
        if file.read(1):
            raise ValueError("it goes on after its data")
        array = raw.view(dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), copy=False)
    except Exception as error:  # a damaged header is parsed as Python and raises what the parser raises
        raise UserError(
            f"{what} cannot be read as a latent ({one_line(error)}): save it with numpy.save, without pickle"
        ) from error


def _open(path: Path, what: str) -> IO[bytes]:
    """Open a regular file; a pipe would wait for ever."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(f"{path} cannot be read as {what} ({error.strerror}): check the file") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is not a regular file: leave it out")
    return file


def read_npy_file(path: Path) -> np.ndarray:
    """Read a ``.npy`` file.

    Raises:
        UserError: as :func:`read_npy`, by path.
    """
    with _open(path, "a latent") as file:
        return read_npy(file, os.fstat(file.fileno()).st_size, str(path))


class Npz:
    """The arrays of an ``.npz``; safe to use from several threads.

    Args:
        path: the file.

    Attributes:
        names: of its arrays, in the order of the archive.

    Raises:
        UserError: it is no archive.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._file = _open(path, "an archive")
        try:
            self._zip = zipfile.ZipFile(self._file)
        except Exception as error:  # zipfile raises what struct, codecs and its own checks raise
            self._file.close()
            raise UserError(
                f"{path} cannot be read as an archive ({one_line(error)}): save it with numpy.savez"
            ) from error
        self._members = [info for info in self._zip.infolist() if info.filename.endswith(".npy")]
        self.names = [info.filename.removesuffix(".npy") for info in self._members]

    def size(self, index: int) -> int:
        """Bytes that an array is said to take."""
        return self._members[index].file_size

    def read(self, index: int) -> np.ndarray:
        """The array at ``index``.

        Raises:
            UserError: it is damaged, or has another size than the archive says.
        """
        info = self._members[index]
        what = f"{self.path}: the array {self.names[index]!r}"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{what} is compressed in a way that numpy does not write: save it with numpy.savez"
            )
        with self._lock:
            try:
                member = self._zip.open(info)
            except Exception as error:  # encrypted, damaged, or another name than in the directory
                raise UserError(
                    f"{what} cannot be read ({one_line(error)}): save it with numpy.savez, without pickle"
                ) from error
            with member:
                return read_npy(member, info.file_size, what)


class Tensors:
    """The tensors of a ``.safetensors`` file, read without a map; safe to use from several threads.

    Args:
        path: the file.

    Attributes:
        names: of its tensors, in the order of their data.

    Raises:
        UserError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path, "safetensors")
        self._entries: dict[str, Entry] = {}
        try:
            size = os.fstat(self._file.fileno()).st_size
            (length,) = struct.unpack("<Q", read_at(self._file.fileno(), 8, 0))
            if length > min(_MAX_TENSORS, size - 8):
                raise ValueError(f"its header is given as {length} bytes, the file has {size}")
            text = bytes(read_at(self._file.fileno(), length, 8))
            self._entries, self._data = parse_header(text, size - 8 - length), 8 + length
        except (ValueError, ReadError) as error:
            self._file.close()
            reason = error.sentence if isinstance(error, ReadError) else one_line(error)
            raise UserError(
                f"{path} cannot be read as safetensors ({reason}): save it with safetensors"
            ) from error
        self.names = list(self._entries)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def size(self, index: int) -> int:
        """Bytes of a tensor."""
        entry = self._entries[self.names[index]]
        return entry.end - entry.begin

    def read(self, index: int) -> Tensor:
        """The tensor at ``index``, in its dtype.

        Raises:
            UserError: it cannot be read, or takes more than 1 GiB.
        """
        entry = self._entries[self.names[index]]
        what = f"{self.path}: the tensor {self.names[index]!r}"
        if entry.dtype not in DTYPES or self.size(index) > MAX_ARRAY:
            raise UserError(
                f"{what} ({entry.dtype}, {self.size(index)} bytes) cannot be a latent: leave it out"
            )
        try:
            raw = read_at(self._file.fileno(), self.size(index), self._data + entry.begin)
        except ReadError as error:
            raise UserError(f"{what} cannot be read ({error.sentence}): get the whole file") from error
        flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPES[entry.dtype]).reshape(entry.shape)


def find_arrays(source: Path) -> list[tuple[str, Callable[[], np.ndarray | Tensor], int]]:
    """(name, how to read it, bytes) of every array of a source, in its order.

    Args:
        source: a folder of ``.npy`` and of ``.safetensors`` of one tensor each, ``latent`` or ``latents``; one
            ``.npy``; or one ``.npz`` or ``.safetensors``, with an array a track.

    Raises:
        UserError: there is none, or a file cannot be opened.
    """
    found: list[tuple[str, Callable[[], np.ndarray | Tensor], int]]
    if source.suffix in (".npz", ".safetensors"):
        archive = Npz(source) if source.suffix == ".npz" else Tensors(source)
        found = [(name, partial(archive.read, i), archive.size(i)) for i, name in enumerate(archive.names)]
        if len(found) == 1 and found[0][0] in _LATENT_NAMES:
            found = [(source.stem, *found[0][1:])]
    elif source.is_file():
        found = [(source.stem, partial(read_npy_file, source), source.stat().st_size)]
    else:
        readers: dict[str, Callable[[Path], np.ndarray | Tensor]]
        readers = {".npy": read_npy_file, ".safetensors": _only_tensor}
        found = [
            (
                path.relative_to(source).with_suffix("").as_posix(),
                partial(readers[path.suffix], path),
                path.stat().st_size,
            )
            for path in sorted(path for ending in readers for path in source.rglob(f"*{ending}"))
        ]
    if not found:
        raise UserError(f"{source} holds no arrays: give a folder of .npy or .safetensors, or one .npz")
    return found


def _only_tensor(path: Path) -> Tensor:
    with contextlib.closing(Tensors(path)) as tensors:
        if len(tensors.names) != 1 or tensors.names[0] not in _LATENT_NAMES:
            raise UserError(
                f"{path} has the tensors {', '.join(tensors.names)[:80]}, expected one named 'latent': "
                "give the file itself where it has a tensor a track"
            )
        return tensors.read(0)
