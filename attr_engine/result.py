"""The answer: every score with its standard error, ranked; Parquet and CSV out, Parquet in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.files import whole_file

FORMAT = "attr_engine.scores/1"
_COLUMNS = ("query", "strength", "function", "track", "rank", "score", "standard_error")


def ranks(scores: np.ndarray) -> np.ndarray:
    """1-based rank of every score, largest first; ties by position. ``[..., N]`` int64."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    out = np.empty_like(order)
    np.put_along_axis(out, order, np.broadcast_to(np.arange(1, scores.shape[-1] + 1), order.shape), axis=-1)
    return out


@dataclass(frozen=True)
class Scored:
    """One track in one ranking."""

    track: str
    rank: int
    score: float
    standard_error: float


@dataclass(frozen=True)
class Attribution:
    """Scores of every training track for every query.

    Attributes:
        tracks: ids, N.
        updates: (query id, strength) of every update, U.
        values: function name to scores, float64 ``[U, N]``; larger = more responsible.
        errors: function name to standard errors ``[U, N]``, NaN with a single replicate.
        base: mean loss of every track under theta_0, ``[N]``.
        meta: settings, hashes, precision and whatever else belongs to the run.
    """

    tracks: Sequence[str]
    updates: Sequence[tuple[str, float]]
    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    base: np.ndarray
    meta: Mapping[str, Any]

    def row(self, query: str, strength: float | None = None) -> int:
        """Index of an update; without a strength the first one of the query.

        Raises:
            UserError: unknown query or strength.
        """
        for u, (name, value) in enumerate(self.updates):
            if name == query and (strength is None or value == strength):
                return u
        known = ", ".join(sorted({name for name, _ in self.updates})[:5])
        raise UserError(f"no scores for query {query!r} at strength {strength}; queries: {known}")

    def top(
        self,
        k: int = 10,
        query: str | None = None,
        function: str | None = None,
        strength: float | None = None,
    ) -> list[Scored]:
        """The k most responsible tracks.

        Args:
            k: how many.
            query: id; may be left out where there is one query.
            function: score function; default the first.
            strength: default the first.

        Raises:
            UserError: unknown query, function or strength, or a query is needed.
        """
        if query is None:
            names = {name for name, _ in self.updates}
            if len(names) != 1:
                raise UserError(f"there are {len(names)} queries: say which one")
            query = next(iter(names))
        function = function or next(iter(self.values))
        if function not in self.values:
            raise UserError(f"no scores by {function!r}; known: {', '.join(self.values)}")
        u = self.row(query, strength)
        score, error = self.values[function][u], self.errors[function][u]
        order = np.argsort(-score, kind="stable")[:k]
        return [Scored(self.tracks[i], n + 1, float(score[i]), float(error[i])) for n, i in enumerate(order)]

    def _table(self) -> Any:
        import pyarrow as pa

        n, parts = len(self.tracks), []
        for function, values in self.values.items():
            place = ranks(values)
            for u, (query, strength) in enumerate(self.updates):
                columns: list[Any] = [
                    [query] * n,
                    [float(strength)] * n,
                    [function] * n,
                    list(self.tracks),
                    place[u],
                    values[u],
                    self.errors[function][u],
                ]
                parts.append(pa.table(dict(zip(_COLUMNS, columns, strict=True))))
        table = pa.concat_tables(parts)
        for column in ("query", "function", "track"):
            table = table.set_column(_COLUMNS.index(column), column, table.column(column).dictionary_encode())
        meta = {"format": FORMAT, "base": [float(x) for x in self.base], "meta": dict(self.meta)}
        return table.replace_schema_metadata({"attr_engine": json.dumps(meta, default=str)})

    def to_parquet(self, path: str | Path) -> None:
        """Write one row a (query, strength, function, track): score, standard error, rank."""
        import pyarrow.parquet as pq

        with whole_file(Path(path)) as part:
            pq.write_table(self._table(), part)

    def to_csv(self, path: str | Path) -> None:
        """Write the same rows as :meth:`to_parquet` as CSV."""
        import pyarrow as pa
        import pyarrow.csv as pc

        table = self._table()
        plain = pa.table(
            {
                name: table.column(name).cast(pa.string())
                if pa.types.is_dictionary(table.column(name).type)
                else table.column(name)
                for name in _COLUMNS
            }
        )
        with whole_file(Path(path)) as part:
            pc.write_csv(plain, part)

    @staticmethod
    def from_parquet(path: str | Path) -> Attribution:
        """Read what :meth:`to_parquet` wrote.

        Raises:
            UserError: missing or damaged file, or another format.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise UserError(f"{path} does not exist: run attr-engine score first")
        try:
            table = pq.read_table(path)
            meta = json.loads((table.schema.metadata or {})[b"attr_engine"])
            columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): run attr-engine score again") from error
        if meta.get("format") != FORMAT:
            raise UserError(f"{path} is of format {meta.get('format')!r}, this version reads {FORMAT!r}")
        functions = list(dict.fromkeys(columns["function"]))
        n = len(meta["base"])
        updates = list(dict.fromkeys(zip(columns["query"], columns["strength"], strict=True)))
        shape = (len(functions), len(updates), n)
        if len(columns["score"]) != int(np.prod(shape)):
            raise UserError(
                f"{path} has {len(columns['score'])} rows, expected {int(np.prod(shape))}: run attr-engine score again"
            )
        values = np.asarray(columns["score"], dtype=np.float64).reshape(shape)
        errors = np.asarray(
            [np.nan if e is None else e for e in columns["standard_error"]], dtype=np.float64
        ).reshape(shape)
        return Attribution(
            tracks=columns["track"][:n],
            updates=updates,
            values=dict(zip(functions, values, strict=True)),
            errors=dict(zip(functions, errors, strict=True)),
            base=np.asarray(meta["base"]),
            meta=meta["meta"],
        )
