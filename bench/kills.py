"""Is anything lost when processes are killed, whichever and whenever?

Small attributions (Fisher, updates, scores) and indexes are computed by one, two or three processes. At a random moment, uniform
over the time that an undisturbed run takes, some of them get SIGKILL; then the same is started again, beside those that
live, and killed again, until it ends. Every file of every result is compared with an undisturbed run of one process.

    python bench/kills.py                    100 results into bench/results/kills.json (some minutes)
    python bench/kills.py --results 6        less of it
    python bench/kills.py --table bench/results/kills.json

The exit code is 1 where a result differed, a job failed, or more was lost than the unit that a killed process worked at.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import forks  # noqa: E402 - needs the path
from stream_report import environment, plain  # noqa: E402

Moment = tuple[float, list[int]]  # seconds until a kill, and the ranks that die

STAGES = ("fisher", "updates", "scoring", "index")
SHARE_OF_INDEX = 0.3  # of the kills
SECONDS_A_PASS = {
    "run": 0.015,
    "index": 0.06,
}  # slept in every pass through the model, so that there is time to be killed in
PATIENCE = 120.0  # seconds until a job that does not end is a failed one
UPDATES = 3 * 2 * 2  # files: queries, strengths, differentiated functions of forks.small


def main() -> int:
    """Kill, compare, write, print; 1 where anything was lost."""
    args = _arguments()
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    _import_everything()
    folder = Path(tempfile.mkdtemp(prefix="attr-engine-kills-", dir=args.work))
    try:
        result = measure(args.results, args.seed, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    return 0 if result["passed"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=int, default=100, help="results, each after one to three kills (100)"
    )
    parser.add_argument("--seed", type=int, help="of data, moments and victims (a new one)")
    parser.add_argument("--work", type=Path, help="where the runs are kept meanwhile (a temporary folder)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kills.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of an earlier run")
    args = parser.parse_args()
    if args.results < 1:
        parser.error("--results must be at least 1")
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(3), "little")
    return args


def _import_everything() -> None:
    """What the children need. Nothing is computed here: autograd does not survive a fork."""
    import pyarrow.csv  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    import attr_engine.index
    import attr_engine.pipeline  # noqa: F401

    torch.set_num_threads(1)
    attr_engine.index._UNIT_TRACKS = 1  # there are six tracks


# -- a process ------------------------------------------------------------------------------------


def start(kind: str, out: Path, seed: int, rank: int, world: int) -> int:
    """One process of a job; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        log = os.open(f"{out}.err", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 2)
        _work(kind, out, seed)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(kind: str, out: Path, seed: int) -> None:
    import attr_engine.index
    import attr_engine.pipeline
    import attr_engine.scoring

    log = os.open(f"{out}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    run_units = attr_engine.pipeline.run_units

    def logged(paths: Any, compute: Callable[[int], None], finished: Any, locks: Path, *more: Any) -> None:
        def both(i: int) -> None:
            os.write(log, f"begin {locks.name} {i}\n".encode())
            compute(i)
            os.write(log, f"end {locks.name} {i}\n".encode())

        run_units(paths, both, finished, locks, *more)

    for module in (attr_engine.pipeline, attr_engine.scoring, attr_engine.index):
        module.run_units = logged  # type: ignore[attr-defined]
    model, tracks, queries = forks.make(seed)
    predict = model.predict

    def slowed(*arguments: Any) -> Any:
        time.sleep(SECONDS_A_PASS[kind])
        return predict(*arguments)

    model.predict = slowed
    if kind == "run":
        attr_engine.pipeline.attribute(
            model, tracks, queries, forks.small(fisher_draws=4, score_draws=8, unit_tracks=1), out
        )
    else:
        settings = attr_engine.index.IndexSettings(("all",), draws=4, replicates=2, rank=2, rows=2)
        attr_engine.index.build_index(model, tracks, out, settings)


def stage_of(kind: str, out: Path) -> str:
    """Where a job is, by its files."""
    if kind == "index":
        return "after" if (out / "index.json").exists() else "index"
    if not (out / "fisher.safetensors").exists():
        return "fisher" if (out / "config.json").exists() else "before"
    if (out / "effects.safetensors").exists():
        return "after"
    return "scoring" if len(list((out / "updates").glob("*.safetensors"))) >= UPDATES else "updates"


# -- a job ----------------------------------------------------------------------------------------


def play(kind: str, out: Path, seed: int, world: int, moment: Callable[[], Moment | None]) -> dict[str, Any]:
    """Start a job, kill as ``moment`` says, start what was killed again, until all have ended by themselves.

    Args:
        kind: ``"run"`` or ``"index"``.
        out: its folder.
        seed: of model and data.
        world: processes.
        moment: seconds until the next kill and the ranks that die, or None to leave the job alone.
    """
    alive: dict[int, int] = {}
    ended, kills, error = set[int](), [], ""
    until = time.monotonic() + PATIENCE
    while len(ended) < world and not error:
        for rank in set(range(world)) - ended - set(alive):
            alive[rank] = start(kind, out, seed, rank, world)
        planned = moment()
        began = time.monotonic()
        at = until if planned is None else min(until, began + planned[0])
        while alive and time.monotonic() < at and not error:
            error = _reap(alive, ended)
            time.sleep(0.002)
        if time.monotonic() > until:
            error = f"it did not end within {PATIENCE:.0f} s"
        victims = set(alive) if error else set(alive).intersection(planned[1] if planned else ())
        for rank in victims:
            os.kill(alive[rank], signal.SIGKILL)
        seconds, died = time.monotonic() - began, 0
        for rank in victims:
            code = os.waitstatus_to_exitcode(os.waitpid(alive.pop(rank), 0)[1])
            died += code == -signal.SIGKILL
            ended |= {rank} if code == 0 else set()  # the kill came too late
        if died and not error:
            kills.append({"seconds": round(seconds, 3), "stage": stage_of(kind, out), "killed": died})
    return {"kind": kind, "processes": world, "kills": kills, "error": error}


def _reap(alive: dict[int, int], ended: set[int]) -> str:
    """Take note of who has ended; says what went wrong."""
    for rank, pid in list(alive.items()):
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            del alive[rank]
            ended.add(rank)
            if status:
                return f"rank {rank} ended with exit code {os.waitstatus_to_exitcode(status)}"
    return ""


def contents(kind: str, folder: Path) -> dict[str, bytes]:
    """Every file of a result, but locks and what says when and where: name to bytes."""
    other = ("environment.json",) if kind == "run" else ()
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.endswith(".lock")
        and not path.name.startswith(("timings", "status"))
        and path.name not in other
    }


