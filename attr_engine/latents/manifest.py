"""The manifest: one Parquet file that says which tracks a data set has and where they lie.

It is made from the shards, by one function (:mod:`attr_engine.latents.build`), whether a data set is closed, appended
to or repaired. Columns, one row a track: ``id``, ``shard`` (index in the list of shards), ``row`` (place in its shard),
``start`` (first frame), ``frames``, ``crc32c``, ``conditioning`` and ``info`` (JSON), and ``NAME.start``, ``NAME.rows``,
``NAME.crc32c`` for each conditioning tensor. The schema's metadata hold one entry, ``attr_engine``: JSON with the
format, dtype, channels, padding, extra, conditioning tensors, shards (file, bytes, tracks, CRC-32C of all but the
payload) and what was left out. Between the last page and the footer, where Parquet readers do not look, stand ``SEAL``
and the CRC-32C of all other bytes. It is written last: a manifest means a whole data set.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import one_line
from attr_engine.latents import native
from attr_engine.latents.errors import (
    DamagedManifest,
    DatasetError,
    ManifestMismatch,
    MissingShard,
    NewerFormat,
    OutsideFolder,
    ReadError,
    named,
)
from attr_engine.latents.header import DTYPES, FLOATS, MAX_RANK
from attr_engine.latents.memory import check_padding
from attr_engine.latents.shardfile import FILE_NAME, FORMAT, field_name, is_newer

MANIFEST = "manifest.parquet"
_SHARED = ("format", "dtype", "channels", "padding", "extra", "fields")
_META = (*_SHARED, "shards", "dropped")
NUMBERS = {"shard": np.int32, "row": np.int32, "start": np.int64, "frames": np.int64, "crc32c": np.uint32}
TEXTS = ("id", "conditioning", "info")
SEAL = b"crc32c: "
_CHUNK = 1 << 20


def columns_of(field: str) -> dict[str, Any]:
    """Names and numpy dtypes of the columns of one conditioning tensor."""
    return {f"{field}.start": np.int64, f"{field}.rows": np.int64, f"{field}.crc32c": np.uint32}


# -- shards ---------------------------------------------------------------------------------------


def shard_path(folder: Path, file: str) -> Path:
    """The file of a shard; a symbolic link is followed within the folder, and not out of it.

    Raises:
        DatasetError: it would lie elsewhere, or cannot be found.
    """
    path = folder / file
    if not FILE_NAME.fullmatch(file):
        raise OutsideFolder(
            f"{folder / MANIFEST} names the shard {file!r}, which is no name of a shard: it is damaged or made up, do "
            "not use it", folder / MANIFEST,
        )  # fmt: skip
    try:
        if not path.is_symlink():
            path.stat()
            return path
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise MissingShard(
            f"shard {path} is missing: restore it, or leave it out with LatentDataset(exclude=[{file!r}]) or "
            "attr-engine shards repair --drop", path,
        ) from None  # fmt: skip
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        what = getattr(error, "strerror", None) or one_line(error)
        raise named(ReadError("unreadable", -1, -1, what), path, None) from None
    if folder.resolve() not in target.parents:
        raise OutsideFolder(
            f"shard {path} is a symbolic link out of {folder}: put the file itself there", path
        )
    return target


def meta_sum(meta: Mapping[str, Any]) -> int:
    """CRC-32C of the metadata, whatever the order of their keys."""
    return native.crc32c(json.dumps({name: meta[name] for name in _META}, sort_keys=True).encode())


def checksum(pieces: Iterable[bytes]) -> int:
    """CRC-32C of bytes that come in pieces."""
    value = 0
    for piece in pieces:
        value = native.crc32c(piece, value)
    return value


# -- reading it -----------------------------------------------------------------------------------


class Manifest:
    """An open manifest: its numbers at once, its texts when they are asked for.

    Args:
        path: the file.

    Raises:
        DatasetError: missing, damaged, of another format, or not what a writer writes.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        if not path.is_file():
            raise DatasetError(
                f"{path.parent} holds no data set ({MANIFEST} is missing): run attr-engine ingest --out {path.parent}, "
                "or attr-engine shards repair where its shards are whole", path,
            )  # fmt: skip
        try:
            # The handle stays open: what is read later belongs to the same file, also after it was replaced.
            self._bytes = pa.OSFile(str(path))
            self._file = pq.ParquetFile(self._bytes, page_checksum_verification=True)
            self.meta = json.loads((self._file.schema_arrow.metadata or {})[b"attr_engine"])
            _check_format(self.meta)
            self._check_seal()
            _check_meta(self.meta)
            tracks, dropped = sum(shard[2] for shard in self.meta["shards"]), self.meta["dropped"]
            if self._file.metadata.num_rows != tracks - sum(row >= 0 for _, row, _ in dropped):
                raise ValueError("it does not list every track of its shards, or lists more")
            names = dict(NUMBERS)
            for field in self.meta["fields"]:
                names.update(columns_of(field))
            table = self._file.read(columns=list(names))
            self.columns = {name: _numbers(name, table.column(name), dtype) for name, dtype in names.items()}
            self._check_rows()
        except DatasetError as error:
            raise type(error)(f"{path}: {error}", path, error.track) from error
        except PermissionError as error:
            raise DatasetError(
                f"{path} cannot be read ({one_line(error)}): check its permissions", path
            ) from error
        except Exception as error:  # pyarrow raises anything on damaged files
            raise self.damaged(error) from error

    def _check_seal(self) -> None:
        size = self._bytes.size()
        (length,) = struct.unpack("<I", self._bytes.read_at(4, size - 8))
        begin = size - 8 - length - len(SEAL) - 4
        found = self._bytes.read_at(len(SEAL) + 4, max(begin, 0))
        if begin < 0 or found != SEAL + struct.pack("<I", checksum(self.octets(begin))):
            raise ValueError("its bytes do not match their checksum")

    def octets(self, seal: int | None = None) -> Iterator[bytes]:
        """The bytes of the file that was opened, in pieces, without the seal that begins at byte ``seal``."""
        size = self._bytes.size()
        parts = [(0, size)] if seal is None else [(0, seal), (seal + len(SEAL) + 4, size)]
        for begin, end in parts:
            for at in range(begin, end, _CHUNK):
                yield self._bytes.read_at(min(_CHUNK, end - at), at)

    def damaged(self, error: Exception) -> DamagedManifest:
        """The exception for a manifest that cannot be read."""
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else one_line(error)
        return DamagedManifest(
            f"{self.path} is damaged ({what}): restore it, or make it again from its shards: attr-engine shards repair",
            self.path,
        )

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def _check_rows(self) -> None:
        """Refuse numbers that lie outside the shards, before anybody computes with them."""
        columns, shards = self.columns, self.meta["shards"]
        shard, row = columns["shard"].astype(np.int64), columns["row"].astype(np.int64)
        counts = np.array([tracks for _, _, tracks, _ in shards], dtype=np.int64)
        if len(shard) == 0:
            return
        if shard.min() < 0 or shard.max() >= len(shards):
            raise ManifestMismatch("a track lies in a shard that is not listed: restore it, or ingest again")
        if row.min() < 0 or (row >= counts[shard]).any() or (np.diff(shard * 2**31 + row) <= 0).any():
            raise ValueError("its tracks are not in the order of the shards, each of them once")
        index = {file: i for i, (file, *_) in enumerate(shards)}
        gone = [index[file] * 2**31 + place for file, place, _ in self.meta["dropped"] if place >= 0]
        taken = np.array(gone, dtype=np.int64)
        if np.isin(shard * 2**31 + row, taken).any():
            raise ValueError("a track that was left out is listed")
        bytes_of = np.array([size for _, size, *_ in shards], dtype=np.int64)[shard]
        width = self.meta["channels"] * DTYPES[self.meta["dtype"]].itemsize
        self._check_place("start", "frames", bytes_of // width)
        for name, (dtype, shape) in self.meta["fields"].items():
            width = math.prod(shape) * DTYPES[dtype].itemsize
            self._check_place(f"{name}.start", f"{name}.rows", bytes_of // width)

    def _check_place(self, start: str, rows: str, room: np.ndarray) -> None:
        first, count = self.columns[start], self.columns[rows]
        # In this order nothing overflows: no number is more than the bytes of a file.
        wrong = (first < 0) | (first > room) | (count < 0) | (count > room)
        wrong |= ~wrong & (first > room - count)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            track = self.texts("id")[i]
            sentence = f"track {track!r}: its {start} {first[i]} and {rows} {count[i]} do not fit its shard"
            way_out = "restore it, or make it again from its shards: attr-engine shards repair"
            raise ManifestMismatch(f"{sentence}; {way_out}", self.path, track)

    def texts(self, name: str, first: int = 0, last: int | None = None) -> list[str]:
        """Rows ``first`` to ``last`` of a column of text; only what is needed is read.

        Raises:
            DamagedManifest: it cannot be read.
        """
        try:
            return self.column(name, first, last).to_pylist()
        except UnicodeDecodeError as error:
            raise self.damaged(error) from error

    def column(self, name: str, first: int = 0, last: int | None = None) -> Any:
        """The same as an Arrow column."""
        import pyarrow as pa

        last = len(self) if last is None else last
        try:
            groups, skipped, reached = [], 0, 0
            for number in range(self._file.num_row_groups):
                begin, reached = reached, reached + self._file.metadata.row_group(number).num_rows
                if reached <= first:
                    skipped = reached
                elif begin < last:
                    groups.append(number)
            column = self._file.read_row_groups(groups, columns=[name]).column(name)
            if not pa.types.is_string(column.type) or column.null_count:
                raise TypeError(f"column {name!r} is {column.type} with {column.null_count} nulls")
            column = column.slice(first - skipped, last - first)
            if len(column) != last - first:
                raise ValueError(f"column {name!r} lacks rows")
            return column
        except Exception as error:  # pyarrow raises anything on damaged files
            raise self.damaged(error) from error


def _numbers(name: str, column: Any, dtype: Any) -> np.ndarray:
    import pyarrow as pa

    if column.null_count or column.type != pa.from_numpy_dtype(dtype):
        raise TypeError(
            f"column {name!r} is {column.type} with {column.null_count} nulls, not {np.dtype(dtype)}"
        )
    return np.ascontiguousarray(column.to_numpy())


def _check_format(meta: Any) -> None:
    if not isinstance(meta, dict):
        raise TypeError("its metadata are not a JSON object")
    found = meta.get("format")
    if is_newer(found):
        raise NewerFormat(
            f"the format is {found!r}, this version reads {FORMAT!r}: install a newer attr-engine"
        )
    if found != FORMAT:
        raise DatasetError(f"the format is {found!r}, this version reads {FORMAT!r}: ingest again")


def _check_meta(meta: dict[str, Any]) -> None:
    if set(meta) != {*_META, "crc32c"} or meta_sum(meta) != meta["crc32c"]:
        raise ValueError("its metadata do not match their checksum")
    if type(meta["channels"]) is not int or meta["channels"] < 1 or not isinstance(meta["extra"], dict):
        raise TypeError("its metadata have values of another type")
    if meta["dtype"] not in FLOATS:
        raise TypeError(f"its dtype is {meta['dtype']!r}")
    for name, (dtype, shape) in meta["fields"].items():
        sized = (
            isinstance(shape, list) and len(shape) < MAX_RANK and all(type(x) is int and x > 0 for x in shape)
        )
        if not field_name(name) or dtype not in DTYPES or not sized or math.prod(shape) >= 2**31:
            raise TypeError(f"its conditioning tensor {name!r} is described wrongly")
    for file, *numbers in meta["shards"]:
        size, tracks, head = numbers
        whole = all(type(x) is int and x >= 0 for x in numbers)
        if not isinstance(file, str) or not whole or size >= 2**63 or tracks >= 2**31 or head >= 2**32:
            raise TypeError("its list of shards has values of another type")
    counts = {file: tracks for file, _, tracks, _ in meta["shards"]}
    for file, row, track in meta["dropped"]:
        if not isinstance(file, str) or not isinstance(track, str) or type(row) is not int:
            raise TypeError("its list of what was left out has values of another type")
        if (row != -1 or file in counts) and not 0 <= row < counts.get(file, 0):
            raise ValueError("its list of what was left out does not fit its shards")
    if len({(file, row) for file, row, _ in meta["dropped"]}) != len(meta["dropped"]):
        raise ValueError("something is left out twice")
    check_padding(meta["padding"], meta["channels"], "the padding (latent of silence)")
    names = [shard[0] for shard in meta["shards"]]
    if len(set(names)) != len(names):
        raise ManifestMismatch("a shard is listed twice: restore it, or ingest again")
