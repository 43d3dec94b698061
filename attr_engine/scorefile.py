"""Scores on disk: Parquet in row groups of one (function, update) each, CSV, and reading all or some of it.

The columns and the file's metadata are described in docs/results.md. Nothing here keeps state: every call opens the file
for itself, so that any number of threads may read at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.csv as pc
import pyarrow.parquet as pq

from attr_engine.errors import UserError, one_line
from attr_engine.files import whole_file

if TYPE_CHECKING:
    from attr_engine.result import Attribution

FORMAT = "attr_engine.scores/2"
METADATA_KEY = "attr_engine"
TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("query", TEXT, nullable=False),
        pa.field("strength", pa.float64(), nullable=False),
        pa.field("function", TEXT, nullable=False),
        pa.field("track", TEXT, nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("standard_error", pa.float64()),
        pa.field("draws", pa.int32(), nullable=False),
        pa.field("stage", pa.int32(), nullable=False),
    ]
)
_AGAIN = "run the command that wrote it again (attr-engine score --out RUN takes seconds where RUN has its effects)"


def repeated(text: str, n: int) -> pa.DictionaryArray:
    """One text in n rows."""
    return pa.DictionaryArray.from_arrays(np.zeros(n, dtype=np.int32), pa.array([text], pa.string()))


def distinct(texts: Sequence[str]) -> pa.DictionaryArray:
    """A text a row, all different."""
    codes = np.arange(len(texts), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(codes, pa.array(texts, pa.string()))


def known(values: np.ndarray) -> pa.Array:
    """Numbers ``[N]`` float64; NaN, which means not known, becomes null, which every reader leaves out of means."""
    return pa.array(values, pa.float64(), mask=np.isnan(values))


def write_parquet(
    path: Path, schema: pa.Schema, tables: Iterable[pa.Table], header: Mapping[str, Any]
) -> None:
    """Write tables one after the other, a row group each; only one of them is in memory at a time.

    Args:
        path: the file; whole or not there.
        schema: of every table.
        tables: what to write.
        header: JSON for the file's metadata, under :data:`METADATA_KEY`.
    """
    texts = [
        field.name for field in schema if field.type == TEXT or field.name in ("strength", "draws", "stage")
    ]
    # Readers find texts, not what Arrow knows of them: the same column type in all of them, and half the footer.
    options = {"use_dictionary": texts, "store_schema": False}
    with whole_file(path) as part, pq.ParquetWriter(part, schema, **options) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(header, default=str)})


def write_csv(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write the same rows as CSV; what is not known is an empty field."""
    plain = pa.schema([pa.field(f.name, pa.string() if f.type == TEXT else f.type) for f in schema])
    with whole_file(path) as part, pc.CSVWriter(part, plain) as writer:
        for table in tables:
            writer.write_table(table.cast(plain))


def score_tables(result: Attribution) -> Iterator[pa.Table]:
    """One table of N rows a (function, update), tracks in their order."""
    n, tracks = len(result.tracks), distinct(result.tracks)
    for function, values in result.values.items():
        for u, (query, strength) in enumerate(result.updates):
            columns = [
                repeated(query, n), np.full(n, float(strength)), repeated(function, n), tracks,
                result.ranks(function, u), known(values[u]), known(result.errors[function][u]), result.draws[u],
                np.zeros(n, dtype=np.int32) if result.stage is None else result.stage[u],
            ]  # fmt: skip
            yield pa.table([pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], SCHEMA.names)


def header_of(result: Attribution) -> dict[str, Any]:
    """What stands in the metadata of the file."""
    base = [None if math.isnan(x) else float(x) for x in result.base]
    return {"format": FORMAT, "base": base, "meta": dict(result.meta)}


def _damaged(path: Path, what: object) -> UserError:
    return UserError(f"{path} cannot be read ({what}): {_AGAIN}")


