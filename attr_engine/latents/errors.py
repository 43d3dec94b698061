"""What can be wrong with a data set on disk; every message names the file, the track and the way out."""

from __future__ import annotations

from pathlib import Path

from attr_engine.errors import UserError


class DatasetError(UserError):
    """Something is wrong with a data set.

    Attributes:
        path: the file, where one is to blame.
        track: id of the track, where one is to blame.
    """

    def __init__(self, message: str, path: Path | str | None = None, track: str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)
        self.track = track

    def __reduce__(self) -> tuple[type, tuple[str, Path | None, str | None]]:
        return type(self), (str(self), self.path, self.track)


class MissingShard(DatasetError):
    """A shard of the manifest is not there."""


class UnreadableShard(DatasetError):
    """The operating system refuses to open or read a shard: permission, input/output error, not a file."""


class TruncatedShard(DatasetError):
    """A shard is shorter than the manifest says, or became shorter while it was being read."""


class DamagedHeader(DatasetError):
    """A file does not start with a valid safetensors header."""


class ManifestMismatch(DatasetError):
    """Manifest and shard are both valid but do not belong together."""


class ChecksumMismatch(DatasetError):
    """The bytes of a track are not those that were checksummed."""


class NonFiniteLatent(DatasetError):
    """A track holds NaN or infinity."""


class DamagedManifest(DatasetError):
    """The manifest cannot be read, or its content is not what a writer writes."""


class NewerFormat(DatasetError):
    """The data set was written by a later version of attr_engine."""


class OutsideFolder(DatasetError):
    """The manifest or a symbolic link leads out of the data set's folder."""


class DiskFull(DatasetError):
    """There is no room for the next shard or the manifest; what was written before is kept."""


class BuffersHeld(DatasetError):
    """Every buffer of a stream is held by a batch that is still alive."""


class StreamClosed(DatasetError):
    """A stream was used after it was closed, or in a process that was forked from its own."""


class ReadError(Exception):
    """What the readers raise among themselves: numbers in place of names (``csrc/error.h``).

    Args:
        kind: a key of ``KINDS``, or ``"argument"``.
        shard: index of the shard, -1 for none.
        track: index of the track in the plan, -1 for none.
        sentence: what is wrong.
    """

    def __init__(self, kind: str, shard: int, track: int, sentence: str) -> None:
        super().__init__(kind, shard, track, sentence)
        self.kind, self.shard, self.track, self.sentence = kind, shard, track, sentence


# kind: exception, way out
KINDS: dict[str, tuple[type[DatasetError], str]] = {
    "missing": (MissingShard, "restore it, or leave it out: attr-engine shards repair --drop"),
    "unreadable": (UnreadableShard, "check the file and its permissions"),
    "truncated": (TruncatedShard, "restore it, or leave it out: attr-engine shards repair --drop"),
    "header": (DamagedHeader, "restore it, or leave it out: attr-engine shards repair --drop"),
    "mismatch": (
        ManifestMismatch,
        "restore the shard, or make the manifest again: attr-engine shards repair",
    ),
    "checksum": (
        ChecksumMismatch,
        "restore the shard, or leave the track out: attr-engine shards repair --drop",
    ),
    "nonfinite": (NonFiniteLatent, "encode the track again, or read with nonfinite='allow'"),
    "newer": (NewerFormat, "install a newer attr-engine"),
    "starved": (BuffersHeld, ""),
    "closed": (StreamClosed, ""),
}


def named(error: ReadError, path: Path | str | None, track: str | None) -> Exception:
    """The exception for users: the file and the track by name, and the way out."""
    if error.kind not in KINDS:  # a mistake of the caller, not of the data
        return ValueError(f"track {track!r}: {error.sentence}" if track is not None else error.sentence)
    kind, way_out = KINDS[error.kind]
    where = "" if path is None else f"shard {path}"
    if track is not None:
        where = f"{where}, track {track!r}" if where else f"track {track!r}"
    sentence = f"{where}: {error.sentence}" if where else error.sentence
    return kind(f"{sentence}; {way_out}" if way_out else sentence, path, track)
