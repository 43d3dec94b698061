"""From measurements of scoring to criteria and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
EXACT, INFLUENCE = 0.58, 0.20  # of the time of separate runs
GIGABYTES = {"bfloat16": 8.0, "float32": 14.0}


def _item(name: str, measured: float, at_most: float) -> Row:
    return {
        "criterion": name,
        "measured": round(measured, 4),
        "at_most": at_most,
        "passed": measured <= at_most,
    }


def queries_criteria(rounds: Sequence[dict[str, float]], same: bool) -> list[Row]:
    """Ratios within a round, their median, lowest and highest; none where the bits were not the same."""
    if not same:
        return []
    out = []
    for way, bound in (("one pass", EXACT), ("influence", INFLUENCE)):
        ratios = [r[way] / r["separate"] for r in rounds]
        item = _item(f"{way}, of the time of separate runs", statistics.median(ratios), bound)
        out.append({**item, "lowest": round(min(ratios), 4), "highest": round(max(ratios), 4)})
    return out


def memory_criteria(rows: Sequence[Row], frames: int) -> list[Row]:
    """Gigabytes of a query at the full length, and of another one."""
    out = []
    for dtype, bound in GIGABYTES.items():
        found = {
            (r["what"], r["frames"] == frames): r["weights"] + r["beside"]
            for r in rows
            if r["dtype"] == dtype
        }
        one = found["one query", False]
        out.append(_item(f"{dtype}, one query, GB", found["one query", True] / 1e9, bound))
        out.append(
            _item(f"{dtype}, another paged query, GB", (found["two, paged", False] - one) / 1e9, 0.001)
        )
        if dtype == "bfloat16":
            more = (found["two, resident", False] - one) / 1e9
            out.append(_item(f"{dtype}, another resident query, GB", more, 2.2))
    return out


def mode(dtype: str, way: str, strength: float, found: Any, exact: Any) -> Row:
    """Rank correlation over tracks (lowest of the queries) and relative error (norm over norm) of every effect."""
    row: Row = {"dtype": dtype, "way": way, "strength": strength}
    for name, values in (
        ("loss_change", lambda e: e.unlearned - e.base),
        ("displacement", lambda e: e.displacement),
    ):
        have, want = (np.asarray(values(e)).mean(axis=-1) for e in (found, exact))
        row[name] = {
            "spearman": min(_spearman(a, b) for a, b in zip(have, want, strict=True)),
            "error": float(np.linalg.norm(have - want) / np.linalg.norm(want)),
        }
    return row


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def markdown(result: dict[str, Any]) -> str:
    """Every part that was measured as a table."""
    lines = []
    for part, write in (("queries", _queries), ("modes", _modes), ("memory", _memory)):
        if part in result:
            lines += [*write(result[part]), "", *_criteria(result[part].get("criteria", [])), ""]
    return "\n".join(lines)


def _criteria(rows: Sequence[Row]) -> list[str]:
    def spread(r: Row) -> str:
        return f" ({r['lowest']:.3f} to {r['highest']:.3f})" if "lowest" in r else ""

    return [
        f"* {r['criterion']}: {r['measured']:.3f}{spread(r)}, asked at most {r['at_most']:g}: {'met' if r['passed'] else 'NOT met'}"
        for r in rows
    ]


def _where(part: Row) -> str:
    host = part["environment"]
    return (
        f"{part['threads']} threads; {host['cpu']}, {host['cores']} cores, torch {host['versions']['torch']}."
    )


def _queries(part: Row) -> list[str]:
    said = "the same bits" if part["same_bits"] else "DIFFERENT BITS: no ratio is shown"
    lines = [
        f"{part['queries']} queries, {part['tracks']} tracks, {part['draws']} draws, demo model, float32, {_where(part)} "
        f"One pass and separate runs: {said}.",
        "",
        "| round | one pass, s | separate runs, s | to first order, one pass, s |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {i + 1} | {r['one pass']:.2f} | {r['separate']:.2f} | {r['influence']:.2f} |"
        for i, r in enumerate(part["rounds"])
    ]


def _modes(part: Row) -> list[str]:
    strengths = sorted({r["strength"] for r in part["rows"]})
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for r in part["rows"]:
        loss, moved = r["loss_change"], r["displacement"]
        cells.setdefault((r["dtype"], r["way"]), {})[r["strength"]] = (
            f"{loss['spearman']:.3f}, {loss['error']:.1g}; {moved['spearman']:.3f}, {moved['error']:.1g}"
        )
    lines = [
        f"Loss change; displacement: each the rank correlation over {part['tracks']} tracks (the lower of {part['queries']} queries) and "
        f"the relative error, against forward passes in float64 with the same updates. {_where(part)}",
        "",
        "| model | way | " + " | ".join(f"size {s:g}" for s in strengths) + " |",
        "|---" * (2 + len(strengths)) + "|",
    ]
    return lines + [
        f"| {dtype} | {way} | " + " | ".join(row[s] for s in strengths) + " |"
        for (dtype, way), row in cells.items()
    ]


def _memory(part: Row) -> list[str]:
    lines = [
        f"The 1.06 B model, one row, loss change and displacement, bytes of tensors measured on a CPU; "
        f"not yet measured on a GPU. {_where(part)}",
        "",
        "| dtype | what | frames | weights, GB | beside them, GB | together, GB |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['dtype']} | {r['what']} | {r['frames']} | {r['weights'] / 1e9:.2f} | {r['beside'] / 1e9:.2f} "
        f"| {(r['weights'] + r['beside']) / 1e9:.2f} |"
        for r in part["rows"]
    ]
