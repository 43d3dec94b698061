"""Did anything get slower? Two results of the same question, row by row, their differences against their repetitions.

    python bench/compare.py OLD.json NEW.json           ratios to limits and peers, which travel between machines
    python bench/compare.py OLD NEW                     two folders of results: every question that both have
    python bench/compare.py OLD NEW --seconds           the times themselves, of the same kind of machine only
    python bench/compare.py ONCE AGAIN --moved          two runs of the same state: how many figures moved by more than their spread?

Only rows of the engine are judged. A ratio is taken within each repetition; the spread is from the lowest to the highest. *Worse* is a
median that is worse by more than the spread of either result, and by more than 1 %. The exit code is 1 where a row is worse, where a check
failed in NEW, or where NEW has lost a row; 2 where the two cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record

RESOLUTION = 0.01  # smaller relative differences are no news
HOST = ("cpu", "cores", "memory_gb", "gpu")
Result = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """One figure of one row.

    Attributes:
        name: the row, and what it is divided by.
        values: one a repetition; empty where it was not measured.
        higher: whether more is better.
        status: ``ok``; or what the row says instead: ``wrong``, ``failed``, ``missing``, ``skipped``.
        exact: counted and not timed, so that one repetition says it.
    """

    name: str
    values: tuple[float, ...]
    higher: bool = False
    status: str = "ok"
    exact: bool = False


# -- what a result says ---------------------------------------------------------------------------


def _over(values: Sequence[float], base: Sequence[float], factor: float = 1.0) -> tuple[float, ...]:
    """Ratios of each repetition; none where the repetitions do not belong together."""
    if len(values) != len(base):
        return ()
    return tuple(factor * x / y for x, y in zip(values, base, strict=True) if y > 0)


def _plain(result: Result) -> Iterator[Measure]:
    """Results of record.py."""
    measure, by_name = result["measure"], {(r["case"], r["way"]): r for r in result["rows"]}
    for row in result["rows"]:
        if row["kind"] != "ours":
            continue
        for base in result["bases"]:
            other = by_name.get((row["case"], base))
            if other is None or other is row:
                continue
            values = record.ratios(row, other, measure) or ()
            yield Measure(f"{row['case']}: {row['way']}, of {base}", tuple(values), status=row["status"])


def _fisher(result: Result) -> Iterator[Measure]:
    for case in result["cases"]:
        rows = {row["way"]: row for row in case["rows"]}
        for way, row in rows.items():
            for base, other in rows.items() if way.startswith("engine") else ():
                same = other.get("full") or base == "backward" or other.get("same_coverage") == way
                if same and not base.startswith("engine") and other["status"] == "ok":
                    name = f"{case['tokens']} tokens, width {case['width']}: {way}, of {base}"
                    yield Measure(name, _over(row["seconds"], other["seconds"]), status=row["status"])


def _stream(result: Result) -> Iterator[Measure]:
    limits = [r for r in result["rows"] if (r["kind"], r["name"]) == ("limit", "memcpy") and r["seconds"]
              and r["threads"] == result["threads"]]  # fmt: skip
    for row in result["rows"]:
        if row["kind"] == "ours" and limits:
            base, name = limits[0], f"{row['name']}, {row.get('threads', '')} threads: GB/s, of memcpy"
            factor = row["payload_gb"] / base["payload_gb"]
            yield Measure(name, _over(base["seconds"], row["seconds"], factor), True, row["status"])


def _score(result: Result) -> Iterator[Measure]:
    if "queries" in result:
        part = result["queries"]
        status = "ok" if part["same_bits"] else "wrong"
        single = [r["separate"] for r in part["rounds"]]
        for way in ("one pass", "influence"):
            values = () if status == "wrong" else _over([r[way] for r in part["rounds"]], single)
            name = f"{part['queries']} queries, {part['tracks']} tracks: {way}, of separate runs"
            yield Measure(name, values, status=status)
    for row in result.get("memory", {}).get("rows", ()):
        name = f"{row['dtype']}, {row['what']}, {row['frames']} frames: bytes, of the weights"
        yield Measure(name, (row["beside"] / row["weights"],), exact=True)


def _index(result: Result) -> Iterator[Measure]:
    rows = result.get("speed", {}).get("rows", ())
    for row in rows:
        if not row["way"].startswith("ours"):
            continue
        name = f"{row['tracks']:,} x {row['width']} {row['numbers']}, {row['threads']} threads"
        status = "failed" if "failed" in row else "ok"
        for key in ("recall_10", "recall_50"):
            values = (row[key],) if key in row else ()
            yield Measure(f"{name}: {key.replace('_', '@')}", values, True, status, exact=True)
        for other in rows:
            same = all(other[key] == row[key] for key in ("tracks", "width", "numbers", "threads"))
            if same and other["way"].startswith("FAISS exact") and "seconds" in other:
                values = _over(row.get("seconds", ()), other["seconds"])
                yield Measure(f"{name}: a query, of {other['way']}", values, status=status)


def _processes(result: Result) -> Iterator[Measure]:
    for row in result["rows"]:
        if row["processes"] > 1 and row["enough_cores"]:
            status = "ok" if result["same_bits"] else "wrong"
            values = tuple(row["efficiency"]) if status == "ok" else ()
            yield Measure(f"{row['stage']}, {row['processes']} processes: efficiency", values, True, status)


def _gpu(result: Result) -> Iterator[Measure]:
    def part(name: str) -> Any:
        return result["parts"].get(name, {}).get("result", {})

    rows = part("kernels").get("rows", [])
    for row in rows:
        for other in rows:
            here = all(other[key] == row[key] for key in ("kernel", "what", "dtype"))
            if row["ours"] and here and not other["ours"]:
                n = min(len(row["seconds"]), len(other["seconds"]))  # slow peers take fewer turns
                name = f"{row['kernel']} {row['what']}, {row['dtype']}: {row['way']}, of {other['way']}"
                yield Measure(name, _over(row["seconds"][:n], other["seconds"][:n]))
    passes = part("passes").get("passes", {})
    base = passes.get("forward + backward", {}).get("seconds", [])
    for way, row in passes.items():
        n = min(len(row["seconds"]), len(base))
        if way.startswith("Fisher") and n:
            yield Measure(f"{way}, of forward + backward", _over(row["seconds"][:n], base[:n]))
    for check in result["checks"]:
        if not check["green"]:
            yield Measure(
                f"check of {check['kernel']}, {check['way']}, {check['dtype']}, {check['what']}",
                (),
                status="wrong",
            )


READERS: dict[str, Callable[[Result], Iterator[Measure]]] = {
    "fisher": _fisher, "stream": _stream, "score": _score, "index": _index, "processes": _processes, "gpu": _gpu,
}  # fmt: skip
# Results that were made before they said their question are known by what they hold.
MARKS = {"cases": "fisher", "our_failures": "stream", "queries": "score", "modes": "score", "memory": "score", "speed": "index",
         "quality": "index", "same_bits": "processes", "tiny": "gpu"}  # fmt: skip


def question(result: Any) -> str | None:
    """Which question a result answers; None for what holds no ratios."""
    if not isinstance(result, dict):
        return None
    if "bases" in result:
        return str(result["name"])
    return next((name for mark, name in MARKS.items() if mark in result), None)


def measures(result: Result, seconds: bool = False) -> dict[str, Measure]:
    """Every figure of the engine, by name."""
    found = _absolute(result) if seconds else READERS.get(str(question(result)), _plain)(result)
    out: dict[str, Measure] = {}
    for one in found:
        name, n = one.name, 2
        while name in out:
            name, n = f"{one.name} ({n})", n + 1
        out[name] = one
    return out


def _absolute(result: Result) -> Iterator[Measure]:
    """Times of results that keep them in rows."""
    cases = (
        [(f"{c['tokens']} tokens", c["rows"]) for c in result["cases"]]
        if "cases" in result
        else [("", result.get("rows", []))]
    )
    for case, rows in cases:
        for row in rows:
            name = ", ".join(
                str(row[k])
                for k in ("case", "stage", "way", "name", "processes", "threads", "workers")
                if k in row
            )
            ours = row.get("kind", "ours") == "ours" and (not case or row["way"].startswith("engine"))
            if ours and "seconds" in row:
                yield Measure(
                    f"{case} {name}: seconds".strip(), tuple(row["seconds"]), status=row.get("status", "ok")
                )


# -- verdicts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table; ``bad`` ones make the exit code 1."""

    name: str
    old: Measure | None
    new: Measure | None
    verdict: str
    bad: bool = False


