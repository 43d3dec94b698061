"""Projected gradients of tracks: small vectors whose inner products stand for those of the gradients.

The gradient of a weight ``[O, I]`` is projected on both sides, ``P_o G P_i^T`` (activations and output gradients first:
:func:`attr_engine.kernels.project`), anything else by one matrix. The matrices are made from a seed (:data:`KINDS`).
A track's feature is the projected gradient of a chosen function, the mean over its draws
(TRAK, Park et al., ICML 2023; with the squared norm of the prediction D-TRAK, Zheng et al., ICLR 2024; two-sided projections
LoGra, Choe et al. 2024). As a rule each draw's gradient has length 1 before the mean (:data:`AVERAGING`): lengths differ
between timesteps, and a plain mean over a few draws is nearly that of its longest one (docs/index.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor, nn

from attr_engine import kernels
from attr_engine.diffusion import ROW_FUNCTIONS, DrawPlan, Noised, Purpose, RowFunction, noised_rows
from attr_engine.errors import UserError
from attr_engine.kernels.project import KINDS as KERNEL_KINDS
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser
from attr_engine.persample import per_sample_backward
from attr_engine.uses import Factors

KINDS = (*KERNEL_KINDS, "coordinates")
"""Kinds of projection: those of :func:`attr_engine.kernels.projection`, and coordinates chosen by the seed, as they are."""

AVERAGING = ("unit", "plain")
"""How gradients of draws become one: at length 1 each, or as they are."""


def _seed(seed: int, name: str, side: str) -> int:
    return int.from_bytes(blake2b(f"{seed}:{side}:{name}".encode(), digest_size=8).digest(), "little")


class Projector:
    """Projects per-sample gradients of a group of parameters.

    Args:
        parameters: name to parameter.
        kind: of projection: ``"gaussian"``, ``"rademacher"``, ``"identity"`` (the first coordinates) or ``"coordinates"`` (some
            chosen by the seed). The first two keep inner products in expectation; the other two count a weight by the
            share of its entries that is kept.
        rank: r: a weight becomes at most r x r numbers, anything else at most r^2.
        seed: of the matrices.

    Attributes:
        width: numbers of a feature.

    Raises:
        UserError: an unknown kind, or a rank below 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kind: str, rank: int, seed: int) -> None:
        if kind not in KINDS or rank < 1:
            raise UserError(f"projection {kind!r} of rank {rank}: use {', '.join(KINDS)}, and at least 1")
        self._sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._places: dict[str, slice] = {}
        self.width = 0
        for name, p in parameters.items():
            # A vector is a matrix of one row, with all its room on the other side.
            rows, columns = (p.shape[0], p[0].numel()) if p.dim() > 1 else (1, p.numel())
            small = min(rows, rank), min(columns, rank if rows > 1 else rank * rank)
            self._sides[name] = (
                _matrix(kind, small[0], rows, _seed(seed, name, "out"), p),
                _matrix(kind, small[1], columns, _seed(seed, name, "in"), p),
            )
            self._shapes[name] = rows, columns
            self._places[name] = slice(self.width, self.width + small[0] * small[1])
            self.width += small[0] * small[1]

    def add(self, total: Tensor, name: str, gradient: Factors | Tensor) -> None:
        """Add the projected gradients of one parameter to its place in ``total`` ``[B, width]``."""
        out, into = self._sides[name]
        if isinstance(gradient, Factors) and gradient.g.shape[1] == 1:
            small = kernels.project(gradient.g[:, 0], gradient.a[:, 0], out, into)
        else:
            shape = torch.Size(self._shapes[name])
            whole = gradient.gradient(shape) if isinstance(gradient, Factors) else gradient
            small = whole.reshape(len(total), *shape).to(total.dtype)
            small = small if out is None else out.to(total.dtype) @ small
            small = small if into is None else small @ into.to(total.dtype).T
        total[:, self._places[name]] += small.reshape(len(total), -1)


def _matrix(kind: str, small: int, size: int, seed: int, like: Tensor) -> Tensor | None:
    """``[small, size]``; None where a side is short enough to stay as it is."""
    if small == size:
        return None
    if kind == "coordinates":
        chosen = kernels.projection("gaussian", 1, size, seed)[0].argsort(stable=True)[:small].sort().values
        matrix = torch.zeros(small, size, dtype=like.dtype)
        matrix[torch.arange(small), chosen] = 1.0
        return matrix.to(like.device)
    return kernels.projection(kind, small, size, seed, like.device, like.dtype)


def row_features(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], rows: Noised, projector: Projector, function: RowFunction
) -> Tensor:  # fmt: skip
    """Projected per-sample gradients of every row in one backward pass.

    Args:
        model: theta_0.
        parameters: the group that the projector was made for.
        rows: B noised rows.
        projector: see :class:`Projector`.
        function: of (model, rows), ``[B]``.

    Returns:
        ``[B, width]``, float32 (float64 for a float64 model).
    """
    total = torch.zeros(len(rows.t), projector.width, dtype=rows.x.dtype, device=rows.x.device)
    per_sample_backward(
        model, parameters, rows, lambda name, gradient: projector.add(total, name, gradient), function
    )
    return total


def track_features(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    plan: DrawPlan,
    purpose: Purpose,
    draws: int,
    masked: bool,
    projector: Projector,
    function: str = "squared_norm",
    rows: int = 16,
    averaging: str = "unit",
    replicates: int = 1,
) -> Tensor:
    """Projected gradients of tracks, the mean over their draws.

    Args:
        model: theta_0.
        parameters: the group that the projector was made for.
        batch: N tracks, padded to the model's frames.
        plan: draw plan.
        purpose: ``"score"`` for training tracks, ``"update"`` for queries.
        draws: a multiple of the plan's replicates.
        masked: whether only valid frames count.
        projector: see :class:`Projector`.
        function: name in :data:`attr_engine.diffusion.ROW_FUNCTIONS`.
        rows: (track, draw) pairs a backward pass.
        averaging: ``"unit"``: a draw's projected gradient has length 1 before the mean; ``"plain"``.
        replicates: R; draw d is of replicate ``d % R``, and each replicate has a mean of its own.

    Returns:
        ``[N, width]`` on the CPU, float32 (float64 for a float64 model); ``[N, R, width]`` where R is above 1.

    Raises:
        UserError: an unusable number of draws, an unknown function or averaging, or a parameter that is not covered.
    """
    plan.check(draws, "the number of draws")
    if function not in ROW_FUNCTIONS:
        raise UserError(f"unknown function {function!r}; known: {', '.join(ROW_FUNCTIONS)}")
    if averaging not in AVERAGING:
        raise UserError(f"unknown averaging {averaging!r}; known: {', '.join(AVERAGING)}")
    pairs = [(i, d) for i in range(len(batch.ids)) for d in range(draws)]
    found = []
    for k in range(0, len(pairs), rows):
        noised = noised_rows(model, batch, pairs[k : k + rows], plan, purpose, masked)
        found.append(row_features(model, parameters, noised, projector, ROW_FUNCTIONS[function]).cpu())
    each = torch.cat(found)
    if averaging == "unit":
        length = each.double().norm(dim=1, keepdim=True)  # squares of large gradients are beyond float32
        each = (each / length.clamp_min(1e-300)).to(each.dtype)
    means = each.reshape(len(batch.ids), draws // replicates, replicates, -1).mean(dim=1)
    return means[:, 0] if replicates == 1 else means
