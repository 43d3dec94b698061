"""What every result of bench/ carries, and how its repetitions become ratios and a table. Standard library alone.

``python bench/record.py bench/results/unlearn.json`` prints the table of an earlier run, of the scripts that have no --table;
a folder's name, which of its results lack something that every result should say.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("attr-engine", "torch", "numpy", "safetensors", "pyarrow")
FOLDERS = ("--work", "--out", "--demo", "--table")
TURN = 0.05  # seconds of a turn, in which a short way is repeated
Row = dict[str, Any]


# -- where it was measured ------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _said("git", "rev-parse", "HEAD"),
        "changed_since_commit": bool(
            _said("git", "status", "--porcelain", "--", "attr_engine", "csrc", "kernels", "bench", ":!bench/results")
        ),
        "command": command(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0") or None,
        "kernel": platform.release().split("-")[0],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "huge_pages": huge.read_text().strip() if huge.exists() else "",
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _said(*words: str) -> str:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command() -> str:
    """The command that runs, without names of folders."""
    words, hide = ["python", f"bench/{Path(sys.argv[0]).name}"], False
    for word in sys.argv[1:]:
        option, _, value = word.partition("=")
        folder = option in FOLDERS or _elsewhere(value)
        words.append("DIR" if hide or _elsewhere(word) else f"{option}=DIR" if folder and value else word)
        hide = folder and not value
    return " ".join(words)


def _elsewhere(word: str) -> bool:
    """Whether a word is a path that says where somebody keeps things."""
    return os.path.isabs(word) or word.startswith(("..", "~"))


def plain(reason: str) -> str:
    """A reason in one line, without addresses and without the folders of this machine."""
    line = re.sub(r"https?://\S+", "[address]", " ".join(reason.split()))
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":,]+/)+", ".../", line)[:300]


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


# -- rows -----------------------------------------------------------------------------------------


def row(case: str, way: str, kind: str = "ours", **more: Any) -> Row:
    """A row without repetitions yet.

    Args:
        case: what is measured; rows of a case are compared with each other.
        way: how.
        kind: ``ours``, ``limit`` or ``peer``.
        more: more of it; ``error`` is None where there is nothing to compare with.
    """
    return {"case": case, "way": way, "kind": kind, "status": "ok", "error": None, **more, "seconds": []}


def checked(entry: Row, error: float, below: float) -> Row:
    """Write an error into a row; one that is not small enough (or NaN) makes it wrong, and a wrong row is not timed."""
    entry["error"] = error if error == error and abs(error) != float("inf") else None
    if not error < below:
        entry.update(status="wrong", reason=f"its error is {error:.3g}, not below {below:g}", seconds=[])
    return entry


def take_turns(
    rows: Sequence[Row],
    ways: Mapping[str, Callable[[], object]],
    repeat: int,
    turn: float = TURN,
    warm: bool = True,
) -> None:
    """Time the ways of rows that are right: every one once a round, in an order that turns round.

    Args:
        rows: get ``seconds``, one a round; a row of a ``case`` is timed by ``ways[way]``.
        ways: name to what is timed.
        repeat: rounds that count.
        turn: seconds that a short way is repeated for within a round; the mean counts.
        warm: whether a round that does not count comes first, which also finds how often a short way is repeated.
    """
    right = [r for r in rows if r["status"] == "ok" and r["way"] in ways]
    times = [1] * len(right)
    for repetition in range(0 if warm else 1, repeat + 1):
        order = list(enumerate(right))
        for i, entry in reversed(order) if repetition % 2 else order:
            start = time.perf_counter()
            for _ in range(times[i]):
                ways[entry["way"]]()
            seconds = (time.perf_counter() - start) / times[i]
            if repetition:
                entry["seconds"].append(float(f"{seconds:.6g}"))
            else:
                times[i] = max(1, min(1000, int(turn / max(seconds, 1e-9))))


def ratios(entry: Row, base: Row | None, measure: str = "seconds") -> list[float] | None:
    """Ratios within a round, so that a machine that drifts does not show; None where there is nothing to divide."""
    if base is None or not entry.get(measure) or len(entry[measure]) != len(base.get(measure, ())):
        return None
    return [x / y for x, y in zip(entry[measure], base[measure], strict=True) if y > 0] or None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    three = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.6g}") for name, value in three.items()}


def summarize(rows: Sequence[Row], bases: Sequence[str], measure: str = "seconds") -> None:
    """Add medians, and the ratios to each base of the same case, to every row that was measured."""
    by_name = {(r["case"], r["way"]): r for r in rows}
    for entry in rows:
        if not entry.get(measure):
            continue
        entry[f"median_{measure}"] = statistics.median(entry[measure])
        found = {base: ratios(entry, by_name.get((entry["case"], base)), measure) for base in bases}
        entry["ratio_to"] = {
            base: None if values is None else spread(values) for base, values in found.items()
        }


def result(
    name: str, question: str, threads: int, rows: Sequence[Row], bases: Sequence[str], started: dict[str, Any],
    measure: str = "seconds", **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A result as the newer scripts write it.

    Args:
        name: the question's short name.
        question: the question.
        threads: of torch.
        rows: what was measured; summarized here.
        bases: ways that ratios are to.
        started: the environment when it began.
        measure: ``seconds`` or ``peak_mb``, of every row.
        more: settings and limits.
    """
    summarize(rows, bases, measure)
    return {
        "name": name, "question": question, "command": started["command"], "commit": started["commit"],
        "environment": started, "threads": threads, "measure": measure, "bases": list(bases), **more, "rows": list(rows),
    }  # fmt: skip


