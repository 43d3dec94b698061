"""How long does the whole job take? The stages of the demo, beside what its plain passes alone take on this machine.

    python bench/end_to_end.py --demo demo-run      reads the timings that a finished demo left
    python bench/end_to_end.py --run                makes a demo first, in a folder that is removed again (some ten minutes)

The limit of a stage: as many forward (and backward) passes as its draws ask for, one row each, of the demo's own model, ready rows.
There is a ratio to it only with ``--run``: timings of an earlier demo were taken while the machine did something else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import record  # noqa: E402 - needs the path

LIMIT = "plain passes"


def main() -> int:
    """Measure, write, print; 1 where the demo failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-run", help="a finished demo (demo-run)")
    parser.add_argument("--run", action="store_true", help="make a demo first, and time it")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for the limit (2)")
    parser.add_argument("--repeat", type=int, default=5, help="of the limit (5)")
    parser.add_argument("--quick", action="store_true", help="the limit once: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "end_to_end.json")
    args = parser.parse_args()
    if min(args.threads, args.repeat) < 1:
        parser.error("--threads and --repeat must be at least 1")
    if args.run:
        with tempfile.TemporaryDirectory(prefix="attr-engine-bench-") as folder:
            return measure(args, Path(folder) / "demo", made=True)
    if not (args.demo / "run" / "timings.json").is_file():
        parser.error(
            f"{args.demo} holds no finished demo: make one with make demo, name one with --demo, or use --run"
        )
    return measure(args, args.demo, made=False)


def measure(args: argparse.Namespace, demo: Path, made: bool) -> int:
    """A row a stage; with ``made`` the whole command too, timed from outside."""
    started, rows = record.environment(), []
    if made:
        seconds = make(demo, args.threads)
        rows.append({**record.row("the whole demo", "attr-engine demo"), "seconds": [round(seconds, 2)]})
    timings = json.loads((demo / "run" / "timings.json").read_text())
    there = json.loads((demo / "run" / "environment.json").read_text())
    passes = counts(demo)
    limit = plain_seconds(demo, args.threads, 1 if args.quick else args.repeat) if made else {}
    for stage, cost in timings.items():
        case = f"{stage}: {passes[stage][1]:,} rows" if stage in passes else stage
        took = cost["seconds"] if isinstance(cost, dict) else cost
        rows.append({**record.row(case, "the demo"), "seconds": [round(took, 3)]})
        if stage in passes and made:
            every = [s * passes[stage][1] for s in limit[passes[stage][0]]]
            rows.append(
                {
                    **record.row(case, LIMIT, "limit", every=every),
                    "seconds": [round(statistics.median(every), 4)],
                }
            )
    found = record.result(
        "end_to_end", (__doc__ or "").splitlines()[0], args.threads, rows, (LIMIT,), started,
        settings={"made": made, "of_the_demo": there},
        notes=["a stage is timed once, by the demo itself; the limit is the median of its repetitions"]
        + ([] if made else ["no limit: these timings are of an earlier run; --run makes a demo and measures both"]),
    )  # fmt: skip
    return record.finish(found, args.out)


def make(demo: Path, threads: int) -> float:
    """Run the demo; seconds of it all."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "attr_engine.cli", "demo", "--out", str(demo)], env=known, stdout=sys.stderr
    )
    if done.returncode:
        raise SystemExit(f"the demo failed with exit code {done.returncode}")
    return time.perf_counter() - start


def counts(demo: Path) -> dict[str, tuple[str, int]]:
    """Kind of pass and number of rows of each stage, from the settings of the demo's run."""
    from attr_engine import LatentDataset

    config: dict[str, Any] = json.loads((demo / "run" / "config.json").read_text())
    tracks = len(LatentDataset(demo / "latents"))
    queries = (
        len(LatentDataset(demo / "generated"))
        + len(LatentDataset(demo / "held-out"))
        + len(config["self_influence"])
    )
    updates = queries * len(config["strengths"])
    found = {
        "fisher": ("backward", tracks * config["fisher_draws"]),
        "unlearn": ("backward", queries * config["update_draws"] * config["steps"]),
        "score": ("forward", tracks * config["score_draws"] * (1 + updates)),
    }
    if config.get("strengths_by", "auto") not in ("auto", "passes") or config["dtype"] != "float32":
        del found["score"]  # tangents: their passes are of another kind
    return found


def plain_seconds(demo: Path, threads: int, repeat: int) -> dict[str, list[float]]:
    """Seconds of a forward pass, and of a forward and backward pass, for one row of a pass of 16."""
    import torch

    from attr_engine import DrawPlan, LatentDataset, load_model
    from attr_engine.diffusion import noised_rows, predict
    from attr_engine.models.protocol import select_parameters
    from attr_engine.persample import summed_gradient

    torch.set_num_threads(threads)
    model = load_model(demo / "model")
    tracks = LatentDataset(demo / "latents")
    together = min(16, len(tracks))
    batch = tracks.batch(range(together), model.frames)
    ready = noised_rows(model, batch, [(i, 0) for i in range(together)], DrawPlan(), "score", False)
    parameters = select_parameters(model, ("transformer",))
    rows = [record.row("", way) for way in ("forward", "backward")]
    ways = {
        "forward": torch.no_grad()(partial(predict, model, ready)),
        "backward": partial(summed_gradient, model, parameters, ready),
    }
    record.take_turns(rows, ways, repeat)
    return {entry["way"]: [s / together for s in entry["seconds"]] for entry in rows}


if __name__ == "__main__":
    sys.exit(main())
