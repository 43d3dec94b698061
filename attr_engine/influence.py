"""Influence to first order: ``tau[q, i] = mean over draws of <grad f_d(z_i; theta_0), Delta_q>``.

With ``f`` the loss this is what unlearning query q does to the loss of track i as long as ``Delta_q`` is small; with the
squared norm of the prediction, for query and track alike, it is the target function of D-TRAK (METHOD section 6). One
forward and one backward pass through a track serve all queries, and no per-sample gradient is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine import kernels
from attr_engine.diffusion import DrawPlan, Noised, RowFunction, losses, noised_rows, row_losses
from attr_engine.effects import checked_draws
from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser
from attr_engine.persample import per_sample_backward, summed_gradient
from attr_engine.updates import Directions, Update
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


class _Recorder:
    """A denoiser that keeps what it last predicted."""

    def __init__(self, model: Denoiser) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, *inputs: Any) -> Tensor:
        out = self._model.predict(*inputs)
        self.last = out.detach()
        return out


def measure_influence(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    updates: Directions | Sequence[Callable[[], Update]],
    plan: DrawPlan,
    draws: int | range,
    masked: bool = False,
    rows: int = 16,
    function: RowFunction = losses,
    gradients: str = "batch",
    tick: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Per-draw influence of a few tracks on every query.

    Args:
        model: theta_0.
        parameters: the layer group that the updates are of.
        batch: the tracks, padded to the model's frames.
        updates: of ``function`` (:func:`attr_engine.unlearn.unlearn_query`): one function an update that returns it, or those
            of several batches in one place.
        plan: draw plan; the purpose is ``score``.
        draws: D, a multiple of the plan's replicates; or a range of draws that begins with such a multiple.
        masked: M_L, whether only valid frames of the tracks count.
        rows: (track, draw) pairs a backward pass.
        function: f, of (model, noised rows).
        gradients: ``"batch"`` or ``"loop"``, as in :func:`attr_engine.fisher.fit_fisher`, which also compares the
            two; a model that no Fisher was fitted of should be compared by
            :func:`attr_engine.persample.check_against_loop` first.
        tick: called before every pass; what it raises ends the measurement.

    Returns:
        Influence, float64 ``[U, N, D]``, and the loss under theta_0, float64 ``[N, D]``, which comes for nothing.

    Raises:
        UserError: an unusable number of draws, or a parameter that is not covered.
    """
    draws = checked_draws(plan, draws)
    if gradients not in ("batch", "loop"):
        raise UserError(f"gradients={gradients!r}: use 'batch' or 'loop'")
    measure, rows = (row_dots, rows) if gradients == "batch" else (one_row_dots, 1)
    directions = (
        updates if isinstance(updates, Directions) else Directions(parameters, updates, DIRECTION_BYTES)
    )
    pairs = [(i, d) for i in range(len(batch.ids)) for d in draws]
    shape = (len(batch.ids), len(draws))
    recorder, base = _Recorder(model), np.full(shape, np.nan)
    tables = [np.zeros((0, *shape))]
    for stacked in directions.chunks():
        found, losses_here = [], []
        for k in range(0, len(pairs), rows):
            tick()
            noised = noised_rows(model, batch, pairs[k : k + rows], plan, "score", masked)
            found.append(measure(recorder, parameters, noised, stacked, function).cpu())
            losses_here.append(row_losses(recorder.last.to(noised.x.dtype), noised).cpu())
        tables.append(torch.cat(found).T.reshape(-1, *shape).numpy())
        base = torch.cat(losses_here).reshape(shape).numpy()
    return np.concatenate(tables), base
