"""Writing a data set: shard by shard, resumable at any moment, the manifest last."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError, one_line
from attr_engine.latents.build import build_manifest, contents_of, shard_files, shared_of
from attr_engine.latents.errors import DiskFull
from attr_engine.latents.header import MAX_RANK, NAMES
from attr_engine.latents.manifest import MANIFEST, Manifest
from attr_engine.latents.memory import check_ids, check_latent, check_padding
from attr_engine.latents.shardfile import FILE_NAME, Track, field_name, write_shard

# What a reader needs on top of the nesting of the texts that it parses.
_SPARE_DEPTH = 200


class LatentWriter:
    """Write a data set track by track; :meth:`close` makes it whole.

    A shard is written under another name and renamed, and is never changed again. Whole shards that an
    interrupted writer left are taken over: :meth:`has` says which tracks they hold.

    Args:
        out: the folder; refused where it already holds a whole data set, unless ``append``.
        shard_bytes: a shard is written once it holds this many bytes.
        padding: ``[C]`` latent of silence that readers pad with; default zeros.
        extra: what readers should know of the set (autoencoder hash, sample rate, ...), JSON.
        append: add shards to the data set that is there.

    Attributes:
        resumed: tracks that were there when the writer was made.

    Raises:
        UserError: the folder already holds a data set, another process writes there, or its shards were
            written with another ``padding`` or ``extra``.
    """

    def __init__(
        self,
        out: str | Path,
        shard_bytes: int = 256 << 20,
        padding: np.ndarray | None = None,
        extra: Mapping[str, Any] | None = None,
        append: bool = False,
    ) -> None:
        self.out = Path(out)
        whole = (self.out / MANIFEST).exists()
        if whole and not append:
            raise UserError(f"{self.out} already holds a data set: choose another folder, or append to it")
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.out)
        check_padding(
            padding, 0 if padding is None else len(padding), f"the padding (latent of silence) for {self.out}"
        )
        self._meta = {"padding": None if padding is None else [float(x) for x in padding],
                      "extra": json.loads(_to_json(extra or {}, "extra", False))}  # fmt: skip
        self._shard_bytes = shard_bytes
        self._pending: list[Track] = []
        self._bytes = 0
        self._seen: set[str] = set()
        self._kind: dict[str, Any] | None = None
        self._dropped: list[tuple[str, int, str]] = []
        self._left_out: list[str] = []
        self._files: list[str] = []
        if whole:
            meta = Manifest(self.out / MANIFEST).meta
            self._files = [shard[0] for shard in meta["shards"]]
            self._dropped = [(file, row, track) for file, row, track in meta["dropped"] if row >= 0]
            self._left_out = [file for file, row, _ in meta["dropped"] if row < 0]
        try:
            self._take_over()
        except BaseException:
            self.release()
            raise
        self.resumed = len(self._seen)

    def _take_over(self) -> None:
        """Take over whole shards of a writer that was interrupted, and remove what it left half-written."""
        for part in leftovers(self.out):
            part.unlink()
        left_out = self._left_out
        gone = {(file, row) for file, row, _ in self._dropped}
        found = shard_files(self.out)
        self._files += [name for name in found if name not in self._files and name not in left_out]
        self._next = 1 + max((int(name[6:].split(".")[0]) for name in (*found, *left_out)), default=-1)
        for file in self._files:
            contents = contents_of(self.out, file)
            check_ids([row[0] for i, row in enumerate(contents.rows) if (file, i) not in gone], self._seen)
            shared = shared_of(contents)
            self._agree({**shared, **self._meta}, shared, f"the shard {self.out / file}")

    def _agree(self, kind: dict[str, Any], other: dict[str, Any], what: str) -> None:
        if self._kind is None:
            self._kind = {key: kind[key] for key in ("dtype", "channels", "fields")}
        theirs, ours = other.get("extra", {}), kind.get("extra", {})
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                raise UserError(
                    f"{what} was written with {key} {_short(theirs.get(key))}, now it is {_short(ours.get(key))}: "
                    "use the settings that it was begun with, or another --out"
                )
        for key in other:
            mine = kind[key] if key in self._meta else self._kind.get(key, other[key])
            if mine != other[key]:
                raise UserError(
                    f"{what} has the {key} {_short(other[key])}, expected {_short(mine)}: the tracks of a data set "
                    "have to agree, use another --out for other settings"
                )

    def has(self, name: str) -> bool:
        """Whether a track with this id was written or added."""
        return name in self._seen

    def add(
        self,
        name: str,
        latent: np.ndarray | Tensor,
        conditioning: Mapping[str, Any],
        info: Mapping[str, Any],
        more: bool = False,
    ) -> None:
        """Add one track.

        Args:
            name: its id.
            latent: ``[C, n]`` float16, bfloat16 (torch), float32 or float64, valid frames only.
            conditioning: what the model's conditioners read: JSON values, and arrays or tensors of at least one
                axis, which may differ from track to track along the first one.
            info: JSON values for people: title, artist, licence, source, ...
            more: further tracks of the same recording follow, which belong into the same shard.

        Raises:
            UserError: wrong shape or dtype, NaN or infinity, other channels or conditioning tensors than before,
                an id that stands twice, or values that are not JSON.
        """
        if self._lock < 0:
            raise UserError(f"the writer of {self.out} is closed: open another one with append=True")
        check_ids([name])
        if name in self._seen:
            raise UserError(f"the id {name!r} stands twice: ids must be unique, rename one of the two")
        # A copy: whose arrays these are may use them again before the shard is written.
        frame_major = check_latent(latent, name).clone(memory_format=torch.contiguous_format)
        tensors, values = _split(conditioning, name)
        fields = {key: [NAMES[x.dtype], list(x.shape[1:])] for key, x in tensors.items()}
        kind = {"dtype": NAMES[frame_major.dtype], "channels": frame_major.shape[1], "fields": fields}
        track = Track(name, frame_major, tensors, _to_json(values, f"conditioning of {name!r}", False),
                      _to_json(info, f"info of {name!r}"))  # fmt: skip
        self._agree(kind, kind, f"track {name!r}")
        self._seen.add(name)
        self._pending.append(track)
        self._bytes += sum(x.numel() * x.element_size() for x in (frame_major, *tensors.values()))
        self._bytes += len(track.conditioning) + len(track.info)
        if self._bytes >= self._shard_bytes and not more:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f"shard-{self._next:05d}.safetensors"
        _write(self.out / name, lambda: write_shard(self.out / name, self._pending, self._meta))
        self._files.append(name)
        self._pending, self._bytes, self._next = [], 0, self._next + 1

    def close(self) -> None:
        """Write what is pending, then the manifest.

        Raises:
            UserError: no track was added, or the padding is not one finite value a channel.
            DiskFull: make room and close it again.
        """
        if self._lock < 0:
            return
        if self._kind is None:
            raise UserError(f"no track was written to {self.out}: the source is empty")
        padding = self._meta["padding"]
        check_padding(padding, self._kind["channels"], f"the padding (latent of silence) for {self.out}")
        self._flush()
        path = self.out / MANIFEST
        _write(path, lambda: build_manifest(self.out, self._files, self._dropped, self._left_out))
        self.release()

    def release(self) -> None:
        """Let go of the folder; where the data set is not whole yet, another writer can take its shards over."""
        lock, self._lock = getattr(self, "_lock", -1), -1
        if lock >= 0:
            os.close(lock)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close after a block that ran through; release either way."""
        try:
            if kind is None and self._lock >= 0:
                self.close()
        finally:
            self.release()

    __del__ = release


