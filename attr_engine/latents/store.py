"""Reading a data set: a folder of shards and a manifest; any tracks in any order, or all of them as a stream."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch, Lazy
from attr_engine.latents.errors import (
    DamagedManifest,
    ManifestMismatch,
    TruncatedShard,
)
from attr_engine.latents.layout import Reading
from attr_engine.latents.manifest import MANIFEST, Manifest, shard_path
from attr_engine.latents.memory import check_ids
from attr_engine.latents.stream import LatentStream, read_once


class _Rows(Lazy[dict[str, Any]]):
    """A column of JSON objects, parsed when they are asked for."""

    def __init__(self, manifest: Manifest, column: str, kept: np.ndarray | None) -> None:
        self._manifest, self._column, self._kept = manifest, column, kept
        self._count = len(manifest) if kept is None else len(kept)

    @functools.cached_property
    def _texts(self) -> list[str]:
        texts = self._manifest.texts(self._column)
        return texts if self._kept is None else [texts[i] for i in self._kept]

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> dict[str, Any]:
        """The object of one track."""
        try:
            value = json.loads(self._texts[index])
            if not isinstance(value, dict):
                raise TypeError(f"a row holds {type(value).__name__} where a JSON object belongs")
        except (ValueError, TypeError, RecursionError) as error:
            raise self._manifest.damaged(error) from error
        return value


class LatentDataset:
    """A data set written by :class:`LatentWriter` (satisfies :class:`attr_engine.latents.batch.Tracks`).

    Safe to use from several threads and after a fork. Files are opened when they are read.

    Args:
        path: its folder.
        exclude: names of shards to leave out, such as ``"shard-00003.safetensors"``; their tracks are in
            ``excluded``.

    Attributes:
        path: its folder.
        lengths: int64 ``[N]``, valid frames.
        channels: C.
        dtype: of the latents as stored.
        padding: float64 ``[C]``, latent of silence, or None for zeros.
        conditioning: a mapping a track, without the tensors, which come with :meth:`batch`.
        info: a mapping a track.
        extra: what the writer wanted readers to know.

    Raises:
        UserError: no whole data set there, or a manifest that does not fit its shards; see
            :mod:`attr_engine.latents.errors`.
    """

    def __init__(self, path: str | Path, exclude: Sequence[str] = ()) -> None:
        self.path, self._exclude = Path(path), tuple(sorted(set(exclude)))
        self.manifest = Manifest(self.path / MANIFEST)
        meta, columns = self.manifest.meta, self.manifest.columns
        self.files: list[str] = [shard[0] for shard in meta["shards"]]
        unknown = [name for name in self._exclude if name not in self.files]
        if unknown:
            raise UserError(
                f"{self.path} has no shard {unknown[0]!r} to leave out: its shards are {', '.join(self.files[:3])}"
            )
        self._kept: np.ndarray | None = None
        if self._exclude:
            gone = [i for i, name in enumerate(self.files) if name in self._exclude]
            self._kept = np.flatnonzero(~np.isin(columns["shard"], gone))
            columns = {name: values[self._kept] for name, values in columns.items()}
        self.lengths: np.ndarray = columns["frames"]
        self.channels, self.extra = int(meta["channels"]), dict(meta["extra"])
        self.padding = None if meta["padding"] is None else np.asarray(meta["padding"], dtype=np.float64)
        self.conditioning = _Rows(self.manifest, "conditioning", self._kept)
        self.info = _Rows(self.manifest, "info", self._kept)
        self.reading = Reading(meta, columns, self._paths(meta))
        self.dtype = self.reading.dtype

    def _paths(self, meta: Mapping[str, Any]) -> list[Path]:
        """Paths of the shards, checked to lie in the folder, to be there and to have their size."""
        out = []
        for file, size, *_ in meta["shards"]:
            path = self.path / file
            if file not in self._exclude:
                path = shard_path(self.path, file)
            out.append(path)
            if file in self._exclude or not path.is_file():
                continue  # what else it may be is told when it is opened
            found = path.stat().st_size
            if found != size:
                kind = TruncatedShard if found < size else ManifestMismatch
                raise kind(
                    f"shard {self.path / file}: it has {found} bytes, {size} were recorded; restore it, or leave it out "
                    f"with LatentDataset(exclude=[{file!r}]) or attr-engine shards repair --drop", self.path / file,
                )  # fmt: skip
        return out

    @functools.cached_property
    def ids(self) -> list[str]:
        """Stable ids in storage order, unique."""
        ids = self.manifest.texts("id")
        try:
            check_ids(ids)
        except UserError as error:
            raise DamagedManifest(f"{self.manifest.path}: {error}", self.manifest.path) from error
        return ids if self._kept is None else [ids[i] for i in self._kept]

    @functools.cached_property
    def _id_column(self) -> Any:
        return self.manifest.column("id").combine_chunks()

    def names(self, indices: np.ndarray) -> list[str]:
        """Ids of the tracks at ``indices``, int64 ``[n]``; the other ids need not be decoded for that."""
        if "ids" in self.__dict__:
            return [self.ids[i] for i in indices]
        return self._id_column.take(indices if self._kept is None else self._kept[indices]).to_pylist()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when any latent, id or conditioning changes, or other shards are left out."""
        digest = hashlib.sha256()
        for piece in self.manifest.octets():
            digest.update(piece)
        return hashlib.sha256(f"{digest.hexdigest()} {self._exclude}".encode()).hexdigest()

    @functools.cached_property
    def excluded(self) -> list[str]:
        """Ids of the tracks that ``exclude`` left out."""
        if self._kept is None:
            return []
        ids, kept = self.manifest.texts("id"), set(self._kept.tolist())
        return [name for i, name in enumerate(ids) if i not in kept]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentDataset, (self.path, self._exclude)

    def batch(self, indices: Sequence[int], frames: int) -> Batch:
        """Tracks at ``indices``, in that order, padded to ``frames``, in the stored dtype.

        Raises:
            UserError: a track's bytes do not match their checksum, hold NaN or infinity, cannot be read, or do
                not fit ``frames``.
        """
        return read_once(self, np.asarray(indices, dtype=np.int64), frames)

    def stream(self, batch: int = 32, frames: int | None = None, **options: Any) -> LatentStream:
        """Batches of all tracks, read ahead; see :class:`attr_engine.latents.stream.LatentStream`."""
        return LatentStream(self, batch, frames, **options)
