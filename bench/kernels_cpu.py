"""What do the kernels' equals for a CPU cost, next to plain torch and to the limit of the same arithmetic or bytes?

    python bench/kernels_cpu.py             three weights of a DiT of width 512: about two minutes
    python bench/kernels_cpu.py --quick     small ones: does it run?

Everything is float32 and compared with float64 first. On a GPU: bench/gpu.py --only kernels. Limits: one product that multiplies as
often (K1, K3, K5), one copy of as many bytes (K2, K4).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import limits  # noqa: E402 - needs the path
import record  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from attr_engine import kernels  # noqa: E402

LIMIT = "limit"
NAIVE = "plain torch"
BELOW = 5e-6
SAMPLES, QUERIES, RANK = 4, 4, 64
# Weight [out, columns] and tokens: attention, feed-forward, conditioning of a DiT of width 512.
SHAPES = ((512, 512, 1025), (4096, 512, 257), (1024, 512, 79))
QUICK = ((48, 32, 17),)
Ways = dict[str, Callable[[], Tensor]]


def main() -> int:
    """Measure, write, print; 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--repeat", type=int, default=7, help="rounds in which everything runs once (7)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kernels-cpu.json")
    args = parser.parse_args()
    if min(args.threads, args.repeat) < 1:
        parser.error("--threads and --repeat must be at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started, rows = record.environment(), []
    for shape in QUICK if args.quick else SHAPES:
        for name, case in weight(*shape).items():
            rows += compared(f"{name}, {shape[0]}x{shape[1]}, T={shape[2]}", *case, args.repeat)
    channels, frames = (8, 37) if args.quick else (64, 2584)
    for name, case in latents(channels, frames).items():
        rows += compared(f"{name}, {SAMPLES}x{channels}x{frames}", *case, args.repeat)
    products = [(o, i, SAMPLES * t) for o, i, t in (QUICK if args.quick else SHAPES)]
    found = record.result(
        "kernels", (__doc__ or "").splitlines()[0], args.threads, rows, (NAIVE, LIMIT), started,
        settings={"samples": SAMPLES, "queries": QUERIES, "rank": RANK, "dtype": "float32", "repeat": args.repeat},
        limits=limits.measure(products, args.repeat),
    )  # fmt: skip
    return record.finish(found, args.out)


def compared(
    case: str, ways: Ways, wanted: Tensor, limit: Callable[[], object], repeat: int
) -> list[record.Row]:
    """Rows of one kernel (the first way), its peers and the limit; what is wrong is not timed."""
    kinds = ["ours", *["peer"] * (len(ways) - 1), "limit"]
    rows = [record.row(case, way, kind) for way, kind in zip((*ways, LIMIT), kinds, strict=True)]
    for entry in rows[:-1]:
        found = ways[entry["way"]]().double()
        record.checked(entry, float((found - wanted).norm() / wanted.norm()), BELOW)
    record.take_turns(rows, {**ways, LIMIT: limit}, repeat)
    return rows


def product(flops: float, inner: int) -> Callable[[], object]:
    """A square product of two matrices that takes as many multiplications and additions."""
    side = max(1, round((flops / (2 * inner)) ** 0.5))
    left, right, out = torch.randn(side, inner), torch.randn(inner, side), torch.empty(side, side)
    return lambda: torch.mm(left, right, out=out)


def copy(moved: float) -> Callable[[], object]:
    """A copy that reads and writes as many bytes."""
    source = torch.ones(max(1, int(moved / 8)))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def weight(out: int, columns: int, tokens: int) -> dict[str, tuple[Ways, Tensor, Callable[[], object]]]:
    """K1, K3, K4, K5 of one weight: ways, what float64 says, limit."""
    g, a = torch.randn(SAMPLES, tokens, out), torch.randn(SAMPLES, tokens, columns)
    exact = torch.bmm(g.double().mT, a.double())  # [B, O, I]
    # Not orthogonal to the gradients: a product of nearly 0 has no relative error to speak of.
    deltas = torch.randn(QUERIES, out, columns) / 2 + (exact[0] / exact[0].square().mean().sqrt()).float()
    rank = min(RANK, out, columns)
    p, q = (kernels.projection("rademacher", rank, n, 0) for n in (out, columns))
    fisher, gradient = torch.rand(out, columns) + 0.5, torch.randn(QUERIES, out, columns)
    squares: Ways = {
        "squared_gradient_": lambda: kernels.squared_gradient_(torch.zeros(out, columns), g, a),
        NAIVE: lambda: torch.bmm(g.mT, a).square_().sum(0),
        "loop": lambda: torch.stack([(x.T @ y).square_() for x, y in zip(g, a, strict=True)]).sum(0),
    }
    dots: Ways = {
        "query_dot": lambda: kernels.query_dot(g, a, deltas),
        NAIVE: lambda: torch.bmm(g.mT, a).flatten(1) @ deltas.flatten(1).T,
    }
    projections: Ways = {
        "project": lambda: kernels.project(g, a, p, q),
        NAIVE: lambda: p @ torch.bmm(g.mT, a) @ q.T,
    }
    steps: Ways = {
        "precondition_": lambda: kernels.precondition_(
            torch.zeros_like(gradient), gradient, fisher, 0.05, 1e-3
        ),
        NAIVE: lambda: torch.zeros_like(gradient).addcdiv_(gradient, fisher + 0.05, value=1e-3),
    }
    full = 2.0 * SAMPLES * tokens * out * columns
    narrow = 2.0 * SAMPLES * tokens * rank * (out + columns + rank)
    return {
        "K1 squared_gradient_": (squares, exact.square().sum(0), product(full, SAMPLES * tokens)),
        "K3 query_dot": (dots, torch.einsum("boi,koi->bk", exact, deltas.double()), product(full, SAMPLES * tokens)),
        "K4 precondition_": (steps, 1e-3 * gradient.double() / (fisher.double() + 0.05),
                             copy(4.0 * (2 * gradient.numel() + fisher.numel()))),
        "K5 project": (projections, p.double() @ exact @ q.double().T, product(narrow, rank)),
    }  # fmt: skip


def latents(channels: int, frames: int) -> dict[str, tuple[Ways, Tensor, Callable[[], object]]]:
    """K2: noising, and the loss of a prediction. The noise itself is taken from the kernels: its bits have tests of their own."""
    x, prediction = torch.randn(SAMPLES, channels, frames), torch.randn(SAMPLES, channels, frames)
    keys, t = torch.randint(-(2**62), 2**62, (SAMPLES,)), torch.rand(SAMPLES, dtype=torch.float64)
    counted = torch.ones(SAMPLES, frames, dtype=torch.bool)
    e = kernels.noise(keys, channels, frames)
    alpha, sigma = (f(0.5 * torch.pi * t)[:, None, None] for f in (torch.cos, torch.sin))
    noised = alpha * x.double() + sigma * e.double()
    target = alpha * e.double() - sigma * x.double()
    size = 4.0 * x.numel()

    def mixed() -> Tensor:
        return alpha.float() * x + sigma.float() * kernels.noise(keys, channels, frames)

    def loss() -> Tensor:
        wanted = alpha.float() * kernels.noise(keys, channels, frames) - sigma.float() * x
        return (prediction - wanted).square().mean(dim=(1, 2))

    noising: Ways = {"noised": lambda: kernels.noised(x, keys, t, "v"), NAIVE: mixed}
    losses: Ways = {
        "v_loss": lambda: kernels.v_loss(prediction, x, keys, t, counted, "v", with_gradient=False)[0],
        NAIVE: loss,
    }
    return {
        "K2 noised": (noising, noised, copy(2 * size)),
        "K2 v_loss": (losses, (prediction.double() - target).square().mean(dim=(1, 2)), copy(2 * size)),
    }


if __name__ == "__main__":
    sys.exit(main())
