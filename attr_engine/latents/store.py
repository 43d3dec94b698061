"""Latents on disk: safetensors shards of packed frames, and a Parquet manifest.

A data set is a folder:

* ``shard-00000.safetensors``: ``latents [frames, C]`` of all its tracks one after the other (a
  track is one contiguous read) and ``offsets`` int64 ``[n + 1]``;
* ``manifest.parquet``: one row a track (id, shard, start, frames, CRC-32C of its bytes,
  conditioning and info as JSON); written last, so that a manifest means that the set is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.errors import UserError, one_line
from attr_engine.files import whole_file
from attr_engine.latents import native
from attr_engine.latents.batch import Batch
from attr_engine.latents.memory import check_ids, check_latent, check_padding

FORMAT = "attr_engine.latents/1"
MANIFEST = "manifest.parquet"
# A header of ours has two tensors and about 200 bytes; the cap keeps a hostile one from filling memory.
_MAX_HEADER = 1 << 20
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_TEXTS, _NUMBERS = ("id", "conditioning", "info"), ("shard", "start", "frames", "crc32c")
_COLUMNS = ("id", *_NUMBERS, "conditioning", "info")
_META = ("format", "channels", "padding", "extra")


class LatentWriter:
    """Write a data set track by track; :meth:`close` makes it whole.

    Args:
        out: the folder; refused where it already holds a whole data set.
        shard_bytes: a shard is written once it holds this many bytes.
        padding: ``[C]`` latent of silence that readers pad with; default zeros.
        extra: what readers should know of the set (autoencoder hash, sample rate, ...), JSON.

    Raises:
        UserError: the folder already holds a data set.
    """

    def __init__(
        self,
        out: str | Path,
        shard_bytes: int = 256 << 20,
        padding: np.ndarray | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = Path(out)
        if (self.out / MANIFEST).exists():
            raise UserError(f"{self.out} already holds a data set: choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self._shard_bytes, self._padding, self._extra = shard_bytes, padding, dict(extra or {})
        self._pending: list[np.ndarray] = []
        self._rows: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._seen: set[str] = set()
        self._shard = self._start = self._bytes = 0
        self._kind: tuple[int, np.dtype[Any]] | None = None

    def add(
        self, name: str, latent: np.ndarray, conditioning: Mapping[str, Any], info: Mapping[str, Any]
    ) -> None:
        """Add one track.

        Args:
            name: its id.
            latent: ``[C, n]`` float16, float32 or float64, valid frames only.
            conditioning: JSON values that the model's conditioners read.
            info: JSON values for people: title, artist, licence, source, ...

        Raises:
            UserError: wrong shape or dtype, NaN or infinity, other channels than before, an id that
                stands twice, or values that are not JSON.
        """
        check_ids([name], self._seen)
        frame_major = np.ascontiguousarray(check_latent(latent, name))
        kind = (frame_major.shape[1], frame_major.dtype)
        if self._kind is not None and kind != self._kind:
            raise UserError(
                f"track {name!r} has {kind[0]} channels of {kind[1]}, the tracks before it {self._kind[0]} of {self._kind[1]}"
            )
        self._kind = kind
        row = (name, self._shard, self._start, len(frame_major), native.crc32c(frame_major.tobytes()))
        texts = (
            _to_json(conditioning, f"conditioning of {name!r}", False),
            _to_json(info, f"info of {name!r}"),
        )
        for column, value in zip(_COLUMNS, (*row, *texts), strict=True):
            self._rows[column].append(value)
        self._pending.append(frame_major)
        self._start += len(frame_major)
        self._bytes += frame_major.nbytes
        if self._bytes >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        from safetensors.numpy import save_file

        offsets = np.cumsum([0, *map(len, self._pending)], dtype=np.int64)
        path = self.out / f"shard-{self._shard:05d}.safetensors"
        tensors = {"latents": np.concatenate(self._pending), "offsets": offsets}
        with whole_file(path) as part:
            save_file(tensors, part, metadata={"format": FORMAT})
        self._pending, self._start, self._bytes, self._shard = [], 0, 0, self._shard + 1

    def close(self) -> None:
        """Write what is pending, then the manifest.

        Raises:
            UserError: no track was added, or the padding is not one finite value a channel.
        """
        if not self._rows["id"]:
            raise UserError(f"no track was written to {self.out}: the source is empty")
        assert self._kind is not None
        check_padding(self._padding, self._kind[0], f"the padding (latent of silence) for {self.out}")
        padding = None if self._padding is None else [float(x) for x in self._padding]
        self._flush()
        meta = {"format": FORMAT, "channels": self._kind[0], "padding": padding, "extra": self._extra}
        write_manifest(self.out / MANIFEST, self._rows, meta)


def write_manifest(path: Path, rows: Mapping[str, list[Any]], meta: Mapping[str, Any]) -> None:
    """Write a manifest; its pages and its ``meta`` carry checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    signed = {**meta, "crc32c": native.crc32c(json.dumps(dict(meta), sort_keys=True).encode())}
    table = pa.table(dict(rows)).replace_schema_metadata({"attr_engine": json.dumps(signed)})
    with whole_file(path) as part:
        pq.write_table(table, part, write_page_checksum=True)


