"""Tables and criteria of ``bench/index.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import record

Row = dict[str, Any]
# Tracks, width, seconds that a query may take after its own gradient, on two cores.
NEEDED = ((115_000, 1024, 0.1), (5_000_000, 256, 1.0))


def criteria(rows: Sequence[Row]) -> list[Row]:
    """What a repeated query may take; ``passed`` is None where it was not measured."""
    out = []
    for tracks, width, most in NEEDED:
        for numbers in ("float16", "int8"):
            found = [r["median"] + r["top_median"] for r in rows if r["way"] == "ours, all scores" and r["threads"] == 2
                     and "failed" not in r and (r["tracks"], r["width"], r["numbers"]) == (tracks, width, numbers)]  # fmt: skip
            measured = found[0] if found else None
            out.append({"criterion": f"{tracks:,} x {width} {numbers}: seconds of all scores and the top 50", "at_most": most,
                        "measured": measured, "passed": None if measured is None else measured <= most})  # fmt: skip
    return out


def markdown(result: Row) -> str:
    """The result as tables."""
    parts = []
    if "quality" in result:
        parts += [quality(result["quality"])]
    if "speed" in result:
        parts += [speed(result)]
    return "\n\n".join(parts)


def quality(found: Row) -> str:
    """A table a question; figures of the half of the queries that nothing was chosen by, those of the other half in brackets."""
    base = ", ".join(f"{name} {value}" for name, value in found["base"].items())
    lines = [
        f"{found['tracks']} tracks, each once a query, and {found['held_out']} held-out queries. Unless a row says otherwise: {base}. "
        f"Truth: {found['truth']}, of the same averaging and ridge. Odd positions (even positions, which the defaults were chosen by).",
    ]
    for section in found["sections"]:
        names = list(section["rows"][0]["changed"])
        lines += [
            "",
            f"| {' | '.join(names)} | numbers | rank of itself | worst | family mAP | parents mAP | recall@10 | recall@50 |",
            "|" + "---|" * (len(names) + 7),
        ]
        for row in section["rows"]:
            changed = " | ".join(str(value) for value in row["changed"].values())
            figures = " | ".join(_both(row, key, digits) for key, digits in FIGURES)
            lines.append(f"| {changed} | {row['of_a_feature']} | {figures} |")
    lines += ["", "| timestep | length of a single gradient: median | least | largest |", "|---|---|---|---|"]
    for row in found["lengths"]:
        figures = " | ".join(f"{row[key]:.3g}" for key in ("median", "least", "largest"))
        lines.append(f"| {row['from']:.1f} to {row['to']:.1f} | {figures} |")
    return "\n".join(lines)


FIGURES = (
    ("self_mean", 2),
    ("self_worst", 0),
    ("family_map", 3),
    ("parents_map", 3),
    ("recall_10", 3),
    ("recall_50", 3),
)


def _both(row: Row, key: str, digits: int) -> str:
    if key not in row["report"]:
        return ""
    return f"{row['report'][key]:.{digits}f} ({row['choose'][key]:.{digits}f})"


def speed(result: Row) -> str:
    """A line a way."""
    found = result["speed"]
    host = found.get("environment") or result["environment"]  # earlier results had one of all parts
    lines = [
        f"One query, warm page cache, median of {found['repeat']}; {host['cpu']}, {host['cores']} cores, load {host['load_average'][0]} at "
        "the start. Recall is against float32 rows.",
        "",
        "| rows | format | threads | way | ms | first, ms | best 50 of them, ms | built, s | recall@10 | recall@50 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in found["rows"]]
    return "\n".join([*lines, *record.criteria(result["criteria"])])


def _line(row: Row) -> str:
    where = f"| {row['tracks']:,} x {row['width']} | {row['numbers']} | {row['threads']} | {row['way']} {row.get('depth', '')}"
    if "failed" in row:
        return f"{where} | FAILED: {row['failed'].replace('|', '/')} | | | | | |"
    ms = [f"{1000 * row[key]:.3g}" if key in row else "" for key in ("median", "first", "top_median")]
    built = f"{row['built']:.0f}" if "built" in row else ""
    return f"{where} | {' | '.join(ms)} | {built} | {row['recall_10']:.3f} | {row['recall_50']:.3f} |"
