"""A blind listening test of a run: does the track that it names sound more like the query than a control's does?

Here: what is asked, and the key that says which was which. :mod:`attr_engine.report.listening` makes the page,
:mod:`attr_engine.listening_answers` reads what came back.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError, one_line
from attr_engine.files import write_text
from attr_engine.listening_settings import CATCH, PAIR, Design
from attr_engine.result import Attribution, order_of

FORMAT = "attr_engine.listening/1"
_MAX_KEY = 4 << 20
_ROUNDS = 20  # times that every query is looked at for catch trials


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        number: its place in the page, from 1.
        kind: ``pair``, or ``catch`` where the target is the query itself.
        query: id of X.
        a: id of A.
        b: id of B.
        target: "A" or "B": the retrieved track, in a catch trial the query.
        against: name of the control; "" in a catch trial.
        repeat_of: number of the trial that this one repeats with A and B exchanged; 0 for none.
    """

    number: int
    kind: str
    query: str
    a: str
    b: str
    target: str
    against: str = ""
    repeat_of: int = 0


@dataclass(frozen=True)
class Key:
    """Which was which; kept away from the listeners.

    Attributes:
        trials: in the order of the page.
        seed: that all of it follows from.
        settings: of the test and the run.
        same: control to how many queries it names the retrieved track for, or an exact copy: those ask nothing.
    """

    trials: tuple[Trial, ...]
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    same: Mapping[str, int] = field(default_factory=dict)

    @property
    def against(self) -> list[str]:
        """Names of the controls."""
        return list(self.same)

    def text(self) -> str:
        """The bytes of ``key.json``, which the page names by their hash."""
        value = {"format": FORMAT, "seed": self.seed, "settings": dict(self.settings), "same": dict(self.same),
                 "trials": [asdict(t) for t in self.trials]}  # fmt: skip
        return json.dumps(value, indent=1, sort_keys=True) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`text`, in hexadecimal; the first 16 digits name the test."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @property
    def test(self) -> str:
        """Name of the test in the answers."""
        return self.digest[:16]

    def write(self, path: Path) -> None:
        """Write ``key.json``."""
        write_text(path, self.text())

    @staticmethod
    def read(path: Path) -> Key:
        """Read ``key.json``.

        Raises:
            UserError: missing, no key, or changed by hand: then it is of no test.
        """
        again = "give the key.json that attr-engine report --listening-test wrote"
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_KEY + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {again}") from error
        try:
            if len(data) > _MAX_KEY:
                raise ValueError("it is too large")
            value = json.loads(data)
            if value["format"] != FORMAT:
                raise ValueError(f"it is of format {value['format']!r}")
            trials = tuple(_trial(n, row) for n, row in enumerate(value["trials"], 1))
            same = {str(k): int(v) for k, v in value["same"].items()}
            key = Key(trials, int(value["seed"]), dict(value["settings"]), same)
            for t in trials:
                if t.kind == PAIR and t.against not in same:
                    raise ValueError(f"trial {t.number} is against no control of it")
                if t.repeat_of and not (t.repeat_of < t.number and trials[t.repeat_of - 1].kind == PAIR):
                    raise ValueError(f"trial {t.number} repeats no trial before it")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is not the key of a listening test ({one_line(error)}): {again}"
            ) from error
        if data != key.text().encode():
            raise UserError(f"{path} was changed after it was written, so it is the key of no test: {again}")
        return key


def _trial(number: int, row: Mapping[str, Any]) -> Trial:
    trial = Trial(**{f.name: row[f.name] for f in fields(Trial)})
    texts = (trial.query, trial.a, trial.b, trial.against)
    if not all(isinstance(x, str) for x in texts) or type(trial.repeat_of) is not int or trial.repeat_of < 0:
        raise ValueError(f"trial {number} is not one")
    if trial.number != number or trial.kind not in (PAIR, CATCH) or trial.target not in ("A", "B"):
        raise ValueError(f"trial {number} is not one")
    return trial


@dataclass(frozen=True)
class Pair:
    """A query and the two tracks that are compared, by index; ``other`` is the control's, ``target`` None in a catch trial."""

    query: int
    target: int | None
    other: int
    against: str


def leading_scores(
    result: Attribution, queries: Sequence[str], function: str | None = None, strength: float | None = None
) -> np.ndarray:
    """What orders the tracks of a result as its ranks do: float64 ``[Q, N]``, NaN where a track was not measured.

    Raises:
        UserError: it has no such query or function.
    """
    name = function or next(iter(result.values))
    if name not in result.values:
        raise UserError(f"no scores by {name!r}; known: {', '.join(result.values)}")
    rows = [result.row(q, strength) for q in queries]
    ranked = np.stack([-result.ranks(name, u).astype(np.float64) for u in rows])
    return np.where(np.isnan(result.values[name][rows]), np.nan, ranked)


