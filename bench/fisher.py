"""What does a diagonal Fisher cost, next to a plain backward pass, to the loop over single rows and to other libraries?

``python bench/fisher.py --peers`` writes bench/results/fisher.json and prints a Markdown table; bench/README.md
says how to read them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fisher_client as client
import fisher_report as report
import stream_report

OURS = ("backward", "engine", "engine, all rows a pass", "loop", "vmap")
# The distribution that each peer needs.
PEERS = {"opacus": "opacus", "backpack": "backpack-for-pytorch", "backpack BatchGrad": "backpack-for-pytorch",
         "kronfluence": "kronfluence", "kronfluence, no files": "kronfluence"}  # fmt: skip
ONE = ("engine", "loop")
# Largest difference from the loop in float64 that counts as the same: per parameter, norm over norm.
TOLERANCE = 1e-5
# Seconds of a turn, in which a short run is repeated: what ran before leaves cold caches to the first.
TURN = 0.3
Size = dict[str, int]


def main() -> int:
    """Measure, write, print; 1 where the engine itself was wrong or failed."""
    args = _arguments()
    if args.table:
        print(report.markdown(json.loads(args.table.read_text())))
        return 0
    with tempfile.TemporaryDirectory(prefix="attr-engine-bench-") as folder:
        result = measure(args, Path(folder))
    stream_report.write(result, args.out)
    print(report.markdown(result))
    ours = [row for case in result["cases"] for row in case["rows"] if row["way"].startswith("engine")]
    return 1 if any(row["status"] != "ok" for row in ours) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 1024, 2048], help="latent frames")
    parser.add_argument("--width", type=int, default=512, help="of the DiT, a multiple of 64 (default 512)")
    parser.add_argument("--depth", type=int, default=2, help="layers (default 2)")
    parser.add_argument("--batch", type=int, default=4, help="rows (default 4)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument(
        "--repeat", type=int, default=7, help="rounds in which every way runs once (default 7)"
    )
    parser.add_argument("--ways", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS])
    parser.add_argument("--no-batch-one", action="store_true", help="leave out the memory at a batch of 1")
    parser.add_argument("--no-memory", action="store_true", help="leave out all memory")
    parser.add_argument("--quick", action="store_true", help="one small case: does everything run?")
    parser.add_argument("--peers", action="store_true",
                        help="install the peers into bench/.venv-fisher-peers if they are not there yet")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fisher.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.width, args.depth, args.batch, args.repeat = [64], 128, 1, 4, 5
    if (
        args.width % 64
        or min(args.threads, args.repeat, args.depth, args.batch, args.width, *args.tokens) < 1
    ):
        parser.error("--width must be a multiple of 64, and every number more than 0")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All cases, in one run."""
    environment = report.environment()
    failed = client.PEERS.install() if args.peers else {}
    for name, reason in failed.items():
        say(f"{name} was not installed: {reason}")
    bench = Bench(args, work, failed)
    try:
        cases = [bench.case(tokens) for tokens in args.tokens]
    finally:
        bench.close()
    figures = ceilings(args, args.batch)
    settings = {
        name: getattr(args, name) for name in ("tokens", "width", "depth", "batch", "threads", "repeat")
    }
    return {
        "question": "what does a diagonal Fisher cost, next to a plain backward pass, the loop and other libraries?",
        "environment": environment | {"peer_versions": client.PEERS.versions()},
        "settings": settings | {"dtype": "float32", "ways": args.ways},
        "error": {"is": "norm of the difference from the float64 loop over single rows over its norm, the largest of all "
                        "parameters that are covered", "below": TOLERANCE},
        "limits": figures,
        "cases": cases,
        "criteria": report.criteria(cases),
    }  # fmt: skip


def ceilings(args: argparse.Namespace, rows: int) -> dict[str, list[float]]:
    """What the machine can do, measured here when nothing else runs: the largest product of a pass of so many rows at each length."""
    import limits
    import torch

    say("the limits of the machine")
    torch.set_num_threads(args.threads)
    return limits.measure([limits.widest(rows, tokens, args.width) for tokens in args.tokens], args.repeat)


