"""Influence to first order: ``tau[q, i] = mean over draws of <grad f_d(z_i; theta_0), Delta_q>``.

With ``f`` the loss this is what unlearning query q does to the loss of track i as long as ``Delta_q`` is small; with the
squared norm of the prediction, for query and track alike, it is the target function of D-TRAK (METHOD section 6). One
forward and one backward pass through a track serve all queries, and no per-sample gradient is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine import kernels
from attr_engine.diffusion import DrawPlan, Noised, RowFunction, losses, noised_rows
from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser
from attr_engine.persample import per_sample_backward, summed_gradient
from attr_engine.unlearn import Update
from attr_engine.uses import Factors

DIRECTION_BYTES = 2**33  # of the updates that one backward pass meets; more of them take another pass


def dots(gradient: Factors | Tensor, directions: Tensor) -> Tensor:
    """Inner products of the per-sample gradients of one parameter with K directions.

    Args:
        gradient: of B rows, as :func:`attr_engine.persample.per_sample_backward` passes it on.
        directions: ``[K, *shape]``.

    Returns:
        float64 ``[B, K]``.
    """
    if isinstance(gradient, Tensor):
        flat = gradient.reshape(len(gradient), -1)
        return flat.double() @ directions.reshape(len(directions), -1).double().T
    _, groups, _, out = gradient.g.shape
    by_group = directions.reshape(len(directions), groups, out, gradient.a.shape[3])
    total = torch.zeros(len(gradient.g), len(directions), dtype=torch.float64, device=directions.device)
    for j in range(groups):
        total += kernels.query_dot(gradient.g[:, j], gradient.a[:, j], by_group[:, j])
    return total


def row_dots(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    rows: Noised,
    directions: Mapping[str, Tensor],
    function: RowFunction = losses,
) -> Tensor:
    """``<grad f(row b), direction k>`` of every row and direction, in one backward pass.

    Args:
        model: theta_0.
        parameters: with respect to which.
        rows: B noised rows.
        directions: parameter name to ``[K, *shape]``.
        function: f, of (model, rows), ``[B]``.

    Returns:
        float64 ``[B, K]``.

    Raises:
        UserError: a parameter is used in a way that per-sample gradients of a batch do not cover.
    """
    some = next(iter(directions.values()))
    out = torch.zeros(len(rows.t), len(some), dtype=torch.float64, device=some.device)

    def sink(name: str, gradient: Factors | Tensor) -> None:
        out.add_(dots(gradient, directions[name]))

    per_sample_backward(model, parameters, rows, sink, function)
    return out


def one_row_dots(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    rows: Noised,
    directions: Mapping[str, Tensor],
    function: RowFunction = losses,
) -> Tensor:
    """:func:`row_dots` of a single row, by autograd alone."""
    assert len(rows.t) == 1, "autograd alone gives the sum over rows"
    gradient = summed_gradient(model, parameters, rows, function)
    parts = [dots(g[None], directions[name]) for name, g in gradient.items() if g is not None]
    return torch.stack(parts).sum(dim=0)


def _chunks(updates: Sequence[Callable[[], Update]]) -> Iterator[list[Update]]:
    """Updates, as many at a time as :data:`DIRECTION_BYTES` holds."""
    held: list[Update] = []
    room = 0
    for load in updates:
        update = load()
        size = sum(value.numel() * value.element_size() for value in update.delta.values())
        if held and size > room:
            yield held
            held = []
        room = (room if held else DIRECTION_BYTES) - size
        held.append(update)
    if held:
        yield held


def measure_influence(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    updates: Sequence[Callable[[], Update]],
    plan: DrawPlan,
    draws: int,
    masked: bool = False,
    rows: int = 16,
    function: RowFunction = losses,
    gradients: str = "batch",
) -> np.ndarray:
    """Per-draw influence of a few tracks on every query.

    Args:
        model: theta_0.
        parameters: the layer group that the updates are of.
        batch: the tracks, padded to the model's frames.
        updates: one function an update that returns it; of ``function`` (:func:`attr_engine.unlearn.unlearn_query`).
        plan: draw plan; the purpose is ``score``.
        draws: D, a multiple of the plan's replicates.
        masked: M_L, whether only valid frames of the tracks count.
        rows: (track, draw) pairs a backward pass.
        function: f, of (model, noised rows).
        gradients: ``"batch"`` or ``"loop"``, as in :func:`attr_engine.fisher.fit_fisher`, which also compares the
            two; a model that no Fisher was fitted of should be compared by
            :func:`attr_engine.persample.check_against_loop` first.

    Returns:
        float64 ``[U, N, D]``.

    Raises:
        UserError: an unusable number of draws, or a parameter that is not covered.
    """
    plan.check(draws, "the number of score draws")
    if gradients not in ("batch", "loop"):
        raise UserError(f"gradients={gradients!r}: use 'batch' or 'loop'")
    measure, rows = (row_dots, rows) if gradients == "batch" else (one_row_dots, 1)
    pairs = [(i, d) for i in range(len(batch.ids)) for d in range(draws)]
    tables = [torch.zeros(0, len(batch.ids), draws, dtype=torch.float64)]
    for held in _chunks(updates):
        directions = {
            name: torch.stack([u.delta[name].to(p.device) for u in held]) for name, p in parameters.items()
        }
        found = []
        for k in range(0, len(pairs), rows):
            noised = noised_rows(model, batch, pairs[k : k + rows], plan, "score", masked)
            found.append(measure(model, parameters, noised, directions, function).cpu())
        tables.append(torch.cat(found).T.reshape(len(held), len(batch.ids), draws))
    return torch.cat(tables).numpy()
