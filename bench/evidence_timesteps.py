"""Does it pay to weight timesteps? Gradients of single draws at length 1, summed by quarter of the timesteps, and then weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from evidence_kernels import Item, ridge

from attr_engine.diffusion import ROW_FUNCTIONS, DrawPlan, noised_rows
from attr_engine.models.protocol import select_parameters
from attr_engine.persample import summed_gradient

DRAWS, QUARTERS = 16, 4
WEIGHTS: dict[str, Sequence[float]] = {
    "all alike (the default)": (1, 1, 1, 1),
    "t below 1/4 (little noise)": (1, 0, 0, 0),
    "t from 1/4 to 1/2": (0, 1, 0, 0),
    "t from 1/2 to 3/4": (0, 0, 1, 0),
    "t above 3/4 (nearly noise)": (0, 0, 0, 1),
    "t below 1/2": (1, 1, 0, 0),
    "t above 1/2": (0, 0, 1, 1),
    "t from 1/4 to 3/4": (0, 1, 1, 0),
    "falling 4 3 2 1": (4, 3, 2, 1),
    "rising 1 2 3 4": (1, 2, 3, 4),
    "the middle twice": (1, 2, 2, 1),
}


def products(model: Any, tracks: int, items: Sequence[Item], plan: DrawPlan) -> np.ndarray:
    """Products of the sums of every quarter, float64 ``[4, 4, items, tracks]``: a weighting is a sum of them.

    Args:
        model: theta_0.
        tracks: N; the first N items are the training tracks.
        items: N + Q.
        plan: of the draws.
    """
    parameters = select_parameters(model, ["transformer"])
    sums = torch.zeros(QUARTERS, len(items), sum(p.numel() for p in parameters.values()))
    function = ROW_FUNCTIONS["squared_norm"]
    for row, item in enumerate(items):
        batch = item.tracks.batch([item.index], model.frames)
        for draw in range(DRAWS):
            noised = noised_rows(model, batch, [(0, draw)], plan, item.purpose, False)
            found = summed_gradient(model, parameters, noised, function)
            flat = torch.cat([(torch.zeros_like(p) if found[n] is None else found[n]).flatten()
                              for n, p in parameters.items()])  # fmt: skip
            sums[int(float(noised.t[0]) * QUARTERS), row] += flat / flat.norm().clamp_min(1e-30)
    whole = sums.transpose(0, 1).flatten(0, 1)  # [items * 4, P]
    found = (whole @ whole[: tracks * QUARTERS].T).double().numpy()
    return found.reshape(len(items), QUARTERS, tracks, QUARTERS).transpose(1, 3, 0, 2)


def weighted(products: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Products ``[items, tracks]`` of the weighted sums."""
    return np.asarray(np.einsum("a,b,abit->it", weights, weights, products))


def scores(products: np.ndarray, weights: Sequence[float], damping: float) -> np.ndarray:
    """Kernel ridge regression with weighted timesteps, ``[Q, N]``."""
    found = weighted(products, weights)
    tracks = found.shape[1]
    return ridge(found[:tracks], found[tracks:], damping)
