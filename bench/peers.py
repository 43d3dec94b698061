"""Every peer in one table: what it covers, how right it is, and the engine's time and memory beside it.

``python bench/peers.py`` reads bench/results and measures nothing; ``python bench/run.py --full peers`` (or ``make peers``) measures. A
question without a result is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fisher_report
import record
import stream_report

Result = Mapping[str, Any]
FASTER, SLOWER, EVEN = "engine faster", "**peer faster**", "within the spread"


@dataclass(frozen=True)
class Line:
    """One peer in one case.

    Attributes:
        what: the question and the case.
        peer: its name.
        covers: how much of the engine's answer it gives.
        error: as its question measured it.
        time: the engine's time over the peer's: median, lowest, highest; None where there is none.
        memory: the engine's peak over the peer's.
        turns: whether both ran in every round; otherwise lowest and highest are of all pairs.
        reason: why there is no figure.
    """

    what: str
    peer: str
    covers: str
    error: float | None = None
    time: Mapping[str, float] | None = None
    memory: float | None = None
    turns: bool = True
    reason: str = ""

    @property
    def verdict(self) -> str:
        """Who is faster, if every round says so."""
        if self.time is None:
            return self.reason or "not measured"
        return FASTER if self.time["max"] < 1 else SLOWER if self.time["min"] > 1 else EVEN


def _time(engine: Sequence[float], peer: Sequence[float], turns: bool = True) -> Mapping[str, float] | None:
    """The spread of ratios within a round; of all pairs where there were no rounds, between the medians."""
    if not engine or not peer or (turns and len(engine) != len(peer)):
        return None
    if turns:
        return record.spread([a / b for a, b in zip(engine, peer, strict=True)])
    middle = statistics.median(engine) / statistics.median(peer)
    return {"median": middle, "min": min(engine) / max(peer), "max": max(engine) / min(peer)}


def _against(what: str, row: Result, rows: Mapping[str, Result], covers: str) -> Line:
    """A peer beside the engine on the same coverage, or on all of it where the peer covers all."""
    engine = rows.get(row.get("same_coverage") or "engine")
    reason = record.refusal(row) or ("no engine beside it" if engine is None else record.refusal(engine))
    if reason or engine is None:
        return Line(what, row["way"], covers, row.get("error"), reason=reason)
    mine, theirs = engine.get("peak_mb"), row.get("peak_mb")
    memory = mine / theirs if mine and theirs else None
    return Line(what, row["way"], covers, row.get("error"), _time(engine["seconds"], row["seconds"]), memory)


def _fisher(result: Result) -> Iterator[Line]:
    for case in result["cases"]:
        rows = {row["way"]: row for row in case["rows"]}
        for way, row in rows.items():
            if not way.startswith("engine") and way != "backward":
                yield _against(f"Fisher, {case['tokens']} tokens", row, rows, fisher_report.covers(row))


def _first_order(result: Result) -> Iterator[Line]:
    for row in result["rows"]:
        if row["kind"] == "peer":
            rows = {other["way"]: other for other in result["rows"] if other["case"] == row["case"]}
            yield _against(f"gradient dot products, {row['case']}", row, rows, row["covers"])


def _stream(result: Result) -> Iterator[Line]:
    ways = {"default": "delivers the same, checks nothing", "no checks": "delivers the same"}
    for mine, covers in ways.items():
        engine = next((r for r in result["rows"] if (r["kind"], r["name"]) == ("ours", mine)), None)
        for row in result["rows"]:
            if row["kind"] != "peer" or engine is None:
                continue
            what, name = f"streaming, {mine}", stream_report.label(row)
            reason = record.refusal(row) or record.refusal(engine)
            if reason:
                yield Line(what, name, covers, reason=reason)
                continue
            # Slow peers run over a part of the tracks.
            a, b = ([s / r["payload_gb"] for s in r["seconds"]] for r in (engine, row))
            yield Line(what, name, covers, time=_time(a, b))


def _index(result: Result) -> Iterator[Line]:
    """The engine's time is that of all scores and of the best 50 among them: FAISS gives the best 50."""
    rows = result.get("speed", {}).get("rows", ())
    for row in rows:
        if not row["way"].startswith("FAISS"):
            continue
        what = f"index, {row['tracks']:,} x {row['width']} {row['numbers']}, {row['threads']} threads"
        name = " ".join(filter(None, [row["way"], row.get("depth")]))
        same = [r for r in rows if r["way"].startswith("ours") and "failed" not in r
                and all(r[key] == row[key] for key in ("tracks", "width", "numbers", "threads"))]  # fmt: skip
        if "failed" in row or not same:
            yield Line(what, name, "", reason=row.get("failed", "no engine beside it"))
            continue
        engine = [a + b for a, b in zip(same[0]["seconds"], same[0]["top_seconds"], strict=True)]
        covers = f"recall@10 {row['recall_10']:.2f}, the engine's {same[0]['recall_10']:.2f}"
        yield Line(what, name, covers, time=_time(engine, row["seconds"], False), turns=False)