def _to_json(values: Mapping[str, Any], what: str, allow_nan: bool = True) -> str:
    try:
        return json.dumps(dict(values), allow_nan=allow_nan)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"the {what} cannot be stored as JSON ({error}): use finite numbers and text"
        ) from error


class _Shard:
    """An open shard: where its latents start, checked against the size of the file."""

    def __init__(self, path: Path, channels: int) -> None:
        try:
            self.path, self.fd = path, os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing: restore it, or ingest again") from None
        except OSError as error:
            raise UserError(
                f"shard {path} cannot be opened ({error.strerror}): check it, or ingest again"
            ) from error
        try:
            header, data_offset, size = self._read_header()
            self.dtype, self.frames, width, begin = _latents_of(header, size - data_offset)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(
                f"shard {path} has no valid header ({_reason(error)}): it is damaged or cut short, restore it or ingest again"
            ) from error
        if width != channels:
            raise UserError(
                f"shard {path} has {width} channels, its manifest {channels}: restore it, or ingest again"
            )
        self.row_bytes, self.data_offset = width * self.dtype.itemsize, data_offset + begin

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        """The header, where the data start, and the size of the file."""
        size = os.fstat(self.fd).st_size
        head = os.pread(self.fd, 8, 0)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"its length is given as {length} bytes, the file has {size}")
        header = json.loads(os.pread(self.fd, length, 8), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise TypeError("it is not a JSON object")
        return header, 8 + length, size

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else one_line(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _latents_of(header: Mapping[str, Any], payload: int) -> tuple[torch.dtype, int, int, int]:
    """(dtype, frames, channels, first byte) of the latents; the tensors must fill the payload without holes.

    Raises:
        ValueError, KeyError, TypeError: what safetensors would refuse too.
    """
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        for number in (begin, end, *entry["shape"]):
            if type(number) is not int or number < 0:
                raise ValueError(f"tensor {name!r} has the size or offset {number!r}")
        spans.append((begin, end))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached or end < begin:
            raise ValueError(f"a tensor lies at {begin} to {end}, expected from {reached}")
        reached = end
    if reached != payload:
        raise ValueError(f"the tensors take {reached} bytes, the file has {payload} for them")
    entry = header["latents"]
    frames, channels = entry["shape"]
    dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if end - begin != frames * channels * dtype.itemsize:
        raise ValueError(f"{frames} x {channels} latents do not take {end - begin} bytes")
    return dtype, frames, channels, begin


def _read_manifest(path: Path) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns (JSON parsed) and ``meta`` of a manifest, with the types that the writer gives them.

    Raises:
        UserError: missing, damaged, of another format, or not what the writer writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(
            f"{path.parent} holds no data set ({MANIFEST} is missing): run attr-engine ingest --out {path.parent}"
        )
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        meta = json.loads((table.schema.metadata or {})[b"attr_engine"])
        _check_meta(meta)
        columns = {name: _values(table.column(name), name) for name in _COLUMNS}
        columns.update({name: [_object(text) for text in columns[name]] for name in ("conditioning", "info")})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}): restore it, or ingest again") from error
    return columns, meta


def _check_meta(meta: Any) -> None:
    if not isinstance(meta, dict):
        raise TypeError("its metadata are not a JSON object")
    if meta.get("format") != FORMAT:
        raise UserError(f"the format is {meta.get('format')!r}, this version reads {FORMAT!r}: ingest again")
    signed = json.dumps({name: meta[name] for name in _META}, sort_keys=True)
    if len(meta) != len(_META) + 1 or native.crc32c(signed.encode()) != meta["crc32c"]:
        raise ValueError("its metadata do not match their checksum")
    if type(meta["channels"]) is not int or meta["channels"] < 1 or not isinstance(meta["extra"], dict):
        raise TypeError("its metadata have values of another type")
    check_padding(meta["padding"], meta["channels"], "the padding (latent of silence)")


