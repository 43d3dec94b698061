"""Which group a track belongs to: by its recording, its exact copies, any column of its metadata, or a CSV of the user's."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attr_engine import evaluate
from attr_engine.errors import UserError, one_line
from attr_engine.rollup import UNKNOWN, Level

RECORDING, DUPLICATES = "track", "duplicates"
_ID = "track"  # the column of a CSV that names a track


def label(value: Any) -> str:
    """A metadata value as the name of a group: text as it stands, numbers and lists as JSON; nothing is :data:`UNKNOWN`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNKNOWN
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    )
    # What is no Unicode cannot be stored: it stands there as an escape.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if text.strip() else UNKNOWN


def make_levels(
    names: Sequence[str],
    hows: Sequence[str],
    ids: Sequence[str],
    info: Sequence[Mapping[str, Any]],
    given: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Level]:
    """The levels of a roll-up by their names.

    Args:
        names: from the lowest to the highest: ``"track"`` puts the windows of a recording together (``parent`` of their
            metadata), ``"duplicates"`` exact copies (:func:`attr_engine.evaluate.clusters`), anything else is a column of
            the metadata or of ``given``, such as ``"artist"``.
        hows: an aggregate a level; one is for all.
        ids: of the tracks, N.
        info: metadata of the tracks, N.
        given: level to (id of a track or recording to group), from :func:`read_groups`; it goes before the metadata.

    Raises:
        UserError: a level of which no track has anything, or another number of aggregates than of levels.
    """
    if len(hows) not in (1, len(names)):
        raise UserError(f"there are {len(names)} levels and {len(hows)} aggregates: give one, or one a level")
    recordings = [
        name if label(row.get("parent")) == UNKNOWN else label(row["parent"])
        for name, row in zip(ids, info, strict=True)
    ]
    out = []
    for k, name in enumerate(names):
        table = (given or {}).get(name)
        if table is not None:
            groups = _of_table(name, table, ids, recordings)
        elif name == RECORDING:
            groups = recordings
        elif name == DUPLICATES:
            copies, first = evaluate.clusters(ids, info), dict[frozenset[str], str]()
            groups = [first.setdefault(copies[i], r) for i, r in zip(ids, recordings, strict=True)]
        else:
            groups = [label(row.get(name)) for row in info]
        if all(group == UNKNOWN for group in groups):
            known = sorted(
                {str(key) for row in info for key in row} | {RECORDING, DUPLICATES} | set(given or {})
            )
            raise UserError(
                f"no track has metadata {name!r}; known: {', '.join(known[:20])} (or give a CSV of groups)"
            )
        out.append(Level(name, groups, hows[k if len(hows) > 1 else 0]))
    return out


def _of_table(
    name: str, table: Mapping[str, str], ids: Sequence[str], recordings: Sequence[str]
) -> list[str]:
    """Groups by a table: a track's own row, else that of its recording; without either it is unknown, or its own copy."""
    if not any(i in table or r in table for i, r in zip(ids, recordings, strict=True)):
        raise UserError(
            f"none of the {len(table)} tracks with a {name} is a track of the run: check the column {_ID!r}"
        )
    alone = name in (RECORDING, DUPLICATES)
    return [table.get(i, table.get(r, r if alone else UNKNOWN)) for i, r in zip(ids, recordings, strict=True)]


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """Groups from a CSV with a column ``track`` and one for each level, such as ``artist``.

    Returns:
        Level to (id of a track or recording to group); empty fields are left out.

    Raises:
        UserError: missing or unreadable file, no such columns, or a track that stands twice.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a CSV with the columns {_ID} and group")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (ValueError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): save it as UTF-8 CSV") from error
    levels = [name for name in names if name != _ID]
    if names.count(_ID) != 1 or not levels or len(set(names)) != len(names):
        raise UserError(
            f"{path} has the columns {', '.join(names) or 'of none'}: it needs {_ID}, and one for each level"
        )
    out: dict[str, dict[str, str]] = {name: {} for name in levels}
    seen = set[str]()
    for number, row in enumerate(rows, start=2):
        track = row[_ID]
        if None in row or not track or track in seen:
            what = (
                "more fields than the first line"
                if None in row
                else f"the track {track!r}, which is empty or stands twice"
            )
            raise UserError(
                f"{path}: row {number} has {what}: keep one row a track, and quote text with commas"
            )
        seen.add(track)
        for name in levels:
            if (group := label(row[name])) != UNKNOWN:
                out[name][track] = group
    return out
