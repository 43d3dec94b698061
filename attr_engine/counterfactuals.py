"""Which models are to be trained again, and the losses of queries under them: what judges an attribution.

The table is two Parquet files in the folder of the models: ``models.parquet`` (model, what, seed, left_out) and ``losses.parquet``
(model, query, loss).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.evaluate import families_of
from attr_engine.files import whole_file
from attr_engine.latents import LatentDataset
from attr_engine.latents.batch import Tracks
from attr_engine.result import Attribution
from attr_engine.retrain import Retrainer, Training, half_subsets, training

HALF, WHOLE, RANDOM = "half", "whole", "random"
MODELS_FILE, LOSSES_FILE = "models.parquet", "losses.parquet"
_RANDOM_REMOVALS = 2


@dataclass(frozen=True)
class Model:
    """One training and what it is for.

    Attributes:
        what: ``"half"``, ``"whole"``, ``"random"`` (k random tracks left out), ``"family=fam03"`` (a group left out), or
            ``"top of METHOD for QUERY"``.
        training: what is left out, and the seed.
    """

    what: str
    training: Training


def halves(tracks: int, subsets: int, seeds: int) -> list[Model]:
    """Random halves, all seeds of one before the next, so that what is there at any time can be judged."""
    found = half_subsets(tracks, subsets)
    return [
        Model(HALF, training(f"half{k:03d}", out, seed))
        for k, out in enumerate(found)
        for seed in range(1, seeds + 1)
    ]


def whole(seeds: int) -> list[Model]:
    """On all tracks: what removals are compared with."""
    return [Model(WHOLE, training("whole", (), seed)) for seed in range(1, seeds + 1)]


def without_groups(tracks: Tracks, column: str, most: int, seeds: int) -> list[Model]:
    """Each of the largest groups left out, of those with more than one track.

    A splice, whose family is ``"fam03+fam10"``, is of both families.

    Raises:
        UserError: no two tracks share a value of the column.
    """
    members: dict[str, list[int]] = {}
    for i, info in enumerate(tracks.info):
        for name in families_of(info) if column == "family" else [str(info.get(column) or "")]:
            if name:
                members.setdefault(name, []).append(i)
    sizes = Counter({name: len(some) for name, some in members.items() if len(some) > 1})
    if not sizes:
        raise UserError(
            f"no two training tracks share a {column!r}: leave out --leave-out {column}, or ingest with such metadata"
        )
    return [
        Model(f"{column}={name}", training(f"{column}-out", members[name], seed))
        for name, _ in sizes.most_common(most) for seed in range(1, seeds + 1)
    ]  # fmt: skip


def removals(
    tables: Mapping[str, Attribution], queries: Sequence[str], k: int, seeds: int, tracks: Tracks
) -> list[Model]:
    """The top k of every method for every query left out, and k random tracks.

    Args:
        tables: method to scores; its first function and strength are used.
        queries: ids.
        k: tracks that are left out.
        seeds: of training.
        tracks: the training tracks.
    """
    place, out = {name: i for i, name in enumerate(tracks.ids)}, []
    for seed in range(1, seeds + 1):
        for n in range(_RANDOM_REMOVALS):
            some = np.random.default_rng([n, k]).permutation(len(tracks))[:k]
            out.append(Model(RANDOM, training(f"random{k}", some.tolist(), seed)))
        for query in queries:
            for name, table in tables.items():
                top = [place[row.track] for row in table.top(k, query)]
                out.append(Model(f"top of {name} for {query}", training(f"top{k}", top, seed)))
    return out


@dataclass(frozen=True)
class Truth:
    """Losses of queries under models that were trained again.

    Attributes:
        tracks: ids of the training tracks, N.
        queries: ids, Q.
        what: of every model, M.
        seeds: int64 ``[M]``.
        kept: bool ``[M, N]``, what it was trained on.
        losses: float64 ``[M, Q]``, mean over the judge's draws.
    """

    tracks: Sequence[str]
    queries: Sequence[str]
    what: Sequence[str]
    seeds: np.ndarray
    kept: np.ndarray
    losses: np.ndarray

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Random halves that all seeds were trained on: kept ``[S, N]`` and losses ``[seeds, S, Q]``.

        Raises:
            UserError: there are none.
        """
        seeds = sorted({int(s) for s, what in zip(self.seeds, self.what, strict=True) if what == HALF})
        found: dict[bytes, dict[int, int]] = {}
        for m, what in enumerate(self.what):
            if what == HALF:
                found.setdefault(self.kept[m].tobytes(), {})[int(self.seeds[m])] = m
        rows = [[by_seed[s] for s in seeds] for by_seed in found.values() if len(by_seed) == len(seeds)]
        if not rows:
            raise UserError("no random half was trained with every seed: run attr-engine retrain to its end")
        return self.kept[[r[0] for r in rows]], self.losses[np.array(rows).T]

    def check(self, tracks: Tracks) -> None:
        """Refuse models of other tracks.

        Raises:
            UserError: the models were trained on parts of another data set.
        """
        if list(self.tracks) != list(tracks.ids):
            raise UserError(
                f"the retrained models are of other training tracks ({len(self.tracks)}, from {self.tracks[0]!r} on) than the scores "
                f"({len(tracks)}, from {tracks.ids[0]!r} on): retrain on the data that was scored"
            )

    def rise(self, rows: Sequence[int], column: int) -> float:
        """How much higher the loss of a query is under some models than under those of the same seeds that saw every track, in percent.

        Raises:
            UserError: no model of one of these seeds was trained on everything.
        """
        base = {int(self.seeds[m]): self.losses[m, column] for m in self.rows_of(WHOLE)}
        seeds = [int(self.seeds[m]) for m in rows]
        missing = sorted(set(seeds) - set(base))
        if missing:
            raise UserError(
                f"no model of seed {missing[0]} was trained on all tracks: run attr-engine retrain to its end"
            )
        return float(self.losses[list(rows), column].mean() / np.mean([base[s] for s in seeds]) - 1) * 100

    def rows_of(self, what: str) -> list[int]:
        """The models of a kind.

        Raises:
            UserError: there are none.
        """
        rows = [m for m, name in enumerate(self.what) if name == what]
        if not rows:
            raise UserError(f"no model {what!r} was trained: run attr-engine retrain with it")
        return rows

    def mean_loss(self, what: str) -> np.ndarray:
        """Mean over the models of a kind: ``[Q]``.

        Raises:
            UserError: there are none.
        """
        return np.asarray(self.losses[self.rows_of(what)].mean(axis=0))

    def columns(self, queries: Sequence[str]) -> np.ndarray:
        """Places of queries.

        Raises:
            UserError: losses of one were not measured.
        """
        place = {name: i for i, name in enumerate(self.queries)}
        missing = [q for q in queries if q not in place]
        if missing:
            raise UserError(
                f"the losses of query {missing[0]!r} were not measured: give its folder to attr-engine retrain --queries"
            )
        return np.array([place[q] for q in queries], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write both files."""
        import pyarrow as pa
        from pyarrow import parquet

        names = [f"{i:04d}" for i in range(len(self.what))]
        out = [[self.tracks[i] for i in np.flatnonzero(~kept)] for kept in self.kept]
        models = {
            "model": names,
            "what": list(self.what),
            "seed": self.seeds,
            "left_out": pa.array(out, pa.list_(pa.string())),
        }
        losses = {
            "model": np.repeat(names, len(self.queries)), "query": list(self.queries) * len(names), "loss": self.losses.ravel()
        }  # fmt: skip
        head = {"tracks": "\n".join(self.tracks)}
        for file, columns in ((MODELS_FILE, models), (LOSSES_FILE, losses)):
            with whole_file(folder / file) as part:
                parquet.write_table(pa.table(columns).replace_schema_metadata(head), part)

    @staticmethod
    def open(folder: Path) -> Truth:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: missing or damaged.
        """
        import pyarrow as pa
        from pyarrow import parquet

        try:
            models, losses = (
                parquet.read_table(folder / MODELS_FILE),
                parquet.read_table(folder / LOSSES_FILE),
            )
            tracks = models.schema.metadata[b"tracks"].decode().split("\n")
            place = {name: i for i, name in enumerate(tracks)}
            kept = np.ones((len(models), len(tracks)), dtype=bool)
            for row, names in zip(kept, models["left_out"].to_pylist(), strict=True):
                row[[place[n] for n in names]] = False
            queries = losses["query"].to_pylist()[: len(losses) // max(1, len(models))]
            values = losses["loss"].to_numpy().reshape(len(models), len(queries))
            return Truth(tracks, queries, models["what"].to_pylist(), models["seed"].to_numpy(), kept, values)
        except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise UserError(
                f"{folder} holds no losses of retrained models ({error}): make them with attr-engine retrain"
            ) from error


def dropped(folder: Path, truth: Truth) -> list[str]:
    """What the table in a folder has and the one that is to take its place has not: kinds of models, then queries."""
    try:
        before = Truth.open(folder)
    except UserError:  # none, or a damaged one: the new table is the way out
        return []
    lost = [x for x in before.what if x not in truth.what] + [
        q for q in before.queries if q not in truth.queries
    ]
    return list(dict.fromkeys(lost))


def truth_of(retrainer: Retrainer, models: Sequence[Model], queries: Sequence[str], draws: int) -> Truth:
    """Put together what models say of queries; each that was not measured yet is."""
    sets = [LatentDataset(path) for path in queries]
    losses, kept = [], np.ones((len(models), len(retrainer.tracks)), dtype=bool)
    for m, model in enumerate(models):
        kept[m, list(model.training.left_out)] = False
        losses.append(np.concatenate([retrainer.losses(model.training, q, draws).mean(axis=1) for q in sets]))
    names: list[str] = [name for q in sets for name in q.ids]
    seeds: Any = np.array([model.training.seed for model in models], dtype=np.int64)
    return Truth(list(retrainer.tracks.ids), names, [m.what for m in models], seeds, kept, np.array(losses))
