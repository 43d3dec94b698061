"""Every method on the same queries, in one table: on the demo, or on music of your own.

    python bench/methods.py --demo demo-run --evidence evidence-run --out compared          after python bench/evidence.py; about an hour
    python bench/methods.py ... --removals 4                                                also train without the ten best tracks of each
    python bench/methods.py --model M --data D --queries Q [--retrained R] --out compared   any other model and music
    python bench/methods.py --table bench/results/methods-demo.json
    python bench/methods.py --figures ridge                                                 what both committed results say of a method

The demo's queries are the judging half of those with known parents, and some training tracks; retrained models judge. It is
``attr-engine compare``: what is there is not asked again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {"the demo": "methods-demo.json", "real music": "methods-music.json"}
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import record  # noqa: E402 - needs the path

RETRAINING = "--subsets 24 --draws 16 --groups 2 --leave-out family artist"  # bench/evidence.py's
TARGETS = 8  # training tracks among the queries; three of them are shorter than 10 s
# mucs and relabel take a minute a query as they are described; these are the figures of fewer draws and steps.
METHODS = ("ridge", "das", "dtrak", "trak", "tracin", "influence", "norm_influence", "cosine", "features", "lpips", "rps", "loss_change",
           "loss_change:strength=0.001", "skew", "displacement", "mucs:draws=16", "ascent", "relabel:steps=30")  # fmt: skip


def main() -> int:
    """Compare, keep the tables, print some of them."""
    args = _arguments()
    if args.figures:
        print(figures(args.figures))
        return 0
    if args.table:
        print(document(json.loads(args.table.read_text())))
        return 0
    from attr_engine.compare import folder_of

    more: list = []
    model, data, queries, retrained = args.model, args.data, args.queries or [], args.retrained
    unasked: list = []
    if args.demo:
        from evidence_sets import Sets

        sets = Sets(args.demo, args.evidence)
        seconds = {i: float(sets.tracks.info[i]["seconds"]) for i in sets.targets}
        short = [i for i in sets.targets if seconds[i] < 10][:3]
        long = [i for i in sets.targets if seconds[i] >= 10][: TARGETS - 3]
        model, data = args.demo / "model", args.demo / "latents"
        queries = [args.evidence / "queries" / "known"]
        unasked = [args.evidence / "generated"]  # the table of bench/evidence.py has their losses too
        retrained = args.evidence / "retrained"
        more = ["--where", "part=judge", "--self-influence", *(sets.tracks.ids[i] for i in [*short, *long])]
    if args.removals and not retrained:
        raise SystemExit("--removals needs --retrained: the folder where models are kept")
    world = ["--model", model, "--data", data, "--queries", *queries]
    compare = ["compare", "--methods", *args.methods, *world, *more, "--score-draws", args.draws, "--threads", args.threads,
               "--players", 0, "--out", args.out]  # fmt: skip
    if args.removals:
        attr_engine(compare)
        found = args.out / "methods"
        tables = [f"{name}={found / folder_of(name) / 'scores.parquet'}" for name in args.methods]
        options = [*shlex.split(args.retraining), "--removals", args.removals, "--removal-seeds", "1"]
        attr_engine(["retrain", *world, *unasked, *options, "--remove", *tables, "--out", retrained])
    attr_engine([*compare, *(["--retrained", retrained] if retrained else [])])
    result = {
        "tables": json.loads((args.out / "methods.json").read_text()),
        "environment": record.environment(),
    }
    result["environment"]["threads"] = args.threads
    record.write(result, args.json)
    print(document(result))
    return 0


def attr_engine(call: list) -> None:
    """A command of attr-engine; ends this one where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "attr_engine.cli", *map(str, call)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="what attr-engine demo wrote")
    parser.add_argument("--evidence", type=Path, default=ROOT / "evidence-run", help="what bench/evidence.py wrote")  # fmt: skip
    for name in ("model", "data", "retrained"):
        parser.add_argument(f"--{name}", type=Path, help="instead of --demo; see attr-engine compare")
    parser.add_argument("--queries", type=Path, nargs="+", help="likewise")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"methods ({' '.join(METHODS)})")
    parser.add_argument("--draws", type=int, default=8, help="score draws a track (8)")
    parser.add_argument("--removals", type=int, default=0, metavar="N",
                        help="also train without the ten best tracks of every method for each of N queries (0)")  # fmt: skip
    parser.add_argument("--retraining", default=RETRAINING, metavar="OPTIONS",
                        help=f"of attr-engine retrain, the same as when --retrained was made ({RETRAINING})")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, default=ROOT / "compared", help="folder of the comparison")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "methods-demo.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more")  # fmt: skip
    parser.add_argument("--figures", nargs="+", metavar="METHOD",
                        help="print what the committed results say of some methods, with any options, and no more")  # fmt: skip
    return parser.parse_args()


def document(result: dict) -> str:
    """The table of all methods, the best by LDS first where there is one; and what the intervals of that are."""
    from attr_engine.report.data import Table
    from attr_engine.report.tables import markdown

    tables = {t["title"]: Table(**t) for t in result["tables"]}
    first = tables["Methods"]
    if "LDS" in first.columns:
        place = first.columns.index("LDS")
        rows = sorted(first.rows, key=lambda row: -row[place] if isinstance(row[place], float) else 9.0)
        tables["Methods"] = Table(first.title, first.columns, rows, first.note)
    wanted = ("Methods", "Linear datamodelling", "Removal", "Rank of a training", "Planted")
    return markdown([t for title, t in tables.items() if title.startswith(wanted)])


def figures(methods: Sequence[str]) -> str:
    """A row for each data set and method, for the page of the method.

    Raises:
        SystemExit: no result has one of them.
    """
    columns = ("removal, % more loss", "planted mAP", "seconds a query", "kB a track")
    lines, missing = [f"| on | method | LDS (95 %) | {' | '.join(columns)} |", "|---" * 7 + "|"], set(methods)
    for what, file in RESULTS.items():
        tables = {
            t["title"].partition(" (")[0]: t
            for t in json.loads((ROOT / "bench" / "results" / file).read_text())["tables"]
        }
        judged = {row[0]: row for row in tables["Linear datamodelling score"]["rows"]}
        for row in tables["Methods"]["rows"]:
            if row[0].partition(":")[0] in methods:
                missing.discard(row[0].partition(":")[0])
                _, lds, low, high = judged[row[0]][:4]
                values = dict(zip(tables["Methods"]["columns"], row, strict=True))
                cells = [f"{values[column]:g}" if column in values else "" for column in columns]
                lines.append(
                    f"| {what} | {row[0]} | {lds:.2f} ({low:.2f} to {high:.2f}) | {' | '.join(cells)} |"
                )
    if missing:
        raise SystemExit(f"no result in bench/results has {', '.join(sorted(missing))}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