def _windows(result: Result) -> Iterator[Line]:
    """FAISS at the depth that it chose, or at the deepest that was measured."""
    last = {(r["case"], r["way"]): r for r in result["rows"]}  # depths grow
    for (case, way), row in last.items():
        exact = last.get((case, "exact"), {})
        if way == "exact":
            continue
        what, name = f"16 of {row['windows']:,} windows, {case}", f"FAISS {way.upper()}"
        if "failed" in row or "seconds" not in exact:
            yield Line(what, name, "", reason=row.get("failed", "no engine beside it"))
            continue
        covers = f"recall@10 {row['recall']:.2f}, the engine's {exact['recall']:.2f}"
        time = _time(exact["seconds"], row["seconds"], False)
        yield Line(what, f"{name}, depth {row['depth']}", covers, time=time, turns=False)


READERS = {"fisher": _fisher, "first_order": _first_order, "stream": _stream, "index": _index, "windows": _windows}  # fmt: skip


def lines(folder: Path) -> list[Line]:
    """A line a peer and case of every result that is there."""
    found = []
    for name, reader in READERS.items():
        path = folder / f"{name}.json"
        if path.exists():
            found += reader(json.loads(path.read_text()))
    return found


def sources(folder: Path) -> list[str]:
    """A table of when, by which state and where every result was measured; empty fields are not in its JSON."""
    out = ["| result | measured on | commit | processor, cores |", "|---|---|---|---|"]
    for name in READERS:
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            # Of an index only the speed is beside peers.
            host = result.get("speed", {}).get("environment") or result.get("environment", {})
            changed = " and changes" if host.get("changed_since_commit") else ""
            where = ", ".join(str(host[key]) for key in ("cpu", "cores") if key in host)
            out.append(
                f"| {path.name} | {host.get('date', '')} | {host.get('commit', '')[:9]}{changed} | {where} |"
            )
    return out


def markdown(found: Sequence[Line], sources: Sequence[str] = ()) -> str:
    """Where it was measured, and both tables."""
    head = [
        "| what | peer | covers | error | engine's time, of the peer's | memory | |",
        "|---|---|---|---|---|---|---|",
    ]
    slower = [line for line in found if line.verdict == SLOWER]
    return "\n".join(
        [
            "Median (lowest to highest) of the ratios within rounds; below 1 the engine is faster. With * the two did not take turns: the "
            "ratio of the medians (of the most unlike repetitions). A peer that covers less is beside the engine on what it covers.",
            "",
            *([*sources, ""] if sources else []),
            *head,
            *map(_shown, found),
            "",
            "### Where a peer is faster",
            "",
            *([*head, *map(_shown, slower)] if slower else ["Nowhere in these results."]),
        ]
    )


def _shown(line: Line) -> str:
    time = ""
    if line.time is not None:
        time = f"{line.time['median']:.3g} ({line.time['min']:.3g} to {line.time['max']:.3g}){'' if line.turns else ' *'}"
    error = "" if line.error is None else f"{line.error:.1e}"
    memory = "" if line.memory is None else f"{line.memory:.2g}"
    return f"| {line.what} | {line.peer} | {line.covers} | {error} | {time} | {memory} | {line.verdict} |"


def main() -> int:
    """Print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", nargs="?", type=Path, default=record.ROOT / "bench" / "results", help="folder (bench/results)"
    )  # fmt: skip
    args = parser.parse_args()
    found = lines(args.results)
    if not found:
        print(
            "no result with peers is there: measure with python bench/run.py --full peers, or make peers",
            file=sys.stderr,
        )
        return 1
    print(markdown(found, sources(args.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