def judge(name: str, old: Measure | None, new: Measure | None) -> Line:
    """What became of one figure."""
    if new is None:
        return Line(name, old, new, "missing in NEW", True)
    if new.status in ("wrong", "failed"):
        return Line(name, old, new, f"{new.status.upper()} in NEW", True)
    if old is None:
        return Line(name, old, new, "only in NEW")
    if not old.values or not new.values:
        return Line(name, old, new, "not measured in " + ("NEW" if old.values else "OLD"), bool(old.values))
    if not (old.exact and new.exact) and min(len(old.values), len(new.values)) < 2:
        return Line(name, old, new, "one repetition: not judged")
    before, after = statistics.median(old.values), statistics.median(new.values)
    worse = before - after if new.higher else after - before
    margin = max(width(old), width(new), RESOLUTION * abs(before))
    verdict = "worse" if worse > margin else "better" if -worse > margin else "same"
    return Line(name, old, new, verdict, verdict == "worse")


def width(one: Measure) -> float:
    """From the lowest to the highest repetition."""
    return max(one.values) - min(one.values)


def compare(old: Result, new: Result, seconds: bool = False) -> list[Line]:
    """Every figure of two results of the same question.

    Raises:
        ValueError: they answer different questions, or times of different machines were asked for.
    """
    asked = question(old), question(new)
    if None in asked:
        raise ValueError(f"{'OLD' if asked[0] is None else 'NEW'} holds no ratios that could be compared")
    if asked[0] != asked[1]:
        raise ValueError(f"OLD answers {asked[0]!r} and NEW {asked[1]!r}: compare results of one question")
    differs = unlike(old, new)
    if seconds and differs:
        raise ValueError(
            f"the machines differ in {', '.join(differs)}: times cannot be compared, leave out --seconds"
        )
    before, after = measures(old, seconds), measures(new, seconds)
    if not before and not after:
        raise ValueError("neither result holds a figure of the engine that could be compared")
    return [judge(name, before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after))]