def finish(found: dict[str, Any], out: Path) -> int:
    """Write, print; the exit code: 1 where a row is wrong or failed that is not a peer's."""
    write(found, out)
    print(markdown(found))
    return 1 if any(r["status"] in ("wrong", "failed") for r in found["rows"] if r["kind"] != "peer") else 0


# -- table ----------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """The result as a table: medians with lowest and highest; a row whose check failed shows no figure."""
    host, bases, measure = found["environment"], found["bases"], found["measure"]
    more = found.get("columns", [])
    unit, scale = ("ms", 1e3) if measure == "seconds" else ("MB", 1.0)
    lines = [
        f"{found['question']} {found['threads']} threads; median (lowest to highest); {host['cpu']}, {host['cores']} cores, "
        f"torch {host['versions']['torch']}, commit {host['commit'][:9] or 'not known'}.",
        "",
        f"| case | way | {unit} | {' | '.join([*(f'of {base}' for base in bases), *more, 'error'])} |",
        "|---" * (4 + len(bases) + len(more)) + "|",
    ]
    for entry in found["rows"]:
        lines.append(_line(entry, bases, more, measure, scale))
    lines += limit_lines(found)
    return "\n".join(
        [*lines, *(["", *(f"* {note}" for note in found["notes"])] if found.get("notes") else [])]
    )


def limit_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines below a table: what the machine can do, where the result has it."""
    out = []
    for name, figures in found.get("limits", {}).items():
        values = spread(figures)
        out += ["", f"Limit, {name}: {values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"]
    return out


def criteria(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of what was asked for: ``criterion``, ``at_most``, ``measured`` and ``passed``, None where not measured."""
    verdicts = {True: "pass", False: "**fail**", None: "not measured"}
    lines = ["", "| criterion | needed | measured | |", "|---|---|---|---|"]
    for item in items:
        shown = "" if item["measured"] is None else f"{item['measured']:.3f}"
        lines.append(
            f"| {item['criterion']} | ≤ {item['at_most']:g} | {shown} | {verdicts[item['passed']]} |"
        )
    return lines


def refusal(entry: Mapping[str, Any]) -> str:
    """What a row says in the place of figures; empty where it is ok."""
    return "" if entry["status"] == "ok" else f"{entry['status'].upper()}: {entry.get('reason', '')}".replace("|", "/")  # fmt: skip


def _line(entry: Row, bases: Sequence[str], more: Sequence[str], measure: str, scale: float) -> str:
    error = "" if entry["error"] is None else f"{entry['error']:.1e}"
    head = f"| {entry['case']} | {entry['way']} |"
    if refusal(entry):
        return f"{head} {refusal(entry)} |{' |' * (len(bases) + len(more))} {error} |"
    shown = _shown({k: scale * v for k, v in spread(entry[measure]).items()}) if entry.get(measure) else ""
    cells = [_shown(entry.get("ratio_to", {}).get(base)) for base in bases]
    cells += [_figure(entry.get(name)) for name in more]
    return f"{head} {shown} | {' | '.join([*cells, error])} |"


def _shown(values: Mapping[str, float] | None) -> str:
    if values is None:
        return ""
    if values["min"] == values["max"]:
        return f"{values['median']:.3g}"
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def lacking(folder: Path) -> str:
    """Which results do not say what every result should: those that were made before their scripts wrote it."""
    wanted: dict[str, list[str]] = {
        "environment": [],
        "command": [],
        "commit": [],
        "cpu": [],
        "load_average": [],
        "date": [],
    }
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        parts = [found, *found.values()] if isinstance(found, dict) else []
        hosts = [part["environment"] for part in parts if isinstance(part, dict) and "environment" in part]
        for name, without in wanted.items():
            said = bool(hosts) and (name == "environment" or all(host.get(name) for host in hosts))
            if not said and (name == "environment" or hosts) and not (name == "command" and found.get(name)):
                without.append(path.stem)
    return "\n".join(
        f"* no {name.replace('_', ' ')}: {', '.join(some)}" for name, some in wanted.items() if some
    )


# -- memory of a process --------------------------------------------------------------------------


def watch_memory() -> tuple[Callable[[], int], str]:
    """Start watching the resident size of this process.

    Returns:
        A function that says by how many bytes it has grown at most, and how that is known.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        return lambda: _status("VmHWM") - before, "high-water mark"
    except OSError:
        import resource

        # The peak of what came before may hide a part of the growth: ru_maxrss cannot be reset.
        unit = 1 if sys.platform == "darwin" else 1024
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            lambda: unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first),
            "ru_maxrss, at least",
        )


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(lacking(Path(name)) if Path(name).is_dir() else markdown(json.loads(Path(name).read_text())))
