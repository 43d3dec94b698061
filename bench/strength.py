"""Does a strength that every query turns into a size of its own beat one size for all?

    python bench/strength.py --demo demo-run --out evidence-run      # a quarter of an hour on a core; carries on
    python bench/strength.py --table bench/results/strength.json

Needs the queries and the retrained models of bench/evidence.py in ``--out``. Every unit and strength is measured on half of the queries
that settings are chosen on; the best one is then judged once on the others, beside the default. Few draws: differences are what counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import fisher_report  # noqa: E402 - needs the path
import numpy as np  # noqa: E402
import stream_report  # noqa: E402
import torch  # noqa: E402
from evidence_sets import Sets, part_of  # noqa: E402
from evidence_tables import markdown, text  # noqa: E402
from evidence_updates import FUNCTIONS, run  # noqa: E402

from attr_engine import judge  # noqa: E402
from attr_engine.counterfactuals import Truth  # noqa: E402
from attr_engine.jobs import Query  # noqa: E402

STRENGTHS = {
    "size": (1e-3, 3e-3, 1e-2, 3e-2),
    "null_loss": (0.03, 0.1, 0.3, 0.9),
    "displacement": (0.003, 0.03, 0.3),
}
DEFAULT = ("size", 1e-2)
DRAWS: dict[str, Any] = {"score_draws": 2, "update_draws": 16, "replicates": 2}


def main() -> int:
    """Measure, write, print."""
    args = _arguments()
    if args.table:
        print(document(json.loads(args.table.read_text())))
        return 0
    torch.set_num_threads(args.threads)
    environment = {**fisher_report.environment(), "threads": args.threads}
    sets = Sets(args.demo, args.out)
    work = args.work or args.out / "strength"
    known = sets.queries("known")
    choosing = [q for q in known if part_of(q) == "choose"][::2]
    judging = [q for q in known if part_of(q) == "judge"]
    chosen = [row for unit, s in STRENGTHS.items() for row in measured(sets, work / unit, choosing, unit, s)]
    best = winner(chosen)
    judged = [
        row
        for unit, s in dict.fromkeys([(best["unit"], best["strength"]), DEFAULT])
        for row in measured(sets, work / f"judged-{unit}-{s:g}", judging, unit, (s,))
    ]
    result = {
        "choosing": [q.id for q in choosing], "judging": [q.id for q in judging], "draws": DRAWS, "chosen": chosen,
        "winner": best, "judged": judged,
        "environment": environment,
    }  # fmt: skip
    stream_report.write(result, args.json)
    print(document(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-run", help="what attr-engine demo wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "evidence-run", help="what bench/evidence.py made")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: strength in --out)")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "strength.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the tables of a result")
    return parser.parse_args()


def measured(
    sets: Sets, folder: Path, queries: Sequence[Query], unit: str, strengths: Sequence[float]
) -> list[dict[str, Any]]:
    """Of every strength: relative sizes of the updates, and LDS of every score function, query by query."""
    found = run(
        sets.model, sets.tracks, queries, folder, unit=unit, strengths=tuple(strengths), cache=str(folder.parent / "cache"),
        **DRAWS,
    )  # fmt: skip
    truth = Truth.open(sets.out / "retrained")
    kept, losses = truth.halves()
    mean = losses[:, :, truth.columns([q.id for q in queries])].mean(axis=0)
    sizes = {(row["query"], row["strength"]): row["size"] for row in found.meta.get("updates", ())}
    return [
        {
            "unit": unit, "strength": x, "sizes": [x if unit == "size" else sizes[q.id, x] for q in queries],
            "lds": {
                f: judge.lds(np.stack([found.values[f][found.row(q.id, x)] for q in queries]), kept, mean).tolist()
                for f in FUNCTIONS
            },
        }
        for x in strengths
    ]  # fmt: skip


def winner(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Unit, strength and score function of the largest mean LDS."""
    cells = [(float(np.mean(row["lds"][f])), row, f) for row in rows for f in FUNCTIONS]
    _, row, function = max(cells, key=lambda cell: cell[0])
    return {"unit": row["unit"], "strength": row["strength"], "function": function}


def document(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    head = (
        f"LDS by {result['draws']['update_draws']} update and {result['draws']['score_draws']} score draws, 95 % bootstrap intervals "
        "over queries; relative sizes of their updates as smallest, median, largest."
    )
    best = result["winner"]
    return "\n".join(
        [
            head,
            f"\n{len(result['choosing'])} queries of the choosing part:\n",
            _table(result["chosen"]),
            "Each score at the best strength of a unit, less the same at its best size, paired:\n",
            _against_size(result["chosen"]),
            f"{len(result['judging'])} queries of the judging part, the best ({best['function']} at {best['unit']} "
            f"{best['strength']:g}) and the default:\n",
            _table(result["judged"]),
            *_judged(result),
        ]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [row["unit"], f"{row['strength']:g}", *(text(judge.bootstrap(np.array(row["lds"][f])), 3) for f in FUNCTIONS),
         ", ".join(f"{summary(row['sizes']):.2g}" for summary in (np.min, np.median, np.max))]
        for row in rows
    ]  # fmt: skip
    return markdown(["unit", "strength", *FUNCTIONS, "sizes"], lines)


def _against_size(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for f in FUNCTIONS:
        best = {
            unit: max((r for r in rows if r["unit"] == unit), key=lambda r: float(np.mean(r["lds"][f])))
            for unit in STRENGTHS
        }
        base = np.array(best["size"]["lds"][f])
        line = [f, f"{best['size']['strength']:g}"]
        for unit in ("null_loss", "displacement"):
            gap = judge.bootstrap(np.array(best[unit]["lds"][f]) - base)
            line.append(f"{best[unit]['strength']:g}: {text(gap, 3)}")
        lines.append(line)
    return markdown(["score", "best size", "null_loss", "displacement"], lines)


def _judged(result: Mapping[str, Any]) -> list[str]:
    """The paired difference of the best to the default, score by score."""
    if len(result["judged"]) < 2:
        return ["The best is the default."]
    best, default = (row["lds"] for row in result["judged"])
    gaps = [f"{f} {text(judge.bootstrap(np.array(best[f]) - np.array(default[f])), 3)}" for f in FUNCTIONS]
    return [f"Best less default, paired: {', '.join(gaps)}."]


if __name__ == "__main__":
    sys.exit(main())