def units(log: Path) -> dict[str, int]:
    """From the log of a job: units, how often one was begun, and how many were finished more than once."""
    lines = Counter(log.read_text().splitlines())
    begun = {line: n for line, n in lines.items() if line.startswith("begin")}
    twice = sum(n > 1 for line, n in lines.items() if line.startswith("end"))
    return {"units": len(begun), "begun": sum(begun.values()), "twice": twice}


# -- all of them ----------------------------------------------------------------------------------


def measure(results: int, seed: int, work: Path) -> dict[str, Any]:
    """All jobs, and what became of them."""
    host, started, chance = environment(), time.monotonic(), random.Random(seed)
    data = chance.randrange(2**31)
    reference, seconds = {}, {}
    for kind in ("run", "index"):
        began = time.monotonic()
        alone = play(kind, work / f"{kind}-alone", data, 1, lambda: None)
        if alone["error"]:
            raise SystemExit(
                f"an undisturbed {kind}: {alone['error']}\n{(work / f'{kind}-alone.err').read_text()}"
            )
        seconds[kind] = time.monotonic() - began
        reference[kind] = contents(kind, work / f"{kind}-alone")
    jobs: list[dict[str, Any]] = []
    while len(jobs) < results:
        kind = "index" if chance.random() < SHARE_OF_INDEX else "run"
        world, left = chance.choice((1, 1, 2, 3)), [chance.choice((1, 1, 2, 3))]

        def moment(kind: str = kind, world: int = world, left: list[int] = left) -> Moment | None:
            left[0] -= 1
            victims = chance.sample(range(world), chance.randint(1, world))
            return (chance.uniform(0.0, seconds[kind] / world), victims) if left[0] >= 0 else None

        out = work / f"job-{len(jobs)}"
        job = play(kind, out, data, world, moment)
        job |= units(Path(f"{out}.log"))
        job["identical"] = not job["error"] and contents(kind, out) == reference[kind]
        if job["error"]:
            job["said"] = plain(Path(f"{out}.err").read_text()[-500:])
        if (
            job["kills"] or not job["identical"]
        ):  # where every kill came after the end there is nothing to tell
            jobs.append(job)
            print(f"{len(jobs)} of {results} results", file=sys.stderr, flush=True)
        for path in work.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {**summary(jobs), "seed": seed, "seconds": round(time.monotonic() - started, 1),
            "undisturbed_seconds": seconds, "environment": host, "jobs": jobs}  # fmt: skip


def summary(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the jobs say together."""
    every = [{**kill, "processes": job["processes"]} for job in jobs for kill in job["kills"]]
    killed = sum(kill["killed"] for kill in every)
    by_stage = Counter(kill["stage"] for kill in every)
    lost = sum(job["begun"] - job["units"] for job in jobs)
    out = {
        "kills": len(every), "processes_killed": killed, "results": len(jobs),
        "identical": sum(job["identical"] for job in jobs),
        "by_stage": {stage: by_stage.pop(stage, 0) for stage in STAGES} | dict(sorted(by_stage.items())),
        "by_processes": dict(sorted(Counter(kill["processes"] for kill in every).items())),
        "units": sum(job["units"] for job in jobs), "units_begun_again": lost, "units_finished_twice": sum(job["twice"] for job in jobs),
    }  # fmt: skip
    whole = out["identical"] == len(jobs) and not any(job["error"] for job in jobs)
    return {"passed": whole and lost <= killed and out["units_finished_twice"] == 0, **out}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        ("kills (moments)", result["kills"]),
        ("processes killed", result["processes_killed"]),
        *((f"kills: {stage}", n) for stage, n in result["by_stage"].items()),
        *((f"kills: {n} process{'es' if int(n) > 1 else ''}", k) for n, k in result["by_processes"].items()),
        ("results", result["results"]),
        ("identical results", result["identical"]),
        ("units", result["units"]),
        ("units begun again", result["units_begun_again"]),
        ("units finished twice", result["units_finished_twice"]),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


if __name__ == "__main__":
    sys.exit(main())
