"""Every question that bench/ answers, or some of them, one after the other.

    python bench/run.py --quick                         does everything run? under two minutes; its times mean nothing
    python bench/run.py --full --demo demo-run          the figures, into bench/results: hours on an idle machine
    python bench/run.py --full fisher unlearn           some questions
    python bench/run.py --full peers                    all that other libraries are in: about an hour; then bench/peers.py
    python bench/run.py --quick peers                   the same on small cases, some minutes: is every library installed, does it run?
    python bench/run.py --list                          what each question is

Each part is a script of its own in a process of its own; its tables go to stdout, its JSON into the folder of results. What needs a demo
is skipped, with a sentence, where there is none. The exit code is 1 where a part failed or found something wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """One script of a question.

    Attributes:
        script: in bench/.
        out: name of its JSON.
        quick: its arguments with ``--quick``; None where it has no part in that.
        full: its arguments with ``--full``; None where it has no part in that.
        peers: its arguments with ``--quick peers``; nothing where no other library is in it.
        demo: ``"needs"`` a demo, ``"takes"`` one where there is one (not with ``--quick``), or nothing.
        threads: whether it has ``--threads``.
    """

    script: str
    out: str
    quick: str | None
    full: str | None
    peers: str = ""
    demo: str = ""
    threads: bool = True


QUESTIONS: dict[str, tuple[str, tuple[Part, ...]]] = {
    "fisher": ("what a diagonal Fisher costs beside a plain backward pass, a loop and other libraries", (
        Part("fisher.py", "fisher.json", "--quick --no-memory --repeat 2 --ways backward engine loop", "--peers",
             "--quick --no-memory --repeat 2 --peers"),
    )),
    "first_order": ("what gradient dot products of tracks and queries cost beside other libraries", (
        Part("first_order.py", "first_order.json", "--quick --no-memory --repeat 2 --ways engine loop vmap", "--peers",
             "--quick --no-memory --repeat 2 --peers"),
    )),
    "unlearn": ("what a step of unlearning costs beside plain passes and a loop", (
        Part("unlearn.py", "unlearn.json", "--quick --repeat 2", ""),
    )),
    "score": ("what scoring many queries costs, and how exact a difference is", (
        Part("score.py", "score.json", "--quick --repeat 1 --only modes", "--only queries modes", demo="needs"),
    )),
    "stream": ("how fast latents are streamed beside memcpy and other readers", (
        Part("stream.py", "stream.json", "--tracks 60 --repetitions 2 --only limits ours", "--peers",
             "--tracks 60 --repetitions 2 --only limits ours peers --peers"),
    )),
    "kernels": ("what the kernels cost beside plain torch; on a GPU, and of their equals on a CPU", (
        Part("kernels_cpu.py", "kernels-cpu.json", "--quick --repeat 2", ""),
        Part("gpu.py", "gpu.json", None, "", threads=False),
    )),
    "index": ("which settings of an index are right, and how fast a query is", (
        Part("index.py", "index.json", "--only speed --quick --repeat 2", "--only speed --peers",
             "--only speed --quick --repeat 2 --peers"),
        Part("index.py", "index.json", None, "--only quality", demo="needs", threads=False),
        Part("windows.py", "windows.json", "--quick --kinds --repeat 2", "--kinds ivf --peers",
             "--quick --kinds ivf --repeat 2 --peers"),
    )),
    "cold": ("how long it is until something happens: imports, --help, the first result", (
        Part("cold.py", "cold.json", "--quick", "", demo="takes"),
    )),
    "scale": ("how time grows with tracks, frames, width, queries and processes", (
        Part("scale.py", "scale.json", "--quick", ""),
        Part("processes.py", "processes.json", None, "", demo="needs", threads=False),
    )),
    "end_to_end": ("how long the whole job takes: the demo", (
        Part("end_to_end.py", "end_to_end.json", "--quick", None, demo="needs"),
        Part("end_to_end.py", "end_to_end.json", None, "--run"),
    )),
    "memory": ("how much memory each stage takes, in a process of its own", (
        Part("memory.py", "memory.json", "--quick --stages backward fisher", ""),
        Part("score.py", "score.json", None, "--only memory"),
        Part("stream_memory.py", "stream_memory.json", None, "", threads=False),
    )),
}  # fmt: skip


PEERS = "peers"  # stands for all parts that other libraries are in


def main() -> int:
    """Run, and say what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "questions",
        nargs="*",
        metavar="question",
        help=f"all of them, or some of: {', '.join(QUESTIONS)}; {PEERS}: the parts of them that other libraries are in",
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_true", help="small cases: does everything run?")
    how.add_argument("--full", action="store_true", help="the figures")
    how.add_argument("--list", action="store_true", help="say what each question is, and no more")
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="a finished demo (demo-run)")
    parser.add_argument("--threads", type=int, help="of torch (what each script has for its own, mostly 2)")
    parser.add_argument("--out", type=Path, help="folder of results (bench/results; with --quick bench-run)")
    args = parser.parse_args()
    strange = [name for name in args.questions if name not in (*QUESTIONS, PEERS)]
    if strange:
        parser.error(f"there is no question {strange[0]!r}; known: {', '.join([*QUESTIONS, PEERS])}")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.list:
        print("\n".join(f"{name:12}{what}" for name, (what, _) in QUESTIONS.items()))
        return 0
    out = args.out or ROOT / ("bench-run" if args.quick else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    said, failed = [], []
    for name, part in asked(args.questions or list(QUESTIONS), args.quick):
        if (part.quick if args.quick else part.full) is None:
            continue
        line, wrong = run(name, part, args, out)
        said.append(line)
        failed += [part.script] if wrong else []
    print("\n".join(["", "| question | script | | seconds | result |", "|---|---|---|---|---|", *said]))
    if failed:
        print(f"\nFailed: {', '.join(failed)}.")
    return 1 if failed else 0


def asked(names: Sequence[str], quick: bool = False) -> list[tuple[str, Part]]:
    """The questions' parts, each once, in the order of the names; with other libraries where these are asked for."""
    found: dict[tuple[str, Part], Part] = {}
    for one in names:
        for name, part in ((name, part) for name, (_, parts) in QUESTIONS.items() for part in parts):
            if one == PEERS and part.peers:
                found[name, part] = replace(part, quick=part.peers) if quick else part
            elif one == name:
                found.setdefault((name, part), part)
    return [(name, part) for (name, _), part in found.items()]


def run(name: str, part: Part, args: argparse.Namespace, out: Path) -> tuple[str, bool]:
    """One script: the line that says what came of it, and whether that is a failure."""
    reason, command = plan(part, args, out / part.out)
    if reason:
        print(f"{name}: {part.script} is skipped: {reason}", file=sys.stderr, flush=True)
        return f"| {name} | {part.script} | skipped: {reason} | | |", False
    print(f"{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    before = _written(out / part.out)
    start = time.perf_counter()
    known = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(command, env=known)
    seconds = time.perf_counter() - start
    said = "done" if done.returncode == 0 else f"**exit code {done.returncode}**"
    result = part.out
    if _written(out / part.out) == before:
        said, done.returncode = said if done.returncode else "**no result**", done.returncode or 1
        result += " is of an earlier run" if before else " was not written"
    return f"| {name} | {part.script} | {said} | {seconds:.0f} | {result} |", done.returncode != 0


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def plan(part: Part, args: argparse.Namespace, out: Path) -> tuple[str, list[str]]:
    """Why a script is skipped, or its command."""
    words = (part.quick if args.quick else part.full) or ""
    more = words.split()
    there = (args.demo / "run" / "timings.json").is_file()
    if part.demo == "needs" and not there:
        return f"{args.demo} holds no finished demo: make one with make demo, or name one with --demo", []
    if part.script == "gpu.py" and not _gpu():
        return "there is no GPU here", []
    if part.threads and args.threads:
        more += ["--threads", str(args.threads)]
    if part.demo and there and not (args.quick and part.demo == "takes"):
        more += ["--demo", str(args.demo)]
    return "", [sys.executable, str(ROOT / "bench" / part.script), *more, "--out", str(out)]


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
