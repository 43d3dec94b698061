"""How fast are latents streamed, next to the limit of the machine and to the peers?

``python bench/stream.py --peers`` writes bench/results/stream.json and prints a Markdown table; bench/README.md
says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stream_client as client
import stream_ours as ours
import stream_report as report
from stream_data import (
    BATCH,
    BUFFERS,
    CHANNELS,
    FIRST_BATCH_TRACKS,
    FRAMES,
    TrackSet,
    make_tiny_tracks,
    make_tracks,
    tracks_for,
)
from stream_limits import Limits

PARTS = ("limits", "ours", "peers", "cold", "first")
# A row of the report, and what measures it once, in seconds.
Case = tuple[report.Row, Callable[[], float]]


def main() -> int:
    """Measure, write, print; 1 where a check of the engine's own results failed."""
    args = _arguments()
    if args.table:
        print(report.markdown(json.loads(args.table.read_text())))
        return 0
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        result = measure(args, args.work.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="attr-engine-bench-") as folder:
            result = measure(args, Path(folder))
    report.write(result, args.out)
    print(report.markdown(result))
    return 1 if result["our_failures"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="payload (default 2.0)")
    parser.add_argument("--tracks", type=int, help="number of tracks, instead of --gigabytes")
    parser.add_argument(
        "--quick", action="store_true", help="0.2 GB: to see that everything runs, not to quote"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of the stream and of the limits (default 2)"
    )
    parser.add_argument("--repetitions", type=int, default=7, help="of everything, taking turns (default 7)")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default 0)")
    parser.add_argument(
        "--work", type=Path, help="folder for the data, which are kept (default: a temporary one)"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="install the peers into bench/.venv-peers if they are not there yet",
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stream.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    args = parser.parse_args()
    if args.quick:
        args.gigabytes = 0.2
    if args.threads < 1 or args.repetitions < 1 or args.gigabytes <= 0:
        parser.error("--threads, --repetitions and --gigabytes must be more than 0")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All parts, in one run."""
    environment, command = report.environment(), report.command()
    count = args.tracks or tracks_for(args.gigabytes)
    folder = work / f"tracks-{count}-{args.seed}"
    say(f"data: {count} tracks")
    make_tracks(folder, count, args.seed)
    tracks = TrackSet(folder, args.seed)
    payload = tracks.load()
    wrong = tracks.check(payload)
    if wrong:
        raise SystemExit(f"the data are not what they should be ({wrong}): remove --work and run again")

    failures: list[str] = []
    cases: list[Case] = []
    skipped: list[report.Row] = []
    extra: dict[str, Any] = {}
    running: list[client.Running] = []
    reason = ours.reason_not_there()
    try:
        if "limits" in args.only:
            extra["memcpy_loop_overhead_seconds"] = _limits(args, tracks, payload, cases, skipped)
        if "ours" in args.only:
            _ours(args, tracks, payload, reason, cases, skipped, failures)
        if "peers" in args.only:
            _peers(args, tracks, work, cases, skipped, running)
        _take_turns(cases, args.repetitions, failures)
    finally:
        for peer in running:
            peer.close()
    rows = [row for row, _ in cases] + skipped
    # What maps the shards has to go before their pages can be dropped.
    del cases, payload
    gc.collect()
    cold = _cold(args, tracks, failures) if "cold" in args.only and not reason else {}
    first = _first(args, work, failures) if "first" in args.only and not reason else {}
    rows.sort(key=lambda row: ("limit", "ours", "peer").index(row["kind"]))
    report.summarize(rows, args.threads)
    return {
        "question": "how fast are latents streamed, next to the limit of the machine and to the peers?",
        "command": command,
        "environment": environment | {"peer_versions": client.PEERS.versions() if "peers" in args.only else {}},
        "threads": args.threads,
        "repetitions": args.repetitions,
        "data": {
            "tracks": count, "seed": args.seed, "payload_gb": tracks.payload() / 1e9, "channels": CHANNELS,
            "dtype": "float16", "batch": BATCH, "frames": FRAMES, "buffers": BUFFERS, "shards": len(tracks.shards),
        },
        "rows": rows,
        "cold": cold,
        "first_batch": first,
        **extra,
        "criteria": report.criteria(rows, cold, first, args.threads),
        "our_failures": failures,
    }  # fmt: skip


def _take_turns(cases: list[Case], repetitions: int, failures: list[str]) -> None:
    """Every case in turn, once uncounted and then as often as asked for; one that breaks is failed and left out."""
    for repetition in range(repetitions + 1):
        say(f"repetition {repetition} of {repetitions}" if repetition else "warming up")
        for row, run in reversed(cases) if repetition % 2 else cases:
            if row["status"] != "ok":
                continue
            gc.collect()
            try:
                seconds = run()
                if repetition:
                    row["seconds"].append(seconds)
            except Exception as error:  # a peer may raise anything, and the others go on
                row.update(status="failed", reason=report.plain(f"{type(error).__name__}: {error}"))
                if row["kind"] == "ours":
                    failures.append(f"{row['name']}: {row['reason']}")


def _limits(
    args: argparse.Namespace, tracks: TrackSet, payload: Any, cases: list[Case], skipped: list[report.Row]
) -> float:
    """Add the limits; returns the seconds that the Python loop of memcpy takes of its own."""
    limits = Limits(tracks, payload)
    for name, run in limits.available().items():
        for threads in sorted({args.threads, 1}, reverse=True):
            if isinstance(run, str):
                skipped.append(report.not_measured("limit", name, "missing", run, threads=threads))
                continue
            try:
                run(threads)
                wrong = limits.check(name)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                skipped.append(report.not_measured("limit", name, "failed", wrong, threads=threads))
                continue
            row = report.row("limit", name, tracks.payload(), threads=threads)
            cases.append((row, lambda run=run, threads=threads: run(threads)))
    return statistics.median(limits.loop_overhead() for _ in range(args.repetitions))


def _ours(
    args: argparse.Namespace, tracks: TrackSet, payload: Any, reason: str, cases: list[Case],
    skipped: list[report.Row], failures: list[str],
) -> None:  # fmt: skip
    """Add the engine's variants, each after a pass that is compared with the data."""
    if reason:
        skipped.append(report.not_measured("ours", "default", "missing", reason))
        return
    stream = ours.Ours(tracks)
    for name, options in ours.variants(args.threads).items():
        say(f"checking ours: {name}")
        try:
            wrong = stream.check(options, payload)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            failures.append(report.plain(f"{name}: {wrong}"))
            skipped.append(report.not_measured("ours", name, "failed", wrong, threads=options["threads"]))
            continue
        row = report.row("ours", name, tracks.payload(), threads=options["threads"])
        cases.append((row, lambda options=options: stream.run(options)))


def _peers(
    args: argparse.Namespace, tracks: TrackSet, work: Path, cases: list[Case], skipped: list[report.Row],
    running: list[client.Running],
) -> None:  # fmt: skip
    """Start every peer, let it write its format and pass its check."""
    failed = client.PEERS.install() if args.peers else {}
    for name, reason in failed.items():
        say(f"{name} was not installed: {reason}")
    for peer in client.ALL:
        say(f"preparing {peer.row}")
        process = client.Running(peer, tracks.folder, work, tracks.seed, args.threads)
        running.append(process)
        answer = process.ask("check")
        if "payload" not in answer:
            status = "missing" if "missing" in answer else "failed"
            reason = answer[status]
            if status == "missing":
                why = next((f": {text}" for name, text in failed.items() if name.split("-")[0] in reason), "")
                reason += why or ("" if args.peers else ": run with --peers")
            skipped.append(report.not_measured("peer", peer.name, status, reason, workers=peer.workers))
            continue
        row = report.row(
            "peer", peer.name, answer["payload"], workers=peer.workers, share_of_tracks=peer.share
        )

        def run(process: client.Running = process) -> float:
            answer = process.ask("run")
            if "seconds" not in answer:
                raise RuntimeError(answer.get("failed", "it gave no answer"))
            return answer["seconds"]

        cases.append((row, run))


def _cold(args: argparse.Namespace, tracks: TrackSet, failures: list[str]) -> dict[str, Any]:
    say("cold page cache")
    try:
        out = ours.cold(tracks, {**ours.DEFAULT, "threads": args.threads}, max(5, args.repetitions))
    except Exception as error:
        failures.append(report.plain(f"cold: {type(error).__name__}: {error}"))
        return {"status": "failed", "reason": failures[-1]}
    medians = {name: statistics.median(values) for name, values in out["seconds"].items()}
    gigabytes = tracks.payload() / 1e9
    speeds = {name: round(gigabytes / value, 4) for name, value in medians.items()}
    out["gb_per_s"] = speeds
    left = max(max(shares) for shares in out["resident_share_at_start"].values())
    if left > 0.02:
        return {**out, "status": "failed", "reason": f"{left:.0%} of the pages could not be dropped"}
    return {**out, "status": "ok", "ratio_to_dd": round(medians["dd"] / medians["ours"], 4)}


def _first(args: argparse.Namespace, work: Path, failures: list[str]) -> dict[str, Any]:
    say(f"first batch of {FIRST_BATCH_TRACKS} tracks")
    folder = work / f"tiny-{FIRST_BATCH_TRACKS}"
    make_tiny_tracks(folder, FIRST_BATCH_TRACKS)
    try:
        seconds = ours.first_batch(folder, max(5, args.repetitions))
    except Exception as error:
        failures.append(report.plain(f"first batch: {type(error).__name__}: {error}"))
        return {"status": "failed", "reason": failures[-1], "tracks": FIRST_BATCH_TRACKS}
    return {
        "tracks": FIRST_BATCH_TRACKS, "median_ms": round(statistics.median(seconds) * 1000, 2),
        "milliseconds": [round(value * 1000, 2) for value in seconds],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
