"""Tables of commands that take long, as they are kept in bench/results: the grid, curves, forget, tail patch, robustness.

    python bench/kept.py bench/results/grid-demo.json                       print the tables
    python bench/kept.py --keep grid/table1.json --command "attr-engine grid ..." --out bench/results/grid-demo.json

``--keep`` takes the JSON that ``attr-engine grid`` (table1.json), ``curves`` (curves.json), ``evaluate`` (evaluation.json), ``robustness``
(robustness.json) or ``forget`` (forget.json, several: a sweep a method) wrote, without its settings, which name folders.
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

import stream_report  # noqa: E402 - needs the path
from evidence_tables import markdown  # noqa: E402

Table = Mapping[str, Any]
GRID = {"layers": "layers", "mask_update": "M_U", "mask_score": "M_L", "mean_rank": "mean rank of itself", "mean_rank_low": "low",
        "mean_rank_high": "high", "worst_rank": "worst", "top_similarity": "top similarity", "bottom_similarity": "bottom similarity",
        "frechet": "Frechet distance"}  # fmt: skip
FORGET = {"forget": "loss, forgotten", "remain": "remaining", "held_out": "held out", "similarity_forget": "similarity, their prompts",
          "similarity_remain": "others", "frechet": "Frechet"}  # fmt: skip


def main() -> int:
    """Print or keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", nargs="?", type=Path, help="of bench/results, to be printed")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="tables whose titles begin so")
    parser.add_argument("--keep", nargs="+", type=Path, metavar="FILE", help="what a command wrote")
    parser.add_argument("--command", default="", help="that command")
    parser.add_argument("--out", type=Path, help="file in bench/results")
    args = parser.parse_args()
    if bool(args.keep) == bool(args.result) or (args.keep and not (args.command and args.out)):
        parser.error("give a result to print, or --keep with --command and --out")
    if args.keep:
        tables = [t for path in args.keep for t in tables_of(json.loads(path.read_text()), path)]
        stream_report.write({"command": args.command, "tables": tables}, args.out)
        return 0
    found = json.loads(args.result.read_text())["tables"]
    wanted = [t for t in found if not args.only or t["title"].startswith(tuple(args.only))]
    print("\n".join(printed(t) for t in wanted))
    return 0


def tables_of(found: Any, path: Path) -> list[Table]:
    """The tables in what a command wrote."""
    if isinstance(found, list):
        return found
    if "cells" in found:
        return [_grid(found)]
    if "tables" in found:
        return list(found["tables"])
    if "rows" in found:
        return [_forget(found)]
    raise SystemExit(f"{path} is of none of the commands that --help names")


def _grid(found: Mapping[str, Any]) -> Table:
    rows = [[_short(cell[name]) for name in GRID] for cell in found["cells"]]
    untouched = found.get("frechet_untouched")
    note = f"{len(found['targets'])} targets"
    note += f"; Frechet distance of the untouched model: {untouched:.1f}." if untouched is not None else "."
    return {"title": "Grid", "columns": list(GRID.values()), "rows": rows, "note": note}


def _forget(found: Mapping[str, Any]) -> Table:
    method, rows = found["settings"]["method"], []
    for row in found["rows"]:
        label = f"{method} {row['strength']:g}" if row["strength"] else "untouched"
        each = [[row[name]] if name == "frechet" else row[name] or [None] * 3 for name in FORGET]
        rows.append([label, *(_short(x) for values in each for x in values)])
    columns = [
        x for name, title in FORGET.items() for x in (title, *(["low", "high"] if name != "frechet" else []))
    ]
    return {"title": method, "columns": ["method, strength", *columns], "rows": rows, "note": ""}


def _short(value: Any) -> Any:
    if isinstance(value, bool):
        return "on" if value else "off"
    return round(value, 3) if isinstance(value, float) else value


def printed(table: Table) -> str:
    """A table as Markdown, a value and its interval in one cell."""
    columns: Sequence[str] = table["columns"]
    places = [i for i, name in enumerate(columns) if name not in ("low", "high")]
    rows = [[_cell(row, i, columns) for i in places] for row in table["rows"]]
    note = f"{table['note']}\n\n" if table.get("note") else ""
    return note + markdown([columns[i] for i in places], rows)


def _cell(row: Sequence[Any], place: int, columns: Sequence[str]) -> str:
    def text(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    if list(columns[place + 1 : place + 3]) != ["low", "high"] or text(row[place + 1]) == "":
        return text(row[place])
    return f"{text(row[place])} ({text(row[place + 1])} to {text(row[place + 2])})"


if __name__ == "__main__":
    sys.exit(main())