def _values(column: Any, name: str) -> list[Any]:
    import pyarrow as pa

    fits = pa.types.is_string if name in _TEXTS else pa.types.is_integer
    if not fits(column.type) or column.null_count:
        raise TypeError(f"column {name!r} is {column.type} with {column.null_count} nulls")
    values = column.to_pylist()
    top = 2**32 if name == "crc32c" else 2**62
    if name in _NUMBERS and values and not 0 <= min(values) <= max(values) < top:
        raise ValueError(f"column {name!r} has values from {min(values)} to {max(values)}")
    return values


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"a row holds {type(value).__name__} where a JSON object belongs")
    return value


class LatentDataset:
    """A data set written by :class:`LatentWriter` (satisfies :class:`attr_engine.latents.batch.Tracks`).

    Args:
        path: its folder.

    Raises:
        UserError: no whole data set there, or a manifest that does not fit its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = self.path / MANIFEST
        columns, meta = _read_manifest(manifest)
        self.fingerprint = hashlib.sha256(manifest.read_bytes()).hexdigest()
        self.ids: list[str] = columns["id"]
        check_ids(self.ids)
        self.lengths = np.asarray(columns["frames"], dtype=np.int64)
        self._starts = np.asarray(columns["start"], dtype=np.int64)
        self._crc = np.asarray(columns["crc32c"], dtype=np.uint32)
        self._shard_of = columns["shard"]
        self.conditioning: list[dict[str, Any]] = columns["conditioning"]
        self.info: list[dict[str, Any]] = columns["info"]
        self.channels, self.extra = int(meta["channels"]), dict(meta["extra"])
        self.padding = None if meta["padding"] is None else np.asarray(meta["padding"], dtype=np.float64)
        self._shards = {
            i: _Shard(self.path / f"shard-{i:05d}.safetensors", self.channels)
            for i in sorted(set(self._shard_of))
        }
        self._check_ranges()

    def _check_ranges(self) -> None:
        for i, name in enumerate(self.ids):
            shard, start, frames = self._shards[self._shard_of[i]], int(self._starts[i]), int(self.lengths[i])
            if frames < 1 or start < 0 or start + frames > shard.frames:
                raise UserError(
                    f"track {name!r} lies outside {shard.path}: the manifest does not belong to this shard, ingest again"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], frames: int) -> Batch:
        """Tracks at ``indices``, in that order, padded to ``frames``, in the stored dtype.

        Raises:
            UserError: a track's bytes do not match their checksum, cannot be read, or do not fit ``frames``.
        """
        longest = max(indices, key=lambda i: self.lengths[i], default=None)
        if longest is not None and self.lengths[longest] > frames:
            raise UserError(
                f"track {self.ids[longest]!r} has {self.lengths[longest]} frames, more than the {frames} asked for: cut it"
            )
        by_shard: dict[int, list[int]] = defaultdict(list)
        for position, i in enumerate(indices):
            by_shard[self._shard_of[i]].append(position)
        dtypes = (self._shards[s].dtype for s in by_shard)
        dtype = max(dtypes, key=lambda d: d.itemsize, default=torch.float32)
        out = torch.zeros(len(indices), frames, self.channels, dtype=dtype)
        for s, positions in by_shard.items():
            out[positions] = self._gather(self._shards[s], [indices[p] for p in positions], frames).to(dtype)
        return Batch(
            ids=[self.ids[i] for i in indices],
            latents=out.transpose(1, 2),
            valid=torch.as_tensor(self.lengths[list(indices)]),
            conditioning=[self.conditioning[i] for i in indices],
        )

    def _gather(self, shard: _Shard, tracks: list[int], frames: int) -> torch.Tensor:
        buffer = torch.empty(len(tracks), frames, self.channels, dtype=shard.dtype)
        pad_row = None
        if self.padding is not None:
            pad_row = torch.as_tensor(self.padding).to(shard.dtype).numpy().tobytes()
        try:
            native.gather(
                shard.fd, shard.data_offset, shard.row_bytes, self._starts[tracks], self.lengths[tracks],
                buffer.view(-1).view(torch.uint8).numpy(), frames, pad_row, self._crc[tracks],
            )  # fmt: skip
        except (ValueError, OSError) as error:  # a ChecksumError is a ValueError
            place = str(error).removeprefix("track ").split(":")[0]
            name = self.ids[tracks[int(place)]] if place.isdigit() and int(place) < len(tracks) else "?"
            raise UserError(
                f"{shard.path}, track {name!r}: {error}; restore the shard, or ingest again"
            ) from error
        return buffer
