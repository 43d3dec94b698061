"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError, one_line

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The mask can only be read by setting it, which is the process's, so it is done once.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under ``.part``; it gets its name only once its bytes are on disk.

    Args:
        path: the final name; missing parent folders are made.

    Yields:
        The name to write to. If the block raises, that file is removed and ``path`` is as it was.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``, whoever wrote.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        # Some writers make files that only their owner can read.
        os.chmod(part, 0o666 & ~_UMASK)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a disk that became read-only: the first error is the one to tell
            part.unlink(missing_ok=True)
        number = _errno(error, part)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that files get their names in this order, also where the power fails
    except OSError:
        pass  # a file system that cannot
    finally:
        os.close(folder)


def _errno(error: BaseException, part: Path) -> int | None:
    """Why the system refused to write a file, if it did; writers in other languages say it in their own way."""
    if isinstance(error, OSError):
        mine = error.filename is None or os.fspath(error.filename) == str(part)
        return error.errno if mine else None
    found = (
        re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    )
    return int(found[1]) if found else None


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn an error of a file in ``folder`` into one sentence.

    Raises:
        UserError: the disk is full, read-only or broken; names the file and the way out.
    """
    try:
        yield
    except OSError as error:
        file = None if error.filename is None else Path(os.fsdecode(error.filename))
        if file is None or not (file.is_relative_to(folder) or folder.is_relative_to(file)):
            raise
        if error.errno in _NO_ROOM:
            raise UserError(
                f"there is no room for {file} ({error.strerror}): make room, and the same command carries on"
            ) from error
        raise UserError(
            f"{file} cannot be written ({error.strerror}): make {folder} writable, and the same command carries on, "
            "or choose another --out"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written directly in a folder, and nothing that may be somebody else's.

    Those are our ``.safetensors.part`` files and safetensors' ``.tmp`` files. Nobody may be writing there.
    """
    for path in [*folder.glob("*.safetensors.part"), *folder.glob(".tmp??????")]:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_ids(path: Path) -> list[str]:
    """Ids of a text file, one a line; empty lines are left out.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): write one id a line") from error
    return [line.strip() for line in lines if line.strip()]
