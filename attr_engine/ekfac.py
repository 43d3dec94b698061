"""EK-FAC: ``H = (Q_G x Q_A) diag(Lambda) (Q_G x Q_A)^T`` for every weight, a curvature in the place of the diagonal Fisher.

George et al. 2018 (arXiv 1806.03884), Grosse et al. 2023 (arXiv 2308.03296, section 2), with the gradients that the
diagonal Fisher squares. For a weight ``[O, I]`` whose layer has inputs a ``[T, I]`` and output gradients g ``[T, O]``
on a (track, draw) pair, so that the gradient of W is ``g^T a``:

* ``A = E sum_t a_t a_t^T`` and ``G = E sum_t g_t g_t^T``, E the mean over pairs; their eigenvectors are ``Q_A``, ``Q_G``;
* ``Lambda = E (Q_G^T grad W Q_A)^2``: the diagonal Fisher in the coordinates that the eigenvectors give;
* ``(H + damping)^-1 V = Q_G [(Q_G^T V Q_A) / (Lambda + damping)] Q_A^T``.

So an EK-FAC is a diagonal Fisher and a rotation. A convolution is covered as a linear layer of its unfolded input
(Grosse and Martens 2016, arXiv 1602.01407), each of its groups by itself. What is no such weight has no rotation and keeps its
diagonal Fisher: gains, biases (of linear layers too), raw parameters, and a weight that the model also uses in
another way than as a layer's. Parameters are independent of each other in H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attr_engine.diffusion import DrawPlan, RowFunction, losses, work_dtype
from attr_engine.errors import UserError
from attr_engine.fisher import (
    Fisher,
    FisherSettings,
    check_fisher,
    check_fits,
    combine,
    fisher_pass,
    fisher_units,
)
from attr_engine.kernels.launch import accumulator, ieee
from attr_engine.latents.batch import Tracks
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.persample import add_squares, per_sample_backward
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.uses import Factors, Sink


@dataclass(frozen=True)
class Basis:
    """Eigenvectors of the two covariances of a weight, as columns, by ascending eigenvalue.

    Attributes:
        outputs: Q_G ``[groups, O, O]``, where a Linear has one group.
        inputs: Q_A ``[groups, I, I]``; of a convolution I is its input channels times its taps.
    """

    outputs: Tensor
    inputs: Tensor

    def rotated(self, gradient: Tensor) -> Tensor:
        """``Q_G^T V Q_A`` of a gradient in the weight's shape, or of B of them ``[B, *shape]``."""
        return self._turned(gradient, self.outputs.mT, self.inputs)

    def rotated_back(self, gradient: Tensor) -> Tensor:
        """``Q_G V Q_A^T``: what :meth:`rotated` was given."""
        return self._turned(gradient, self.outputs, self.inputs.mT)

    def rotated_rows(self, gradient: Factors | Tensor) -> Factors | Tensor:
        """:meth:`rotated` of per-sample gradients; of factors none is made. In the dtype of the basis."""
        if isinstance(gradient, Tensor):
            return self.rotated(gradient.to(self.outputs.dtype))
        g, a = gradient.g.to(self.outputs.dtype), gradient.a.to(self.inputs.dtype)
        with ieee(g.device):
            return Factors(g @ self.outputs, a @ self.inputs)

    def to(self, device: torch.device) -> Basis:
        """The same on another device."""
        return Basis(self.outputs.to(device), self.inputs.to(device))

    def _turned(self, gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
        left, right = (x.to(gradient) for x in (left, right))
        blocks = gradient.reshape(-1, len(left), left.shape[1], right.shape[1])  # [B, groups, O, I]
        with ieee(gradient.device):
            return (left @ blocks @ right).reshape(gradient.shape)


@dataclass(frozen=True)
class EKFAC:
    """A fitted EK-FAC; :func:`attr_engine.unlearn.unlearn_query` takes it in the place of a Fisher.

    Attributes:
        eigenvalues: Lambda, the diagonal Fisher in rotated coordinates, in the shapes of the parameters.
        bases: name of a weight to its eigenvectors; parameters without one are not rotated.
    """

    eigenvalues: Fisher
    bases: Mapping[str, Basis]

    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters that it was fitted for, by name."""
        return self.eigenvalues.shapes()

    def rotated(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``Q_G^T V Q_A`` of a gradient: there ``H`` is diagonal, and inner products are what they were.

        So ``g_i^T (H + damping)^-1 g_q`` is the inner product of ``rotated(g_i)`` and
        ``eigenvalues.precondition(rotated(g_q), damping)``.
        """
        check_fits(self.shapes(), gradient)
        return {n: self.bases[n].rotated(g) if n in self.bases else g for n, g in gradient.items()}

    def precondition(self, gradient: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """``(H + damping * mean eigenvalue)^-1 gradient``.

        Args:
            gradient: parameter name to a tensor in the parameter's shape; of all parameters, or of some of them.
            damping: relative to the mean eigenvalue over all parameters of the group, which is all but the mean of
                the diagonal Fisher: a rotation keeps sums of squares.

        Returns:
            The direction, by name in the order of ``gradient``: float32, or float64 for a float64 gradient, on its device.

        Raises:
            UserError: an unusable damping, or a gradient of another model.
        """
        if damping == 0.0:
            raise UserError(
                "EK-FAC has eigenvalues that are zero but for rounding, and cannot divide by them: set --damping above 0"
            )
        direction = self.eigenvalues.precondition(self.rotated(gradient), damping)
        return {n: self.bases[n].rotated_back(g) if n in self.bases else g for n, g in direction.items()}

    def save(self, path: Path, key: str) -> None:
        """Write to safetensors, under a key that :meth:`load` checks."""
        tensors = {f"eigenvalues/{name}": value for name, value in self.eigenvalues.values.items()}
        for name, basis in self.bases.items():
            tensors |= {f"outputs/{name}": basis.outputs, f"inputs/{name}": basis.inputs}
        meta = {"key": key, "pairs": self.eigenvalues.pairs, "unused": list(self.eigenvalues.unused)}
        save_tensors(path, tensors, {**meta, "bases": list(self.bases)})

    @staticmethod
    def load(path: Path, key: str | None = None) -> EKFAC:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: missing or damaged file, no EK-FAC, or another key than the one asked for.
        """
        tensors, meta = load_tensors(path, key)
        if "bases" not in meta:
            raise UserError(f"{path} holds no EK-FAC: give the file that EKFAC.save wrote, or fit it again")
        bases = {name: Basis(tensors[f"outputs/{name}"], tensors[f"inputs/{name}"]) for name in meta["bases"]}
        prefix = "eigenvalues/"
        values = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        return EKFAC(Fisher(values, int(meta["pairs"]), tuple(meta["unused"])), bases)


def fit_ekfac(
    model: Denoiser,
    tracks: Tracks,
    layers: Sequence[str],
    plan: DrawPlan,
    draws: int,
    masked: bool = False,
    rows: int = 16,
    function: RowFunction = losses,
    progress: Callable[[int, int], None] | None = None,
) -> EKFAC:
    """Fit the EK-FAC of a layer group, in memory, in two passes over the tracks: covariances, then eigenvalues.

    Beside the model and the eigenvalues it holds ``O^2 + I^2`` float64 numbers of every weight.

    Args:
        model: theta_0.
        tracks: the training tracks.
        layers: layer groups or name patterns.
        plan: draw plan; the purpose is ``fisher``, and both passes have the same draws.
        draws: draws a track, a multiple of the plan's replicates.
        masked: whether only valid frames count in the loss (False: as the model was trained).
        rows: (track, draw) pairs a backward pass.
        function: of whose gradients, of (model, noised rows) ``[B]``: the loss, or another one of
            :data:`attr_engine.diffusion.ROW_FUNCTIONS`.
        progress: called with (tracks done, of both passes; twice the tracks).

    Returns:
        The EK-FAC, on the CPU in float32 (float64 for a float64 model): covariances are added in float64, eigenvalues as
        :func:`attr_engine.fisher.fit_fisher` adds squares. The order is fixed.

    Raises:
        UserError: as :func:`attr_engine.fisher.check_fisher`, or covariances or eigenvalues that are not finite.
    """
    settings = FisherSettings(layers, plan, draws, masked, rows)
    check_fisher(model, tracks, settings, function)
    total = len(tracks)

    def tick(done: int) -> None:
        if progress is not None:
            progress(done, 2 * total)

    tick(0)
    covariances = Covariances()
    _sweep(model, tracks, range(total), settings, function, covariances.add, tick)
    bases = covariances.bases(work_dtype(model))
    eigenvalues = corrected_eigenvalues(
        model, tracks, settings, bases, function, lambda done: tick(total + done)
    )
    return EKFAC(eigenvalues, {name: basis.to(torch.device("cpu")) for name, basis in bases.items()})


class Covariances:
    """Sums ``sum_t g_t g_t^T`` and ``sum_t a_t a_t^T`` of the uses of weights, as a :data:`attr_engine.uses.Sink`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, gradient: Factors | Tensor) -> None:
        """Add those of B rows; products are float32 (float64 of float64 factors), sums float64. Tensors are passed over."""
        if isinstance(gradient, Tensor):
            return
        found = (_product(gradient.g), _product(gradient.a))
        if name in self._sums:
            for total, x in zip(self._sums[name], found, strict=True):
                total += x
        else:
            self._sums[name] = found

    def bases(self, dtype: torch.dtype) -> dict[str, Basis]:
        """Their eigenvectors, rounded to ``dtype``, by name of the weight. The sums are given up.

        Raises:
            UserError: a sum is not finite.
        """
        found = {}
        for name in list(self._sums):
            sums = self._sums.pop(name)
            if not all(bool(torch.isfinite(x).all()) for x in sums):
                raise UserError(
                    f"the covariances of {name} are not finite: the model or a latent holds NaN, or use --dtype float32"
                )
            outputs, inputs = (torch.linalg.eigh(x).eigenvectors.to(dtype) for x in sums)
            found[name] = Basis(outputs.contiguous(), inputs.contiguous())
        return found


def corrected_eigenvalues(
    model: Denoiser,
    tracks: Tracks,
    settings: FisherSettings,
    bases: Mapping[str, Basis],
    function: RowFunction = losses,
    progress: Callable[[int], None] = lambda done: None,
) -> Fisher:
    """The diagonal Fisher in rotated coordinates, ``E (Q_G^T grad W Q_A)^2``; without bases the diagonal Fisher.

    Args:
        model: theta_0.
        tracks: the training tracks.
        settings: of the Fisher.
        bases: of the weights that are rotated.
        function: whose gradients.
        progress: called with the tracks that are done.

    Raises:
        UserError: a value is not finite.
    """
    parameters, dtype = select_parameters(model, settings.layers), work_dtype(model)

    def of_unit(unit: range) -> tuple[dict[str, Tensor], set[str]]:
        sums = {name: torch.zeros_like(p, dtype=dtype) for name, p in parameters.items()}

        def add(name: str, gradient: Factors | Tensor) -> None:
            if name in bases:
                gradient = bases[name].rotated_rows(gradient)
            add_squares(sums[name], gradient)

        return sums, _sweep(model, tracks, unit, settings, function, add, progress)

    units = fisher_units(len(tracks), settings)
    return combine((of_unit(unit) for unit in units), len(tracks) * settings.draws)


def _sweep(
    model: Denoiser,
    tracks: Tracks,
    unit: range,
    settings: FisherSettings,
    function: RowFunction,
    sink: Sink,
    tick: Callable[[int], None],
) -> set[str]:
    """Pass the per-sample gradients of some tracks to a sink, in their order; returns the parameters that are used."""
    parameters, used = select_parameters(model, settings.layers), set[str]()
    for first in range(unit.start, unit.stop, settings.step):
        here = range(first, min(first + settings.step, unit.stop))
        make, pairs = fisher_pass(model, tracks, here, settings)
        for k in range(0, len(pairs), settings.rows):
            rows = make(pairs[k : k + settings.rows])
            used |= per_sample_backward(model, parameters, rows, sink, function)
        tick(here.stop)
    return used


def _product(x: Tensor) -> Tensor:
    """``sum over rows and tokens of x x^T`` for ``[B, groups, T, n]``: float64 ``[groups, n, n]``."""
    x = x.transpose(0, 1).flatten(1, 2).to(accumulator(x.dtype))  # [groups, B T, n]
    with ieee(x.device):
        return (x.mT @ x).double()