def _open(path: Path, codes: Sequence[str] = ()) -> tuple[pq.ParquetFile, dict[str, Any]]:
    """The file and its header, whose format is one that is read here; texts of ``codes`` are read as codes."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: run attr-engine score first")
    try:
        file = pq.ParquetFile(path, read_dictionary=codes)
        header = json.loads(file.metadata.metadata[METADATA_KEY.encode()])
        found = header["format"]
    except Exception as error:  # pyarrow raises anything on damaged files
        raise _damaged(path, one_line(error)) from error
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, this version reads {FORMAT!r}: {_AGAIN}")
    return file, header


def read_scores(
    path: str | Path,
    query: str | None = None,
    function: str | None = None,
    strength: float | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read some rows and columns; row groups of other queries, functions and strengths are not read from the disk.

    Args:
        path: what :meth:`attr_engine.Attribution.to_parquet` wrote.
        query: id of a query; default all.
        function: name of a score function; default all.
        strength: default all.
        columns: names in the order wanted; default all.

    Returns:
        A ``pyarrow.Table``; its ``to_pandas()`` and ``polars.from_arrow`` take it on.

    Raises:
        UserError: missing or damaged file, another format, an unknown column, or no such rows.
    """
    path = Path(path)
    file, _ = _open(path)
    unknown = [name for name in columns or () if name not in file.schema_arrow.names]
    if unknown:
        raise UserError(f"{path} has no column {unknown[0]!r}; columns: {', '.join(file.schema_arrow.names)}")
    asked = {"query": query, "function": function, "strength": strength}
    wanted = {name: value for name, value in asked.items() if value is not None}
    names = list(columns) if columns is not None else list(file.schema_arrow.names)
    try:
        groups = [i for i in range(file.num_row_groups) if _may_hold(file.metadata.row_group(i), wanted)]
        table = file.read_row_groups(groups, columns=list({*names, *wanted}))
        for name, value in wanted.items():
            table = table.filter(compute.equal(table.column(name), value))
    except Exception as error:
        raise _damaged(path, one_line(error)) from error
    if not len(table):
        raise UserError(f"{path} has no rows with {', '.join(f'{n} {v!r}' for n, v in wanted.items())}")
    return table.select(names).replace_schema_metadata(None)


def _may_hold(group: pq.RowGroupMetaData, wanted: Mapping[str, str | float]) -> bool:
    """Whether the statistics of a row group leave room for the values; of very long texts there are none."""
    for j in range(group.num_columns):
        column = group.column(j)
        value, found = wanted.get(column.path_in_schema), column.statistics
        if (
            value is not None
            and found is not None
            and found.has_min_max
            and not found.min <= value <= found.max
        ):
            return False
    return True


def read_parts(path: Path) -> dict[str, Any]:
    """The fields of an :class:`attr_engine.Attribution`, a column of the file in memory at a time.

    Raises:
        UserError: missing or damaged file, another format, or rows that are not as they were written.
    """
    file, header = _open(path, [field.name for field in SCHEMA if field.type == TEXT])
    try:
        return _parts(file, header)
    except Exception as error:
        raise _damaged(path, one_line(error)) from error


def _parts(file: pq.ParquetFile, header: Mapping[str, Any]) -> dict[str, Any]:
    base = np.array([np.nan if x is None else x for x in header["base"]], dtype=np.float64)
    rows, n = file.metadata.num_rows, len(base)
    if not n or not rows or rows % n:
        raise ValueError(f"{rows} rows of {n} tracks")
    tracks = _first_of_each(file, "track", n, along=0)
    queries, strengths, names = (
        _first_of_each(file, c, n, along=1) for c in ("query", "strength", "function")
    )
    functions = list(dict.fromkeys(names))
    u = len(names) // len(functions)
    updates = list(zip(queries[:u], strengths[:u], strict=True))
    order = [(q, s, f) for f in functions for q, s in updates]
    if len(set(updates)) != u or list(zip(queries, strengths, names, strict=True)) != order:
        raise ValueError(f"{rows} rows are not all the scores of {n} tracks, in their order")
    shape = (len(functions), u, n)
    draws, stage = (_whole(file, name).reshape(shape) for name in ("draws", "stage"))
    if (draws != draws[0]).any() or (stage != stage[0]).any():
        raise ValueError("draws or stages differ from function to function")
    values, errors = (_column(file, name).to_numpy().reshape(shape) for name in ("score", "standard_error"))
    return {
        "tracks": tracks, "updates": updates, "base": base, "meta": header["meta"],
        "values": dict(zip(functions, values, strict=True)), "errors": dict(zip(functions, errors, strict=True)),
        "draws": draws[0].astype(np.int64), "stage": stage[0].astype(np.int64) if stage.any() else None,
    }  # fmt: skip


def _column(file: pq.ParquetFile, name: str) -> pa.ChunkedArray:
    column, wanted = file.read(columns=[name]).column(name), SCHEMA.field(name)
    if column.type != wanted.type or (column.null_count and not wanted.nullable):
        raise TypeError(f"column {name!r} is {column.type} with {column.null_count} nulls")
    return column


def _whole(file: pq.ParquetFile, name: str) -> np.ndarray:
    return np.asarray(_column(file, name).to_numpy())


def _first_of_each(file: pq.ParquetFile, name: str, n: int, along: int) -> list[Any]:
    """What a column holds in blocks of n rows: the n values that are the same in each, or the one value of each block."""
    column, kinds = _column(file, name), None
    if column.type == TEXT:
        column = column.unify_dictionaries()
        kinds = column.chunk(0).dictionary.to_pylist()
        rows = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    else:
        rows = column.to_numpy()
    blocks = rows.reshape(-1, n)
    first = blocks[0] if along == 0 else blocks[:, 0]
    if (blocks != np.expand_dims(first, along)).any() or (along == 0 and len(np.unique(first)) != n):
        raise ValueError(f"the rows are not in the order in which they were written (column {name!r})")
    return first.tolist() if kinds is None else [kinds[i] for i in first]
