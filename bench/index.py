"""Which settings of an index are right, and how fast is a query? Planted relations and whole gradients judge the first.

``python bench/index.py --demo demo-run --peers`` writes bench/results/index.json and prints Markdown tables; bench/README.md says
how to read them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import index_quality as quality
import index_report as report
import index_speed as speed
import stream_report

# Tracks, width, format of the rows, and the kinds of FAISS' indexes on the same rows.
FAST = ["exact 8 bits", "IVF 8 bits"]
SIZES = (
    (115_000, 1024, "float16", ["exact float32", "HNSW 8 bits"]), (115_000, 1024, "int8", FAST),
    (5_000_000, 256, "float16", []), (5_000_000, 256, "int8", FAST),
)  # fmt: skip
PARTS = ("quality", "speed")
QUICK = ((20_000, 64, "float16", ["exact float32"]), (20_000, 64, "int8", FAST))


def main() -> int:
    """Measure, write, print; 1 where scores of ours are wrong."""
    args = _arguments()
    if args.table:
        found = json.loads(args.table.read_text())
        print(report.markdown({k: v for k, v in found.items() if k not in PARTS or k in args.only}))
        return 0
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    made_by = {"environment": stream_report.environment()}
    with tempfile.TemporaryDirectory(prefix="attr-engine-bench-", dir=args.work) as folder:
        if "quality" in args.only:
            result["quality"] = made_by | measure_quality(args, Path(args.work or folder))
        if "speed" in args.only:
            result["speed"] = made_by | measure_speed(args, Path(folder) / "index")
            result["criteria"] = report.criteria(result["speed"]["rows"])
    if all("environment" in result[part] for part in PARTS if part in result):
        result.pop("environment", None)  # of a part that was measured before parts had their own
    stream_report.write(result, args.out)
    print(report.markdown(result))
    return int("speed" in args.only and speed.wrong(result["speed"]["rows"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--demo", type=Path, default=Path("demo-run"), help="a finished demo (default demo-run)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS),
                        help="a part of it; the other part of --out stays as it is")  # fmt: skip
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[2, 1], help="of torch and FAISS (default 2 1)"
    )
    parser.add_argument("--repeat", type=int, default=9, help="queries that are timed (default 9)")
    parser.add_argument("--quick", action="store_true", help="small indexes only: does it run?")
    parser.add_argument("--peers", action="store_true",
                        help="install FAISS into bench/.venv-index-peers if it is not there yet, and measure it")  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder for features and indexes, which keeps the features")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "index.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    args = parser.parse_args()
    if args.repeat < 1 or min(args.threads) < 1:
        parser.error("--repeat and --threads must be at least 1")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_quality(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A question a section, on the demo."""
    work.mkdir(parents=True, exist_ok=True)
    demo = quality.Demo(args.demo)
    return {
        "tracks": len(demo.tracks), "held_out": len(demo.held), "base": quality.BASE,
        "truth": f"kernel ridge over whole gradients of {quality.TRUE_DRAWS} draws of seed {quality.TRUE_SEED}",
        "sections": quality.measure(demo, work, say),
        "lengths": quality.lengths(quality.cause(demo, work, say)["rows"]),
    }  # fmt: skip


def measure_speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One index at a time, deleted before the next."""
    failed = speed.PEERS.install() if args.peers else {}
    for name, reason in failed.items():
        say(f"{name} was not installed: {reason}")
    rows = []
    for tracks, width, numbers, peers in QUICK if args.quick else SIZES:
        say(f"{tracks} x {width} {numbers}")
        try:
            ways = peers if args.peers and not failed else []
            rows += speed.measure(tracks, width, numbers, folder, args.repeat, args.threads, ways)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return {"rows": rows, "repeat": args.repeat, "peers": speed.PEERS.versions()}


if __name__ == "__main__":
    sys.exit(main())
