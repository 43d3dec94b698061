"""Every kernel against float64, on the same already rounded inputs, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from gpu_layers import CHANNELS, MODEL, RANK, TOKENS, Layer, layers
from gpu_tools import DTYPES, Bench, exact, interpreter, products, relative
from torch import Tensor

from attr_engine import kernels
from attr_engine.kernels import launch, table

squares: Any = import_module("attr_engine.kernels.squared_gradient")
dots: Any = import_module("attr_engine.kernels.query_dot")

BOUND = 5e-6  # relative RMS error of everything that adds products in float32
FLOAT32 = 2e-7  # below this two float32 results differ by their rounding alone
QUERIES = 3
Call = Callable[[], Tensor]


def run(bench: Bench) -> dict[str, Any]:
    """All comparisons; where the time ends the rest is skipped, and what was not compared is not timed."""
    kinds = ["gpu"] if bench.cuda else ["plain"]
    if bench.tiny and not bench.cuda:
        kinds = ["interpreter", "plain"] if launch.have_triton() else kinds
        if not launch.have_triton():
            bench.skip("Triton's interpreter", "Triton is not installed")
    for kind in kinds:
        with interpreter(kind == "interpreter"):
            for inner in ("channels", "frames"):
                check_rows(bench, kind, inner)
            check_steps(bench, kind)
            for layer in layers(bench.tiny, others=True):
                if bench.budget.left() < 0:
                    bench.skip(f"checks of {layer.name}", "the time of this part is over")
                else:
                    check_layer(bench, kind, layer)
    green = sum(check["green"] for check in bench.checks)
    return {"checks": len(bench.checks), "green": green, "kinds": kinds}


# -- K1, K3, K5: products over tokens -------------------------------------------------------------


def check_layer(bench: Bench, kind: str, layer: Layer) -> None:
    """Squared gradients, directions and projections of one weight, in every dtype."""
    samples = 4 if bench.cuda else 2
    whole = [bench.normal(samples, layer.tokens, n) for n in (layer.out, layer.columns)]
    first: Tensor | None = None
    for name in ("float32", "bfloat16", "float16"):
        g, a = (x.to(DTYPES[name]) for x in whole)
        gradients = exact(g, a)
        wanted = gradients.square().sum(0)
        first = wanted if first is None else first
        rounding = None if name == "float32" else relative(wanted, first)
        _check_squares(bench, kind, layer, name, (g, a), wanted, rounding)
        _check_dots(bench, kind, layer, name, (g, a), gradients)
        _check_projections(bench, kind, layer, name, (g, a), gradients)


def _row(g: Tensor, a: Tensor) -> table.Row:
    row = table.choose(launch.architecture(g.device), g.shape[2], a.shape[2], g.dtype, g.shape[1])
    return replace(row, use="triton")


def _twice(call: Call) -> tuple[Tensor, bool]:
    """A result, and whether the same call gives the same bits again."""
    out = call()
    return out, bool(torch.equal(out, call()))


def _check_squares(
    bench: Bench, kind: str, layer: Layer, dtype: str, inputs: tuple[Tensor, Tensor], wanted: Tensor,
    rounding: float | None,
) -> None:  # fmt: skip
    g, a = inputs
    baseline = relative(products(g, a).square().sum(0), wanted)

    def into(way: Callable[[Tensor], Any]) -> Call:
        def call() -> Tensor:
            fisher = torch.zeros(wanted.shape, device=g.device)
            way(fisher)
            return fisher

        return call

    ways: dict[str, Call] = {"operator": into(lambda fisher: kernels.squared_gradient_(fisher, g, a))}
    if layer.tokens > 1 and (kind == "interpreter" or (bench.cuda and launch.supported(g.device))):
        row = table.INTERPRETED if kind == "interpreter" else _row(g, a)
        ways["triton"] = into(lambda fisher: squares.run_triton(fisher, g, a, None, row))
        ways["triton, one part"] = into(lambda fisher: squares.run_triton(fisher, g, a, None, row, parts=1))
    if bench.cuda:
        ways["bmm in chunks"] = into(
            lambda fisher: squares.run_products(fisher, g, a, None, squares.GPU_SCRATCH)
        )
    for way, call in ways.items():
        out, same = _twice(call)
        off = relative(out, wanted)
        green = off < BOUND and off <= max(2 * baseline, FLOAT32) and same
        bench.check(
            "K1", f"{kind}: {way}", dtype, layer.shape, green,
            error=off, bound=BOUND, bmm_and_square=baseline, same_bits=same, rounding_of_inputs=rounding,
        )  # fmt: skip


def _check_dots(
    bench: Bench, kind: str, layer: Layer, dtype: str, inputs: tuple[Tensor, Tensor], gradients: Tensor
) -> None:
    g, a = inputs
    # Not orthogonal to the gradients: a score of nearly 0 has no relative error to speak of.
    along = (gradients[0] / gradients[0].square().mean().sqrt()).float()
    deltas = bench.normal(QUERIES, *along.shape) / 2 + along
    wanted = torch.einsum("boi,koi->bk", gradients, deltas.double())
    ways: dict[str, Call] = {"operator": lambda: kernels.query_dot(g, a, deltas)}
    if bench.cuda and launch.supported(g.device) and layer.tokens > 1:
        row = _row(g, a)
        ways["triton"] = lambda: dots.run_triton(g, a, deltas, row)
    if bench.cuda:
        ways["bmm in chunks"] = lambda: _ieee(lambda: dots.run_products(g, a, deltas, dots.GPU_SCRATCH), g)
    rank = min(RANK, layer.tokens)
    factors = torch.arange(1, QUERIES + 1, device=g.device, dtype=g.dtype)[:, None, None]
    u, v = factors * g[0, :rank].mT, a[0, :rank].mT.expand(QUERIES, -1, -1)
    low = torch.einsum("boi,kor,kir->bk", gradients, u.double(), v.double())
    for way, call, want in [*((n, c, wanted) for n, c in ways.items()),
                            ("low rank", lambda: kernels.query_dot_low_rank(g, a, u, v), low)]:  # fmt: skip
        out, same = _twice(call)
        off = relative(out, want)
        bench.check("K3", f"{kind}: {way}", dtype, layer.shape, off < BOUND and same,
                    error=off, bound=BOUND, same_bits=same)  # fmt: skip


def _ieee(call: Call, like: Tensor) -> Tensor:
    with launch.ieee(like.device):
        return call()


def _check_projections(
    bench: Bench, kind: str, layer: Layer, dtype: str, inputs: tuple[Tensor, Tensor], gradients: Tensor
) -> None:
    g, a = inputs
    rank = min(RANK, layer.out, layer.columns)
    p, q = (kernels.projection("rademacher", rank, n, bench.seed, bench.device, g.dtype)
            for n in (layer.out, layer.columns))  # fmt: skip
    wanted = p.double() @ gradients @ q.double().T
    out, same = _twice(lambda: kernels.project(g, a, p, q))
    off = relative(out, wanted)
    bench.check("K5", f"{kind}: operator", dtype, layer.shape, off < BOUND and same,
                error=off, bound=BOUND, same_bits=same)  # fmt: skip


# -- K2: noise, mixing, loss ----------------------------------------------------------------------


def philox_normals(key: int, channels: int, frames: int) -> np.ndarray:
    """The noise of a draw from its definition: float64 ``[C, F]`` of the counters ``f * C + c``."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = np.arange(channels * frames, dtype=np.uint64)
    c1 = c2 = c3 = np.zeros_like(c0)
    k0, k1 = np.uint64(key) & low, np.uint64(key) >> half
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    first, second = (w.astype(np.uint32).view(np.int32).astype(np.int64) for w in (c0, c1))
    u, v = (np.where(w < 0, -w - 1, w) * 4.6566127342e-10 for w in (first, second))
    flat = np.sqrt(-2.0 * np.log(np.maximum(u, 1e-7))) * np.cos(2.0 * np.pi * v)
    return flat.reshape(frames, channels).T


