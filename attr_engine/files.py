"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that files get their names in this order, also where the power fails
    except OSError:
        pass  # a file system that cannot
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")
