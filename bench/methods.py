"""Every method on the same queries, in one table: on the demo, or on music of your own.

    python bench/methods.py --demo demo-run --evidence evidence-run --out compared          after python bench/evidence.py; about an hour
    python bench/methods.py --model M --data D --queries Q [--retrained R] --out compared   any other model and music
    python bench/methods.py --table bench/results/methods-demo.json

The demo's queries are the judging half of those with known parents, and some training tracks; retrained models judge. It is
``attr-engine compare``: what is there is not asked again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import record  # noqa: E402 - needs the path

TARGETS = 8  # training tracks among the queries; three of them are shorter than 10 s
# mucs and relabel take a minute a query as they are described; these are the figures of fewer draws and steps.
METHODS = ("ridge", "das", "dtrak", "trak", "tracin", "influence", "norm_influence", "cosine", "features", "lpips", "rps", "loss_change",
           "loss_change:strength=0.001", "skew", "displacement", "mucs:draws=16", "ascent", "relabel:steps=30")  # fmt: skip


def main() -> int:
    """Compare, keep the tables, print some of them."""
    args = _arguments()
    if args.table:
        print(document(json.loads(args.table.read_text())))
        return 0
    more = []
    if args.demo:
        from evidence_sets import Sets

        sets = Sets(args.demo, args.evidence)
        seconds = {i: float(sets.tracks.info[i]["seconds"]) for i in sets.targets}
        short = [i for i in sets.targets if seconds[i] < 10][:3]
        long = [i for i in sets.targets if seconds[i] >= 10][: TARGETS - 3]
        more = ["--model", args.demo / "model", "--data", args.demo / "latents", "--queries", args.evidence / "queries" / "known",
                "--where", "part=judge", "--retrained", args.evidence / "retrained",
                "--self-influence", *(sets.tracks.ids[i] for i in [*short, *long])]  # fmt: skip
    else:
        more = ["--model", args.model, "--data", args.data, "--queries", *args.queries]
        more += ["--retrained", args.retrained] if args.retrained else []
    call = ["-m", "attr_engine.cli", "compare", "--methods", *args.methods, *more, "--score-draws", args.draws, "--threads",
            args.threads, "--out", args.out]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, call)], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        return done.returncode
    result = {
        "tables": json.loads((args.out / "methods.json").read_text()),
        "environment": record.environment(),
    }
    result["environment"]["threads"] = args.threads
    record.write(result, args.json)
    print(document(result))
    return 0


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
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--out", type=Path, default=ROOT / "compared", help="folder of the comparison")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "methods-demo.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more")  # fmt: skip
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
    wanted = ("Methods", "Linear datamodelling", "Rank of a training", "Planted")
    return markdown([t for title, t in tables.items() if title.startswith(wanted)])


if __name__ == "__main__":
    sys.exit(main())
