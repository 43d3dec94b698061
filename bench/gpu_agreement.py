"""What the passes rest on: the model's size and arithmetic, and the Fisher and inner products of a small one in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_model import MILLIONS, TINY, Dit, Size, transformer
from gpu_tools import Bench, relative
from gpu_work import PLAN
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attr_engine.diffusion import noised_rows
from attr_engine.influence import row_dots
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.models.stable_audio import cast
from attr_engine.persample import batch_squares, loop_squares, summed_gradient


def agreement(bench: Bench) -> dict[str, Any]:
    """Size and arithmetic of the large model, without its memory; Fisher and directions of a small one in float64."""
    size = Size()
    module = transformer(size, torch.bfloat16, "meta")
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    bench.check(
        "model",
        "counted",
        "bfloat16",
        "parameters, millions",
        abs(millions - MILLIONS) < 1e-6,
        found=millions,
    )
    empty = partial(torch.empty, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(
            empty(1, size.channels, size.frames), empty(1), use_checkpointing=False,
            cross_attn_cond=empty(1, size.context, size.context_width), global_embed=empty(1, size.timing_width),
        )  # fmt: skip
    counted, formula = float(counter.get_total_flops()), size.forward_flops()
    bench.check("model", "counted", "bfloat16", "operations of a forward pass", abs(counted / formula - 1) < 1e-3,
                found=counted, formula=formula)  # fmt: skip
    _check_small(bench)
    return {"millions": millions, "tflop_a_row": {name: n / 1e12 for name, n in size.flops().items()}}


def _check_small(bench: Bench) -> None:
    size = replace(TINY, frames=600) if bench.cuda else TINY
    exact = Dit(size, torch.float32, torch.device("cpu"), bench.seed)
    here = Dit(size, torch.float32, bench.device, bench.seed)
    here.module.load_state_dict(exact.module.state_dict())
    cast(exact.module, torch.float64)
    batch, pairs = exact.batch(2, bench.seed), [(0, 0), (1, 0), (0, 1)]

    def side(model: Dit, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Tensor]]:
        parameters = select_parameters(model, ["all"])
        empty = {n: torch.zeros_like(p, dtype=dtype) for n, p in parameters.items()}
        make = partial(noised_rows, model, batch, plan=PLAN, purpose="fisher", masked=True)
        return parameters, make, empty

    parameters, make, wanted = side(exact, torch.float64)
    loop_squares(exact, parameters, make, pairs, wanted)
    along = {
        n: torch.randn(3, *p.shape, dtype=torch.float64) * wanted[n].mean().sqrt()
        for n, p in parameters.items()
    }
    for n, g in summed_gradient(exact, parameters, make(pairs)).items():
        along[n] += 0 if g is None else g  # not orthogonal to the gradients
    dots = _dots_by_rows(exact, parameters, make, pairs, along)

    parameters, make, found = side(here, torch.float32)
    batch_squares(here, parameters, make, pairs, found)
    directions = {n: d.to(bench.device, torch.float32) for n, d in along.items()}
    worst = max(relative(found[n].cpu(), wanted[n]) for n in wanted)
    bench.check("Fisher", "small model", "float32", "worst parameter", worst < 1e-2, error=worst, bound=1e-2)
    off = relative(row_dots(here, parameters, make(pairs), directions).cpu(), dots)
    bench.check("first order", "small model", "float32", "3 directions", off < 1e-2, error=off, bound=1e-2)


def _dots_by_rows(model: Denoiser, parameters: Mapping[str, nn.Parameter], make: Any, pairs: Any,
                  directions: Mapping[str, Tensor]) -> Tensor:  # fmt: skip
    rows = []
    for pair in pairs:
        gradient = summed_gradient(model, parameters, make([pair]))
        rows.append(sum((directions[n] * g).flatten(1).sum(1) for n, g in gradient.items() if g is not None))
    return torch.stack([torch.as_tensor(row) for row in rows])
