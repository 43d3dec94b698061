"""What attribution costs, counted: seconds of a GPU and gigabytes, from a card's two ceilings and the model's shape.

    python bench/cost_model.py --tracks 115000 --draws 16 --queries 1 --card h100
    python bench/cost_model.py --floor       what single pieces of work take
    python bench/cost_model.py --paper       the paper's figures beside the model's
    python bench/cost_model.py --checks      predicted beside measured on a CPU (bench/results)
    python bench/cost_model.py --plan        past one machine: 5 million windows, 100 million tracks

Nothing here was measured on a GPU. A time is given twice: as if arithmetic and traffic hid each other perfectly (the larger of the two:
nothing is faster) and as if they never overlapped (their sum). ``--share`` is the part of the card's matrix rate that is reached.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from gpu_model import Size  # noqa: E402 - needs the path
from gpu_report import DATASHEETS  # noqa: E402

KEPT, TRANSIENT = 27, 12
"""Tensors of a token's width: written by a layer of the DiT, and so kept for its backward pass; alive beside them at its peak.

Three norms 3, to_qkv 3, attention 1 + 1, to_q 1, to_out 1 + 1, ff.ff.0.proj 8, its gate and product 4, ff.ff.2 1, three sums 3; at the peak
the gradients of the proj (8) and of the product (4)."""
FORWARD_ALIVE = 18  # of them, alive at once where nothing is kept: proj 8, gate 4, product 4, the layer's input and its norm
LINEARS, SIDES = 7, 24  # weights of a layer; sum of their inputs and outputs in units of the width
WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class Card:
    """A GPU: dense bfloat16 FLOP/s and bytes/s of its memory, and where they are from."""

    name: str
    matrix: float
    memory: float
    source: str


CARDS = {
    "h100": Card("H100", 1e12 * DATASHEETS["H100"]["matrix"], 1e12 * DATASHEETS["H100"]["copy"], "datasheet"),
    "h200": Card("H200", 1e12 * DATASHEETS["H200"]["matrix"], 1e12 * DATASHEETS["H200"]["copy"], "datasheet"),
    # Measured on a card before this project's first run on one: no JSON under bench/results holds it.
    "h200-cube": Card("H200", 788e12, 1e12 * DATASHEETS["H200"]["copy"], "8192-cube product; memory: datasheet"),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """FLOP and bytes through the card's memory; ``held`` bytes on the card at the peak, ``disk`` bytes on disk."""

    flop: float = 0.0
    traffic: float = 0.0
    held: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flop + other.flop, self.traffic + other.traffic, max(self.held, other.held), self.disk + other.disk
        )  # fmt: skip

    def __mul__(self, times: float) -> Work:
        return replace(self, flop=self.flop * times, traffic=self.traffic * times)

    def seconds(self, card: Card, share: float = 1.0) -> tuple[float, float]:
        """Least (arithmetic and traffic hide each other) and without any overlap."""
        arithmetic, traffic = self.flop / (card.matrix * share), self.traffic / card.memory
        return max(arithmetic, traffic), arithmetic + traffic


