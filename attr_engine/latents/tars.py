"""Webdataset tars, streamed: nothing is written to disk, and nothing is read whose size was not checked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from attr_engine.errors import UserError, one_line
from attr_engine.latents.npy import MAX_ARRAY

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# As webdataset splits names: the key is all up to the first dot of the base name.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_OWN_NOTES = re.compile(r"__[^/]*__($|/)")  # members that webdataset keeps for itself
_MAX_TEXT = 16 << 20
_LIMITS = {"npy": MAX_ARRAY, "json": _MAX_TEXT, "txt": _MAX_TEXT}
_LONG_NAMES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_MAX_LONG_NAME = 1 << 20
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass
class Sample:
    """A sample of a tar.

    Attributes:
        tar: the file.
        key: names of its members, up to the first dot of the base name.
        parts: bytes of its members ``npy``, ``json`` and ``txt``.
        position: bytes of the tar read so far.
        there: whether its track is there already, so that its ``npy`` was not read.
        names: endings of all its members.
    """

    tar: Path
    key: str
    there: bool
    parts: dict[str, bytes] = field(default_factory=dict)
    position: int = 0
    names: set[str] = field(default_factory=set)


class _Refused(Exception):
    """A tar is not what it should be; a few words."""


class _Ending:
    """A stream that ends once: to skip a member that is said to be huge, tarfile would read behind the end for years."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._ends = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._ends += not data
        if self._ends > 2:
            raise _Refused("it is cut short, or a member is not as large as it says")
        return data


def find_tars(source: Path) -> list[Path]:
    """Tars of a folder (with its subfolders, sorted), or the one file.

    Raises:
        UserError: nothing there.
    """
    if source.is_file():
        return [source]
    found = sorted(p for p in source.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
    if not found:
        raise UserError(f"{source} holds no tars ({', '.join(SUFFIXES)}): check the path")
    return found


def _strict(at_end: list[bool]) -> type[tarfile.TarInfo]:
    """A reader of tar headers that raises where tarfile would stop without a word.

    Args:
        at_end: gets one entry, whether the last block was one of zeros, which ends a tar.
    """

    class Member(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            try:
                info = super().frombuf(buf, encoding, errors)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                at_end[:] = [True]
                raise
            except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                if at_end != [True]:
                    raise _Refused("it is cut short: it does not end as a tar ends") from None
                raise
            except tarfile.HeaderError as error:
                raise _Refused(f"it is damaged or cut short ({one_line(error)})") from None
            at_end[:] = [False]
            if info.type in _LONG_NAMES and not 0 <= info.size <= _MAX_LONG_NAME:
                raise _Refused(f"the name of a member is said to take {info.size} bytes")
            if info.type not in (*_FILES, *_LONG_NAMES, tarfile.DIRTYPE):
                kind = {tarfile.SYMTYPE: "a link", tarfile.LNKTYPE: "a link", tarfile.GNUTYPE_SPARSE: "a sparse file",
                        tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe"}  # fmt: skip
                raise _Refused(
                    f"its member {info.name!r} is {kind.get(info.type, 'of an unknown type')}, not a file"
                )
            return info

    return Member


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> bytes:
    if member.size > _LIMITS[ending]:
        raise _Refused(
            f"its member {member.name!r} is said to take {member.size} bytes, more than {_LIMITS[ending]}"
        )
    stream = tar.extractfile(member)
    data = b"" if stream is None else stream.read(member.size)
    if len(data) != member.size:
        raise _Refused(f"it is cut short in its member {member.name!r}")
    return data


def _samples(tar: tarfile.TarFile, path: Path, has: Callable[[str], bool]) -> Iterator[Sample]:
    sample: Sample | None = None
    while (member := tar.next()) is not None:
        vars(tar)["members"] = []  # or they pile up
        found = _NAME.fullmatch(member.name.removeprefix("./"))
        if member.isdir() or found is None or _OWN_NOTES.match(member.name):
            continue
        if member.issparse():
            raise _Refused(f"its member {member.name!r} is a sparse file, not a plain one")
        if member.size < 0:
            raise _Refused(f"its member {member.name!r} is said to take {member.size} bytes")
        key, ending = found[1], found[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(path, key, has(key))
        if ending in sample.names:
            raise _Refused(f"its sample {key!r} has two members .{ending}")
        sample.names.add(ending)
        if ending in _LIMITS and not (sample.there and ending == "npy"):
            sample.parts[ending] = _read(tar, member, ending)
    if sample is not None:
        yield sample


def read_samples(path: Path, has: Callable[[str], bool]) -> Iterator[Sample]:
    """Samples of a tar (plain, gz, bz2, xz) in its order: members next to one another with one key.

    Args:
        path: the file.
        has: whether the track of a key is there already; its latent is passed over.

    Raises:
        UserError: it is cut or damaged, has links, devices or sparse files, a member that is too large, or two
            members of one ending in a sample.
    """
    at_end: list[bool] = []
    after = ""
    try:
        with open(path, "rb") as file, _plain(file) as plain:
            stream: Any = _Ending(plain)
            with tarfile.open(
                fileobj=stream, mode="r|", tarinfo=_strict(at_end), ignore_zeros=True, encoding="utf-8",
                errors="surrogateescape",
            ) as tar:  # fmt: skip
                for sample in _samples(tar, path, has):
                    sample.position, after = file.tell(), f" after its sample {sample.key!r}"
                    yield sample
    except Exception as error:  # tarfile, the decompressors and the system each raise their own
        raise UserError(
            f"the tar {path} cannot be read{after} ({one_line(error)}): get the whole file, or pack it again "
            "from plain files"
        ) from error


def _plain(file: IO[bytes]) -> IO[bytes]:
    """The file decompressed; the modules, unlike tarfile's streams, check sums, ends and further streams."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(file)
    return file
