"""What unlearning does to tracks, measured: losses and predictions under theta_0 once, under every update beside it.

Every draw serves theta_0 and theta_q, so differences are paired. Three ways from an update to its effect at strength s:

- ``passes``: a forward pass at ``theta_0 + Delta(s)``, for every strength;
- ``tangent``: the tangent ``J_i Delta`` of the prediction by forward-mode differentiation, once for all strengths;
- ``difference``: the same by a finite difference, ``(f(theta_0 + Delta) - f(theta_0)) / s``, where attention kernels have no forward mode.

With a tangent the loss, which is quadratic in the prediction, changes by ``a_i s + b_i s^2``: ``a_i`` the inner product of its gradient
with the tangent, ``b_i`` the mean square of the tangent, which is the displacement. That is the Gauss-Newton approximation: what
the prediction does beyond first order is left out (METHOD section 6).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from attr_engine import kernels
from attr_engine.diffusion import DrawPlan, Noised, frame_losses, noised_rows, predict, row_losses
from attr_engine.errors import UserError, one_line
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser
from attr_engine.updates import Unlearned, Update, applied

WAYS = ("passes", "tangent", "difference")
Loads = Sequence[Callable[[], Update]]


@dataclass(frozen=True)
class Effects:
    """Per-draw numbers of N tracks under U updates; float64, larger displacement = larger effect.

    Attributes:
        base: ``[N, D]``, loss under theta_0.
        unlearned: ``[U, N, D]``, loss under theta_0 + update.
        displacement: ``[U, N, D]``, mean squared change of the prediction over the counted elements.
        influence: name of a function of :data:`attr_engine.diffusion.ROW_FUNCTIONS` to ``[U, N, D]``, what
            :func:`attr_engine.influence.measure_influence` found.
    """

    base: np.ndarray
    unlearned: np.ndarray
    displacement: np.ndarray
    influence: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """theta_0 on some draws: what all queries share.

    Attributes:
        losses: float64 ``[n]``, of every row.
        predictions: ``[n, C, F]`` in the work dtype.
    """

    losses: Tensor
    predictions: Tensor


Keep = Callable[[Callable[[], Base]], Base]


@dataclass(frozen=True)
class Tangents:
    """Per-draw effects of Q updates at any strength, to first order in the prediction.

    Attributes:
        base: ``[N, D]``, loss under theta_0.
        slope: a, ``[Q, N, D]``, loss change for a unit of strength, to first order.
        curvature: b, ``[Q, N, D]``, mean square of the tangent over the counted elements.
    """

    base: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray

    def at(self, strengths: Sequence[float]) -> Effects:
        """Effects of every update at every strength, ``U = Q * S``: base + a s + b s^2, and b s^2."""
        s = np.asarray(strengths)[None, :, None, None]
        moved = self.curvature[:, None] * s**2
        changed = self.base + self.slope[:, None] * s + moved
        flat = (-1, *self.base.shape)
        return Effects(self.base, changed.reshape(flat), moved.reshape(flat))


def rows_of(
    model: Denoiser, batch: Batch, plan: DrawPlan, draws: range, masked: bool, rows: int
) -> list[Noised]:
    """The noised rows of all (track, draw) pairs of a batch, ``rows`` of them a pass, draws of a track together."""
    pairs = [(i, d) for i in range(len(batch.ids)) for d in draws]
    return [
        noised_rows(model, batch, pairs[k : k + rows], plan, "score", masked)
        for k in range(0, len(pairs), rows)
    ]


def _base(model: Denoiser, noised: Sequence[Noised], tick: Callable[[], None]) -> Base:
    losses, predictions = [], []
    for n in noised:
        tick()
        predictions.append(predict(model, n))
        losses.append(row_losses(predictions[-1], n))
    return Base(torch.cat(losses), torch.cat(predictions))


def _nothing() -> None:
    pass


def checked_draws(plan: DrawPlan, draws: int | range) -> range:
    """Draws as a range that begins and ends with whole rounds of replicates.

    Raises:
        UserError: it does not.
    """
    draws = range(draws) if isinstance(draws, int) else draws
    plan.check(len(draws), "the number of score draws")
    if draws.start % plan.replicates or draws.step != 1:
        raise UserError(
            f"score draws from {draws.start} on: begin at a multiple of the {plan.replicates} replicates"
        )
    return draws


@torch.no_grad()
def measure_effects(
    model: Denoiser,
    batch: Batch,
    updates: Unlearned | Loads,
    plan: DrawPlan,
    draws: int | range,
    masked: bool = False,
    rows: int = 16,
    keep: Keep = lambda measure: measure(),
    tick: Callable[[], None] = _nothing,
    which: Sequence[int] | None = None,
) -> Effects:
    """Losses and displacements of a few tracks under every update, by forward passes.

    Args:
        model: theta_0; unchanged on return.
        batch: the tracks, padded to the model's frames.
        updates: unlearned models, or one function an update that returns it.
        plan: draw plan; the purpose is ``score``.
        draws: D, a multiple of the plan's replicates; or a range of draws that begins with such a multiple.
        masked: M_L, whether only valid frames of the tracks count.
        rows: (track, draw) pairs a forward pass.
        keep: gets the function that measures theta_0, and may return what it kept of an earlier call instead.
        tick: called before every pass; what it raises ends the measurement.
        which: indices of the updates to measure; default all.

    Raises:
        UserError: unusable draws.
    """
    unlearned = updates if isinstance(updates, Unlearned) else Unlearned(model, updates)

    @contextlib.contextmanager
    def under(u: int) -> Iterator[_Effect]:
        with unlearned.under(u):
            yield partial(_change, model)

    chosen = range(len(unlearned)) if which is None else which
    return Effects(*_measured(model, batch, under, chosen, plan, draws, masked, rows, keep, tick))


_Effect = Callable[[Noised, Tensor], tuple[Tensor, Tensor]]
"""Two numbers of every row, from the rows and their predictions under theta_0."""


def _measured(
    model: Denoiser, batch: Batch, under: Callable[[int], contextlib.AbstractContextManager[_Effect]], chosen: Sequence[int],
    plan: DrawPlan, draws: int | range, masked: bool, rows: int, keep: Keep, tick: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Losses under theta_0 ``[N, D]``, and the two numbers of an effect under each of the chosen updates, ``[U, N, D]``."""
    draws = checked_draws(plan, draws)
    noised = rows_of(model, batch, plan, draws, masked, rows)
    base = keep(lambda: _base(model, noised, tick))
    shape = (len(batch.ids), len(draws))
    first, second = np.empty((len(chosen), *shape)), np.empty((len(chosen), *shape))
    for row, u in enumerate(chosen):
        with under(u) as effect:
            found = []
            for n, before in _paired(noised, base):
                tick()
                found.append(effect(n, before))
        first[row], second[row] = (_table(part, shape) for part in zip(*found, strict=True))
    return _table([base.losses], shape), first, second