@dataclass(frozen=True)
class Model:
    """A DiT of :class:`gpu_model.Size` and how it is run: rows a pass, bytes of a number."""

    size: Size
    rows: int = 4
    number: int = 2

    @property
    def group(self) -> int:
        """Parameters of the layers ("transformer"), without biases and gains."""
        s = self.size
        return s.depth * (18 * s.width**2 + 2 * s.context_width**2)

    @property
    def parameters(self) -> int:
        """All of them, without biases and gains."""
        s = self.size
        once = 2 * s.context_width**2 + s.timing_width * s.width + 2 * s.width**2 + 256 * s.width
        return self.group + once + 2 * s.channels * (s.width + s.channels)

    @property
    def layer_tokens(self) -> int:
        """Bytes of one tensor of a row's width."""
        return (self.size.frames + 1) * self.size.width * self.number

    def forward(self) -> Work:
        """One row. FLOP: ``Size.forward_flops``. Traffic: every kept tensor written and read, the weights read once a pass."""
        traffic = 2 * KEPT * self.size.depth * self.layer_tokens + self.parameters * self.number / self.rows
        held = self.parameters * self.number + self.rows * FORWARD_ALIVE * self.layer_tokens
        return Work(self.size.forward_flops(), traffic, held)

    def backward(self) -> Work:
        """One row forward and backward: three times the forward pass (two products for each of its own)."""
        held = self.parameters * self.number
        held += self.rows * (KEPT * self.size.depth + TRANSIENT) * self.layer_tokens
        return replace(self.forward() * 3, held=held)

    def weight_products(self) -> float:
        """FLOP of the gradients of a row's weights: those of the forward pass without its attention."""
        s, tokens = self.size, self.size.frames + 1
        attention = s.depth * 2 * (2 * tokens * tokens * s.width + 2 * tokens * s.context * s.width)
        return s.forward_flops() - attention

    def projected(self, rank: int) -> Work:
        """One row's projected gradient: no weight gradients, inputs and output gradients projected to ``rank`` instead."""
        s, whole = self.size, self.backward()
        tokens = s.frames + 1
        more = 2 * tokens * s.depth * (rank * SIDES * s.width + LINEARS * rank**2)
        return replace(whole, flop=whole.flop - self.weight_products() + more)

    # -- methods ------------------------------------------------------------------------------------

    def fisher(self, tracks: float, draws: float) -> Work:
        """``N T`` rows forward and backward; the squared gradients are added to a float32 Fisher once a pass."""
        row = self.backward()
        row = replace(
            row, traffic=row.traffic + 2 * WIDE * self.group / self.rows, held=row.held + WIDE * self.group
        )
        return replace(row * (tracks * draws), disk=WIDE * self.group)

    def update(self, queries: float, draws: float, steps: int = 1) -> Work:
        """``K steps T`` rows forward and backward, and ``g / (F + damping)`` once a step: gradient, Fisher and weights."""
        row = self.backward()
        once = Work(traffic=4 * WIDE * self.group, held=row.held + 2 * WIDE * self.group)
        each = replace(row, held=0.0) * (draws * steps) + once * steps
        return replace(each * queries, disk=queries * self.group * self.number)

    def unlearning(self, tracks: float, draws: float, queries: float, unit: int = 16) -> Work:
        """``N T (1 + K)`` rows forward; every unit of tracks exchanges the weights for each of K updates (paged)."""
        row = self.forward()
        work = row * (tracks * draws * (1 + queries))
        swaps = tracks / unit * queries * 3 * self.group * self.number
        return replace(work, traffic=work.traffic + swaps, held=row.held + self.group * self.number)

    def influence(self, tracks: float, draws: float, queries: float) -> Work:
        """``N T`` rows forward and backward, whatever K; every pass multiplies with K updates (2 FLOP a number and row)."""
        row = self.backward()
        more = Work(2 * self.group * queries, queries * self.group * self.number / self.rows)
        held = row.held + queries * self.group * self.number
        return replace((row + more) * (tracks * draws), held=held)

    def index(self, tracks: float, draws: float, rank: int = 16, width: int = 1024, number: int = 2) -> Work:
        """``N T`` rows forward and backward without weight gradients; the rows of the index, and the units that they are made of."""
        features = self.size.depth * LINEARS * rank**2
        disk = tracks * (width * number + features * WIDE)
        return replace(self.projected(rank) * (tracks * draws), disk=disk)

    def race(self, tracks: float, draws: float, queries: float, share: float, first: int = 4) -> Work:
        """At most: the first round for all, theta_0 shared; then ``share T - first`` draws of a track, theta_0 for each query again."""
        rest = max(share * draws - first, 0.0) * tracks * 2 * queries
        row = self.forward()
        return replace(row * (tracks * first * (1 + queries) + rest), held=row.held + self.group * self.number)  # fmt: skip


def solve_flop(tracks: float, numbers: float) -> float:
    """Float64 FLOP of an index' solve on a CPU: ``Phi^T Phi``, its eigenvectors (about 9 n^3, Golub and Van Loan), the rows."""
    return 2 * tracks * numbers**2 + 9 * numbers**3 + 2 * tracks * numbers * 1024


def main() -> int:
    """Print a table."""
    import cost_tables as tables

    args = _arguments()
    model = Model(replace(Size(), frames=args.frames), args.rows)
    for name in ("floor", "paper", "checks", "plan"):
        if getattr(args, name):
            print(getattr(tables, name)())
            return 0
    print(tables.methods(model, args))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tracks", type=float, default=115_000, help="N (115000)")
    parser.add_argument("--draws", type=int, default=16, help="T a track, of scores (16)")
    parser.add_argument("--queries", type=int, default=1, help="K (1)")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--share", type=float, default=1.0, help="of the card's matrix rate that is reached (1: the floor)")  # fmt: skip
    parser.add_argument("--frames", type=int, default=2584, help="latent frames (2584)")
    parser.add_argument("--rows", type=int, default=4, help="rows a pass (4)")
    parser.add_argument("--fisher-draws", type=int, default=4, help="a track (4)")
    parser.add_argument("--update-draws", type=int, default=2048, help="a query (2048, the paper's)")
    parser.add_argument("--index-draws", type=int, default=8, help="a track (8)")
    parser.add_argument("--race-share", type=float, default=0.05, help="of the 256 draws of exhaustive scoring (0.05)")  # fmt: skip
    for name in ("floor", "paper", "checks", "plan"):
        parser.add_argument(f"--{name}", action="store_true", help="see above")
    args = parser.parse_args()
    if min(args.tracks, args.draws, args.queries, args.rows, args.frames) < 1 or not 0 < args.share <= 1:
        parser.error("numbers have to be at least 1, and --share between 0 and 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
