"""Per-sample gradients: one (track, draw) pair, every parameter of the layer group.

This is the batch-1 loop: nothing that autograd covers can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from attr_engine.diffusion import DrawPlan, Noised, Purpose, losses, noised_rows
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser


def summed_gradient(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], rows: Noised
) -> dict[str, Tensor | None]:
    """Gradient of the *sum* of the rows' losses.

    Args:
        model: the denoiser.
        parameters: with respect to which.
        rows: noised rows; one row gives a per-sample gradient.

    Returns:
        Name to gradient in the parameter's shape and dtype; None where the prediction does not
        depend on the parameter (its gradient is exactly zero).
    """
    with torch.enable_grad():
        total = losses(model, rows).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


def per_sample_gradients(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    draws: int,
    plan: DrawPlan,
    purpose: Purpose,
    masked: bool,
) -> Iterator[tuple[int, int, dict[str, Tensor | None]]]:
    """Yield (index in batch, draw, gradient) for every pair, one at a time."""
    for i in range(len(batch.ids)):
        for draw in range(draws):
            row = noised_rows(model, batch, [(i, draw)], plan, purpose, masked)
            yield i, draw, summed_gradient(model, parameters, row)
