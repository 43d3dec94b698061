"""How much faster are several processes of one torchrun, and do they give the bits of one?

Fisher, updates, scores and an index of the demo's tracks, by 1, 2 and 4 processes with one thread each, taking turns. A stage's
time is from when the first process enters it to when the last one leaves it; loading is not in it. The efficiency of n
processes is ``t1 / (n tn)``: 1 where the work is shared without loss. Every file is compared with the first result.

    make demo                                               makes demo-run/
    python bench/processes.py                               into bench/results/processes.json (some ten minutes)
    python bench/processes.py --demo DIR --repetitions 1    another demo folder, once
    python bench/processes.py --table bench/results/processes.json

With more processes than cores only the bits say something. Use an otherwise idle machine. The exit code is 1 where bits differed.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from stream_report import environment  # noqa: E402

STAGES = ("fisher", "updates", "scoring", "index")
QUERIES = 4  # of the held-out pieces
MOST_SECONDS_TO_MEET = 300.0


def main() -> int:
    """Measure, write, print; 1 where bits differed."""
    args = _arguments()
    if args.worker:
        work(args.demo, args.worker)
        return 0
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    with tempfile.TemporaryDirectory(prefix="attr-engine-processes-", dir=args.work) as folder:
        result = measure(args, Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    return 0 if result["same_bits"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-run", help="a demo's folder (demo-run)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of them (1 2 4)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each, taking turns (3)")
    parser.add_argument("--work", type=Path, help="where the runs are kept meanwhile (a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "processes.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of an earlier run")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.processes) < 1 or args.repetitions < 1 or 1 not in args.processes:
        parser.error("--processes needs 1, to compare with, and no number below it; --repetitions at least 1")
    if not args.table and not (args.demo / "model").is_dir():
        parser.error(f"{args.demo} holds no demo: make one with make demo, or name one with --demo")
    return args


# -- one of the processes -------------------------------------------------------------------------


def work(demo: Path, out: Path) -> None:
    """Every stage, from a start that all processes make together; when it began and ended goes to a file."""
    import torch

    from attr_engine import LatentDataset, Settings, load_model, pipeline
    from attr_engine.index import IndexSettings, build_index
    from attr_engine.jobs import Job, check, make_queries
    from attr_engine.runs import open_run
    from attr_engine.settings import UNLEARNING
    from attr_engine.units import rank

    torch.set_num_threads(1)
    model = load_model(demo / "model")
    tracks, queries = LatentDataset(demo / "latents"), LatentDataset(demo / "held-out")
    settings = Settings(
        functions=UNLEARNING,
        plan="track",
        score_draws=8,
        strengths=(0.01,),
        rows=16,
        unit_tracks=16,
        threads=1,
        keep_updates=True,
    )
    times: dict[str, list[float]] = {}
    with open_run(out / "run", settings) as run:
        every = make_queries(tracks, [queries])
        job = Job(run, model, tracks, every[:QUERIES])
        check(job)
        fisher: list[Any] = []
        stages = {
            "fisher": lambda: fisher.append(pipeline.fisher_stage(job)),
            "updates": lambda: pipeline.update_stage(job, fisher[0]),
            "scoring": lambda: pipeline.score_stage(job),
            "index": lambda: build_index(model, tracks, out / "index", IndexSettings(rank=4)),
        }
        for name, stage in stages.items():
            _meet(out / "meet", name)
            began, cpu = time.monotonic(), time.process_time()  # one clock for all processes of a machine
            stage()
            times[name] = [began, time.monotonic(), time.process_time() - cpu]
    (out / f"times-{rank()}.json").write_text(json.dumps(times))


def _meet(folder: Path, name: str) -> None:
    """Wait until all processes are here."""
    from attr_engine.units import rank, workers

    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{rank()}").touch()
    until = time.monotonic() + MOST_SECONDS_TO_MEET
    while len(list(folder.glob(f"{name}-*"))) < workers():
        if time.monotonic() > until:
            raise SystemExit("the other processes did not come")
        time.sleep(0.001)


# -- all of them ----------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Repetitions of every number of processes, taking turns."""
    host = environment()
    seconds: dict[int, dict[str, list[float]]] = {n: {stage: [] for stage in STAGES} for n in args.processes}
    cpu: dict[int, dict[str, list[float]]] = {n: {stage: [] for stage in STAGES} for n in args.processes}
    reference: dict[str, bytes] = {}
    differing: list[str] = []
    for turn in range(args.repetitions):
        for n in args.processes:
            out = folder / f"{turn}-{n}"
            out.mkdir()
            print(f"repetition {turn + 1} of {args.repetitions}, {n} processes", file=sys.stderr, flush=True)
            took = _once(args.demo, out, n)
            for stage in STAGES:
                seconds[n][stage].append(took[stage][0])
                cpu[n][stage].append(took[stage][1])
            found = contents(out)
            reference = reference or found
            differing += [
                f"{name} ({n} processes)"
                for name in {*reference, *found}
                if reference.get(name) != found.get(name)
            ]
    cores = len(os.sched_getaffinity(0))
    rows = [
        {"stage": stage, "processes": n, "seconds": [round(s, 3) for s in seconds[n][stage]],
         "median": statistics.median(seconds[n][stage]), "cpu_seconds": [round(s, 3) for s in cpu[n][stage]],
         "efficiency": [round(one / (n * s), 3) for one, s in zip(seconds[1][stage], seconds[n][stage], strict=True)],
         "median_efficiency": round(statistics.median(seconds[1][stage]) / (n * statistics.median(seconds[n][stage])), 3),
         "enough_cores": n <= cores}
        for stage in STAGES for n in args.processes
    ]  # fmt: skip
    return {"same_bits": not differing, "differing": sorted(set(differing)), "files": sorted(reference), "rows": rows,
            "repetitions": args.repetitions, "environment": host}  # fmt: skip


def _once(demo: Path, out: Path, n: int) -> dict[str, tuple[float, float]]:
    """Seconds of every stage by n processes of a torchrun, and of all their processors together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += [str(Path(__file__).resolve()), "--demo", str(demo), "--worker", str(out)]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    if done.returncode:
        raise SystemExit(f"{n} processes failed:\n{done.stderr[-3000:]}")
    times = [json.loads((out / f"times-{rank}.json").read_text()) for rank in range(n)]
    return {
        stage: (
            max(t[stage][1] for t in times) - min(t[stage][0] for t in times),
            sum(t[stage][2] for t in times),
        )
        for stage in STAGES
    }


def contents(out: Path) -> dict[str, bytes]:
    """What has to be the same, whoever shared the work: name to bytes."""
    paths = [*(out / "run").rglob("*.safetensors"), *(out / "index").iterdir()]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(paths)}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "| stage | processes | s, median | s, all | s of processor, median | efficiency | of each repetition |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        every = ", ".join(f"{e:.2f}" for e in row["efficiency"])
        shown = (
            (f"{row['median_efficiency']:.2f}", every)
            if row["enough_cores"]
            else ("more processes than cores", "")
        )
        together = statistics.median(row["cpu_seconds"])
        took = ", ".join(f"{s:.2f}" for s in row["seconds"])
        lines.append(
            f"| {row['stage']} | {row['processes']} | {row['median']:.2f} | {took} | {together:.2f} | {shown[0]} | {shown[1]} |"
        )
    said = (
        "the same bits everywhere" if result["same_bits"] else f"different: {', '.join(result['differing'])}"
    )
    return "\n".join([*lines, "", f"{len(result['files'])} files, {said}"])


if __name__ == "__main__":
    sys.exit(main())
