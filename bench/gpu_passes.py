"""The large model: forward, backward, Fisher pass, one unlearning step; time and peak memory of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_tools import Bench, Row, alternate, once, peak, release, summary
from gpu_work import PLAN, Work, fitting, work_of
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import noised_rows, predict
from attr_engine.errors import UserError
from attr_engine.persample import add_squares, check_against_loop
from attr_engine.unlearn import query_gradient

DRAWS = 2048  # timesteps of one step, as in the paper
CHUNKS = 8  # of the step: each is timed by itself


def passes(bench: Bench) -> dict[str, Any]:
    """Forward, forward + backward, Fisher pass and the loop over single rows, in turns."""
    work = work_of(bench)
    make = partial(noised_rows, work.model, work.batch, plan=PLAN, purpose="fisher", masked=False)
    try:
        check_against_loop(work.model, work.parameters, make, [(0, 0), (1, 0)])
        bench.check("Fisher", "large model", "bfloat16", "2 rows against the loop", True)
    except UserError as error:
        bench.check("Fisher", "large model", "bfloat16", "2 rows against the loop", False, reason=str(error))
    release(bench.device)
    work.rows, result = fitting(bench, work.rows, partial(_passes, bench, work))
    return {"parameters": work.count(), "rows": work.rows, "passes": result}


def _passes(bench: Bench, work: Work, rows: int) -> dict[str, Row]:
    noised, flops = work.make(rows), work.size.flops()

    @torch.no_grad()
    def forward() -> None:
        predict(work.model, noised)

    def fresh_squares() -> None:
        work.squares(noised, work.zeros())

    ways: dict[str, Callable[[], Any]] = {
        "noise, mixing, target": lambda: work.make(rows),
        "forward": forward,
        "forward + backward": lambda: work.backward(noised),
    }
    kinds = {**flops, "Fisher pass": flops["forward + backward"], "noise, mixing, target": 0.0}
    if bench.green("K1", "bfloat16") and all(c["green"] for c in bench.checks if c["kernel"] == "Fisher"):
        memory = {"Fisher pass": peak(fresh_squares, bench.device)}
        work.fisher = work.zeros()
        ways["Fisher pass"] = lambda: work.squares(noised, work.fisher)
    else:
        memory = {}
        bench.skip("Fisher pass", "a comparison of K1 or of a Fisher is red")
    # The plain gradient's peak is its own: the Fisher is not counted there, though it may be held.
    memory |= {name: peak(way, bench.device) for name, way in ways.items() if name not in memory}
    found = alternate(ways, bench, repeats=7, seconds=bench.budget.left() / 6, cold=False)
    out = {name: work.row(result, rows, kinds[name], memory[name]) for name, result in found.items()}
    few = [work.make(1) for _ in range(2)]
    squares = work.zeros()

    def loop() -> None:
        for row in few:
            for name, g in work.backward(row).items():
                if g is not None:
                    add_squares(squares[name], g[None])

    needed = peak(loop, bench.device)
    single = alternate({"loop": loop}, bench, repeats=3, seconds=2.0, cold=False)["loop"]
    out["loop over single rows"] = work.row(single, len(few), flops["forward + backward"], needed)
    return out


def unlearning(bench: Bench) -> dict[str, Any]:
    """One step of 2048 draws: the gradient in eight timed chunks, as many as there is time for, and the damped step."""
    work = work_of(bench)
    draws = 16 * work.rows if bench.tiny else DRAWS
    chunk = draws // CHUNKS

    def gradient(draws: range, rows: int) -> dict[str, Tensor]:
        return query_gradient(work.model, work.parameters, work.batch, draws, PLAN, True, rows)

    # Warm, and the peak: the mean gradient in float32 and one pass.
    rows, needed = fitting(
        bench, work.rows, lambda n: peak(lambda: gradient(range(n, 3 * n), n), bench.device)
    )
    seconds: list[float] = []
    mean: dict[str, Tensor] = {}
    for first in range(0, draws, chunk):
        if seconds and bench.budget.left() < 1.2 * max(seconds):
            bench.skip(
                f"{CHUNKS - len(seconds)} of {CHUNKS} chunks of draws", "the time of this part is over"
            )
            break
        mean.clear()
        some = range(first, first + chunk)
        seconds.append(once(lambda some=some: mean.update(gradient(some, rows)), bench.device))  # type: ignore[misc]
    fisher = work.fisher or {n: torch.ones_like(g) for n, g in mean.items()}
    delta = work.zeros()
    step = once(
        lambda: [kernels.precondition_(delta[n], g, fisher[n], 1e-8, 1.0) for n, g in mean.items()],
        bench.device,
    )
    whole = len(seconds) == CHUNKS
    total = (sum(seconds) if whole else CHUNKS * summary(seconds)["median"]) + step
    rates = work.row(summary(seconds), chunk, work.size.flops()["forward + backward"], needed)
    return {
        **rates, "chunk": chunk, "rows": rows, "measured_draws": chunk * len(seconds), "draws": draws, "whole": whole,
        "precondition_seconds": step, "step_seconds": total,
        "step_is": "measured" if whole else f"extrapolated from {chunk * len(seconds)} draws",
    }  # fmt: skip
