"""How fast are the nearest of a million windows found, exactly and by FAISS, and how many of them does FAISS find?

``python bench/windows.py`` writes bench/results/windows.json and prints a Markdown table; bench/README.md says how to read it.
FAISS: ``--peers``, or ``pip install '.[search]'``; without it the exact search alone is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import record
import stream_report
import torch
from index_speed import PEERS

from attr_engine.errors import UserError
from attr_engine.methods.search import Approximate, Exact, approximate, recall
from attr_engine.methods.windows import TrackWindows

WIDTH, BATCH, K, LEAST = 512, 16, 10, 0.95
HELD = 128  # held-out queries: half choose the depth, half say what is found
CHUNK = 2**16  # windows that are made at a time
# Spread of tracks about their genre and of windows about their track, beside genres of spread 1.
GENRES, TRACK, WINDOW = 100, 0.7, 0.7
EXACT_SECONDS, SHARE = 0.6, 0.1
Row = dict[str, Any]


def windows_of(case: str, tracks: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 ``[count, WIDTH]``, track by track, and ``[HELD, WIDTH]`` more drawn in the same way.

    ``"tracks"``: a genre's centre, plus a track's own part, plus a window's own part. ``"i.i.d."``: nothing in common.
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((GENRES, WIDTH), dtype=np.float32)
    own = centres[rng.integers(GENRES, size=tracks)]
    own += TRACK * rng.standard_normal((tracks, WIDTH), dtype=np.float32)
    track_of = np.arange(count) * tracks // count

    def draw(chosen: np.ndarray) -> np.ndarray:
        x = rng.standard_normal((len(chosen), WIDTH), dtype=np.float32)
        if case == "tracks":
            x = own[chosen] + WINDOW * x
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    out = np.empty((count, WIDTH), dtype=np.float32)
    for first in range(0, count, CHUNK):
        out[first : first + CHUNK] = draw(track_of[first : first + CHUNK])
    return out, draw(rng.integers(tracks, size=HELD))


def seconds_of(work: Callable[[], Any], repeat: int) -> Row:
    """Median and all times of some calls, after one that does not count."""
    work()
    out = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        out.append(round(time.perf_counter() - start, 5))
    return {"median": statistics.median(out), "seconds": out}


def check(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray) -> float:
    """Recall of the exact search against float64 products, of a few queries."""
    truth = []
    for query in queries.astype(np.float64):
        scores = np.concatenate(
            [vectors[i : i + CHUNK].astype(np.float64) @ query for i in range(0, len(vectors), CHUNK)]
        )
        truth.append(np.argsort(-scores)[:K])
    return recall(found, np.stack(truth))


def measure(case: str, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Exact search, and each kind of FAISS' at every depth up to the one that it chose."""
    say(f"{case}: {args.windows} windows of {args.tracks} tracks")
    vectors, held = windows_of(case, args.tracks, args.windows, seed=0)
    bounds = np.searchsorted(
        np.arange(args.windows) * args.tracks // args.windows, np.arange(args.tracks + 1)
    )
    windows, batch = TrackWindows(vectors, bounds, f"bench {case}"), held[:BATCH]
    exact = Exact(vectors)
    common = {
        "case": case,
        "windows": args.windows,
        "tracks": args.tracks,
        "width": WIDTH,
        "threads": args.threads,
    }
    right = check(vectors, batch[:4], exact.nearest(batch[:4], K)[1])
    if right < 1.0:
        return [{**common, "way": "exact", "failed": f"WRONG: recall {right:.3f} against float64"}]
    timed = seconds_of(lambda: exact.nearest(batch, K), args.repeat)
    rows = [{**common, "way": "exact", "recall": right, **timed}]
    truth = exact.nearest(held, K)[1]
    for kind in args.kinds:
        if case == "i.i.d." and kind == "hnsw" and not args.quick:
            continue  # takes far longest to build, and finds as little
        say(f"{case}: {kind}")
        start = time.perf_counter()
        try:
            index = approximate(windows, kind, folder, held, K, LEAST)
        except UserError as error:
            rows.append({**common, "way": kind, "failed": stream_report.plain(str(error))})
            continue
        built = {"built": round(time.perf_counter() - start, 1), "chosen": index.meta["depth"]}
        most = rows[0]["median"]
        rows += [
            {**common, "way": kind, **built, **row} for row in depths(index, held, truth, args.repeat, most)
        ]
    for row in rows:
        if "median" in row:
            row["of_exact"] = round(row["median"] / rows[0]["median"], 4)
    return rows


