"""Inner products of whole gradients between queries and tracks: what every method of the influence family is made of here.

Nothing is projected, so that a table can say what a method is worth and not what a projection lost. Of one run of draws the
products are kept for several numbers of draws, layer groups and both ways of averaging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.diffusion import ROW_FUNCTIONS, DrawPlan, noised_rows
from attr_engine.models.protocol import select_parameters
from attr_engine.persample import summed_gradient

DRAWS = (4, 8, 16)
GROUPS = ("transformer", "cross_attn.to_kv", "cross_attn", "self_attn")
AVERAGING = ("plain", "unit")  # of the gradients of single draws, or of those at length 1


@dataclass(frozen=True)
class Item:
    """A track or a query, and the purpose of its draws."""

    tracks: Any
    index: int
    purpose: str


def items_of(tracks: Any, queries: Sequence[Any], targets: Sequence[int]) -> list[Item]:
    """All training tracks by draws of scores; all queries and targets by draws of updates."""
    asked = [Item(q, i, "update") for q in queries for i in range(len(q))]
    return (
        [Item(tracks, i, "score") for i in range(len(tracks))]
        + asked
        + [Item(tracks, i, "update") for i in targets]
    )


def name_of(averaging: str, group: str, draws: int) -> str:
    """Of a matrix in the file."""
    return f"{averaging}/{group}/{draws}"


def kernels(
    model: Any, tracks: int, items: Sequence[Item], function: str, plan: DrawPlan, say: Callable[[str], None] = print,
    masks: str = "none", keep: Path | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Products of the mean gradients of all items with those of the tracks, float64 ``[items, tracks]``, by :func:`name_of`.

    Args:
        model: theta_0.
        tracks: N; the first N items are the training tracks.
        items: N + Q.
        function: name in ROW_FUNCTIONS.
        plan: of the draws.
        masks: whether valid frames alone count: ``"none"``, ``"both"``, or ``"mixed"`` (M_U on, M_L off: of queries only).
        say: gets a line now and then.
        keep: file for the plain mean gradients at the largest number of draws, float32 ``[N + Q, parameters]``.
    """
    parameters = select_parameters(model, ["transformer"])
    where = _columns(model, parameters)
    batches = [item.tracks.batch([item.index], model.frames) for item in items]
    size = sum(p.numel() for p in parameters.values())
    sums = {averaging: torch.zeros(len(items), size) for averaging in AVERAGING}
    out: dict[str, np.ndarray] = {}
    started = time.perf_counter()
    for draw in range(max(DRAWS)):
        for row, (item, batch) in enumerate(zip(items, batches, strict=True)):
            noised = noised_rows(model, batch, [(0, draw)], plan, item.purpose, _masked(item, masks))
            found = summed_gradient(model, parameters, noised, ROW_FUNCTIONS[function])
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if found[n] is None else found[n]).flatten()
                    for n, p in parameters.items()
                ]
            )
            sums["plain"][row] += flat
            sums["unit"][row] += flat / flat.norm().clamp_min(1e-30)
        if draw + 1 in DRAWS:
            out.update(_products(sums, where, tracks, draw + 1))
            say(f"{function}, {plan.kind} draws: {draw + 1} done, {time.perf_counter() - started:.0f} s")
    if keep is not None:
        np.save(keep, (sums["plain"] / max(DRAWS)).numpy())
    return out


def _masked(item: Item, masks: str) -> bool:
    return masks == "both" or (masks == "mixed" and item.purpose == "update")


def _columns(model: Any, parameters: Mapping[str, torch.Tensor]) -> dict[str, list[slice]]:
    """Layer group to the columns of its parameters in a flat gradient."""
    out: dict[str, list[slice]] = {}
    for group in GROUPS:
        chosen, first = select_parameters(model, [group]), 0
        out[group] = []
        for name, p in parameters.items():
            if name in chosen:
                out[group].append(slice(first, first + p.numel()))
            first += p.numel()
    return out


def _products(
    sums: Mapping[str, torch.Tensor], where: Mapping[str, Sequence[slice]], tracks: int, draws: int
) -> dict[str, np.ndarray]:
    out = {}
    for averaging, whole in sums.items():
        for group in GROUPS:
            total = sum(whole[:, s] @ whole[:tracks, s].T for s in where[group])
            out[name_of(averaging, group, draws)] = (total.double() / draws**2).numpy()
    return out


def ridge(kernel: np.ndarray, asked: np.ndarray, damping: float, normalised: bool = False) -> np.ndarray:
    """Kernel ridge regression: ``K_q (K + lambda mean diag(K))^-1``, float64 ``[Q, N]`` (D-TRAK, TRAK without projection).

    Args:
        kernel: ``[N, N]``.
        asked: ``[Q, N]``.
        damping: lambda.
        normalised: with tracks at length 1 (a query's length changes no ranking).
    """
    kernel = (kernel + kernel.T) / 2
    if normalised:
        length = np.sqrt(np.diag(kernel))
        kernel, asked = kernel / length / length[:, None], asked / length
    damped = kernel + damping * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    return np.linalg.solve(damped, asked.T).T
