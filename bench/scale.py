"""How does the time grow with tracks, frames, width, queries and processes?

    python bench/scale.py                   about five minutes
    python bench/scale.py --quick           small cases: does it run?

Fisher and scores of a small DiT with random weights, a (track, draw) at a time. The limit is plain passes of the same rows, which are
ready: forward and backward for the Fisher and to first order, 1 + Q forward passes for the scores of Q queries. Up to ``--most-tracks``
tracks are simulated by a unit of tracks again and again; what more take is computed from a unit's cost, and says so. What
follows the model (scores, standard errors, ranks) is measured for all numbers of tracks, on made-up effects.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import limits
import numpy as np
import record
import torch
from cases import LAYERS, PLAN, Case, arguments

from attr_engine.diffusion import losses
from attr_engine.effects import Effects, measure_effects
from attr_engine.fisher import FisherSettings, sum_unit
from attr_engine.influence import measure_influence
from attr_engine.result import ranks
from attr_engine.score import scores
from attr_engine.updates import Update

ROOT = Path(__file__).resolve().parent.parent
FISHER, SCORES, FIRST, AFTER = "Fisher", "scores", "scores to first order", "ranks and errors"
LIMIT, COPY = "plain passes", "copy of the effects"
FRAMES, QUERIES, TRACKS = (64, 256, 1024, 2584), (1, 4, 16, 64), (100, 1000, 10_000, 100_000)
WIDTHS, PROCESSES = (128, 256, 512, 1024, 1536), (1, 2, 4)
UNIT = 16  # tracks of a durable unit of scoring
BELOW = 1e-4


def main() -> int:
    """Measure, write, print; 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128, help="of the DiT where nothing else is said (128)")
    parser.add_argument("--depth", type=int, default=2, help="its layers (2)")
    parser.add_argument(
        "--most-tracks", type=int, default=1000, help="that are measured; more are computed (1000)"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = arguments(parser, "scale")
    if args.quick:
        args.width, args.depth, args.most_tracks, args.repeat = (
            64,
            1,
            min(args.most_tracks, 32),
            min(args.repeat, 2),
        )
    if args.worker:
        return worker(args)
    frames, queries = ((64, 128), (1, 4)) if args.quick else (FRAMES, QUERIES)
    tracks = (16, 32, *TRACKS[2:]) if args.quick else TRACKS
    processes = (1, 2) if args.quick else PROCESSES
    started, rows = record.environment(), []
    for f in frames:
        rows += by_shape(f"{f} frames", f, args.width, args)
    for w in (64, 128) if args.quick else WIDTHS:
        rows += by_shape(f"width {w}", 256, w, args)
    for q in queries:
        rows += by_queries(args, q)
    rows += by_tracks(args, tracks)
    rows += by_processes(args, processes)
    shapes = [entry["widest"] for entry in rows if "widest" in entry]
    found = record.result(
        "scale", (__doc__ or "").splitlines()[0], args.threads, rows, (LIMIT, COPY, "1 process"), started,
        settings={"width": args.width, "depth": args.depth, "repeat": args.repeat, "unit_tracks": UNIT},
        limits=limits.measure(shapes, args.repeat), columns=["ms_a_pair", "found"],
        notes=[f"a pair is one (track, draw); 'computed': the seconds a pair of the largest measured number of tracks, times their "
               f"number; {os.cpu_count()} cores: with more processes than that nothing can be gained"],
    )  # fmt: skip
    return record.finish(found, args.out)


def _timed(
    case: str, ways: dict[str, Callable[[], object]], errors: dict[str, float], pairs: int, repeat: int,
    widest: tuple[int, int, int] | None = None,
) -> list[record.Row]:  # fmt: skip
    """Rows of ways that were checked before, with milliseconds a (track, draw); ``widest`` is the largest product of the plain passes."""
    kinds = {LIMIT: "limit", COPY: "limit"}
    rows = [record.row(case, way, kinds.get(way, "ours"), pairs=pairs, found="measured") for way in ways]
    for entry in rows:
        if entry["way"] == LIMIT and widest:
            entry["widest"] = widest
        if entry["way"] in errors:
            record.checked(entry, errors[entry["way"]], BELOW)
    record.take_turns(rows, ways, repeat)
    for entry in rows:
        if entry["seconds"]:
            entry["ms_a_pair"] = 1e3 * statistics.median(entry["seconds"]) / pairs
    return rows


def _off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def by_shape(name: str, frames: int, width: int, args: argparse.Namespace) -> list[record.Row]:
    """The Fisher of four tracks, and their scores for one query."""
    case = Case(frames, width, args.depth, tracks=4)
    together, pairs = case.rows_a_pass(), [(i, 0) for i in range(4)]
    settings = FisherSettings(LAYERS, PLAN, 1, rows=together)
    exact, _ = sum_unit(case.model, case.tracks, replace(settings, rows=1, gradients="loop"), range(4))
    ready = case.noised(pairs, "fisher", together)

    def fisher() -> dict[str, torch.Tensor]:
        return sum_unit(case.model, case.tracks, settings, range(4))[0]

    found = fisher()
    error = max(float((found[n] - w).norm() / w.norm()) for n, w in exact.items() if bool(w.any()))
    fitted = _timed(
        f"Fisher, {name}", {LIMIT: lambda: case.backward(ready), FISHER: fisher}, {FISHER: error}, 4, args.repeat,
        limits.widest(min(together, 4), frames, width),
    )  # fmt: skip
    return [*fitted, *_scored(case, f"{name}, 1 query", 1, args.repeat)]


def _scored(case: Case, name: str, queries: int, repeat: int, first_order: bool = False) -> list[record.Row]:
    """Scores of the case's tracks under updates, beside 1 + Q forward passes."""
    updates = case.updates(queries)
    load = [lambda u=u: u for u in updates]  # type: ignore[misc]
    together, count = case.rows_a_pass(), len(case.tracks)
    ready = case.noised([(i, 0) for i in range(count)], "score", together)

    def effects() -> Effects:
        return measure_effects(case.model, case.batch, load, PLAN, 1, rows=together)

    def influence(gradients: str = "batch") -> np.ndarray:
        rows = 1 if gradients == "loop" else together
        return measure_influence(
            case.model, case.parameters, case.batch, load, PLAN, 1, rows=rows, gradients=gradients
        )[1]

    ways: dict[str, Callable[[], object]] = {
        LIMIT: lambda: [case.forward(ready) for _ in range(1 + queries)], SCORES: effects,
    }  # fmt: skip
    ends = [0, queries - 1]
    errors = {SCORES: _off(effects().unlearned[ends], exact_losses(case, [updates[q] for q in ends]))}
    widest = limits.widest(min(together, count), case.size.frames, case.size.width)
    rows = _timed(f"scores, {name}", ways, errors, count, repeat, widest)
    if first_order:
        ways = {LIMIT: lambda: case.backward(ready), FIRST: influence}
        errors = {FIRST: _off(influence(), influence("loop"))}
        rows += _timed(f"to first order, {name}", ways, errors, count, repeat, widest)
    return rows


@torch.no_grad()
def exact_losses(case: Case, updates: Sequence[Update]) -> np.ndarray:
    """Losses ``[U, N, 1]`` under updates that are simply added to the weights, in float64, one row at a time."""
    size = case.size
    exact = Case(size.frames, size.width, size.depth, len(case.tracks), dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in exact.parameters.items()}
    rows = exact.noised([(i, 0) for i in range(len(case.tracks))], "score", 1)
    out = []
    for update in updates:
        for n, p in exact.parameters.items():
            p.copy_(before[n] + update.delta[n].double())
        out.append([[float(losses(exact.model, row)[0])] for row in rows])
    return np.array(out)


def by_queries(args: argparse.Namespace, queries: int) -> list[record.Row]:
    """Scores of a unit of tracks for Q queries in one pass, by forward passes and to first order."""
    case = Case(64, args.width, args.depth, tracks=4 if args.quick else UNIT)
    return _scored(case, f"{queries} queries, 64 frames", queries, args.repeat, first_order=True)


def by_tracks(args: argparse.Namespace, numbers: tuple[int, ...]) -> list[record.Row]:
    """Scores for one query, unit by unit: measured as far as asked for, then computed; and what follows, measured."""
    rows: list[record.Row] = []
    case = Case(64, args.width, args.depth, tracks=UNIT)
    update = case.updates(1)[0]
    together = case.rows_a_pass()
    ready = case.noised([(i, 0) for i in range(UNIT)], "score", together)
    alone = exact_losses(case, [update])
    found = measure_effects(case.model, case.batch, [lambda: update], PLAN, 1, rows=together).unlearned
    for n in numbers:
        units = -(-n // UNIT)
        if n <= args.most_tracks:

            def score(units: int = units) -> None:
                for _ in range(units):
                    measure_effects(case.model, case.batch, [lambda: update], PLAN, 1, rows=together)

            def plain(units: int = units) -> None:
                for _ in range(2 * units):
                    case.forward(ready)

            ways: dict[str, Callable[[], object]] = {LIMIT: plain, SCORES: score}
            rows += _timed(
                f"scores, {n:,} tracks", ways, {SCORES: _off(found, alone)}, units * UNIT, min(3, args.repeat),
                limits.widest(min(together, UNIT), 64, args.width),
            )  # fmt: skip
        else:
            rows += _computed(rows, n)
        rows += _after(n, args.repeat)
    return rows


def _computed(rows: list[record.Row], tracks: int) -> list[record.Row]:
    """The last measured row of scores for more tracks; it has no repetitions, and so no ratio."""
    measured = [r for r in rows if r["way"] == SCORES and r["seconds"]]
    if not measured:
        return []
    a_pair = measured[-1]["ms_a_pair"]
    return [record.row(f"scores, {tracks:,} tracks", SCORES, pairs=tracks, ms_a_pair=a_pair,
                       computed_seconds=a_pair * tracks / 1e3, found=f"computed: {a_pair * tracks / 1e3:.4g} s")]  # fmt: skip


def _after(tracks: int, repeat: int) -> list[record.Row]:
    """Scores, standard errors and ranks of made-up effects of 4 queries and 4 draws; checked against a sort."""
    rng = np.random.default_rng(0)
    base = rng.random((tracks, 4))
    effects = Effects(base, base + rng.normal(size=(4, tracks, 4)), rng.random((4, tracks, 4)))

    def after() -> np.ndarray:
        return np.stack([ranks(s) for s in scores(effects, ("loss_change",), 4)["loss_change"][0]])

    ways: dict[str, Callable[[], object]] = {COPY: lambda: effects.unlearned.copy(), AFTER: after}
    wanted = np.argsort(np.argsort(-(effects.unlearned - base).mean(axis=-1), axis=1), axis=1) + 1
    return _timed(
        f"ranks, {tracks:,} tracks", ways, {AFTER: float((after() != wanted).mean())}, 4 * tracks, repeat
    )


# -- processes ------------------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> int:
    """One of n processes: says that it is ready, waits for a line, scores its share, says what the scores add up to; again and again."""
    torch.set_num_threads(1)
    case = Case(64, args.width, args.depth, tracks=UNIT)
    update = case.updates(1)[0]
    print("ready", flush=True)
    for line in sys.stdin:
        total = 0.0
        for _ in range(int(line)):
            total = float(measure_effects(case.model, case.batch, [lambda: update], PLAN, 1).unlearned.sum())
        print(repr(total), flush=True)
    return 0


def by_processes(args: argparse.Namespace, numbers: tuple[int, ...]) -> list[record.Row]:
    """The same units by n processes of one thread each, which are started and ready; every sum has to be the same."""
    units = 4 if args.quick else 16
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "1", "--width", str(args.width),
               "--depth", str(args.depth), "--threads", "1"]  # fmt: skip
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    crew = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=known)
        for _ in range(max(numbers))
    ]
    case = f"{units * UNIT} tracks shared"
    rows = [record.row(case, _name(n), pairs=units * UNIT, found="measured") for n in numbers]
    try:
        ready = [str(w.stdout.readline()).strip() for w in crew]  # type: ignore[union-attr]
        if set(ready) != {"ready"}:
            raise SystemExit("a process of the benchmark did not start")
        sums = {share(crew[:n], units) for n in numbers}
        if len({x for some in sums for x in some}) != 1:
            for entry in rows:
                entry.update(status="wrong", reason="processes gave different scores")
        ways: dict[str, Callable[[], object]] = {
            _name(n): lambda n=n: share(crew[:n], units) for n in numbers
        }  # type: ignore[misc]
        record.take_turns(rows, ways, args.repeat, turn=0.0)
    finally:
        for one in crew:
            one.stdin.close()  # type: ignore[union-attr]
            one.wait()
    for entry, n in zip(rows, numbers, strict=True):
        if entry["seconds"]:
            entry["ms_a_pair"] = 1e3 * statistics.median(entry["seconds"]) / (units * UNIT)
        if n > (os.cpu_count() or 1):
            entry["found"] = "more processes than cores"
    return rows


def _name(n: int) -> str:
    return "1 process" if n == 1 else f"{n} processes"


def share(crew: list[subprocess.Popen[str]], units: int) -> frozenset[str]:
    """Units by some processes, as evenly as goes: what each says."""
    for k, one in enumerate(crew):
        one.stdin.write(f"{len(range(k, units, len(crew)))}\n")  # type: ignore[union-attr]
        one.stdin.flush()  # type: ignore[union-attr]
    return frozenset(str(one.stdout.readline()).strip() for one in crew)  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
