"""Metadata of tracks from CSV or JSON, keyed by file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError

_MAX_BYTES = 1 << 30
_MAX_FIELD = 1 << 20


def _value(text: str) -> Any:
    """A CSV field as int or finite float where it is one, else as text."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if number == number and abs(number) != float("inf") else text
    return text


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by the file that they describe.

    Args:
        path: a CSV with a ``path`` column, or JSON: a list of objects with ``path``, or an object
            from path to object. Paths are relative to the ingested folder.

    Raises:
        UserError: missing, too large, unreadable, no ``path``, or a path that stands twice.
    """
    if not path.is_file():
        raise UserError(f"metadata file {path} does not exist: check the path")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"metadata file {path} is larger than 1 GiB: split the data set")
    try:
        if path.suffix.lower() == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = (
                [{**v, "path": k} for k, v in content.items()] if isinstance(content, dict) else list(content)
            )
        else:
            csv.field_size_limit(_MAX_FIELD)
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = [
                    {k: _value(v or "") for k, v in row.items() if k is not None and not isinstance(v, list)}
                    for row in csv.DictReader(file)
                ]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"metadata file {path} cannot be read ({error}): save it as UTF-8 CSV or JSON"
        ) from error
    out: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        name = str(row.get("path") or "") if isinstance(row, dict) else ""
        if not name:
            raise UserError(
                f"metadata file {path}: row {number + 1} has no 'path': name the file it describes"
            )
        key = Path(name).as_posix()
        if key in out:
            raise UserError(f"metadata file {path}: {name!r} stands twice: keep one row a file")
        out[key] = dict(row)
    return out


def conditioning_of(row: Mapping[str, Any], names: Sequence[str], track: str) -> dict[str, Any]:
    """The named entries of a metadata row.

    Raises:
        UserError: the row lacks one of them.
    """
    for name in names:
        if name not in row or row[name] == "":
            raise UserError(
                f"{track!r} has no metadata {name!r}, which --condition asks for: add it to the metadata file"
            )
    return {name: row[name] for name in names}
