"""Each kernel at the model's shapes beside what there would be without it; the tiles that are best for each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from gpu_card import share
from gpu_layers import CHANNELS, CONTEXT, MODEL, RANK, TOKENS, Layer, layers
from gpu_tools import (
    DTYPES,
    TABLE_SOURCE,
    Bench,
    Row,
    alternate,
    exact,
    interpreter,
    peak,
    products,
    relative,
    release,
)
from stream_report import plain
from torch import Tensor

from attr_engine import kernels
from attr_engine.kernels import launch, table

squares: Any = import_module("attr_engine.kernels.squared_gradient")
QUERIES = 4
BOUND = 5e-6
GAIN = 0.02  # other tiles replace the counted ones where they are faster by more than this
Way = Callable[[], Any]

# Beside the rows of kernels/table.py: what the compile gate lets pass on sm_90 for K1 and for K3, which takes K1's tiles.
CANDIDATES = {
    2: ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 128, 128, 8, 2), (64, 128, 64, 8, 4), (128, 64, 64, 8, 4),
        (64, 64, 64, 8, 4)),
    4: ((64, 64, 16, 8, 3), (64, 64, 32, 8, 2), (128, 64, 16, 8, 2)),
}  # fmt: skip


def run(bench: Bench) -> dict[str, Any]:
    """Time and peak memory of K1 to K5; a kernel that is not known to be right is skipped."""
    rows: list[Row] = []
    with interpreter(False):
        for dtype in ("bfloat16", "float32", "float16"):
            for layer in layers(bench.tiny):
                if bench.budget.left() < 0:
                    bench.skip(f"kernels at {layer.name}, {dtype}", "the time of this part is over")
                    continue
                rows += _layer(bench, layer, dtype)
            rows += _latents(bench, dtype) if bench.budget.left() > 0 else []
            release(bench.device)
        rows += _step(bench)
    return {"samples": _samples(bench), "queries": QUERIES, "rows": rows}


def _samples(bench: Bench) -> int:
    return 2 if bench.tiny else 8


def _compared(
    bench: Bench, kernel: str, what: str, dtype: str, ways: Mapping[str, Way], flops: float, moved: float,
    checked: str = "",
) -> list[Row]:  # fmt: skip
    """Rows of one kernel beside its peers; ``ours`` is the first way, ``checked`` what has to be compared."""
    if not bench.green(kernel, dtype, checked):
        bench.skip(f"{kernel} at {what}, {dtype}", "its comparison with float64 is red or was not made")
        return []
    found: list[Row] = []
    memory = {name: peak(way, bench.device) for name, way in ways.items()}
    ours = next(iter(ways))
    for name, result in alternate(ways, bench, 10, 0.5).items():
        rates = share(bench, result["median"], flops, moved, dtype)
        found.append({"kernel": kernel, "what": what, "dtype": dtype, "way": name, "ours": name == ours,
                      **result, **rates, "peak_bytes": memory[name]})  # fmt: skip
    return found


def _layer(bench: Bench, layer: Layer, dtype: str) -> list[Row]:
    """K1, K3 and K5 of one weight. The peers give 16-bit gradients where the model is one: that is what autograd does."""
    b = _samples(bench)
    g, a = (bench.normal(b, layer.tokens, n, dtype=DTYPES[dtype]) for n in (layer.out, layer.columns))
    fisher = torch.zeros(layer.out, layer.columns, device=bench.device)
    deltas = bench.normal(QUERIES, layer.out, layer.columns)
    rank = min(RANK, layer.out, layer.columns)
    p, q = (kernels.projection("rademacher", rank, n, bench.seed, bench.device, g.dtype)
            for n in (layer.out, layer.columns))  # fmt: skip
    u, v = (bench.normal(QUERIES, n, rank, dtype=g.dtype) for n in (layer.out, layer.columns))
    what, size = f"{layer.name} {layer.shape}", g.element_size()
    read = b * layer.tokens * (layer.out + layer.columns) * size
    weight = layer.out * layer.columns
    full = 2.0 * b * layer.tokens * weight
    narrow = 2.0 * b * layer.tokens * rank * (layer.out + layer.columns + rank)
    one = torch.func.vmap(lambda x, y: x.T @ y)
    run = partial(_compared, bench, what=what, dtype=dtype, checked=layer.shape)
    dots: dict[str, Way] = {
        "query_dot": lambda: kernels.query_dot(g, a, deltas),
        "bmm, then product": lambda: products(g, a).flatten(1) @ deltas.flatten(1).T,
        "loop": lambda: [(g[i].T @ a[i]).float().flatten() @ deltas.flatten(1).T for i in range(b)],
    }
    low: dict[str, Way] = {f"low rank {rank}": lambda: kernels.query_dot_low_rank(g, a, u, v)}
    ways: dict[str, Way] = {
        "squared_gradient_": lambda: kernels.squared_gradient_(fisher, g, a),
        "bmm + square": lambda: fisher.add_(products(g, a).square_().sum(0)),
        "vmap": lambda: fisher.add_(one(g, a).float().square().sum(0)),
        "loop": lambda: [_add(fisher, g[i].T @ a[i]) for i in range(b)],
    }
    projections: dict[str, Way] = {
        "project": lambda: kernels.project(g, a, p, q),
        "bmm, then projections": lambda: p.float() @ products(g, a) @ q.float().T,
    }
    with launch.ieee(bench.device):  # the peers' float32 products too
        return [
            *run("K1", ways=ways, flops=full, moved=read + 8 * weight),
            *run("K3", ways=dots, flops=full, moved=read + 4 * QUERIES * weight),
            *run("K3", ways=low, flops=2.0 * QUERIES * b * layer.tokens * rank * (layer.out + layer.columns),
                 moved=read),
            *run("K5", ways=projections, flops=narrow, moved=read),
        ]  # fmt: skip


def _add(fisher: Tensor, gradient: Tensor) -> Tensor:
    wide = gradient.float()
    return fisher.addcmul_(wide, wide)


def _latents(bench: Bench, dtype: str) -> list[Row]:
    """K2: noise, mixing and loss of many rows, bytes read and written once."""
    rows, channels, frames = (3, 8, 37) if bench.tiny else (64, CHANNELS, TOKENS - 1)
    x, prediction = (bench.normal(rows, frames, channels, dtype=DTYPES[dtype]).mT for _ in range(2))
    keys = torch.randint(-(2**62), 2**62, (rows,), device=bench.device, generator=bench.random)
    t = torch.rand(rows, device=bench.device, generator=bench.random).double()
    counted = torch.ones(rows, frames, dtype=torch.bool, device=bench.device)
    size = x.numel() * x.element_size()

    def plain() -> Any:
        e = kernels.noise(keys, channels, frames)
        return kernels.per_draw_loss(prediction, kernels.v_target(x, e, t, "v"), counted)

    noising: dict[str, Way] = {
        "noised": lambda: kernels.noised(x, keys, t, "v"),
        "noise, then mix": lambda: kernels.mix(x, kernels.noise(keys, channels, frames), t, "v"),
    }
    loss: dict[str, Way] = {
        "v_loss": lambda: kernels.v_loss(prediction, x, keys, t, counted, "v"),
        "v_loss, no gradient": lambda: kernels.v_loss(prediction, x, keys, t, counted, "v", with_gradient=False),
        "noise, target, loss": plain,
    }  # fmt: skip
    what = f"{rows}x{channels}x{frames}"
    return [
        *_compared(bench, "K2", f"noised {what}", dtype, noising, 0.0, 2.0 * size),
        *_compared(bench, "K2", f"v_loss {what}", dtype, loss, 0.0, 2.0 * size + 4 * x.numel()),
    ]


def _step(bench: Bench) -> list[Row]:
    """K4: the damped step of one and several queries on the largest weight, gradients in bfloat16."""
    layer = MODEL[3].small() if bench.tiny else MODEL[3]
    shape, found = (layer.out, layer.columns), []
    fisher = bench.normal(*shape).square()
    for queries in (1, QUERIES):
        theta, gradient = bench.normal(queries, *shape), bench.normal(queries, *shape, dtype=torch.bfloat16)

        def peer(theta: Tensor = theta, gradient: Tensor = gradient) -> None:
            for k in range(len(theta)):
                theta[k].addcdiv_(gradient[k].float(), fisher + 0.05, value=1e-9)

        def ours(theta: Tensor = theta, gradient: Tensor = gradient) -> None:
            kernels.precondition_(theta, gradient, fisher, 0.05, 1e-9)

        ways: dict[str, Way] = {"precondition_": ours, "addcdiv_": peer}
        moved = fisher.numel() * (4.0 + queries * (4 + 4 + 2))
        found += _compared(bench, "K4", f"{queries}x{shape[0]}x{shape[1]}", "bfloat16", ways, 0.0, moved)
    return found


# -- which tiles ----------------------------------------------------------------------------------


def tiles(bench: Bench) -> dict[str, Any]:
    """For every weight, dtype and class of tokens: the candidates of K1, checked and timed, and the row for the table."""
    found: list[Row] = []
    arch = launch.architecture(bench.device)
    with interpreter(bench.tiny and launch.have_triton()):
        for dtype in ("bfloat16", "float16", "float32"):
            for layer in MODEL:
                for kind, tokens in (("sequence", TOKENS), ("context", CONTEXT)):
                    shown = f"{layer.name}, {dtype}, {kind}"
                    if bench.budget.left() < 0:
                        bench.skip(f"tiles of {shown}", "the time of this part is over")
                        continue
                    here = replace(layer, tokens=tokens)
                    found.append(_best(bench, here.small() if bench.tiny else here, dtype, kind, arch))
                    found[-1]["layer"] = layer.name
            release(bench.device)
    lines = [entry["line"] for entry in found if entry["line"]]
    return {"source": TABLE_SOURCE, "shapes": found, "lines": lines}


def candidates(dtype: torch.dtype, arch: str, kind: str) -> list[table.Row]:
    """The counted row first, then the other tiles, then products of a few samples."""
    size = dtype.itemsize
    counted = table.DEFAULTS[arch, str(8 * size), kind]
    others = [row for key, row in table.DEFAULTS.items() if key[1] == str(8 * size)]
    others += [table.STRIDED, table.QUERY_POINTER] if size == 2 else [table.QUERY_FLOAT_STRIDED]
    others += [table.Row("triton", *numbers) for numbers in CANDIDATES[size]]
    triton = dict.fromkeys(replace(row, use="triton") for row in (counted, *others))
    return [*triton, replace(counted, use="bmm")]


def _best(bench: Bench, layer: Layer, dtype: str, kind: str, arch: str) -> Row:
    g, a = (bench.normal(_samples(bench), layer.tokens, n, dtype=DTYPES[dtype])
            for n in (layer.out, layer.columns))  # fmt: skip
    fisher = torch.zeros(layer.out, layer.columns, device=bench.device)
    tried = _tried(bench, layer, (g, a), fisher, kind, arch)
    ways = {
        _name(row): partial(_add_squares, fisher, g, a, row) for row, entry in tried.items() if entry["green"]
    }
    timed = alternate(ways, bench, 7, 0.25) if ways else {}
    for row, entry in tried.items():
        entry.update(timed.get(_name(row), {}))
    counted = table.choose(arch, layer.out, layer.columns, g.dtype, layer.tokens)
    best = _choice({row: timed[_name(row)]["median"] for row in tried if _name(row) in timed}, counted)
    out: Row = {"shape": layer.shape, "dtype": dtype, "class": kind, "counted": _numbers(counted), "best": None,
                "line": "", "candidates": list(tried.values())}  # fmt: skip
    if best is not None:
        flops = 2.0 * g.shape[0] * layer.tokens * layer.out * layer.columns
        rates = share(bench, timed[_name(best)]["median"], flops, 0.0, dtype)
        out["share_of_matrix_rate"] = rates["share_of_matrix_rate"]
        out.update(best=_numbers(best), line=_line(best, layer, dtype, kind, arch))
    return out


def _tried(
    bench: Bench, layer: Layer, inputs: tuple[Tensor, Tensor], fisher: Tensor, kind: str, arch: str
) -> dict[table.Row, Row]:
    """Every candidate with its error over two samples; what is wrong, or does not run on this card, is not green."""
    g, a = (x[:2] for x in inputs)
    wanted = exact(g, a).square().sum(0)
    able = launch.supported(bench.device) if bench.cuda else launch.interpreting()
    rows = candidates(g.dtype, arch, kind)
    tried: dict[table.Row, Row] = {}
    for row in (rows[0], rows[-1]) if bench.tiny else rows:  # the interpreter is slow
        entry = tried[row] = {"row": _numbers(row), "green": False}
        if row.use == "triton" and not able:
            entry["reason"] = "no GPU that Triton's kernels run on"
            continue
        fisher.zero_()
        try:
            _add_squares(fisher, g, a, row)
            entry["error"] = relative(fisher, wanted)
        except Exception as error:  # shared memory or registers that this card does not have
            entry["reason"] = plain(f"{type(error).__name__}: {error}")
            continue
        entry["green"] = entry["error"] < BOUND
        dtype = str(g.dtype).removeprefix("torch.")
        bench.check(
            "tiles", _name(row), dtype, layer.shape, entry["green"], error=entry["error"], bound=BOUND
        )
    return tried


def _add_squares(fisher: Tensor, g: Tensor, a: Tensor, row: table.Row) -> None:
    if row.use == "triton":
        squares.run_triton(fisher, g, a, None, row)
        return
    with launch.ieee(g.device):
        squares.run_products(fisher, g, a, None, squares.GPU_SCRATCH)


def _numbers(row: table.Row) -> list[Any]:
    return [row.use, row.block_out, row.block_in, row.block_tokens, row.warps, row.stages]


def _name(row: table.Row) -> str:
    return " ".join(map(str, _numbers(row)))


def _choice(median: Mapping[table.Row, float], counted: table.Row) -> table.Row | None:
    """The fastest; the counted row where nothing is faster by more than what a repetition differs by."""
    if not median:
        return None
    best = min(median, key=median.__getitem__)
    same = next((row for row in median if _numbers(row) == _numbers(counted)), None)
    if same is not None and median[same] <= (1 + GAIN) * median[best]:
        return same
    return best


def _line(best: table.Row, layer: Layer, dtype: str, kind: str, arch: str) -> str:
    numbers = ", ".join(repr(n) for n in _numbers(best)).replace("'", '"')
    return f'("{arch}", {layer.out}, {layer.columns}, "{dtype}", "{kind}"): Row({numbers}, "{TABLE_SOURCE}"),'