def _change(model: Denoiser, rows: Noised, before: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and displacement of a pass."""
    after = predict(model, rows)
    return row_losses(after, rows), kernels.per_draw_loss(after, before, rows.counted)


def _paired(noised: Sequence[Noised], base: Base) -> Iterator[tuple[Noised, Tensor]]:
    """Passes with their predictions under theta_0."""
    first = 0
    for n in noised:
        yield n, base.predictions[first : first + len(n.t)].to(n.x.device)
        first += len(n.t)


def _table(parts: Sequence[Tensor], shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(torch.cat(list(parts)).double().cpu().numpy().reshape(shape))


# -- tangents -----------------------------------------------------------------------------------


class _Predictor(nn.Module):
    """A denoiser as a module, so that :func:`torch.func.functional_call` can give it other weights, tied ones too."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.inner = model.module
        self._predict = partial(predict, model)

    def forward(self, noised: Noised) -> Tensor:
        return self._predict(noised)


def _tangent(model: Denoiser, noised: Noised, delta: Mapping[str, Tensor]) -> Tensor:
    """``J Delta`` of every row's prediction, ``[B, C, F]``, by forward-mode differentiation; delta like the parameters."""
    parameters = dict(model.module.named_parameters())
    predictor = _Predictor(model)
    with (
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # fused attention kernels have no forward mode
        dual = {
            f"inner.{name}": forward_ad.make_dual(parameters[name].detach(), value)
            for name, value in delta.items()
        }
        try:
            out = functional_call(predictor, dual, (noised,))
        except NotImplementedError as error:
            raise UserError(
                f"the model has an operation without forward mode ({one_line(error)}): use --strengths-by difference"
            ) from error
        tangent = forward_ad.unpack_dual(out).tangent
        # A prediction that depends on no parameter of the group does not move.
        return torch.zeros_like(noised.x) if tangent is None else tangent.to(noised.x.dtype)


@torch.no_grad()
def measure_tangents(
    model: Denoiser,
    batch: Batch,
    updates: Unlearned | Loads,
    plan: DrawPlan,
    draws: int | range,
    masked: bool = False,
    rows: int = 16,
    way: str = "tangent",
    keep: Keep = lambda measure: measure(),
    tick: Callable[[], None] = _nothing,
    which: Sequence[int] | None = None,
) -> Tangents:
    """Slopes and curvatures of a few tracks under every update, to read off effects at any strength.

    Args:
        model: theta_0; unchanged on return.
        batch: the tracks, padded to the model's frames.
        updates: of one step each; for ``way="difference"`` unlearned models may be given.
        plan: draw plan; the purpose is ``score``.
        draws: D or a range of draws, as in :func:`measure_effects`.
        masked: M_L.
        rows: (track, draw) pairs a pass.
        way: ``"tangent"`` or ``"difference"`` (at the update's own strength).
        keep: as in :func:`measure_effects`.
        tick: called before every pass.
        which: indices of the updates to measure; default all.

    Raises:
        UserError: unusable draws, an unknown way, or an operation of the model that has no forward mode.
    """

    @contextlib.contextmanager
    def under(u: int) -> Iterator[_Effect]:
        with _tangents(model, updates, u, way) as tangent:
            yield lambda n, before: _expansion(n, before, tangent(n, before))

    chosen = range(len(updates)) if which is None else which
    return Tangents(*_measured(model, batch, under, chosen, plan, draws, masked, rows, keep, tick))


@contextlib.contextmanager
def _tangents(
    model: Denoiser, updates: Unlearned | Loads, index: int, way: str
) -> Iterator[Callable[[Noised, Tensor], Tensor]]:
    """A function of (rows, predictions under theta_0) to their tangents for a unit of strength."""
    if way == "difference":
        unlearned = updates if isinstance(updates, Unlearned) else Unlearned(model, updates)
        with unlearned.under(index) as strength:
            yield lambda n, before: (predict(model, n) - before) / strength
    elif way == "tangent" and not isinstance(updates, Unlearned):
        update, parameters = updates[index](), dict(model.module.named_parameters())
        delta = {name: value.to(parameters[name]) for name, value in update.delta.items()}
        yield lambda n, _: _tangent(model, n, delta) / update.strength
    else:
        raise UserError(f"tangents by {way!r} of {type(updates).__name__}: use 'tangent' or 'difference'")


def _expansion(noised: Noised, before: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients a and b of every row: its loss is ``L + a s + b s^2`` where its prediction moves by ``s`` tangents."""
    with torch.enable_grad():
        prediction = before.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(row_losses(prediction, noised).sum(), prediction)
    slope = (gradient * tangent).sum(dim=(1, 2), dtype=torch.float64)
    return slope, kernels.per_draw_loss(tangent, torch.zeros_like(tangent), noised.counted)


# -- where in the tracks ------------------------------------------------------------------------


@torch.no_grad()
def frame_effects(
    model: Denoiser, batch: Batch, update: Update, plan: DrawPlan, draws: int, rows: int = 16
) -> Mapping[str, np.ndarray]:
    """Where in the tracks an update acts.

    Returns:
        ``"displacement"`` and ``"loss_change"``: float64 ``[B, F]``, averaged over channels and draws.
    """
    noised = rows_of(model, batch, plan, range(draws), False, rows)
    base = [predict(model, n) for n in noised]
    moved, change = [], []
    with applied(model, update.delta):
        for n, before in zip(noised, base, strict=True):
            after = predict(model, n)
            moved.append((after - before).square().double().mean(dim=1))
            change.append(frame_losses(after, n) - frame_losses(before, n))

    def per_frame(chunks: Sequence[Tensor]) -> np.ndarray:
        frames = torch.cat(list(chunks)).cpu().numpy()
        return np.asarray(frames.reshape(len(batch.ids), draws, -1).mean(axis=1))

    return {"displacement": per_frame(moved), "loss_change": per_frame(change)}
