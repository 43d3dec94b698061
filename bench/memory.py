"""How much memory does each stage take, at its peak, in a process of its own?

    python bench/memory.py                  64 and 1024 frames at width 512: about eight minutes
    python bench/memory.py --quick          one small case: does it run?

What a fresh process grows by in one run of the stage, over what it holds when the model, its tracks, the Fisher and the update are
there and a run at a tiny size has imported all that there is to import. The limit is a plain forward and backward pass of as many rows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import record
import torch
from cases import LAYERS, PLAN, Case, arguments

from attr_engine import fit_fisher, unlearn_query
from attr_engine.effects import measure_effects
from attr_engine.influence import measure_influence

ROOT = Path(__file__).resolve().parent.parent
LIMIT = "backward"
STAGES = (LIMIT, "forward", "fisher", "unlearn", "score", "first-order")
DRAWS = 4


def main() -> int:
    """Measure, write, print; 1 where a stage failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 1024], help="of the model")
    parser.add_argument("--width", type=int, default=512, help="of the DiT (512)")
    parser.add_argument("--depth", type=int, default=2, help="its layers (2)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = arguments(parser, "memory")
    if args.quick:
        args.frames, args.width, args.depth, args.repeat = [64], 64, 1, 1
    if args.stage:
        print(json.dumps(peak(args.stage, args.frames[0], args.width, args.depth)))
        return 0
    started, rows = record.environment(), []
    for frames in args.frames:
        rows += [measure(args, stage, frames) for stage in args.stages]
    found = record.result(
        "memory", (__doc__ or "").splitlines()[0], args.threads, rows, (LIMIT,), started, measure="peak_mb",
        settings={"width": args.width, "depth": args.depth, "draws": DRAWS, "repeat": args.repeat},
        columns=["weights_mb", "rows"], notes=["every repetition is a process of its own"],
    )  # fmt: skip
    return record.finish(found, args.out)


def measure(args: argparse.Namespace, stage: str, frames: int) -> record.Row:
    """A row of one stage, each repetition a process."""
    entry = record.row(
        f"{frames} frames, {DRAWS} draws",
        stage,
        "limit" if stage in (LIMIT, "forward") else "ours",
        peak_mb=[],
    )
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage, "--frames", str(frames), "--width",
               str(args.width), "--depth", str(args.depth), "--threads", str(args.threads)]  # fmt: skip
    # glibc gives freed memory back at once, so that this is what was in use.
    known = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
    }
    for _ in range(args.repeat):
        done = subprocess.run(command, capture_output=True, text=True, env=known)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            entry.update(status="failed", reason=record.plain(last[0]), peak_mb=[])
            break
        answer = json.loads(done.stdout)
        if not answer["finite"]:
            entry.update(status="wrong", reason="its numbers are not finite, or all zero", peak_mb=[])
            break
        entry["peak_mb"].append(round(answer["peak_mb"], 2))
        entry.update({name: answer[name] for name in ("weights_mb", "rows", "peak_from")})
    return entry


def peak(stage: str, frames: int, width: int, depth: int) -> dict[str, object]:
    """In this process: one run of a stage, and what it grew by."""
    tiny, _ = work(stage, Case(16, 64, depth, tracks=2))  # what is set up at first use is not the stage's
    tiny()
    del tiny
    case = Case(frames, width, depth, tracks=2)
    run, rows = work(stage, case)
    gc.collect()
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and not given back would hide growth
    highest, how = record.watch_memory()
    numbers = run()
    grown = highest()
    size = sum(float(torch.as_tensor(x).double().square().sum()) for x in numbers)
    weights = sum(p.numel() * p.element_size() for p in case.model.module.parameters())
    return {"peak_mb": grown / 1e6, "peak_from": how, "weights_mb": round(weights / 1e6, 2), "rows": rows,
            "finite": math.isfinite(size) and size > 0}  # fmt: skip


def work(stage: str, case: Case) -> tuple[Callable[[], Sequence[object]], int]:
    """What is watched, and its rows a pass; everything that it needs is there."""
    together = min(DRAWS, case.rows_a_pass())
    ready = case.noised([(0, d) for d in range(DRAWS)], "fisher", together)
    needs_updates = stage in ("score", "first-order")
    updates = case.updates(1) if needs_updates else []
    fisher = case.fisher() if stage == "unlearn" else None
    load = [lambda u=u: u for u in updates]  # type: ignore[misc]

    def passes() -> Sequence[object]:
        (case.backward if stage == LIMIT else case.forward)(ready)
        return [1.0]

    def fit() -> Sequence[object]:
        return list(fit_fisher(case.model, case.tracks, LAYERS, PLAN, DRAWS, rows=together).values.values())

    def unlearn() -> Sequence[object]:
        assert fisher is not None
        made = unlearn_query(case.model, case.tracks, 0, fisher, PLAN, 1000, draws=DRAWS, rows=together)
        return list(made.delta.values())

    def score() -> Sequence[object]:
        return [measure_effects(case.model, case.batch, load, PLAN, DRAWS, rows=together).displacement]

    def influence() -> Sequence[object]:
        return [
            measure_influence(case.model, case.parameters, case.batch, load, PLAN, DRAWS, rows=together)[1]
        ]

    stages: dict[str, Callable[[], Sequence[object]]] = {
        LIMIT: passes, "forward": passes, "fisher": fit, "unlearn": unlearn, "score": score, "first-order": influence,
    }  # fmt: skip
    return stages[stage], together


if __name__ == "__main__":
    sys.exit(main())
