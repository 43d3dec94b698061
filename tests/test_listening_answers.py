"""The key of a listening test reads as it was written, and its answers are counted as they were given."""

import csv
import dataclasses
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attr_engine.errors import UserError
from attr_engine.judge import share
from attr_engine.listening import Key, Trial
from attr_engine.listening_answers import COLUMNS, Answer, binomial, judge, read_answers
from attr_engine.listening_settings import CATCH, KEY, PAIR

soundfile = pytest.importorskip("soundfile")


# -- the key --------------------------------------------------------------------------------------

TRIALS = (
    Trial(1, PAIR, "q0", "t0", "t1", "A", "random"),
    Trial(2, CATCH, "q1", "t2", "q1", "B"),
    Trial(3, PAIR, "q1", "t3", "t0", "B", "table"),
    Trial(4, PAIR, "q0", "t1", "t0", "B", "random", 1),
)
SIMPLE = Key(TRIALS, 5, {"trials": 2}, {"random": 0, "table": 3})


def test_a_key_reads_as_it_was_written(tmp_path):
    SIMPLE.write(tmp_path / KEY)
    assert Key.read(tmp_path / KEY) == SIMPLE


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format="other"), lambda v: v.pop("seed"), lambda v: v["trials"][0].update(target="C"),
        lambda v: v["trials"][0].update(a=3), lambda v: v["trials"][3].update(repeat_of=4), lambda v: v["trials"][3].update(repeat_of=2),
        lambda v: v["trials"][0].update(number=9), lambda v: v["trials"][0].update(against="who"), lambda v: v.update(trials=7),
        lambda v: v.update(same=[]), lambda v: v["trials"][0].update(target="B"),
    ],
)  # fmt: skip
def test_a_key_that_is_none_or_was_changed_is_refused(tmp_path, change):
    value = json.loads(SIMPLE.text())
    change(value)
    (tmp_path / KEY).write_text(json.dumps(value, indent=1, sort_keys=True))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / KEY))):
        Key.read(tmp_path / KEY)


def test_a_key_of_any_bytes_is_refused(tmp_path, rng):
    for data in (b"", b"[" * 100_000, b"\xff", rng.bytes(200), b"5"):
        (tmp_path / KEY).write_bytes(data)
        with pytest.raises(UserError, match="key of a listening test"):
            Key.read(tmp_path / KEY)
    with pytest.raises(UserError, match="cannot be read"):
        Key.read(tmp_path / "none.json")


# -- the answers ----------------------------------------------------------------------------------


def said(listener: str, trial: int, choice: str, **more) -> dict[str, object]:
    row = {"listener": listener, "test": SIMPLE.test, "trial": trial, "choice": choice, "confidence": "sure", "seconds": 2.5,
           "plays_x": 1, "plays_a": 1, "plays_b": 2, "comment": ""}  # fmt: skip
    return {**row, **more}


