"""``attr-engine compare``: any set of methods on the same queries, in one table, with both of the paper's figures, and on one page."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from attr_engine.cli_index import add_command
from attr_engine.errors import UserError

NOT_USED = (
    "functions", "strengths", "strengths_by", "unit", "groups", "top", "race_draws", "confidence", "race_share", "index", "rescore",
    "shares", "controls", "false_accepts", "keep_updates", "cache", "damping", "ridge", "projection_rank",
)  # fmt: skip


def add_compare(commands: Any) -> argparse.ArgumentParser:
    """Add the command; its settings are the caller's to add."""
    p = add_command(commands, "compare", "any set of methods on the same queries: judged by the same tables, drawn in the same figures",
                    """examples:
  attr-engine compare --list
  attr-engine compare --model model --data latents --queries held-out generated --out compared
  attr-engine compare --methods ridge features loss_change:strength=0.001 clap:checkpoint=clap.pt ... --out compared
  attr-engine compare ... --retrained retrained --where part=judge --out compared      # with LDS and removal
  attr-engine retrain ... --remove compared/methods/*/scores.parquet                   # removal for each method

Written are methods.md and .json (the table of all methods, and every table behind it), figure1 and figure2, methods.html, and a folder
a method with scores.parquet. methods.html has the tables and figures on one page, and for each query the first tracks (--show) of every
method side by side, with players: those that several methods agree on are marked. A method that is there is not asked again; stopped
at any moment, the same command carries on.
""")  # fmt: skip
    p.add_argument("--methods", nargs="+", default=[], metavar="NAME[:OPTION=VALUE,...]",
                   help="methods, the first one is what the others are compared with (default: all that need no further file)")  # fmt: skip
    p.add_argument("--list", action="store_true", help="list methods with their options, and end")
    p.add_argument("--out", default="", help="folder of it all; the same command carries on there")
    p.add_argument("--config", default="", help="JSON of settings, e.g. the config.json of a run; flags override it")  # fmt: skip
    p.add_argument("--retrained", default="", metavar="FOLDER", help="what attr-engine retrain wrote")
    p.add_argument("--where", default="", metavar="COLUMN=VALUE",
                   help="only queries whose metadata say so, and training tracks")  # fmt: skip
    p.add_argument(
        "--show-queries",
        type=int,
        default=50,
        metavar="N",
        help="queries on the page, the first ones (default: 50)",
    )
    p.add_argument("--players", type=int, default=3, metavar="N",
                   help="tracks of every method and query that the page plays (default: 3; 0: no sound at all)")  # fmt: skip
    p.add_argument("--no-figures", action="store_true", help="without figures, which need matplotlib")
    return p


def compare(args: argparse.Namespace) -> None:
    """Ask, judge, draw, print and write."""
    if args.list:
        print(listing())
        return
    from attr_engine import figures, progress
    from attr_engine.cli_judge import only_where
    from attr_engine.cli_options import settings_of
    from attr_engine.compare import Answer, ask, base_losses, folder_of, judged, without_needs
    from attr_engine.compare_report import write_page
    from attr_engine.counterfactuals import Truth
    from attr_engine.files import write_json, write_text
    from attr_engine.jobs import make_queries
    from attr_engine.latents import LatentDataset
    from attr_engine.load import load_base
    from attr_engine.methods import parse
    from attr_engine.report.tables import markdown

    if not args.out:
        raise UserError("say with --out where the comparison is to be written")
    if min(args.show_queries, args.players) < 0:
        raise UserError(f"--show-queries {args.show_queries} --players {args.players}: use 0 or more of each")
    out, s = Path(args.out), settings_of(args)
    names = list(dict.fromkeys(args.methods or without_needs()))
    for name in names:
        parse(name)
    truth = Truth.open(Path(args.retrained)) if args.retrained else None
    model, tracks = load_base(s)
    queries = only_where(
        make_queries(tracks, [LatentDataset(q) for q in s.queries], s.self_influence), args.where
    )
    if not queries:
        raise UserError("no query is left to be asked: check --queries and --where")
    if truth is not None:  # before hours of scoring
        truth.check(tracks)
        truth.columns([q.id for q in queries if q.kind != "training track"])
    answers: list[Answer] = []
    failed: dict[str, str] = {}
    for i, name in enumerate(names):
        print(f"method {i + 1} of {len(names)}: {name}", file=sys.stderr)
        try:
            answers.append(
                ask(name, model, tracks, queries, s, out / "methods" / folder_of(name), progress.bar)
            )
        except UserError as error:
            failed[name] = str(error)
            print(f"  {error}", file=sys.stderr)
    if not answers:
        raise UserError(f"no method could be asked, the first one because {next(iter(failed.values()))}")
    base = base_losses(model, tracks, out)
    case, found = judged(answers, tracks, queries, base, model.frames, truth)
    text = markdown(found)
    write_json(out / "methods.json", [vars(t) for t in found])
    write_text(out / "methods.md", text)
    print(text)
    written = [out / "methods.md", out / "methods.json"]
    if not args.no_figures:
        written += figures.draw(case.methods, out)
    written.append(
        write_page(
            out,
            case,
            answers,
            found,
            model,
            s,
            failed,
            args.show_queries,
            args.players,
            not args.no_figures,
            progress.bar,
        )
    )
    print("written: " + ", ".join(map(str, written)))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} methods could not be asked ({', '.join(failed)}), the first one because "
            f"{next(iter(failed.values()))}"
        )


def listing() -> str:
    """Methods by what they look at, each with its options."""
    from attr_engine.methods import METHODS
    from attr_engine.methods.base import KINDS

    lines = []
    for kind in KINDS:
        lines.append(f"{kind}:")
        for name, entry in METHODS.items():
            if entry.kind == kind:
                lines.append(f"  {name}: {entry.text}" + (f" (needs {entry.needs})" if entry.needs else ""))
                fields: Any = dataclasses.fields(entry.make)  # type: ignore[arg-type]
                lines += [f"      {f.name}={f.default}  {f.metadata['help']}" for f in fields]
    return "\n".join(lines)