def unlike(old: Result, new: Result) -> list[str]:
    """In what two machines, or the threads that were used, differ."""
    one, two = (_host(result) for result in (old, new))
    return [key for key in one if one[key] != two[key]]


def _host(result: Result) -> dict[str, Any]:
    parts = [part for part in result.values() if isinstance(part, dict)]
    places = [result["speed"], result] if "speed" in result else [result, *parts]
    found = next((p["environment"] for p in places if isinstance(p.get("environment"), dict)), {})
    threads = next(
        (p["threads"] for p in (result, result.get("settings", {}), *places) if "threads" in p), None
    )
    return {**{key: found.get(key) for key in HOST}, "threads": threads}


def markdown(lines: Sequence[Line]) -> str:
    """The table: what is bad first."""
    out = ["| row | old | spread | new | spread | verdict |", "|---|---|---|---|---|---|"]
    for line in sorted(lines, key=lambda line: not line.bad):
        verdict = f"**{line.verdict}**" if line.bad else line.verdict
        out.append(f"| {line.name.replace('|', '/')} | {_cells(line.old)} | {_cells(line.new)} | {verdict} |")
    return "\n".join(out)


def moved(found: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """How far two runs of one state agree: figures that moved by no more than the spread of either, the others, and those of one alone."""
    head = "| question | figures | moved by less than their spread | by more | not repeated |"
    out = [head, "|---" * 5 + "|"]
    for name, lines in found:
        judged = [line for line in lines if line.verdict in ("same", "worse", "better")]
        out.append(f"| {name} | {len(judged)} | {sum(line.verdict == 'same' for line in judged)} | "
                   f"{sum(line.verdict != 'same' for line in judged)} | {sum(map(_lost, lines))} |")  # fmt: skip
    rest = [
        replace(line, name=f"{name}: {line.name}", verdict="not repeated" if _lost(line) else line.verdict)
        for name, lines in found for line in lines if line.verdict == "better" or line.bad
    ]  # fmt: skip
    return "\n".join([*out, "", markdown(rest)] if rest else out)


def _lost(line: Line) -> bool:
    """Whether the second run has no figure where the first has one; a check that failed there is another matter."""
    return line.bad and (line.new is None or not (line.new.values or line.new.status in ("wrong", "failed")))


def _cells(one: Measure | None) -> str:
    """Median and spread; a row whose check failed shows neither."""
    if one is None or not one.values or one.status in ("wrong", "failed"):
        return " | "
    return f"{statistics.median(one.values):.4g} | {width(one):.2g}"


def main() -> int:
    """Compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="a result, or a folder of results")
    parser.add_argument("new", type=Path, help="another of the same question, or another folder")
    parser.add_argument(
        "--seconds", action="store_true", help="times, not ratios; of the same kind of machine only"
    )
    parser.add_argument(
        "--moved", action="store_true", help="count what moved by more than its spread, either way"
    )
    args = parser.parse_args()
    try:
        pairs = list(_pairs(args.old, args.new, args.seconds))
        if args.moved:
            print(moved([(name, compare(old, new, args.seconds)) for name, old, new in pairs]))
            alone = _alone(args.old, {name for name, _, _ in pairs}) if args.old.is_dir() else []
            if alone:
                print(f"\nNot run again: {', '.join(alone)}.")
            return 0
        bad = False
        for name, old, new in pairs:
            lines = compare(old, new, args.seconds)
            bad |= any(line.bad for line in lines)
            print(f"## {name}\n\n{markdown(lines)}\n")
            differs = unlike(old, new)
            if differs:
                print(f"The machines differ in {', '.join(differs)}: ratios alone are compared.\n")
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 1 if bad else 0


def _pairs(old: Path, new: Path, seconds: bool) -> Iterator[tuple[str, Result, Result]]:
    """Results that belong together; of folders, those of the same file name that hold ratios."""
    if old.is_dir() != new.is_dir():
        raise ValueError("compare two files or two folders")
    if not old.is_dir():
        yield new.stem, _read(old), _read(new)
        return
    names = sorted({p.name for p in old.glob("*.json")} & {p.name for p in new.glob("*.json")})
    found = [(name, _read(old / name), _read(new / name)) for name in names]
    found = [
        (name, a, b) for name, a, b in found
        if question(a) is not None and (measures(a, seconds) or measures(b, seconds))
    ]  # fmt: skip
    if not found:
        raise ValueError(
            f"the folders have no result of the same name that holds {'seconds' if seconds else 'ratios'}"
        )
    for name, a, b in found:
        yield Path(name).stem, a, b


def _alone(old: Path, both: Container[str]) -> list[str]:
    """Results of a folder that hold ratios and are not in the other."""
    rest = ((p, _read(p)) for p in sorted(old.glob("*.json")) if p.stem not in both)
    return [path.stem for path, found in rest if question(found) is not None and measures(found)]


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return result


if __name__ == "__main__":
    sys.exit(main())