def best(scores: np.ndarray, tracks: Sequence[str], without: Collection[str]) -> int | None:
    """Index of the first of the ranked tracks that is not ``without``; None where there is none with a score.

    Args:
        scores: ``[N]``.
        tracks: N ids.
        without: ids.
    """
    return next(
        (int(i) for i in order_of(scores) if tracks[i] not in without and not np.isnan(scores[i])), None
    )


class Draws:
    """The pairs and catch trials that a test may take, in random order.

    Args:
        queries: Q ids.
        tracks: N ids.
        leading: ``[Q, N]`` scores, whose first track is the retrieved one.
        controls: name to ``[Q, N]`` scores; ``random`` never names the retrieved track.
        copies: id to itself and its exact copies (:func:`attr_engine.evaluate.clusters`): a query is not asked about itself.
        rng: decides.

    Attributes:
        same: control to the number of queries for which it names the retrieved track, or an exact copy of it.
    """

    def __init__(
        self, queries: Sequence[str], tracks: Sequence[str], leading: np.ndarray, controls: Mapping[str, np.ndarray],
        copies: Mapping[str, frozenset[str]], rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._queries, self._tracks, self._copies, self._rng = queries, tracks, copies, rng
        self.same = dict.fromkeys(controls, 0)
        self._found: dict[int, dict[str, Pair]] = {}
        for q in range(len(queries)):
            target = best(leading[q], tracks, self._itself(q))
            if target is None:
                continue
            alike = self._itself(q) | copies[tracks[target]]
            for name, scores in controls.items():
                other = best(scores[q], tracks, alike if name == "random" else self._itself(q))
                if other is not None and tracks[other] in alike:
                    self.same[name] += 1
                elif other is not None:
                    self._found.setdefault(q, {})[name] = Pair(q, target, other, name)

    def _itself(self, q: int) -> frozenset[str]:
        return self._copies.get(self._queries[q], frozenset())

    def pairs(self, count: int, usable: Callable[[Pair], bool]) -> list[Pair]:
        """At most ``count`` pairs that are usable, one a query; the control that was taken least often comes first."""
        names = [str(n) for n in self._rng.permutation(list(self.same))]
        taken: list[Pair] = []
        for q in self._rng.permutation(sorted(self._found)):
            offered = self._found[int(q)]
            so_far = [pair.against for pair in taken]
            pair = offered[min((n for n in names if n in offered), key=so_far.count)]
            if len(taken) < count and usable(pair):
                taken.append(pair)
        return taken

    def catches(self, count: int, usable: Callable[[Pair], bool]) -> list[Pair]:
        """At most ``count`` usable trials of a query against itself and a random other track; no query twice before all had one."""
        taken: list[Pair] = []
        for _ in range(_ROUNDS):
            for q in self._rng.permutation(len(self._queries)):
                others = [i for i, name in enumerate(self._tracks) if name not in self._itself(int(q))]
                if len(taken) < count and others:
                    pair = Pair(int(q), None, int(self._rng.choice(others)), "")
                    taken += [pair] * usable(pair)
        return taken


@dataclass(frozen=True, eq=False)
class _Asked:
    """A pair with the side of its target, 0 for A; ``again`` is what it repeats."""

    pair: Pair
    side: int
    again: _Asked | None = None


def arranged(
    pairs: Sequence[Pair], catches: Sequence[Pair], repeats: int, queries: Sequence[str], tracks: Sequence[str],
    rng: np.random.Generator,
) -> tuple[list[Trial], list[Pair]]:  # fmt: skip
    """Trials in their order, with the pair of each.

    Sides are independent fair coins, which is what the exact binomial test takes for granted. Repeats are of pairs from the
    beginning and stand in the second half.
    """
    mixed = [*pairs, *catches]
    order = [_Asked(mixed[place], int(rng.integers(2))) for place in rng.permutation(len(mixed))]
    for first in [x for x in order if x.pair.target is not None][:repeats]:
        earliest = max(len(order) // 2, order.index(first) + 1)
        order.insert(int(rng.integers(earliest, len(order) + 1)), _Asked(first.pair, 1 - first.side, first))
    trials = []
    for place, x in enumerate(order, 1):
        query, other = queries[x.pair.query], tracks[x.pair.other]
        target = query if x.pair.target is None else tracks[x.pair.target]
        a, b = (target, other) if x.side == 0 else (other, target)
        kind, again = (
            CATCH if x.pair.target is None else PAIR,
            0 if x.again is None else order.index(x.again) + 1,
        )
        trials.append(Trial(place, kind, query, a, b, "AB"[x.side], x.pair.against, again))
    return trials, [x.pair for x in order]


def seeded(design: Design) -> tuple[Design, np.random.Generator]:
    """The design with a seed, drawn where it has none, and the generator that follows from it."""
    seed = secrets.randbits(128) if design.seed is None else design.seed
    return replace(design, seed=seed), np.random.default_rng(seed)