def leftovers(folder: Path) -> list[Path]:
    """Files that an interrupted writer left half-written."""
    parts = (part for part in sorted(folder.glob("*.part")) if part.is_file())
    return [x for x in parts if x.stem == MANIFEST or FILE_NAME.fullmatch(x.stem)]


def lock_folder(folder: Path) -> int:
    """Hold the folder for one writer, for as long as the descriptor that is returned is open."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise UserError(
            f"another process writes to {folder}: wait for it, or choose another folder"
        ) from None
    return fd


def _write(path: Path, write: Callable[[], Any]) -> None:
    try:
        write()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"there is no room for {path} ({error.strerror}): make room and run the same again, "
            "whole shards are kept", path,
        ) from error  # fmt: skip


def _split(conditioning: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Conditioning tensors, and the rest."""
    tensors, values = {}, {}
    for key, value in conditioning.items():
        if not isinstance(value, np.ndarray | Tensor):
            values[key] = value
            continue
        what = f"the conditioning tensor {key!r} of {name!r} ({value.dtype}, shape {list(value.shape)})"
        try:
            given = np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value.detach()
            # A copy: whose array this is may use it again before the shard is written.
            tensor = torch.as_tensor(given).reshape(value.shape).to("cpu", copy=True).contiguous()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{what} cannot be stored ({one_line(error)}): use numbers of a common dtype"
            ) from error
        row = tensor.shape[1:]
        if not field_name(key) or not 1 <= tensor.dim() < MAX_RANK or tensor.dtype not in NAMES or 0 in row:
            raise UserError(
                f"{what} cannot be stored: use letters, digits, - and _ in its name, and one to {MAX_RANK - 1} axes"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{what} holds NaN or infinity: compute it again")
        tensors[key] = tensor
    return dict(sorted(tensors.items())), values


def _to_json(values: Mapping[str, Any], what: str, allow_nan: bool = True) -> str:
    try:
        text = json.dumps(dict(values), allow_nan=allow_nan)
        json.loads("[" * _SPARE_DEPTH + text + "]" * _SPARE_DEPTH)  # what cannot be read back is not written
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"the {what} cannot be stored as JSON ({error}): use finite numbers and text"
        ) from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:297] + "..."
