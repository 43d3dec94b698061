"""The libraries that score tracks by gradients, each on one regression: bench/methods_against_libraries.py and bench/first_order.py.

A function makes the library ready and returns what is run again and again: scores float64 ``[Q, N]``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[], np.ndarray]
RowFunction = Callable[[Tensor, Tensor], Tensor]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Of predictions and targets ``[..., C, F]``, one a row."""
    return (prediction - target).square().mean(dim=(-2, -1))


def square(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square of predictions ``[..., C, F]``, one a row."""
    return prediction.square().mean(dim=(-2, -1))


@dataclass(frozen=True)
class Regression:
    """A module and its samples.

    Attributes:
        module: of some inputs, each ``[B, ...]``, to predictions ``[B, C, F]``.
        tracks: the inputs of all tracks, then the targets: each ``[N, ...]``.
        queries: the same of the queries.
        folder: where a library may write.
        batch: tracks that a library takes at a time.
        seed: of random projections.
    """

    module: nn.Module
    tracks: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    folder: Path
    batch: int
    seed: int = 0

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def loader(self, rows: tuple[Tensor, ...], batch: int) -> Any:
        data = torch.utils.data.TensorDataset(*rows)
        return torch.utils.data.DataLoader(data, batch_size=batch, shuffle=False)

    def new_folder(self) -> str:
        return tempfile.mkdtemp(dir=self.folder)


class _Rowwise(nn.Module):
    """Captum's loss: of each row, or their sum with what it wants to be told for its trick."""

    def __init__(self, summed: bool = False) -> None:
        super().__init__()
        self._summed = summed
        if summed:
            self.reduction = "sum"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        losses = mse(prediction, target)
        return losses.sum() if self._summed else losses


def captum_tracin(r: Regression, trick: bool = False) -> Run:
    """TracInCP with one checkpoint of learning rate 1; ``trick`` is its sample-wise path, of Linear and Conv2d alone."""
    from captum.influence import TracInCP

    tracin = TracInCP(
        r.module, r.loader(r.tracks, r.batch), checkpoints=["one"], checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=_Rowwise(trick), batch_size=None, sample_wise_grads_per_batch=trick,
    )  # fmt: skip
    return lambda: tracin.influence(r.queries).numpy()


def captum_last(r: Regression, layer: nn.Module) -> Run:
    """TracInCPFast, which looks at one last Linear alone."""
    from captum.influence import TracInCPFast

    tracin = TracInCPFast(
        r.module, layer, r.loader(r.tracks, r.batch), checkpoints=["one"], checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=_Rowwise(True), batch_size=None,
    )  # fmt: skip
    return lambda: tracin.influence(r.queries).numpy()


def _dattri_task(r: Regression) -> Any:
    from dattri.task import AttributionTask

    def loss(parameters: Any, data: Any) -> Tensor:
        *inputs, y = data
        inputs = tuple(x[None] for x in inputs)
        return mse(torch.func.functional_call(r.module, parameters, inputs), y[None]).sum()

    return AttributionTask(loss_func=loss, model=r.module, checkpoints=[r.module.state_dict()])


def dattri_tracin(r: Regression, normalised: bool = False) -> Run:
    from dattri.algorithm.tracin import TracInAttributor

    attributor = TracInAttributor(_dattri_task(r), torch.ones(1), normalised)
    attributor.projector_kwargs = None  # it projects to 512 numbers otherwise
    tracks, queries = r.loader(r.tracks, r.batch), r.loader(r.queries, len(r.queries[0]))
    return lambda: attributor.attribute(tracks, queries).detach().numpy().T


def dattri_trak(r: Regression, width: int, ridge: float) -> Run:
    """Projected to ``width`` numbers; ``ridge`` is lambda for whole gradients."""
    from dattri.algorithm.trak import TRAKAttributor

    def run() -> np.ndarray:
        attributor = TRAKAttributor(
            _dattri_task(r), lambda parameters, data: torch.zeros(1, dtype=torch.float64),  # Q = 1 - p = 1
            {"proj_dim": width, "proj_type": "normal", "device": "cpu", "proj_seed": r.seed % 1000},
            regularization=ridge / r.elements,  # it divides gradients by the root of their length
        )  # fmt: skip
        attributor.cache(r.loader(r.tracks, r.batch))
        return attributor.attribute(r.loader(r.queries, len(r.queries[0]))).numpy().T

    return run


def traker(r: Regression, function: RowFunction, ridge: float, width: int = 0) -> Run:
    """Without projection where ``width`` is 0; the library multiplies all scores by one number. ``ridge`` as in :func:`dattri_trak`."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        def get_output(self, model: Any, weights: Any, buffers: Any, *row: Tensor) -> Tensor:
            *inputs, y = row
            out = torch.func.functional_call(model, (weights, buffers), tuple(x[None] for x in inputs))
            return function(out, y[None]).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    n, q = len(r.tracks[0]), len(r.queries[0])

    def run() -> np.ndarray:
        projector = (
            BasicProjector(r.elements, width, r.seed % 1000, ProjectionType.normal, "cpu", 16, torch.float32)
            if width
            else NoOpProjector(device="cpu")
        )
        found = TRAKer(
            r.module, Output(), n, r.new_folder(), device="cpu", projector=projector, use_half_precision=False,
            lambda_reg=ridge / r.elements, logging_level=logging.ERROR,
        )  # fmt: skip
        found.load_checkpoint(r.module.state_dict(), model_id=0)
        # All rows at once: it makes its random matrix anew for every batch.
        found.featurize(r.tracks, num_samples=n)
        found.finalize_features()
        found.start_scoring_checkpoint("asked", r.module.state_dict(), 0, num_targets=q)
        found.score(r.queries, num_samples=q)
        return np.asarray(found.finalize_scores("asked")).T

    return run


def kronfluence_scores(
    r: Regression, strategy: str, fisher: tuple[Tensor, ...] | None = None, damping: float | None = None
) -> tuple[Run, Callable[[], np.ndarray]]:
    """Pairwise scores by its Analyzer, in the module's dtype; of Linear layers alone. The module is changed.

    Args:
        r: the regression.
        strategy: ``identity`` is TracIn; ``diagonal`` divides by the mean square of the gradients and damping.
        fisher: the rows of that mean square.
        damping: a number.

    Returns:
        What computes the scores and leaves them in a file, and what reads them.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Squares(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            *inputs, y = batch
            return mse(model(*inputs), y).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    def data(rows: tuple[Tensor, ...]) -> Any:
        return torch.utils.data.TensorDataset(*rows)

    task, dtype = Squares(), next(r.module.parameters()).dtype
    model = prepare_model(r.module, task)
    analyzer = Analyzer(
        "case", model, task, cpu=True, output_dir=r.new_folder(), disable_tqdm=True, log_level=logging.ERROR,
        disable_model_save=True,
    )  # fmt: skip
    factors = FactorArguments(
        strategy=strategy, use_empirical_fisher=True, per_sample_gradient_dtype=dtype, lambda_dtype=dtype
    )
    scores = ScoreArguments(
        damping_factor=damping, per_sample_gradient_dtype=dtype, precondition_dtype=dtype, score_dtype=dtype
    )
    analyzer.fit_all_factors(
        "factors", data(fisher or r.tracks), per_device_batch_size=r.batch, factor_args=factors
    )

    def run() -> None:
        analyzer.compute_pairwise_scores(
            "scores", "factors", data(r.queries), data(r.tracks), per_device_query_batch_size=len(r.queries[0]),
            per_device_train_batch_size=r.batch, score_args=scores, overwrite_output_dir=True,
        )  # fmt: skip

    return run, lambda: analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
