"""What does scoring many queries cost, how exact is each way of taking a difference, and how much memory does it take?

    python bench/score.py --demo demo-run                    everything but the full-size model's memory (about 15 minutes)
    python bench/score.py --only memory                      the 1.06 B model on a CPU: 20 GB of memory, some minutes
    python bench/score.py --demo demo-run --quick            small: does it run?
    python bench/score.py --table bench/results/score.json

The demo folder is what ``attr-engine demo`` wrote. The result is JSON with every repetition, and tables on stdout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import score_report as report  # noqa: E402 - needs the path
import stream_report  # noqa: E402

PARTS = ("queries", "modes", "memory")


def main() -> int:
    """Measure, write, print; 1 where one pass and separate runs gave other bits."""
    args = _arguments()
    if args.table:
        found = json.loads(args.table.read_text())
        print(report.markdown({part: found[part] for part in args.only or PARTS if part in found}))
        return 0
    args.only = args.only or ["queries", "modes"]
    import fisher_report
    import torch

    torch.set_num_threads(args.threads)
    # A part that is measured alone leaves the others as they are in the file.
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.only:
        environment, started = fisher_report.environment(), time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="attr-engine-bench-") as folder:
            found = globals()[f"measure_{part}"](args, Path(folder))
        seconds = round(time.perf_counter() - started, 1)
        result[part] = {
            "environment": environment, "threads": args.threads, "quick": args.quick, "seconds": seconds,
            **found,
        }  # fmt: skip
        stream_report.write(result, args.out)
    print(report.markdown(result))
    return int("queries" in args.only and not result["queries"]["same_bits"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="folder of the demo (demo-run)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"parts ({', '.join(PARTS)}; queries and modes, and all of a --table)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds in which every way runs once (3)")
    parser.add_argument("--quick", action="store_true", help="few tracks and queries: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "score.json")
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    args = parser.parse_args()
    if not args.table and args.only != ["memory"] and not (args.demo / "model").is_dir():
        parser.error(f"{args.demo} is no demo folder: run attr-engine demo first, or name it with --demo")
    return args


# -- many queries in one pass -------------------------------------------------------------------


def _job(args: argparse.Namespace, folder: Path, queries: list[int], functions: tuple[str, ...]) -> Any:
    """A job over some of the demo's training tracks, its queries other training tracks."""
    from attr_engine import LatentDataset, Settings, load_model
    from attr_engine.jobs import Job, make_queries
    from attr_engine.runs import Run

    tracks = LatentDataset(args.demo / "latents")
    ids = tuple(tracks.ids[i] for i in queries)
    settings = Settings(
        functions=functions,
        self_influence=ids,
        plan="track",
        score_draws=4,
        unit_tracks=16,
        rows=16,
        threads=args.threads,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(args.demo / "model")
    return Job(Run(folder, settings), model, tracks, make_queries(tracks, [], ids))


def measure_queries(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The scoring stage alone: Q queries in one pass and in Q runs, each with an empty cache."""
    from attr_engine.pipeline import fisher_stage, update_stage
    from attr_engine.scoring import score_stage

    count = 2 if args.quick else 16
    queries = list(range(0, 256, 256 // count))[:count]
    exact, first = ("loss_change", "displacement"), ("influence",)
    prepared = _job(args, work / "prepared", queries, (*exact, *first))
    fisher = fisher_stage(prepared)
    update_stage(prepared, fisher)

    def once(name: str, some: list[int], functions: tuple[str, ...]) -> tuple[float, Any]:
        job = _job(args, work / name, some, functions)
        (work / name / "updates").mkdir()
        for query in job.queries:  # made before: what is timed is scoring alone
            path = job.update_path(query, job.run.settings.strengths[0])
            path.hardlink_to(prepared.update_path(query, job.run.settings.strengths[0]))
        started = time.perf_counter()
        parts = score_stage(job)
        seconds = time.perf_counter() - started
        shutil.rmtree(work / name)
        return seconds, parts[0].effects

    rounds: list[dict[str, float]] = []
    same = True
    for r in range(args.repeat + 1):
        together, effects = once(f"{r}-all", queries, exact)
        single = [once(f"{r}-{q}", [q], exact) for q in queries]
        influence, _ = once(f"{r}-influence", queries, first)
        same &= all(
            bool((x.unlearned[0] == effects.unlearned[k]).all() and (x.displacement[0] == effects.displacement[k]).all())
            for k, (_, x) in enumerate(single)
        )  # fmt: skip
        if r:  # the first round warms up
            rounds.append(
                {"one pass": together, "separate": sum(s for s, _ in single), "influence": influence}
            )
    return {"queries": count, "tracks": len(prepared.tracks), "draws": 4, "same_bits": same, "rounds": rounds,
            "criteria": report.queries_criteria(rounds, same)}  # fmt: skip


# -- how exact a difference is ------------------------------------------------------------------


def measure_modes(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Loss change and displacement of the same updates by every way, against forward passes in float64."""
    from dataclasses import replace

    import torch

    from attr_engine import DrawPlan, Fisher, LatentDataset, load_model, unlearn_query
    from attr_engine.effects import measure_effects, measure_tangents

    tracks = LatentDataset(args.demo / "latents")
    held = LatentDataset(args.demo / "held-out")
    fisher = Fisher.load(args.demo / "run" / "fisher.safetensors")
    plan, strengths = DrawPlan(), (1e-4, 1e-3, 1e-2, 1e-1)
    batch = tracks.batch(range(0, 256, 64 if args.quick else 4), 188)
    model = load_model(args.demo / "model")
    units = [unlearn_query(model, held, q, fisher, plan, len(tracks), 1.0, draws=64) for q in (2, 12)]

    def at(strength: float, dtype: torch.dtype = torch.float32) -> list[Any]:
        made = [
            replace(u, strength=strength, delta={n: (v * strength).to(dtype) for n, v in u.delta.items()})
            for u in units
        ]
        return [lambda u=u: u for u in made]

    exact_model = load_model(args.demo / "model", None, "float64")
    exact = {s: measure_effects(exact_model, batch, at(s), plan, 4) for s in strengths}
    rows = []
    for dtype in ("float32", "bfloat16"):
        low = load_model(args.demo / "model", None, dtype)
        halves = [torch.float32, torch.bfloat16]
        for s in strengths:
            for kept in halves:
                name = f"passes, updates in {str(kept)[6:]}"
                rows.append(
                    report.mode(dtype, name, s, measure_effects(low, batch, at(s, kept), plan, 4), exact[s])
                )
        for way, base in (("tangent", 1e-2), ("difference", 1e-3), ("difference", 1e-2)):
            found = measure_tangents(low, batch, at(base), plan, 4, way=way)
            name = way if way == "tangent" else f"difference at {base:g}"
            rows += [report.mode(dtype, name, s, found.at((s,)), exact[s]) for s in strengths]
    return {"tracks": len(batch.ids), "draws": 4, "queries": len(units), "rows": rows}


# -- memory of the full-size model --------------------------------------------------------------


def measure_memory(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Bytes of tensors at the peak of scoring a track with the 1.06 B model; what lies on disk is read tensor by tensor."""
    from dataclasses import replace

    import torch
    from gpu_model import TINY, Size

    size = TINY if args.quick else Size()
    # What another query takes does not depend on the length of a track.
    short = replace(size, frames=size.frames // 10 + 1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rows += _memory_of(size, dtype, work, ("one query",))
        rows += _memory_of(short, dtype, work, ("one query", "two, paged", "two, resident"))
    return {"rows": rows, "criteria": report.memory_criteria(rows, size.frames)}


def _memory_of(size: Any, dtype: Any, work: Path, ways: tuple[str, ...]) -> list[dict[str, Any]]:
    """One model and its updates; all of it is gone afterwards."""
    import torch
    from gpu_model import Dit

    from attr_engine import DrawPlan
    from attr_engine.effects import measure_effects
    from attr_engine.memory import peak_bytes
    from attr_engine.models.protocol import select_parameters
    from attr_engine.updates import Unlearned, Update

    model, plan, cpu = Dit(size, dtype, torch.device("cpu"), 0), DrawPlan(replicates=1), torch.device("cpu")
    group = select_parameters(model, ("transformer",))
    paths = [work / f"{q}.safetensors" for q in range(2)]
    for path in [p for p in paths if not p.exists()]:
        delta = {n: torch.full(p.shape, 1e-4, dtype=torch.bfloat16) for n, p in group.items()}
        Update(path.stem, 1e-2, "size", delta, 1.0, 1e-2).save(path, "k")
    batch, rows = model.batch(1, 0), []
    for name, queries, room in (("one query", 1, 0.0), ("two, paged", 2, 0.0), ("two, resident", 2, 1e12)):
        if name not in ways:
            continue
        unlearned = Unlearned(model, [lambda p=p: Update.load(p) for p in paths[:queries]], room)  # type: ignore[misc]

        def pass_(unlearned: Any = unlearned) -> object:
            return measure_effects(model, batch, unlearned, plan, 1, rows=1)

        rows.append({
            "dtype": str(dtype)[6:], "what": name, "frames": size.frames, "beside": peak_bytes(pass_, cpu),
            "weights": sum(p.numel() * p.element_size() for p in model.module.parameters()),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
