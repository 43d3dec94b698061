"""Metadata of tracks from CSV or JSON, keyed by file."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError, one_line

_MAX_BYTES = 1 << 30
_MAX_FIELD = 1 << 20
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?")


def _convert(rows: Sequence[dict[str, Any]], name: str) -> None:
    """Turn a column of text into int or float, if all of it is that; empty fields stay."""
    texts = [row[name].strip() for row in rows if row.get(name)]
    kind: type[int] | type[float]
    if all(_INTEGER.fullmatch(text) for text in texts):
        kind = int
    elif all(_NUMBER.fullmatch(text) and math.isfinite(float(text)) for text in texts):
        kind = float
    else:
        return
    for row in rows:
        if row.get(name):
            row[name] = kind(row[name])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return dict(pairs)


def _read_json(path: Path) -> list[Any]:
    content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    if isinstance(content, dict):
        return [{**row, "path": name} for name, row in content.items()]
    return list(content)


def _read_csv(path: Path, numbers: Sequence[str]) -> list[dict[str, Any]]:
    csv.field_size_limit(_MAX_FIELD)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"line {reader.line_num} has more fields than the first line: quote text with commas"
                )
            rows.append({name: value or "" for name, value in row.items()})
    for name in numbers:
        _convert(rows, name)
    return rows


def read_metadata(path: Path, numbers: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Rows by the file that they describe.

    Args:
        path: a CSV with a ``path`` column, or JSON: a list of objects with ``path``, or an object
            from path to object. Paths are relative to the ingested folder.
        numbers: columns of a CSV that are read as numbers where the whole column is numeric; all
            other text stays as it stands there (a title may be ``007``).

    Raises:
        UserError: missing, too large, unreadable, no ``path``, or a path that stands twice.
    """
    if not path.is_file():
        raise UserError(f"metadata file {path} does not exist: check the path")
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"metadata file {path} is larger than 1 GiB: split the data set")
    try:
        rows = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path, numbers)
    except (ValueError, csv.Error, TypeError, RecursionError, OSError) as error:
        raise UserError(
            f"metadata file {path} cannot be read ({one_line(error)}): save it as UTF-8 CSV or JSON"
        ) from error
    out: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        name = str(row.get("path") or "") if isinstance(row, dict) else ""
        if not name:
            known = f" (it has {', '.join(map(repr, list(row)[:5]))})" if isinstance(row, dict) else ""
            raise UserError(
                f"metadata file {path}: row {number + 1} has no 'path'{known}: name the file it describes"
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
        if row.get(name) is None or row[name] == "":
            raise UserError(
                f"{track!r} has no metadata {name!r}, which --condition asks for: add it to the metadata file"
            )
    return {name: row[name] for name in names}