def depths(index: Approximate, held: np.ndarray, truth: np.ndarray, repeat: int, most: float) -> list[Row]:
    """Time and recall, of the queries that the depth was not chosen by, up to the chosen depth or to the time of the exact search."""
    out, chosen = [], int(index.meta["depth"])
    for depth in [d for d in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if d < chosen] + [chosen]:
        index.set_depth(depth)
        found = index.nearest(held, K)[1]
        times = seconds_of(lambda: index.nearest(held[:BATCH], K), repeat)
        out.append({"depth": depth, "recall": recall(found[1::2], truth[1::2]), **times})
        if times["median"] > most:
            break
    return out


def criteria(rows: list[Row]) -> list[Row]:
    """What was asked for; ``passed`` is None where it was not measured."""
    of_tracks = [r for r in rows if r["case"] == "tracks" and "median" in r]
    took = [r["median"] for r in of_tracks if r["way"] == "exact"]
    good = [
        r["of_exact"]
        for r in of_tracks
        if r["way"] != "exact" and r["recall"] >= LEAST and r["depth"] == r["chosen"]
    ]
    share = min(good, default=None)
    return [
        {"criterion": f"seconds of {BATCH} queries, exact", "at_most": EXACT_SECONDS, "measured": took[0] if took else None,
         "passed": took[0] <= EXACT_SECONDS if took else None},
        {"criterion": f"share of that at recall@{K} of {LEAST}", "at_most": SHARE, "measured": share,
         "passed": None if share is None else share <= SHARE},
    ]  # fmt: skip


def markdown(result: Row) -> str:
    """The result as tables."""
    host = result["environment"]
    lines = [
        f"{BATCH} queries at a time, median of {result['repeat']}; {host['cpu']}, {host['cores']} cores, load {host['load_average'][0]} at "
        f"the start; most memory {result['peak_gb']} GB.",
        "",
        f"| vectors | way | depth | recall@{K} | ms | of the exact time | built, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        where = f"| {r['windows']:,} x {r['width']}, {r['case']} | {r['way']} "
        if "failed" in r:
            lines.append(f"{where}| FAILED: {r['failed'].replace('|', '/')} | | | | |")
            continue
        depth = f"{r['depth']}{' (chosen)' if r['depth'] == r['chosen'] else ''}" if "depth" in r else ""
        lines.append(
            f"{where}| {depth} | {r['recall']:.3f} | {1000 * r['median']:.3g} | {r['of_exact']:.3f} | {r.get('built', '')} |"
        )
    return "\n".join([*lines, *record.criteria(result["criteria"])])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, write, print; 1 where the exact search is wrong."""
    args = _arguments()
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    if args.peers and find_spec("faiss") is None and Path(sys.prefix).resolve() != PEERS.folder.resolve():
        failed = PEERS.install()
        if not failed:
            return subprocess.run([str(PEERS.python()), *sys.argv]).returncode
        say(f"FAISS was not installed: {', '.join(failed.values())}")
    torch.set_num_threads(args.threads)
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(args.threads)
    host = stream_report.environment()
    rows: list[Row] = []
    for case in args.cases:
        with tempfile.TemporaryDirectory(prefix="attr-engine-bench-", dir=args.work) as folder:
            rows += measure(case, args, Path(folder))
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        result = {
            "environment": host,
            "repeat": args.repeat,
            "peak_gb": peak,
            "rows": rows,
            "criteria": criteria(rows),
        }
        stream_report.write(result, args.out)  # after each case: the next one takes minutes
    print(markdown(result))
    return int(wrong(rows))


def wrong(rows: list[Row]) -> bool:
    """Whether the exact search is wrong; FAISS may fail."""
    return any("failed" in row for row in rows if row["way"] == "exact")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 windows: does it run?")
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--tracks", type=int, default=20_000)
    parser.add_argument("--cases", nargs="+", choices=("tracks", "i.i.d."), default=["tracks", "i.i.d."])
    parser.add_argument("--kinds", nargs="*", choices=("ivf", "hnsw"), default=["ivf", "hnsw"])
    parser.add_argument("--peers", action="store_true",
                        help="install FAISS into bench/.venv-index-peers if it is not there, and run there")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="of torch and FAISS (default 2)")
    parser.add_argument("--repeat", type=int, default=9, help="calls that are timed (default 9)")
    parser.add_argument("--work", type=Path, help="folder for the indexes, 2.2 GB (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "windows.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    args = parser.parse_args()
    if args.quick:
        args.windows, args.tracks = 20_000, 400
    return args


if __name__ == "__main__":
    sys.exit(main())
