"""The peers: other libraries that make per-sample gradients or their squares, each called as its fastest.

Each gets the same DiT. What a library needs to be told or to have written in another way stands at its function.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_ways import Case, Make, Rows, Sums, Way
from torch import Tensor, nn


def opacus(case: Case, only: Sequence[str]) -> Way:
    """Hooks that store ``[B, *shape]`` on every parameter; then their squares are summed.

    Opacus refuses a module with a buffer: the shift of the DiT's LayerNorm, which is zero, becomes a plain
    attribute with the same value.
    """
    from opacus import GradSampleModule

    for module in case.model.modules():
        for name, value in list(module.named_buffers(recurse=False)):
            if list(module.parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Hooks are off in eval mode; the DiT has no dropout and no statistics, so training mode changes nothing.
        wrapped = GradSampleModule(case.model, loss_reduction="sum", strict=False).train()

    def run() -> Sums:
        case.loss(case.rows, wrapped).sum().backward()
        out = {}
        for name, p in case.parameters.items():
            out[name] = p.grad_sample.square_().sum(dim=0)  # type: ignore[attr-defined]
            # Freed at once, which is less memory than a zero_grad at the end.
            p.grad = p.grad_sample = None  # type: ignore[attr-defined]
        return out

    return Way(run)


def _extended(case: Case) -> dict[str, nn.Parameter]:
    """Extend the layers that BackPACK knows; other parameters are frozen, which saves their gradients."""
    from backpack import extend

    covered = {}
    for p in case.parameters.values():
        p.requires_grad_(False)
    for path, module in case.model.m.named_modules():
        if type(module) in (nn.Linear, nn.Conv1d):
            extend(module)
            for name, p in module.named_parameters(recurse=False):
                covered[f"{path}.{name}"] = p.requires_grad_()
    return covered


def backpack_sums(case: Case, only: Sequence[str]) -> Way:
    """BackPACK's own extension for the sum; a Linear with tokens goes through an einsum of four factors."""
    from backpack import backpack
    from backpack.extensions import SumGradSquared

    covered = _extended(case)

    def run() -> Sums:
        with backpack(SumGradSquared()):
            case.loss(case.rows).sum().backward()
        out = {}
        for name, p in covered.items():
            out[name] = p.sum_grad_squared  # type: ignore[attr-defined]
            p.grad = p.sum_grad_squared = None  # type: ignore[attr-defined]
        return out

    return Way(run)


def backpack_batch(case: Case, only: Sequence[str]) -> Way:
    """BackPACK's per-sample gradients, squared and freed layer by layer in its hook."""
    from backpack import backpack
    from backpack.extensions import BatchGrad

    covered = _extended(case)

    def square(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            if hasattr(p, "grad_batch"):
                # Not in place: a bias' gradients can be the memory of the gradient that flows on.
                p.squares = p.grad_batch.square().sum(dim=0)  # type: ignore[attr-defined]
                del p.grad_batch

    def run() -> Sums:
        with backpack(BatchGrad(), extension_hook=square):
            case.loss(case.rows).sum().backward()
        out = {}
        for name, p in covered.items():
            out[name] = p.squares  # type: ignore[attr-defined]
            p.grad = p.squares = None  # type: ignore[attr-defined]
        return out

    return Way(run)


def _task(case: Case) -> Any:
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(self, batch: Rows, model: nn.Module, sample: bool = False) -> Tensor:
            return case.loss(batch, model).sum()

        def compute_measurement(self, batch: Rows, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Summed()


def _by_name(case: Case, matrices: dict[str, Tensor]) -> Sums:
    """Kronfluence's matrices by the DiT's names: the last column belongs to the bias where there is one."""
    out = {}
    for path, value in matrices.items():
        path = path.removeprefix("m.")
        if f"{path}.bias" in case.parameters:
            value, out[f"{path}.bias"] = value[:, :-1], value[:, -1]
        out[f"{path}.weight"] = value
    return out


def _diagonal() -> Any:
    from kronfluence.arguments import FactorArguments

    return FactorArguments(strategy="diagonal", use_empirical_fisher=True)


def kronfluence_files(case: Case, only: Sequence[str]) -> Way:
    """As its documentation says: an Analyzer over a data set, whose result is a file. Writing it is timed, reading it is not."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from torch.utils.data import TensorDataset

    logging.disable(logging.WARNING)
    task = _task(case)
    model = prepare_model(case.model, task)
    folder = tempfile.TemporaryDirectory(prefix="attr-engine-bench-")
    analyzer = Analyzer(
        "bench", model, task, cpu=True, output_dir=folder.name, disable_tqdm=True, disable_model_save=True
    )
    data, rows, arguments = TensorDataset(*case.rows), len(case.rows[1]), _diagonal()

    def run() -> tempfile.TemporaryDirectory[str]:
        analyzer.fit_lambda_matrices("f", data, per_device_batch_size=rows, factor_args=arguments,
                                     overwrite_output_dir=True)  # fmt: skip
        return folder

    def read(folder: tempfile.TemporaryDirectory[str]) -> Sums:
        from safetensors.torch import load_file

        (path,) = Path(folder.name).rglob("lambda_matrix.safetensors")
        return _by_name(case, load_file(path))

    return Way(run, read)


def kronfluence_fit(case: Case, only: Sequence[str]) -> Way:
    """The function inside the Analyzer that does the work: no files, no data loader."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader
    from kronfluence.utils.constants import LAMBDA_MATRIX_NAME
    from kronfluence.utils.state import State

    task = _task(case)
    model, state, arguments = prepare_model(case.model, task), State(cpu=True), _diagonal()

    def run() -> dict[str, Tensor]:
        batches: Any = [case.rows]  # all that is asked of a loader is its length and its batches
        _, found = fit_lambda_matrices_with_loader(model, state, task, batches, arguments, disable_tqdm=True)
        return found[LAMBDA_MATRIX_NAME]

    return Way(run, lambda found: _by_name(case, found))


PEERS: dict[str, Make] = {
    "opacus": opacus,
    "backpack": backpack_sums,
    "backpack BatchGrad": backpack_batch,
    "kronfluence": kronfluence_files,
    "kronfluence, no files": kronfluence_fit,
}
