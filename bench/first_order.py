"""What do gradient dot products of tracks and queries cost, beside a loop over single rows and other libraries?

``python bench/first_order.py --peers`` writes bench/results/first_order.json and prints a Markdown table; bench/README.md
says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fisher
import peers_env
import record

HERE = Path(__file__).resolve().parent
OURS = ("engine", "engine, with its fit", "loop", "vmap")
# The distribution that each peer needs.
PEERS = {"kronfluence": "kronfluence", "dattri": "dattri", "captum": "captum", "captum, sample-wise": "captum",
         "captum, TracInCPFast": "captum", "traker": "traker", "bergson": "bergson", "bergson, its hooks": "bergson"}  # fmt: skip
ENVIRONMENT = peers_env.Environment(
    HERE / ".venv-first-order-peers", HERE / "requirements-first-order.txt",
    ("kronfluence", "dattri", "captum", "traker", "bergson", "stable-audio-tools", "torch", "numpy"), dependencies=False,
)  # fmt: skip
# Norm of the difference from the loop in float64 over its norm, over all scores: from here on a row is wrong.
TOLERANCE = 1e-5
COLUMNS = ("peak_mb", "covers")
OTHER_KIND = "other kind: projected, and a solve over the tracks"
NOTES = (
    "covers: the parameters whose gradients are looked at; the error is against the loop in float64 over the same ones. "
    "What covers less than all is to be read beside the engine on what it covers.",
    "other kind: not gradient dot products, so there is nothing to compare with here; bench/methods_against_libraries.py compares TRAK.",
)


def main() -> int:
    """Measure, write, print; 1 where the engine itself was wrong or failed."""
    args = _arguments()
    if args.table:
        print(record.markdown(json.loads(args.table.read_text())))
        return 0
    started = record.environment()
    failed = ENVIRONMENT.install() if args.peers else {}
    for name, reason in failed.items():
        fisher.say(f"{name} was not installed: {reason}")
    with tempfile.TemporaryDirectory(prefix="attr-engine-bench-") as work:
        bench = Bench(args, Path(work), failed)
        try:
            cases = [bench.case(tokens) for tokens in args.tokens]
        finally:
            bench.close()
    settings = {name: getattr(args, name) for name in ("tokens", "width", "depth", "tracks", "queries", "batch", "repeat")}  # fmt: skip
    found = record.result(
        "first_order",
        f"What do gradient dot products of {args.tracks} tracks and {args.queries} queries cost (DiT of width {args.width}, {args.depth} "
        "layers, float32, one draw each), beside a loop over single rows and other libraries?",
        args.threads, [row for case in cases for row in rows_of(case)], ("loop", "vmap"),
        started | {"peer_versions": ENVIRONMENT.versions()},
        limits=fisher.ceilings(args, args.batch), settings=settings, below=TOLERANCE, columns=list(COLUMNS), notes=list(NOTES),
    )  # fmt: skip
    record.finish(found, args.out)
    return int(any(row["kind"] == "ours" and row["status"] != "ok" for row in found["rows"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="latent frames (64 256)")
    parser.add_argument("--width", type=int, default=256, help="of the DiT, a multiple of 64 (256)")
    parser.add_argument("--depth", type=int, default=2, help="layers (2)")
    parser.add_argument("--tracks", type=int, default=16, help="of one row each (16)")
    parser.add_argument("--queries", type=int, default=4, help="of one row each (4)")
    parser.add_argument(
        "--batch", type=int, default=4, help="rows that a library takes at a time; the engine chooses its own (4)"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds in which every way runs once (5)")
    parser.add_argument(
        "--ways", nargs="+", choices=(*OURS, *PEERS), help="all, or with --quick and no --peers ours"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory")
    parser.add_argument("--quick", action="store_true", help="one small case: does everything run?")
    parser.add_argument("--peers", action="store_true",
                        help="install the peers into bench/.venv-first-order-peers if they are not there yet")  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE / "results" / "first_order.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.width, args.depth, args.tracks, args.queries, args.batch = [24], 64, 1, 6, 3, 4
    if args.ways is None:
        args.ways = list(OURS) if args.quick and not args.peers else [*OURS, *PEERS]
    numbers = (args.threads, args.repeat, args.depth, args.batch, args.width, args.tracks, args.queries)
    if args.width % 64 or min(*numbers, *args.tokens) < 1:
        parser.error("--width must be a multiple of 64, and every number more than 0")
    if not args.table and find_spec("stable_audio_tools") is None:
        parser.error("stable-audio-tools is not installed: pip install '.[stable-audio]'")
    args.no_batch_one = True
    return args


class Bench(fisher.Bench):
    """The processes of all ways of scores: covered is what a way says, and the error is of the scores."""

    script, peers, needs = "first_order_worker.py", ENVIRONMENT, PEERS

    def _size(self, tokens: int) -> fisher.Size:
        args = self._args
        return {"tokens": tokens, **{name: getattr(args, name) for name in ("width", "depth", "tracks", "queries", "batch")}}  # fmt: skip

    def _judge(self, row: record.Row, answer: dict[str, Any], elements: dict[str, int]) -> None:
        if answer["covered"] is None:
            row["other_kind"] = True
            return
        self._cover(row, answer["covered"], elements)
        record.checked(row, answer["error"], TOLERANCE)


def rows_of(case: dict[str, Any]) -> list[record.Row]:
    """The rows of a case as those of record.py, which summarizes them itself."""
    out = []
    for row in case["rows"]:
        kind = "ours" if row["way"].startswith("engine") else "peer"
        covers = OTHER_KIND if row.get("other_kind") else fisher.report.covers(row)
        more = {
            name: value for name, value in row.items() if name not in ("median_seconds", "ratio_to", "way")
        }
        out.append({**record.row(f"{case['tokens']} tokens", row["way"], kind, covers=covers), **more})
    return out


if __name__ == "__main__":
    sys.exit(main())
