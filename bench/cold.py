"""How long is it until something happens? Imports, --help, and the first result, each in a fresh process.

    python bench/cold.py                        with --demo DIR the first result of the demo's model too
    python bench/cold.py --quick                one round: does it run?

The limits are a Python that does nothing and one that imports torch, which the engine cannot do without. The first result is a Fisher,
an update and the effect on two tracks, of a tiny DiT with random weights (from a demo: its own model and tracks); it is compared
with the same numbers from another process. Files are in the page cache: everything was run once before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
PYTHON, TORCH = "python", "import torch"


def main() -> int:
    """Measure, write, print; 1 where something does not run or two processes differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="a demo's folder, for its model too")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--repeat", type=int, default=7, help="rounds in which everything runs once (7)")
    parser.add_argument("--quick", action="store_true", help="one round: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cold.json")
    parser.add_argument("--first", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first is not None:
        print(json.dumps(first_result(args.first, args.threads)))
        return 0
    if min(args.threads, args.repeat) < 1:
        parser.error("--threads and --repeat must be at least 1")
    if args.demo and not (args.demo / "model").is_dir():
        parser.error(f"{args.demo} holds no demo: make one with make demo, or leave out --demo")
    started = record.environment()
    rows = measure(args)
    import limits  # after the clocks: it imports torch

    found = record.result(
        "cold", (__doc__ or "").splitlines()[0], args.threads, rows, (PYTHON, TORCH), started,
        settings={"rounds": args.repeat}, limits={"page cache, GB/s": limits.page_cache(args.repeat)},
    )  # fmt: skip
    return record.finish(found, args.out)


def measure(args: argparse.Namespace) -> list[record.Row]:
    """Every start, in turns; one that fails or gives other numbers is not timed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(args.threads), "--first"]
    commands = {
        PYTHON: [sys.executable, "-c", "pass"],
        TORCH: [sys.executable, "-c", "import torch"],
        "import attr_engine": [sys.executable, "-c", "import attr_engine"],
        "attr-engine --help": [sys.executable, "-m", "attr_engine.cli", "--help"],
        "first result, tiny model": [*command, ""],
    }
    if args.demo:
        commands["first result, the demo's model"] = [*command, str(args.demo.resolve())]
    rows = [
        record.row("fresh process", way, "limit" if way in (PYTHON, TORCH) else "ours") for way in commands
    ]
    for entry in rows:
        _check(entry, commands[entry["way"]])
    ways: dict[str, Callable[[], object]] = {
        way: lambda c=c: _run(c).check_returncode() for way, c in commands.items()
    }  # type: ignore[misc]
    record.take_turns(rows, ways, 1 if args.quick else args.repeat, turn=0.0, warm=False)
    return rows


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=known, capture_output=True, text=True)


def _check(entry: record.Row, command: list[str]) -> None:
    """It runs; help is help, and a result is of finite, differing numbers, which another process gives to the bit."""
    one = _run(command)
    if one.returncode:
        reason = one.stderr.strip().splitlines()[-1:] or [f"exit code {one.returncode}"]
        entry.update(status="failed", reason=record.plain(reason[0]))
    elif entry["way"].endswith("--help") and "attribute" not in one.stdout:
        entry.update(status="wrong", reason="this is no help")
    elif entry["way"].startswith("first"):
        scores = json.loads(one.stdout)
        right = len(scores) == 2 and all(abs(s) < float("inf") for s in scores) and scores[0] != scores[1]
        if not right or _run(command).stdout != one.stdout:
            entry.update(status="wrong", reason="two processes differ, or the scores are no numbers")


def first_result(demo: str, threads: int) -> list[float]:
    """Loss changes of two tracks after the first of them was unlearned."""
    import torch

    torch.set_num_threads(threads)
    if demo:
        import attr_engine

        model = attr_engine.load_model(Path(demo) / "model")
        tracks = attr_engine.LatentDataset(Path(demo) / "latents")
        batch = tracks.batch(range(2), model.frames)
    else:
        from cases import Case

        case = Case(frames=64, width=64, depth=1, tracks=2)
        model, tracks, batch = case.model, case.tracks, case.batch  # type: ignore[assignment]
    from attr_engine import DrawPlan, fit_fisher, measure_effects, scores, unlearn_query
    from attr_engine.latents.memory import MemoryTracks

    two = MemoryTracks(batch.ids, [x.numpy() for x in batch.latents], batch.conditioning)
    plan = DrawPlan(replicates=1)
    fisher = fit_fisher(model, two, ("transformer",), plan, 1)
    update = unlearn_query(model, two, 0, fisher, plan, len(tracks), draws=2)
    effects = measure_effects(model, batch, [lambda: update], plan, 2)
    return [float(s) for s in scores(effects, ("loss_change",), 1)["loss_change"][0][0]]


if __name__ == "__main__":
    sys.exit(main())
