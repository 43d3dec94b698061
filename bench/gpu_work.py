"""The large model on the device, its tracks, and the rows of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from gpu_card import share
from gpu_model import TINY, Dit, Size
from gpu_tools import Bench, Row, peak, release
from torch import Tensor

from attr_engine.diffusion import DrawPlan, Noised, noised_rows
from attr_engine.models.protocol import select_parameters
from attr_engine.persample import add_squares, per_sample_backward, summed_gradient

MOST_ROWS = 8
PLAN = DrawPlan(seed=0)
LAYERS = ("transformer",)  # the paper's best group
T = TypeVar("T")


def fitting(bench: Bench, rows: int, attempt: Callable[[int], T]) -> tuple[int, T]:
    """Run with as many rows as the memory takes: half of them where it does not."""
    while True:
        try:
            return rows, attempt(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        release(bench.device)  # outside of the handler, which holds the frames of the failed call
        rows //= 2


class Work:
    """The large model on the device, its tracks, and the rows of a pass."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.size = bench, TINY if bench.tiny else Size()
        self.model = Dit(self.size, torch.bfloat16, bench.device, bench.seed)
        self.parameters = select_parameters(self.model, LAYERS)
        self.batch = self.model.batch(MOST_ROWS, bench.seed)
        self.rows = bench.rows or self._rows()
        self.fisher: dict[str, Tensor] = {}

    def make(self, rows: int) -> Noised:
        """Rows of as many tracks, one draw each."""
        pairs = [(i % MOST_ROWS, i // MOST_ROWS) for i in range(rows)]
        return noised_rows(self.model, self.batch, pairs, PLAN, "fisher", False)

    def count(self) -> int:
        """Numbers in the parameters of the group."""
        return sum(p.numel() for p in self.parameters.values())

    def zeros(self) -> dict[str, Tensor]:
        """An empty Fisher."""
        return {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}

    def backward(self, rows: Noised) -> Any:
        """A plain forward + backward pass."""
        return summed_gradient(self.model, self.parameters, rows)

    def squares(self, rows: Noised, total: Mapping[str, Tensor]) -> None:
        """A Fisher pass."""
        per_sample_backward(self.model, self.parameters, rows, lambda n, g: add_squares(total[n], g))

    def _rows(self) -> int:
        """A power of two that fits beside one gradient and one float32 Fisher, with a tenth of the memory to spare."""
        if not self.bench.cuda:
            return 4
        one, two = (peak(lambda n=n: self.backward(self.make(n)), self.bench.device) for n in (1, 2))  # type: ignore[misc]
        release(self.bench.device)
        room = 0.9 * torch.cuda.mem_get_info(self.bench.device)[0] - 4 * self.count() - (2 * one - two)
        return 2 ** int(math.log2(max(1, min(MOST_ROWS, room / max(1, two - one)))))

    def row(self, result: Row, rows: int, flops: float, needed: int) -> Row:
        """A measured pass with rates and memory."""
        rates = share(self.bench, result["median"], flops * rows, 0.0, "bfloat16")
        del rates["gb_per_s"], rates["share_of_copy"]
        return {
            **result,
            "rows": rows,
            "seconds_a_row": result["median"] / rows,
            **rates,
            "peak_bytes": needed,
        }


def work_of(bench: Bench) -> Work:
    """The model, built when it is asked for first."""
    if "work" not in bench.state:
        bench.state["work"] = Work(bench)
    work: Work = bench.state["work"]
    return work


def finish(bench: Bench) -> None:
    """Give the model's memory back."""
    bench.state.pop("work", None)
    release(bench.device)
