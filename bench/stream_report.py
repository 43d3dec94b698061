"""From repetitions to medians, ratios, criteria and a Markdown table."""

from __future__ import annotations

import statistics
from typing import Any

from record import command, environment, plain, write

__all__ = [
    "command",
    "criteria",
    "environment",
    "label",
    "markdown",
    "not_measured",
    "plain",
    "row",
    "summarize",
    "write",
]
_BASES = ("memcpy", "numpy memmap", "stable-audio-tools")
Row = dict[str, Any]


def row(kind: str, name: str, payload: int, **more: Any) -> Row:
    """A row without repetitions yet; ``kind`` is ``limit``, ``ours`` or ``peer``."""
    out = {"kind": kind, "name": name, "status": "ok", "payload_gb": payload / 1e9}
    return {**out, **more, "seconds": []}


def not_measured(kind: str, name: str, status: str, reason: str, **more: Any) -> Row:
    """A row that is ``missing`` or ``failed``."""
    return {**row(kind, name, 0, **more), "status": status, "reason": plain(reason)}


def summarize(rows: list[Row], threads: int) -> None:
    """Add GB/s and ratios of medians to every row that was measured."""
    for entry in rows:
        if entry["status"] != "ok" or not entry["seconds"]:
            continue
        seconds, payload = entry["seconds"], entry["payload_gb"]
        speeds = {"median": statistics.median(seconds), "min": max(seconds), "max": min(seconds)}
        entry["gb_per_s"] = {name: round(payload / value, 4) for name, value in speeds.items()}
    bases = {base: _base(rows, base, threads) for base in _BASES}
    for entry in rows:
        if "gb_per_s" in entry:
            speed = entry["gb_per_s"]["median"]
            entry["ratio_to"] = {
                base: None if value is None else round(speed / value, 3) for base, value in bases.items()
            }


def _speed(rows: list[Row], kind: str, name: str, **more: Any) -> float | None:
    """The fastest median of the rows with this name."""
    found = [
        entry["gb_per_s"]["median"]
        for entry in rows
        if (entry["kind"], entry["name"]) == (kind, name)
        and "gb_per_s" in entry
        and all(entry[key] == value for key, value in more.items())
    ]
    return max(found, default=None)


def _base(rows: list[Row], name: str, threads: int) -> float | None:
    return _speed(rows, "limit", name, threads=threads) if name == "memcpy" else _speed(rows, "peer", name)


def criteria(
    rows: list[Row], cold: dict[str, Any], first: dict[str, Any], threads: int
) -> list[dict[str, Any]]:
    """Every criterion with what was measured; ``passed`` is None where it could not be."""
    memcpy = _base(rows, "memcpy", threads)
    cast = _speed(rows, "limit", "cast fp16 to fp32", threads=threads)
    default = _speed(rows, "ours", "default")
    peers = {
        label(entry): entry["gb_per_s"]["median"]
        for entry in rows
        if entry["kind"] == "peer" and "gb_per_s" in entry
    }

    def ratio(name: str, over: float | None) -> float | None:
        speed = _speed(rows, "ours", name)
        return None if speed is None or over is None else speed / over

    at_least = [
        ("no checks, of memcpy", ratio("no checks", memcpy), 0.8),
        ("checksums only, of memcpy", ratio("checksums only", memcpy), 0.65),
        ("float32 without checks, of the cast alone", ratio("float32, no checks", cast), 0.7),
        ("cold page cache, of dd", cold.get("ratio_to_dd"), 0.9),
        ("default, over numpy memmap", ratio("default", _base(rows, "numpy memmap", threads)), 1.8),
        (
            "default, over stable-audio-tools",
            ratio("default", _base(rows, "stable-audio-tools", threads)),
            50.0,
        ),
    ]
    out: list[dict[str, Any]] = [
        {"criterion": name, "measured": _rounded(value), "at_least": bound,
         "passed": None if value is None else value >= bound}
        for name, value, bound in at_least
    ]  # fmt: skip
    groups = {
        "the fastest peer": peers,
        "the fastest peer without a kept map": {k: v for k, v in peers.items() if "map kept" not in k},
    }
    for what, group in groups.items():
        best = max(group, key=group.__getitem__, default=None)
        over = None if best is None or default is None else default / group[best]
        out.append(
            {"criterion": f"default, over {what} ({best or 'none was measured'})", "measured": _rounded(over),
             "more_than": 1.0, "passed": None if over is None else over > 1.0}
        )  # fmt: skip
    took = first.get("median_ms")
    out.append(
        {"criterion": f"milliseconds to the first batch of {first.get('tracks', 0)} tracks", "measured": took,
         "at_most": 50.0, "passed": None if took is None else took <= 50.0}
    )  # fmt: skip
    return out


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def label(entry: Row) -> str:
    """Name and number of workers."""
    return f"{entry['name']}, {entry['workers']} workers" if entry.get("workers") else entry["name"]


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    data, host = result["data"], result["environment"]
    lines = [
        f"{data['payload_gb']:.2f} GB of payload in {data['tracks']} tracks, warm page cache, {result['threads']} threads, "
        f"median (lowest to highest) of {result['repetitions']}; {host['cpu']}, {host['cores']} cores.",
        "",
        "| | threads | GB/s | of memcpy | of numpy memmap | of stable-audio-tools |",
        "|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        name = {"limit": "limit: ", "ours": "**ours**: ", "peer": ""}[entry["kind"]] + label(entry)
        if "gb_per_s" in entry:
            speed = entry["gb_per_s"]
            shown = f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"
            ratios = [_times(entry["ratio_to"][base]) for base in _BASES]
        else:
            shown, ratios = f"{entry['status']}: {entry.get('reason', '')}".replace("|", "/"), ["", "", ""]
        lines.append(f"| {name} | {entry.get('threads', '')} | {shown} | {' | '.join(ratios)} |")
    if "gb_per_s" in result["cold"]:
        cold = result["cold"]["gb_per_s"]
        lines += [
            "",
            f"Cold page cache: {cold['ours']:.2f} GB/s, dd {cold['dd']:.2f} GB/s {result['cold'].get('reason', '')}".strip(),
        ]
    lines += ["", "| criterion | needed | measured | |", "|---|---|---|---|"]
    for item in result["criteria"]:
        signs = {"at_least": "≥", "more_than": ">", "at_most": "≤"}
        key = next(key for key in signs if key in item)
        verdict = {True: "pass", False: "**fail**", None: "not measured"}[item["passed"]]
        shown = "" if item["measured"] is None else f"{item['measured']:.2f}"
        lines.append(f"| {item['criterion']} | {signs[key]} {item[key]:g} | {shown} | {verdict} |")
    return "\n".join(lines)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