def write_answers(path: Path, rows, columns=COLUMNS, encoding="utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        out = csv.DictWriter(file, columns, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return path


def read(*paths: Path) -> list[Answer]:
    return read_answers(list(paths), {SIMPLE.test: SIMPLE})


def test_answers_are_read_in_any_order_of_columns_with_a_mark_and_several_lines(tmp_path):
    rows = [
        said("Ann", 1, "A", comment='a "b",\nc'),
        said("Ann", 3, "neither", confidence="unsure", seconds=0),
    ]
    one = read(write_answers(tmp_path / "a.csv", rows))
    two = read(write_answers(tmp_path / "b.csv", rows, COLUMNS[::-1], "utf-8-sig"))
    assert one == two == [
        Answer("Ann", SIMPLE.test, TRIALS[0], "A", "sure", 2.5, (1, 1, 2), 'a "b",\nc'),
        Answer("Ann", SIMPLE.test, TRIALS[2], "neither", "unsure", 0.0, (1, 1, 2), ""),
    ]  # fmt: skip
    assert [a.chosen for a in one] == ["retrieved", "neither"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test": "0123456789abcdef"}, "to test '0123456789abcdef'"), ({"trial": 5}, "trial '5' is no whole number from 1 to 4"),
        ({"trial": "-1"}, "trial"), ({"trial": "1e0"}, "trial"), ({"trial": "9" * 5000}, "trial"), ({"trial": "²"}, "trial"),
        ({"choice": "C"}, "choice 'C'"), ({"choice": ""}, "choice ''"), ({"confidence": "very"}, "confidence 'very'"),
        ({"seconds": "nan"}, "no number of seconds"), ({"seconds": "-1"}, "seconds"), ({"seconds": "1e9"}, "seconds"),
        ({"seconds": "soon"}, "seconds"), ({"plays_a": "1.5"}, "plays_a"), ({"plays_x": "1" * 7}, "plays_x"),
        ({"listener": ""}, "listener"), ({"listener": "a" * 65}, "listener"), ({"listener": "a\x1b[2J"}, "listener"),
        ({"comment": "x" * 5000}, "5000 characters"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_one_is_named_with_its_line(tmp_path, change, sentence):
    path = write_answers(tmp_path / "a.csv", [said("Ann", 1, "A"), {**said("Bob", 1, "A"), **change}])
    with pytest.raises(UserError, match=re.escape(sentence)) as found:
        read(path)
    assert (
        f"{path}, line 3" in str(found.value) and "\n" not in str(found.value) and len(str(found.value)) < 500
    )


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"a,b\n1,2\n", b'"listener', b"\x00" * 50, b"x" * (5 << 20),
             (",".join(COLUMNS) + "\n1,2\n").encode(), (",".join(COLUMNS) + '\n"a"b,' + "," * 8).encode(),
             (",".join(COLUMNS) + "\n").encode()]
)  # fmt: skip
def test_a_file_that_holds_no_answers_is_refused(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError):
        read(tmp_path / "a.csv")


def test_an_answer_given_twice_is_refused_in_one_file_or_two(tmp_path):
    one = write_answers(tmp_path / "a.csv", [said("Ann", 1, "A"), said("Ann", 1, "B")])
    with pytest.raises(UserError, match="trial 1 a second time"):
        read(one)
    two = write_answers(tmp_path / "b.csv", [said("Ann", 2, "A"), said("Bob", 1, "B")])
    three = write_answers(tmp_path / "c.csv", [said("Bob", 1, "B")])
    with pytest.raises(UserError, match=r"c\.csv, line 2: 'Bob' .*b\.csv, line 3"):
        read(two, three)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_the_exact_test_counts_coins(rng):
    for count in range(1, 9):
        sums = np.array([sum(coins) for coins in itertools.product((0, 1), repeat=count)])
        for hits in range(count + 1):
            as_far = np.abs(sums - count / 2) >= abs(hits - count / 2)
            assert binomial(hits, count) == pytest.approx(as_far.mean(), rel=1e-12)
    assert np.isnan(binomial(0, 0)) and 0 <= binomial(3000, 10_000) < 1e-100


def table(found, title: str) -> list[dict[str, object]]:
    (one,) = [t for t in found.tables if t.title.startswith(title)]
    return [dict(zip(one.columns, row, strict=True)) for row in one.rows]


def test_answers_are_counted_by_control_and_by_query(tmp_path, rng):
    trials = [Trial(i + 1, PAIR, f"q{i}", "t", "c", "A", ("random", "table")[i % 2]) for i in range(12)]
    key = Key((*trials, Trial(13, CATCH, "q0", "q0", "c", "A"), replace(trials[0], number=14, a="c", b="t", target="B", repeat_of=1)),
              1, {}, {"random": 0, "table": 2})  # fmt: skip
    said_by = {f"l{k}": rng.choice(["A", "B", "neither"], size=12) for k in range(4)}
    answers = []
    for name, choices in said_by.items():
        for t, c in zip(trials, choices, strict=True):
            answers.append(Answer(name, key.test, t, str(c), "sure", 1.0, (1, 1, 1), ""))
        answers.append(
            Answer(name, key.test, key.trials[12], "B" if name == "l3" else "A", "sure", 1.0, (1, 1, 1), "")
        )
        answers.append(Answer(name, key.test, key.trials[13], "B", "unsure", 1.0, (1, 1, 1), ""))
    found = judge({key.test: key}, answers)
    assert found.kept == {"l0", "l1", "l2"}
    kept = np.stack([said_by[f"l{k}"] for k in range(3)])
    for row in table(found, "The retrieved"):
        some = {"random": kept[:, ::2], "table": kept[:, 1::2], "all": kept}[row["against"]]
        hits, misses = int((some == "A").sum()), int((some == "B").sum())
        assert (row["retrieved"], row["control"], row["neither"]) == (hits, misses, some.size - hits - misses)
        wilson = share(hits, hits + misses)
        assert (row["share"], row["low"], row["high"]) == (wilson.value, wilson.low, wilson.high)
        assert row["p"] == binomial(hits, hits + misses)
        assert row["same track"] == {"random": 0, "table": 2, "all": 2}[row["against"]]
        shares = [
            (r == "A").sum() / max(1, np.isin(r, ["A", "B"]).sum())
            for r in some
            if np.isin(r, ["A", "B"]).any()
        ]
        if len(shares) > 1:
            assert row["over listeners"].startswith(f"{np.mean(shares):.3f} (")
    for row in table(found, "Queries"):
        column = kept[:, int(row["query"][1:])]
        assert (row["retrieved"], row["control"]) == ((column == "A").sum(), (column == "B").sum())
    for row in table(found, "Listeners"):
        mine = said_by[row["listener"]]
        assert row["kept"] == ("no" if row["listener"] == "l3" else "yes") and row["answers"] == 12
        assert (
            row["repeats answered alike"] == f"{int(mine[0] == 'A')} of 1"
        )  # B of the repeat is A of the first
        assert row["catch trials right"] == ("0 of 1" if row["listener"] == "l3" else "1 of 1")
    assert judge({key.test: key}, answers, 0.0).kept == set(said_by)


def test_who_answers_no_catch_trial_is_left_out_where_there_are_some():
    one = Answer("Ann", SIMPLE.test, TRIALS[0], "A", "sure", 1.0, (1, 1, 1), "")
    with pytest.raises(UserError, match="none of 1 listeners"):
        judge({SIMPLE.test: SIMPLE}, [one])
    with pytest.raises(UserError, match="outside 0 to 1"):
        judge({SIMPLE.test: SIMPLE}, [one], 2.0)
    neither = dataclasses.replace(one, trial=TRIALS[1], choice="neither")
    with pytest.raises(UserError, match="none of 1 listeners"):
        judge({SIMPLE.test: SIMPLE}, [one, neither])
    right = dataclasses.replace(one, trial=TRIALS[1], choice="B")
    assert judge({SIMPLE.test: SIMPLE}, [one, right]).kept == {"Ann"}


def test_what_is_written_runs_nothing_in_a_spreadsheet_or_a_page(tmp_path):
    nasty = "=cmd|'/c calc'!A1"
    answers = read(
        write_answers(
            tmp_path / "a.csv", [said("<b>|", 1, "A", comment=nasty), said("<b>|", 2, "B", comment="-1\n+2")]
        )
    )
    judge({SIMPLE.test: SIMPLE}, answers).write(tmp_path)
    with (tmp_path / "listening.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["comment"][0] for r in rows] == ["'", "'"] and [r["chosen"] for r in rows] == [
        "retrieved",
        "retrieved",
    ]
    assert [(r["retrieved"], r["control"]) for r in rows] == [("t0", "t1"), ("q1", "t2")]
    text = (tmp_path / "listening.md").read_text(encoding="utf-8")
    assert "<b>" not in text and r"\<b\>\|" in text
    assert json.loads((tmp_path / "listening.json").read_text())[0]["rows"][0][0] == "random"
