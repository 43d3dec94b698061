"""The answers to a listening test: read, joined with the key, judged. Files come from outside and are believed in nothing."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine.errors import UserError, one_line
from attr_engine.files import write_text
from attr_engine.judge import bootstrap, share
from attr_engine.listening import Key, Trial
from attr_engine.listening_settings import CATCH, PAIR
from attr_engine.report.data import Table

COLUMNS = (
    "listener",
    "test",
    "trial",
    "choice",
    "confidence",
    "seconds",
    "plays_x",
    "plays_a",
    "plays_b",
    "comment",
)
CHOICES, CONFIDENCES = ("A", "B", "neither"), ("sure", "unsure")
RETRIEVED, CONTROL, NEITHER = "retrieved", "control", "neither"
_MAX_BYTES, _MAX_NAME, _MAX_COMMENT, _MAX_SECONDS, _MAX_PLAYS = 4 << 20, 64, 4000, 1e6, 100_000
_AGAIN = "use the file as the page saved it"

Cell = str | float | int | None


@dataclass(frozen=True)
class Answer:
    """What a listener said to one trial.

    Attributes:
        listener: name.
        test: name of the test.
        trial: the question.
        choice: "A", "B" or "neither".
        confidence: "sure" or "unsure".
        seconds: spent on the trial.
        plays: how often X, A and B were played.
        comment: text from outside.
    """

    listener: str
    test: str
    trial: Trial
    choice: str
    confidence: str
    seconds: float
    plays: tuple[int, int, int]
    comment: str

    @property
    def chosen(self) -> str:
        """``retrieved``, ``control`` or ``neither``; in a catch trial ``retrieved`` is X itself, which is right."""
        if self.choice == NEITHER:
            return NEITHER
        return RETRIEVED if self.choice == self.trial.target else CONTROL


def read_answers(paths: Sequence[Path], keys: Mapping[str, Key]) -> list[Answer]:
    """Read files of answers.

    Args:
        paths: CSV files with :data:`COLUMNS`, in any order, of one or several listeners.
        keys: test to key.

    Raises:
        UserError: a file that cannot be read or holds anything but answers to these tests, or a question that one listener answered
            twice. The message names file and line.
    """
    found: list[Answer] = []
    seen: dict[tuple[str, str, int], str] = {}
    for path in paths:
        for line, row in _rows(path):
            where = f"{path}, line {line}"
            answer = _answer(row, keys, where)
            asked = (answer.test, answer.listener, answer.trial.number)
            if asked in seen:
                raise UserError(
                    f"{where}: {answer.listener!r} answers trial {answer.trial.number} a second time (first: {seen[asked]}): give each "
                    "answer once, and every listener a name of their own"
                )
            seen[asked] = where
            found.append(answer)
    if not found:
        raise UserError("the files hold no answer: let somebody listen first")
    return found


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, column to text) of a file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give files that the page saved"
        ) from error
    if len(data) > _MAX_BYTES:
        raise UserError(
            f"{path} has more than {_MAX_BYTES >> 20} MB, so it is not what the page saved: {_AGAIN}"
        )
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = next(reader, [])
        if sorted(header) != sorted(COLUMNS):
            raise UserError(f"{path} does not have the columns {', '.join(COLUMNS)}: {_AGAIN}")
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, not {len(header)}: {_AGAIN}"
                )
            if row:
                rows.append((reader.line_num, dict(zip(header, row, strict=True))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV in UTF-8 ({one_line(error)}): {_AGAIN}") from error
    return rows


def _answer(row: Mapping[str, str], keys: Mapping[str, Key], where: str) -> Answer:
    """One row, checked."""
    key = keys.get(row["test"])
    if key is None:
        raise UserError(
            f"{where}: an answer to test {_short(row['test'])}, not to {', '.join(keys)}: give its key with --key, or leave the file out"
        )
    number = _number(row, "trial", 1, len(key.trials), where)
    name, comment = row["listener"], row["comment"]
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise UserError(
            f"{where}: the listener {_short(name)} is not a name of 1 to {_MAX_NAME} characters: {_AGAIN}"
        )
    if len(comment) > _MAX_COMMENT:
        raise UserError(
            f"{where}: a comment of {len(comment)} characters, more than {_MAX_COMMENT}: shorten it"
        )
    for column, allowed in (("choice", CHOICES), ("confidence", CONFIDENCES)):
        if row[column] not in allowed:
            raise UserError(
                f"{where}: the {column} {_short(row[column])} is none of {', '.join(allowed)}: {_AGAIN}"
            )
    try:
        seconds = float(row["seconds"])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _MAX_SECONDS:
        raise UserError(f"{where}: {_short(row['seconds'])} is no number of seconds: {_AGAIN}")
    x, a, b = (_number(row, f"plays_{letter}", 0, _MAX_PLAYS, where) for letter in "xab")
    trial = key.trials[number - 1]
    return Answer(name, row["test"], trial, row["choice"], row["confidence"], seconds, (x, a, b), comment)


def _number(row: Mapping[str, str], column: str, low: int, high: int, where: str) -> int:
    text = row[column]
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise UserError(
            f"{where}: the {column} {_short(text)} is no whole number from {low} to {high}: {_AGAIN}"
        )
    return int(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def binomial(hits: int, count: int) -> float:
    """Two-sided exact probability of a result as far from half as ``hits`` of ``count`` fair coins; NaN for none."""
    if count < 1:
        return math.nan
    tail, ways = 0, 1
    for k in range(min(hits, count - hits) + 1):
        tail, ways = tail + ways, ways * (count - k) // (k + 1)
    return min(1.0, float(2 * tail / 2**count))


@dataclass(frozen=True)
class Judgement:
    """What the answers say.

    Attributes:
        tables: over controls, listeners and queries.
        answers: all of them.
        kept: listeners whose answers count.
    """

    tables: list[Table]
    answers: list[Answer]
    kept: frozenset[str]

    def write(self, folder: Path) -> None:
        """Write ``listening.csv``, an answer a row, ``listening.md`` and ``listening.json``."""
        from attr_engine.report.tables import markdown

        text = io.StringIO(newline="")
        out = csv.writer(text)
        out.writerow(
            [*COLUMNS, "kind", "against", "query", "retrieved", "control", "chosen", "repeat_of", "kept"]
        )
        for a in self.answers:
            t = a.trial
            both = (t.a, t.b) if t.target == "A" else (t.b, t.a)
            row = [a.listener, a.test, t.number, a.choice, a.confidence, a.seconds, *a.plays, a.comment,
                   t.kind, t.against, t.query, *both, a.chosen, t.repeat_of, int(a.listener in self.kept)]  # fmt: skip
            out.writerow([_cell(value) for value in row])
        tables = [{**vars(t), "rows": [[_plain(x) for x in row] for row in t.rows]} for t in self.tables]
        write_text(folder / "listening.csv", text.getvalue())
        write_text(folder / "listening.md", markdown(self.tables))
        write_text(folder / "listening.json", json.dumps(tables, indent=2, allow_nan=False) + "\n")


def _cell(value: object) -> object:
    """Text that a spreadsheet would take for a formula gets a quote before it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _plain(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judge(keys: Mapping[str, Key], answers: Sequence[Answer], catch_share: float = 1.0) -> Judgement:
    """Join answers with their keys and count.

    Args:
        keys: test to key.
        answers: what was read.
        catch_share: a listener counts who got this part of the answered catch trials right; where a test has some, at least one has to
            be answered.

    Returns:
        Tables: for every control the share of answers for the retrieved track among those for either of the two (Wilson interval,
        exact two-sided binomial test, bootstrap over listeners and over queries of the mean of their shares); listeners;
        queries. Repeated trials count for consistency only.

    Raises:
        UserError: a share outside [0, 1], or no listener is left.
    """
    if not 0.0 <= catch_share <= 1.0:
        raise UserError(
            f"the share {catch_share} of catch trials is outside 0 to 1: use 1, or less for kinder judges"
        )
    names = list(dict.fromkeys(a.listener for a in answers))
    rows: list[list[Cell]] = []
    kept = set()
    for name in names:
        mine = [a for a in answers if a.listener == name]
        catches = [a.chosen == RETRIEVED for a in mine if a.trial.kind == CATCH]
        needed = any(t.kind == CATCH for test in {a.test for a in mine} for t in keys[test].trials)
        good = sum(catches) >= catch_share * len(catches) and (
            bool(catches) or not needed or catch_share == 0
        )
        if good:
            kept.add(name)
        same, again = _consistency(mine)
        said = [a for a in mine if _counts(a)]
        rows.append([name, "yes" if good else "no", len(said), f"{sum(catches)} of {len(catches)}", f"{same} of {again}",
                     *_tally(said), _share_of(said), float(np.median([a.seconds for a in mine]))])  # fmt: skip
    if not kept:
        raise UserError(
            f"none of {len(names)} listeners got {catch_share:.0%} of the catch trials right: lower --catch-share, or ask others"
        )
    counted = [a for a in answers if a.listener in kept and _counts(a)]
    listeners = Table(
        "Listeners",
        [
            "listener",
            "kept",
            "answers",
            "catch trials right",
            "repeats answered alike",
            *_TALLY,
            "share",
            "median seconds",
        ],
        rows,
        f"Kept: who got at least {catch_share:.0%} of the catch trials right, in which A or B is X itself.",
    )
    tables = [_by_control(keys, counted, len(names) - len(kept)), listeners, _by_query(counted)]
    return Judgement(tables, list(answers), frozenset(kept))


ALL = "all"  # the line of all controls together
_TALLY = ["retrieved", "control", "neither"]


def _counts(answer: Answer) -> bool:
    return answer.trial.kind == PAIR and not answer.trial.repeat_of


def _tally(answers: Sequence[Answer]) -> list[int]:
    said = [a.chosen for a in answers]
    return [said.count(RETRIEVED), said.count(CONTROL), said.count(NEITHER)]


def _share_of(answers: Sequence[Answer]) -> float:
    """Share of the retrieved track among answers for either; NaN where there are none."""
    retrieved, control, _ = _tally(answers)
    return retrieved / (retrieved + control) if retrieved + control else math.nan


def _consistency(answers: Sequence[Answer]) -> tuple[int, int]:
    """Of one listener: repeats that were answered for the same track, or neither, as the first time; and repeats answered at all."""
    first = {(a.test, a.trial.number): a.chosen for a in answers}
    pairs = [
        (first[a.test, a.trial.repeat_of], a.chosen) for a in answers if (a.test, a.trial.repeat_of) in first
    ]
    return sum(x == y for x, y in pairs), len(pairs)


def _by_control(keys: Mapping[str, Key], answers: Sequence[Answer], dropped: int) -> Table:
    names = list(dict.fromkeys(name for key in keys.values() for name in key.against))
    rows: list[list[Cell]] = []
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        some = [a for a in answers if name == ALL or a.trial.against == name]
        retrieved, control, neither = _tally(some)
        said = share(retrieved, retrieved + control)
        same = sum(n for key in keys.values() for k, n in key.same.items() if name in (ALL, k))
        rows.append([name, retrieved, control, neither, said.value, said.low, said.high, binomial(retrieved, retrieved + control),
                     _over([a.listener for a in some], some), _over([a.trial.query for a in some], some),
                     _share_of([a for a in some if a.confidence == "sure"]), same])  # fmt: skip
    return Table(
        "The retrieved track against a control",
        [
            "against",
            *_TALLY,
            "share",
            "low",
            "high",
            "p",
            "over listeners",
            "over queries",
            "share when sure",
            "same track",
        ],
        rows,
        "Share: of the answers for either track, those for the retrieved one; 0.5 is chance. Low, high: 95 % Wilson interval; p: exact "
        "two-sided binomial test; both take answers for independent. Over listeners, over queries: mean of their shares with its 95 % "
        "bootstrap interval, where there are at least two. Same track: queries for which the control names the retrieved track "
        f"itself; they are not asked and in no share. {dropped} listeners were left out for failed catch trials.",
    )


def _over(groups: Sequence[str], answers: Sequence[Answer]) -> str:
    """Mean of the groups' shares with its bootstrap interval; "" for fewer than two groups."""
    shares = [
        _share_of([a for g, a in zip(groups, answers, strict=True) if g == group])
        for group in dict.fromkeys(groups)
    ]
    known = np.array([x for x in shares if not math.isnan(x)])
    return str(bootstrap(known)) if len(known) > 1 else ""


def _by_query(answers: Sequence[Answer]) -> Table:
    groups: dict[tuple[str, str, str, str], list[Answer]] = {}
    for a in answers:
        t = a.trial
        both = (t.a, t.b) if t.target == "A" else (t.b, t.a)
        groups.setdefault((t.query, t.against, *both), []).append(a)
    rows: list[list[Cell]] = [
        [query, against, target, other, *_tally(some), _share_of(some)]
        for (query, against, target, other), some in sorted(groups.items())
    ]
    return Table(
        "Queries", ["query", "against", "retrieved track", "control's track", *_TALLY, "share"], rows
    )
