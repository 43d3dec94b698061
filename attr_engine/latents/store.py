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

from attr_engine.errors import UserError
from attr_engine.latents import native
from attr_engine.latents.batch import Batch
from attr_engine.latents.memory import check_ids, check_latent

FORMAT = "attr_engine.latents/1"
MANIFEST = "manifest.parquet"
_MAX_HEADER = 100 << 20
_DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_COLUMNS = ("id", "shard", "start", "frames", "crc32c", "conditioning", "info")


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
            UserError: wrong shape or dtype, NaN or infinity, or other channels than before.
        """
        frame_major = np.ascontiguousarray(check_latent(latent, name))
        kind = (frame_major.shape[1], frame_major.dtype)
        if self._kind is not None and kind != self._kind:
            raise UserError(
                f"track {name!r} has {kind[0]} channels of {kind[1]}, the tracks before it {self._kind[0]} of {self._kind[1]}"
            )
        self._kind = kind
        row = (name, self._shard, self._start, len(frame_major), native.crc32c(frame_major.tobytes()))
        for column, value in zip(
            _COLUMNS, (*row, json.dumps(dict(conditioning)), json.dumps(dict(info))), strict=True
        ):
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
        part = path.with_suffix(".part")
        save_file(
            {"latents": np.concatenate(self._pending), "offsets": offsets}, part, metadata={"format": FORMAT}
        )
        _sync_rename(part, path)
        self._pending, self._start, self._bytes, self._shard = [], 0, 0, self._shard + 1

    def close(self) -> None:
        """Write what is pending, then the manifest.

        Raises:
            UserError: no track was added, or two have the same id.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows["id"]:
            raise UserError(f"no track was written to {self.out}: the source is empty")
        check_ids(self._rows["id"])
        self._flush()
        assert self._kind is not None
        meta = {
            "format": FORMAT,
            "channels": self._kind[0],
            "padding": None if self._padding is None else [float(x) for x in self._padding],
            "extra": self._extra,
        }
        table = pa.table(self._rows).replace_schema_metadata({"attr_engine": json.dumps(meta)})
        part = self.out / (MANIFEST + ".part")
        pq.write_table(table, part)
        _sync_rename(part, self.out / MANIFEST)


def _sync_rename(part: Path, path: Path) -> None:
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


class _Shard:
    """An open shard: where its latents start, checked against the size of the file."""

    def __init__(self, path: Path, channels: int) -> None:
        if not path.is_file():
            raise UserError(f"shard {path} is missing: restore it, or ingest again")
        self.path, self.fd = path, os.open(path, os.O_RDONLY)
        try:
            self._read_header(channels)
        except Exception:
            os.close(self.fd)
            raise

    def _read_header(self, channels: int) -> None:
        size = os.fstat(self.fd).st_size
        head = os.pread(self.fd, 8, 0)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise UserError(
                f"shard {self.path} has no valid header: it is damaged, restore it or ingest again"
            )
        try:
            header = json.loads(os.pread(self.fd, length, 8))
            entry = header["latents"]
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            self.dtype = _DTYPES[entry["dtype"]]
            frames, width = int(shape[0]), int(shape[1])
            self.row_bytes = width * self.dtype.itemsize
            self.data_offset = 8 + length + int(begin)
            whole = end - begin == frames * self.row_bytes and begin >= 0 and 8 + length + int(end) <= size
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"shard {self.path} has a header that cannot be read: restore it, or ingest again"
            ) from error
        if not whole or width != channels:
            raise UserError(
                f"shard {self.path} is cut short or of other channels: restore it, or ingest again"
            )
        self.frames = frames

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LatentDataset:
    """A data set written by :class:`LatentWriter` (satisfies :class:`attr_engine.latents.batch.Tracks`).

    Args:
        path: its folder.

    Raises:
        UserError: no whole data set there, or a manifest that does not fit its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        columns, meta = self._read_manifest()
        self.ids: list[str] = columns["id"]
        check_ids(self.ids)
        self.lengths = np.asarray(columns["frames"], dtype=np.int64)
        self._starts = np.asarray(columns["start"], dtype=np.int64)
        self._crc = np.asarray(columns["crc32c"], dtype=np.uint32)
        self._shard_of = columns["shard"]
        self.conditioning = [json.loads(text) for text in columns["conditioning"]]
        self.info = [json.loads(text) for text in columns["info"]]
        self.channels, self.extra = int(meta["channels"]), dict(meta["extra"])
        self.padding = None if meta["padding"] is None else np.asarray(meta["padding"], dtype=np.float64)
        self._shards = {
            i: _Shard(self.path / f"shard-{i:05d}.safetensors", self.channels)
            for i in sorted(set(self._shard_of))
        }
        self._check_ranges()

    def _read_manifest(self) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise UserError(
                f"{self.path} holds no data set ({MANIFEST} is missing): run attr-engine ingest --out {self.path}"
            )
        try:
            table = pq.read_table(manifest)
            meta = json.loads((table.schema.metadata or {})[b"attr_engine"])
            columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise UserError(f"{manifest} cannot be read ({error}): restore it, or ingest again") from error
        if meta.get("format") != FORMAT:
            raise UserError(f"{manifest} is of format {meta.get('format')!r}, this version reads {FORMAT!r}")
        self.fingerprint = hashlib.sha256(manifest.read_bytes()).hexdigest()
        return columns, meta

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
            UserError: a track's bytes do not match their checksum, or cannot be read.
        """
        by_shard: dict[int, list[int]] = defaultdict(list)
        for position, i in enumerate(indices):
            by_shard[self._shard_of[i]].append(position)
        dtype = max((self._shards[s].dtype for s in by_shard), key=lambda d: d.itemsize)
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
        except (native.ChecksumError, OSError) as error:
            place = str(error).removeprefix("track ").split(":")[0]
            name = self.ids[tracks[int(place)]] if place.isdigit() and int(place) < len(tracks) else "?"
            raise UserError(
                f"{shard.path}, track {name!r}: {error}; restore the shard, or ingest again"
            ) from error
        return buffer