def _ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many float32 numbers lie between two."""
    ordered = [torch.where(i < 0, -(i & 0x7FFFFFFF), i) for i in (x.view(torch.int32).long() for x in (a, b))]
    return (ordered[0] - ordered[1]).abs()


def check_rows(bench: Bench, kind: str, inner: str) -> None:
    """Noise, noised latents and loss of three rows; ``inner`` is the axis of stride 1."""
    rows, channels, frames = (3, 8, 37) if bench.tiny else (3, CHANNELS, TOKENS - 1)
    generator = np.random.default_rng(bench.seed)
    numbers = generator.integers(0, 2**64, rows, dtype=np.uint64)
    e64 = torch.from_numpy(np.stack([philox_normals(int(n), channels, frames) for n in numbers]))
    keys = torch.from_numpy(numbers.view(np.int64)).to(bench.device)
    t = torch.from_numpy(generator.random(rows)).to(bench.device)
    e = e64.float().double().to(bench.device)  # noise is rounded to float32 once, by definition
    if inner == "channels":
        ulps = _ulps(kernels.noise(keys, channels, frames).cpu(), e64.float())
        equal = float((ulps == 0).double().mean())
        # One element in 10^8 is rounded the other way, and of few elements one is more than 1 in 10^4.
        near = int((ulps != 0).sum()) <= max(1, 1e-4 * ulps.numel()) and int(ulps.max()) <= 2
        bench.check("K2", f"{kind}: noise", "float32", f"{rows}x{channels}x{frames}",
                    near, equal=equal, most_ulps=int(ulps.max()))  # fmt: skip
    alpha, sigma = (f(t * (math.pi / 2))[:, None, None] for f in (torch.cos, torch.sin))
    for name, dtype in DTYPES.items():
        x, prediction = (bench.normal(rows, frames, channels, dtype=dtype).mT for _ in range(2))
        if inner == "frames":
            x, prediction = x.contiguous(), prediction.contiguous()
        shape = f"{rows}x{channels}x{frames}, {inner} innermost"
        mixed = alpha * x.double() + sigma * e
        out, same = _twice(lambda x=x: kernels.noised(x, keys, t, "v"))  # type: ignore[misc]
        off, bound = relative(out, mixed), 1.01 * relative(mixed.to(dtype), mixed) + FLOAT32
        if kind == "interpreter" and name == "bfloat16":
            slack = 2**-22 * ((alpha * x.double()).abs() + (sigma * e).abs())  # of float32 arithmetic
            nearest = out.double().clamp(_cut_off(mixed - slack), _cut_off(mixed + slack))
            off, bound = relative(out, nearest), FLOAT32
        bench.check("K2", f"{kind}: noised", name, shape, off <= bound and same,
                    error=off, bound=bound, same_bits=same)  # fmt: skip
        _check_loss(bench, kind, name, shape, (prediction, x, keys, t), alpha * e - sigma * x.double())


def _cut_off(x: Tensor) -> Tensor:
    """Numbers as the interpreter makes bfloat16 of them: float32 without its last 16 bits, not rounded."""
    return (x.float().view(torch.int32) & ~0xFFFF).view(torch.float32).double()


def _check_loss(
    bench: Bench, kind: str, dtype: str, shape: str, rows: tuple[Tensor, Tensor, Tensor, Tensor], target: Tensor
) -> None:  # fmt: skip
    frames = target.shape[2]
    valid = torch.tensor([frames, 3, frames // 2], device=bench.device)
    counted = torch.arange(frames, device=bench.device) < valid[:, None]
    difference = (rows[0].double() - target) * counted[:, None]
    elements = (valid * target.shape[1])[:, None, None]
    wanted = (
        (difference.square() / elements).sum(dim=(1, 2)),
        difference.square().mean(dim=1),
        2 * difference / elements,
    )
    found = kernels.v_loss(*rows, counted, "v", per_frame=True)
    again = kernels.v_loss(*rows, counted, "v", per_frame=True)
    off = [relative(out, want) for out, want in zip(found, wanted, strict=True)]
    same = all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    bench.check("K2", f"{kind}: v_loss", dtype, shape, max(off) < 1e-6 and same, error=max(off), bound=1e-6,
                of_loss=off[0], of_frames=off[1], of_gradient=off[2], same_bits=same)  # fmt: skip


# -- K4: the damped step --------------------------------------------------------------------------


def check_steps(bench: Bench, kind: str) -> None:
    """One and several queries, gradients of every dtype."""
    layer = MODEL[3].small() if bench.tiny else MODEL[3]
    shape = (layer.out, layer.columns)
    for queries in (1, QUERIES):
        theta, fisher = bench.normal(queries, *shape), bench.normal(*shape).square()
        for name, dtype in DTYPES.items():
            gradient = bench.normal(queries, *shape, dtype=dtype)
            wanted = theta.double() + 0.3 * gradient.double() / (fisher.double() + 0.05)

            def call(theta: Tensor = theta, gradient: Tensor = gradient, fisher: Tensor = fisher) -> Tensor:
                return kernels.precondition_(theta.clone(), gradient, fisher, 0.05, 0.3)

            out, same = _twice(call)
            off = relative(out, wanted)
            bench.check("K4", f"{kind}: {queries} queries", name, f"{queries}x{shape[0]}x{shape[1]}",
                        off < 3e-7 and same, error=off, bound=3e-7, same_bits=same)  # fmt: skip