class Bench:
    """The processes of all ways, and what is asked of them.

    Attributes:
        script: that serves a way.
        peers: the environment of the other libraries.
        needs: the distribution that each peer needs.

    Args:
        args: the settings.
        work: a folder for the reference and for logs.
        failed: requirements that could not be installed, with the reason.
    """

    script, peers, needs = "fisher_worker.py", client.PEERS, PEERS

    def __init__(self, args: argparse.Namespace, work: Path, failed: dict[str, str]) -> None:
        self._args, self._work, self._failed = args, work, failed
        self._running: dict[str, client.Worker] = {}

    def close(self) -> None:
        """End every process."""
        for worker in self._running.values():
            worker.close()

    def case(self, tokens: int) -> report.Result:
        """Everything at one length."""
        args = self._args
        size = self._size(tokens)
        say(f"{tokens} tokens: the reference")
        for way in args.ways:
            self._worker(way, way)
        elements = self._alone("reference", "reference", size).get("elements")
        if elements is None:
            raise SystemExit("the loop in float64 failed: is stable-audio-tools installed?")
        rows = [self._check(way, way, size, elements) for way in args.ways]
        rows += self._same_coverage(rows, size, elements)
        self._take_turns(rows, size)
        report.summarize(rows)
        if not args.no_memory:
            # Memory is no matter of time; more than one at once only where all are small.
            with ThreadPoolExecutor(2 if args.quick else 1) as pool:
                list(pool.map(lambda row: self._peak(row, size), rows))
        one = {} if args.no_memory or args.no_batch_one else self._batch_one(size)
        for row in rows:
            del row["of"], row["names"]
        parameters = {"parameters": sum(elements.values()), "tensors": len(elements)}
        return {**size, **parameters, "rows": rows, "batch_one": one}

    def _size(self, tokens: int) -> Size:
        args = self._args
        return {"tokens": tokens, "width": args.width, "depth": args.depth, "batch": args.batch}

    def _worker(self, name: str, way: str) -> client.Worker:
        if name not in self._running:
            self._running[name] = self._start(way)
        return self._running[name]

    def _start(self, way: str, exact: bool = False) -> client.Worker:
        python = str(self.peers.python()) if way in self.needs else sys.executable
        return client.Worker(self.script, python, way, self._args.threads, self._work, exact)

    def _alone(self, way: str, question: str, size: Size, only: Sequence[str] = ()) -> dict[str, Any]:
        """Ask in a process of its own, which ends after the answer."""
        worker = self._start(way, exact=question == "peak")
        try:
            return worker.do(question, size, only)
        finally:
            worker.close()

    def _check(
        self, name: str, way: str, size: Size, elements: dict[str, int], only: Sequence[str] = ()
    ) -> report.Row:
        """A row with its coverage and its error; not ``ok`` where it failed or is wrong."""
        say(f"{size['tokens']} tokens: checking {name}")
        answer = self._worker(name, way).do("check", size, only)
        row: report.Row = {
            "way": name,
            "of": way,
            "names": list(only),
            "status": "ok",
            "times": 1,
            "seconds": [],
        }
        if "missing" in answer or "failed" in answer:
            row["status"] = "missing" if "missing" in answer else "failed"
            reason = stream_report.plain(answer[row["status"]])
            if row["status"] == "missing":
                reason += f": {self._failed.get(self.needs.get(way, ''), 'run with --peers')}"
            return row | {"reason": reason}
        self._judge(row, answer, elements)
        return row

    def _judge(self, row: report.Row, answer: dict[str, Any], elements: dict[str, int]) -> None:
        """Add to a row what its check found."""
        errors: dict[str, float] | None = answer["errors"]
        if errors is None:
            return
        self._cover(row, list(errors), elements)
        wrong = [name for name, error in errors.items() if not error < TOLERANCE]
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        row["error"], row["error_of"] = errors[worst], worst
        if wrong:
            row["status"] = "wrong"
            row["reason"] = f"{len(wrong)} of {len(errors)} parameters differ from the loop, most {worst}"

    def _cover(self, row: report.Row, names: list[str], elements: dict[str, int]) -> None:
        row["names"] = names
        row["covered"] = {
            "tensors": len(names), "of_tensors": len(elements),
            "parameters": sum(elements[name] for name in names), "of_parameters": sum(elements.values()),
        }  # fmt: skip
        row["not_covered"] = [name for name in elements if name not in names]
        row["full"] = not row["not_covered"]

    def _same_coverage(
        self, rows: list[report.Row], size: Size, elements: dict[str, int]
    ) -> list[report.Row]:
        """The engine again, on what a peer covers that does not cover all."""
        out: dict[tuple[str, ...], report.Row] = {}
        if all(row["way"] != "engine" for row in rows):
            return []
        for row in rows:
            if row["status"] != "ok" or row.get("full", True):
                continue
            covered = tuple(name for name in elements if name in set(row["names"]))
            if covered not in out:
                name = f"engine, on what {row['way']} covers"
                out[covered] = self._check(name, "engine", size, elements, covered)
            row["same_coverage"] = out[covered]["way"]
        return list(out.values())

    def _take_turns(self, rows: list[report.Row], size: Size) -> None:
        """Every way in turn, once uncounted and then as often as asked for; one that breaks is failed and left out."""
        for repetition in range(self._args.repeat + 1):
            say(f"{size['tokens']} tokens: " + (f"round {repetition}" if repetition else "warming up"))
            for row in reversed(rows) if repetition % 2 else rows:
                if row["status"] != "ok":
                    continue
                answer = self._worker(row["way"], row["of"]).do("run", size, times=row["times"])
                if "seconds" not in answer:
                    reason = answer.get("failed", "it gave no answer")
                    row.update(status="failed", reason=stream_report.plain(reason), seconds=[])
                elif repetition:
                    row["seconds"].append(answer["seconds"])
                else:
                    row["times"] = max(1, min(50, math.ceil(TURN / answer["seconds"])))

    def _peak(self, row: report.Row, size: Size) -> None:
        if row["status"] != "ok":
            return
        say(f"{size['tokens']} tokens: memory of {row['way']}")
        only = row["names"] if row["of"] == "engine" else ()
        answer = self._alone(row["of"], "peak", size, only)
        if "peak_mb" in answer:
            row["peak_mb"], row["peak_from"] = round(answer["peak_mb"], 2), answer["how"]
        else:
            row["peak_failed"] = stream_report.plain(answer.get("failed", answer.get("missing", "")))

    def _batch_one(self, size: Size) -> dict[str, Any]:
        """Peak memory with a single row."""
        say(f"{size['tokens']} tokens: memory at a batch of 1")
        answers = {way: self._alone(way, "peak", {**size, "batch": 1}) for way in ONE}
        return {way: answer.get("peak_mb") for way, answer in answers.items()}


if __name__ == "__main__":
    sys.exit(main())
