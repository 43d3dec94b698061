"""The plots of docs/performance.md: times and memory as bench/results holds them, as small SVG files.

A plot carries a hash of its series, so that whether it is of the present results is known without drawing it.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER, RESULTS = ROOT / "docs" / "plots", ROOT / "bench" / "results"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Named series of (x, y) over two logarithmic axes."""

    title: str
    x: str
    y: str
    series: dict[str, Points]

    def key(self) -> str:
        """A hash of all that is drawn."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _fisher(result: dict[str, Any], y: str, of: Callable[[dict[str, Any]], float | None]) -> Plot:
    series: dict[str, Points] = {}
    for case in result["cases"]:
        for row in case["rows"]:
            value = of(row) if row["status"] == "ok" and "covers" not in row["way"] else None
            if value is not None:
                series.setdefault(row["way"], []).append((case["tokens"], value))
    s = result["settings"]
    title = f"Fisher of a batch of {s['batch']}, {s['depth']} layers of width {s['width']}, {s['threads']} threads"
    return Plot(title, "tokens", y, series)


def _modes(result: dict[str, Any]) -> Plot:
    series: dict[str, Points] = {}
    for row in result["modes"]["rows"]:
        series.setdefault(f"{row['dtype']}: {row['way']}", []).append(
            (row["strength"], max(row["loss_change"]["error"], 1e-9))
        )
    return Plot("Loss change against forward passes in float64", "size of the update", "relative error", series)  # fmt: skip


def _index(result: dict[str, Any]) -> Plot:
    series: dict[str, Points] = {}
    for row in result["speed"]["rows"]:
        if row["way"].startswith("ours") and "failed" not in row:
            name = f"{row['numbers']}, {row['threads']} threads"
            series.setdefault(name, []).append((row["megabytes"], 1e3 * row["median"]))
    return Plot("All scores of one query by an index", "index, MB", "ms", series)


def _scale(result: dict[str, Any], what: str, title: str) -> Plot:
    """Seconds of every way against the number in the names of its cases, such as ``"scores, 256 frames, 1 query"``."""
    series: dict[str, Points] = {}
    for row in result["rows"]:
        found = re.match(rf"([^,]*), (?:([\d,]+) {what}|{what} (\d+))", row["case"])
        if found and row["seconds"]:
            at = int((found[2] or found[3]).replace(",", ""))
            series.setdefault(f"{found[1]}: {row['way']}", []).append((at, statistics.median(row["seconds"])))
    s = result["settings"]
    return Plot(
        f"{title}, {s['depth']} layers, {result['threads']} threads", what, "seconds (median)", series
    )


def all_plots() -> dict[Path, Plot]:
    """Every plot whose results are there, by its file."""
    made: dict[str, tuple[str, Callable[[dict[str, Any]], Plot]]] = {
        "fisher-time": (
            "fisher",
            lambda r: _fisher(r, "seconds (median)", lambda row: row["median_seconds"]),
        ),
        "fisher-memory": ("fisher", lambda r: _fisher(r, "peak MB", lambda row: row.get("peak_mb"))),
        "difference-error": ("score", _modes),
        "index-time": ("index", _index),
        "scale-frames": (
            "scale",
            lambda r: _scale(r, "frames", f"Four tracks, width {r['settings']['width']}"),
        ),
        "scale-width": ("scale", lambda r: _scale(r, "width", "Four tracks of 256 frames")),
        "scale-queries": (
            "scale",
            lambda r: _scale(r, "queries", f"16 tracks of 64 frames, width {r['settings']['width']}"),
        ),
        "scale-tracks": (
            "scale",
            lambda r: _scale(r, "tracks", f"Tracks of 64 frames, width {r['settings']['width']}"),
        ),
    }
    return {
        FOLDER / f"{name}.svg": make(json.loads((RESULTS / f"{source}.json").read_text()))
        for name, (source, make) in made.items()
        if (RESULTS / f"{source}.json").exists()
    }


def stale() -> list[Path]:
    """Plots that are missing or of other series."""
    return [
        path
        for path, plot in all_plots().items()
        if not path.exists() or plot.key() not in path.read_text(encoding="utf-8")
    ]


def draw(paths: Sequence[Path]) -> None:
    """Draw some of the plots. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    FOLDER.mkdir(exist_ok=True)
    found = all_plots()
    for path in paths:
        plot = found[path]
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), mark in zip(sorted(plot.series.items()), "osv^D*xP+<>" * 3, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), marker=mark, markersize=4, linewidth=1, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        about = {"Date": None, "Description": plot.key()}
        with matplotlib.rc_context({"svg.hashsalt": "attr_engine", "svg.fonttype": "none"}):
            figure.savefig(path, format="svg", metadata=about)
