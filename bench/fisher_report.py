"""From repetitions to ratios, criteria and a Markdown table."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from typing import Any

import record
import stream_report

Row = dict[str, Any]
Result = dict[str, Any]
FASTEST, MEMORY, MEMORY_ONE, BACKWARD = 1.03, 0.5, 1.1, 1.25
SHORTEST, LONG, WIDE = 512, 1024, 512  # a criterion of time holds from here on: tokens, tokens, width
BASES = ("loop", "backward")


def summarize(rows: Sequence[Row]) -> None:
    """Add medians, and ratios to the loop and to the plain backward pass, to every row that was timed."""
    by_name = {row["way"]: row for row in rows}
    for row in rows:
        if not row["seconds"]:
            continue
        row["median_seconds"] = statistics.median(row["seconds"])
        row["ratio_to"] = {base: spread(row, by_name.get(base)) for base in BASES}


def spread(row: Row, base: Row | None) -> dict[str, float] | None:
    """Median, lowest and highest ratio of times within a round, so that a machine that drifts does not show."""
    if base is None or not row["seconds"] or not base["seconds"]:
        return None
    ratios = [x / y for x, y in zip(row["seconds"], base["seconds"], strict=True)]
    values = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(value, 4) for name, value in values.items()}


# -- criteria -------------------------------------------------------------------------------------------


def _item(name: str, measured: float | None, at_most: float) -> dict[str, Any]:
    """``passed`` is None where it could not be measured."""
    return {
        "criterion": name, "measured": None if measured is None else round(measured, 4), "at_most": at_most,
        "passed": None if measured is None else measured <= at_most,
    }  # fmt: skip


def criteria(cases: Sequence[Result]) -> list[dict[str, Any]]:
    """Every criterion at every length that it is for."""
    out = []
    for case in cases:
        rows = {row["way"]: row for row in case["rows"]}
        if "engine" not in rows:
            continue
        if case["tokens"] >= SHORTEST:
            out += _fastest(case, rows)
        out += _memory(case, rows)
        if case["tokens"] >= LONG and case["width"] >= WIDE:
            ratio = spread(rows["engine"], rows.get("backward"))
            out.append(
                _item(f"{_where(case)}: time, of a plain backward pass", ratio and ratio["median"], BACKWARD)
            )
    longest = max((case["tokens"] for case in cases), default=0)
    if longest < SHORTEST:
        out.append(_item(f"time, of the fastest: from {SHORTEST} tokens on", None, FASTEST))
    if longest < LONG or all(case["width"] < WIDE for case in cases):
        name = f"time, of a plain backward pass: from {LONG} tokens and width {WIDE} on"
        out.append(_item(name, None, BACKWARD))
    return out


def _where(case: Result) -> str:
    return f"{case['tokens']} tokens"


def _fastest(case: Result, rows: dict[str, Row]) -> list[dict[str, Any]]:
    """The engine next to the fastest that covers all, and, on what others cover, next to each of them."""
    engine = rows["engine"]
    full = [
        row
        for row in rows.values()
        if row["seconds"] and row.get("full") and row["way"] not in ("engine", "backward")
    ]
    best = min(full, key=lambda row: row["median_seconds"], default=None)
    ratio = spread(engine, best)
    name = f"{_where(case)}: time, of the fastest that covers all ({best['way'] if best else 'none was measured'})"
    out = [_item(name, ratio and ratio["median"], FASTEST)]
    for row in rows.values():
        same = rows.get(row.get("same_coverage", ""))
        if same is not None:
            ratio = spread(same, row)
            name = f"{_where(case)}: time on what {row['way']} covers, of {row['way']}"
            out.append(_item(name, ratio and ratio["median"], FASTEST))
    return out


def _memory(case: Result, rows: dict[str, Row]) -> list[dict[str, Any]]:
    out = []
    mine = rows["engine"].get("peak_mb")
    for other in ("vmap", "opacus"):
        if other in rows:
            theirs = rows[other].get("peak_mb")
            ratio = mine / theirs if mine and theirs else None
            out.append(_item(f"{_where(case)}: peak memory, of {other}", ratio, MEMORY))
    one = case["batch_one"]
    if one:
        ratio = one["engine"] / one["loop"] if one.get("engine") and one.get("loop") else None
        out.append(_item(f"{_where(case)}: peak memory at a batch of 1, of the loop", ratio, MEMORY_ONE))
    return out


# -- environment and table ------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    found = stream_report.environment()
    found["kernel"] = (
        f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}"
    )
    found["versions"] = {name: found["versions"][name] for name in ("attr-engine", "torch", "numpy")}
    return found


def markdown(result: Result) -> str:
    """The result as tables."""
    host, settings = result["environment"], result["settings"]
    lines = [
        f"DiT of {settings['depth']} layers of width {settings['width']}, batch of {settings['batch']} rows, {settings['dtype']}, "
        f"{settings['threads']} threads; median (lowest to highest) of the ratios within {settings['repeat']} rounds; "
        f"{host['cpu']}, {host['cores']} cores, torch {host['versions']['torch']}.",
        "",
        "| tokens | | time, of the loop | of backward | peak MB | covers | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        lines += [_line(case, row) for row in case["rows"]]
    ones = [case for case in result["cases"] if case["batch_one"]]
    if ones:
        lines += ["", "| batch of 1, tokens | engine, peak MB | loop, peak MB |", "|---|---|---|"]
        for case in ones:
            engine, loop = (case["batch_one"].get(way) for way in ("engine", "loop"))
            lines.append(f"| {case['tokens']} | {_number(engine)} | {_number(loop)} |")
    return "\n".join([*lines, *record.limit_lines(result), *record.criteria(result["criteria"])])


def _line(case: Result, row: Row) -> str:
    name = f"**{row['way']}**" if row["way"].startswith("engine") else row["way"]
    if reason := record.refusal(row):
        return f"| {case['tokens']} | {name} | {reason} | | | {covers(row)} | {_error(row)} |"
    loop, backward = (row.get("ratio_to", {}).get(base) for base in BASES)
    times = "" if loop is None else f"{loop['median']:.2f} ({loop['min']:.2f} to {loop['max']:.2f})"
    over = "" if backward is None else f"{backward['median']:.2f}"
    return (
        f"| {case['tokens']} | {name} | {times} | {over} | {_number(row.get('peak_mb'))} | {covers(row)} "
        f"| {_error(row)} |"
    )


def covers(row: Row) -> str:
    """How much of the parameters a row is of."""
    if "covered" not in row:
        return "no Fisher" if row["way"] == "backward" else ""
    if row["full"]:
        return "all"
    covered = row["covered"]
    share = covered["parameters"] / covered["of_parameters"]
    return f"{covered['tensors']} of {covered['of_tensors']} tensors, {100 * share:.1f} % of parameters"


def _error(row: Row) -> str:
    return f"{row['error']:.1e}" if row.get("error") is not None else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
