"""``attr-engine report --listening-test`` and ``attr-engine listening``: a blind listening test, and what its answers say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_engine.cli_index import add_command
from attr_engine.errors import UserError, printable
from attr_engine.listening_settings import EXCERPTS, KEY, PAGE, PAIR, Design

if TYPE_CHECKING:
    from attr_engine.result import Attribution
    from attr_engine.settings import Settings

_FLAGS = ("against", "trials", "catch", "repeats", "clip_seconds", "excerpt", "test_seed")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a listening test to ``report``."""
    d = Design()
    g = parser.add_argument_group("listening test (docs/listening-test.md)")
    g.add_argument("--listening-test", default="", metavar="FOLDER",
                   help=f"instead of the report write a blind listening test of the run's scores: {PAGE}, and {KEY}, which says which is "
                   "which")  # fmt: skip
    for name, kind, metavar, text in (
        ("trials", int, "N", f"pairs that are compared at most, one a query (default: {d.trials})"),
        ("catch", int, "N", f"trials in which A or B is X itself (default: {d.catch})"),
        ("repeats", int, "N", f"trials that come again with A and B exchanged (default: {d.repeats})"),
        ("clip-seconds", float, "S", f"length of a clip at most (default: {d.seconds:g})"),
        ("test-seed", int, "N", "of what is asked, and in which order (default: drawn, and kept in the key)"),
    ):
        g.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)
    g.add_argument("--excerpt", choices=EXCERPTS, default=argparse.SUPPRESS,
                   help=f"which part of a longer track is heard (default: {d.excerpt})")  # fmt: skip
    g.add_argument("--against", nargs="+", default=argparse.SUPPRESS, metavar="CONTROL",
                   help="what the retrieved track is compared with: random, cosine (of raw latents), or the top of another table of "
                   "scores, [NAME=]FILE (default: random)")  # fmt: skip


def wanted(args: argparse.Namespace) -> bool:
    """Whether a listening test is asked for.

    Raises:
        UserError: flags of one without it.
    """
    folder = getattr(args, "listening_test", "")
    lonely = [name for name in _FLAGS if hasattr(args, name)]
    if lonely and not folder:
        raise UserError(
            f"--{lonely[0].replace('_', '-')} is about a listening test: give --listening-test FOLDER"
        )
    return bool(folder)


def write(args: argparse.Namespace, settings: Settings) -> None:
    """Write the test of a finished run, print where it is."""
    from attr_engine.files import writing_in
    from attr_engine.load import load_job
    from attr_engine.pipeline import SCORES_PARQUET
    from attr_engine.report.listening import write_test
    from attr_engine.result import Attribution
    from attr_engine.runs import open_run

    out, folder = Path(args.out), Path(args.listening_test)
    given = {name: getattr(args, name) for name in _FLAGS if hasattr(args, name)}
    against = _controls(given.pop("against", ["random"]))
    names = {"clip_seconds": "seconds", "test_seed": "seed"}
    design = Design(**{names.get(name, name): value for name, value in given.items()})
    design.check()
    if not (out / SCORES_PARQUET).is_file():
        raise UserError(f"{out} has no {SCORES_PARQUET}: finish the run first (attr-engine attribute)")
    if settings.groups:
        raise UserError(
            "a listening test is of single tracks, and this run ranks groups: use a run without --groups"
        )
    result = Attribution.from_parquet(out / SCORES_PARQUET)
    with open_run(out, settings, bars=True) as run, writing_in(folder):
        key = write_test(folder, load_job(run), result, against, design, settings.title)
    asked = [t for t in key.trials if t.kind == PAIR and not t.repeat_of]
    for name in key.against:
        print(printable(f"{sum(t.against == name for t in asked)} trials against {name}; "
                        f"for {key.same[name]} queries it names the same track"))  # fmt: skip
    if key.settings["without_sound"]:
        print(
            f"note: {key.settings['without_sound']} pairs were left out: no sound of a second",
            file=sys.stderr,
        )
    print(f"{len(key.trials)} trials in {folder / PAGE}: give listeners this file alone")
    print(f"key: {folder / KEY}; attr-engine listening ANSWERS.csv --key {folder / KEY} reads their answers")


def _controls(given: list[str]) -> dict[str, Attribution | None]:
    from attr_engine.cli_judge import named_tables
    from attr_engine.listening_answers import ALL
    from attr_engine.report.listening import COSINE, RANDOM

    if len(set(given)) < len(given):
        raise UserError("a control stands twice in --against: name each once")
    tables = named_tables([text for text in given if text not in (RANDOM, COSINE)])
    if taken := {RANDOM, COSINE, ALL} & set(tables):
        raise UserError(f"a table may not be called {min(taken)}: give it another name, NAME=FILE")
    plain: dict[str, Attribution | None] = {text: None for text in given if text in (RANDOM, COSINE)}
    return {**plain, **tables}


def add_listening(commands: Any) -> None:
    """Add the command."""
    p = add_command(commands, "listening", "what listeners said: how often they chose the retrieved track over a control", """examples:
  attr-engine report --out run --listening-test test --against random cosine
  attr-engine listening answers/*.csv --key test/key.json --out answers

Listeners who fail catch trials (A or B is X itself) are left out and named. Written are listening.csv (an answer a row, joined with the
key), listening.md and listening.json.
""")  # fmt: skip
    p.add_argument("answers", nargs="+", metavar="CSV", help="files that listeners saved")
    p.add_argument(
        "--key", nargs="+", required=True, metavar="FILE", help=f"{KEY} of the tests they answered"
    )
    p.add_argument(
        "--out", default="", metavar="FOLDER", help="folder for the results (default: that of the key)"
    )
    p.add_argument("--catch-share", type=float, default=1.0, metavar="X",
                   help="part of the catch trials that a listener has to get right (default: 1)")  # fmt: skip


def listening(args: argparse.Namespace) -> None:
    """Read, judge, print and write."""
    from attr_engine.files import writing_in
    from attr_engine.listening import Key
    from attr_engine.listening_answers import judge, read_answers
    from attr_engine.report.tables import markdown

    keys = {key.test: key for key in (Key.read(Path(path)) for path in args.key)}
    found = judge(keys, read_answers([Path(path) for path in args.answers], keys), args.catch_share)
    out = Path(args.out) if args.out else Path(args.key[0]).parent
    with writing_in(out):
        found.write(out)
    print(markdown(found.tables))
    print(f"written: {out / 'listening.csv'}, .md and .json")
