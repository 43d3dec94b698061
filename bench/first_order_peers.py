"""The peers: other libraries that score tracks by gradients, each on the rows of the same DiT (bench/score_libraries.py)."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import score_libraries as libraries
import torch
from first_order_ways import Case, Make, Way
from torch import Tensor, nn

# Tracers to a server, and data sets looked for on one, are no part of this.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
WIDTH = 128  # numbers that TRAK projects a gradient to; its default is 2048, and on a CPU its time is theirs
RIDGE = 1e-3  # any number: what a solve takes does not depend on it


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """It goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="attr-engine-bench-")


def _regression(case: Case) -> libraries.Regression:
    return libraries.Regression(case.model, case.tracks, case.queries, Path(_folder().name), case.size.batch)


def _of(case: Case, *kinds: type[nn.Module]) -> list[str]:
    """Names of the parameters of such layers."""
    return [
        f"{path}.{name}"
        for path, module in case.model.m.named_modules()
        if type(module) in kinds
        for name, _ in module.named_parameters(recurse=False)
    ]


def kronfluence(case: Case, only: Sequence[str]) -> Way:
    """Pairwise scores with the identity in the place of a curvature, into files: writing is timed, reading is not."""
    covers = _of(case, nn.Linear)
    run, read = libraries.kronfluence_scores(_regression(case), "identity")
    return Way(run, covers, lambda _: read())


def dattri(case: Case, only: Sequence[str]) -> Way:
    """TracIn, nothing projected."""
    return Way(libraries.dattri_tracin(_regression(case)), only)


def captum(case: Case, only: Sequence[str]) -> Way:
    """TracInCP, row by row."""
    return Way(libraries.captum_tracin(_regression(case)), only)


def captum_trick(case: Case, only: Sequence[str]) -> Way:
    """TracInCP by its sample-wise path, which knows two kinds of layers and says nothing of the others."""
    return Way(libraries.captum_tracin(_regression(case), True), _of(case, nn.Linear, nn.Conv2d))


def captum_last(case: Case, only: Sequence[str]) -> Way:
    """TracInCPFast, of one last Linear."""
    last = "transformer.project_out"
    influence = libraries.captum_last(_regression(case), case.model.m.get_submodule(last))

    def run() -> Any:
        try:
            return influence()
        except AssertionError as error:  # that the layer's output has two axes; it says nothing more
            raise ValueError(
                "it asserts that the last layer's output is [B, features], and a DiT's is [B, T, features]"
            ) from error

    return Way(run, [name for name in only if name.startswith(f"{last}.")])


def traker(case: Case, only: Sequence[str]) -> Way:
    """TRAK: projected, and a solve over the tracks: scores of another kind."""
    return Way(libraries.traker(_regression(case), libraries.mse, RIDGE, WIDTH), None)


def bergson(case: Case, only: Sequence[str]) -> Way:
    """Its documented entry to gradients, as far as it can be brought to: it asks for a transformers model and for ids of tokens."""
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    case.model.device = torch.device("cpu")  # type: ignore[assignment]
    case.model.__dict__["base_model"] = case.model
    data, folder = Dataset.from_dict({"track": list(range(case.size.tracks))}), _folder().name

    def run() -> Any:
        try:
            return collect_gradients(case.model, data, GradientProcessor(), IndexConfig(run_path=folder))
        except KeyError as error:
            raise ValueError(
                f"its data set has to have a column {error} of a language model's tokens"
            ) from error

    return Way(run, only)


def bergson_hooks(case: Case, only: Sequence[str]) -> Way:
    """Its hooks and its scorer around passes of our own: of Linear layers that see a sequence, which is all that they take.

    Its Conv1d is left out: it takes ``[B, C, T]`` for ``[B, T, C]``.
    """
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector, Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset

    case.model.device = torch.device("cpu")  # type: ignore[assignment]  # it asks the model for one
    for p in case.parameters.values():
        p.requires_grad_(False)
    layers = _sequences(case)
    for path in layers:
        case.model.get_submodule(path).requires_grad_()
    folder = _folder().name

    def collect(rows: tuple[Tensor, ...], scorer: Any) -> Any:
        data = Dataset.from_dict({"length": [1] * len(rows[0])})
        collector = InMemoryCollector(
            model=case.model, data=data, cfg=IndexConfig(run_path=folder), scorer=scorer,
            processor=GradientProcessor(include_bias=True), target_modules=set(layers),
        )  # fmt: skip
        for first in range(0, len(rows[0]), case.size.batch):
            some = tuple(x[first : first + case.size.batch] for x in rows)
            with collector.with_batch():
                losses = case.loss(some)
                losses.sum().backward()
            case.model.zero_grad()
            collector.process_batch(list(range(first, first + len(losses))), losses=losses)
        collector.teardown()
        return collector

    def run() -> Any:
        asked = collect(case.queries, None).gradients
        writer = InMemorySequenceScoreWriter(case.size.tracks, case.size.queries)
        return collect(
            case.tracks, Scorer(asked, list(asked), writer, torch.device("cpu"), torch.float32)
        ).scores

    covers = [f"{path}.{name}".removeprefix("m.") for path in layers
              for name, _ in case.model.get_submodule(path).named_parameters()]  # fmt: skip
    return Way(run, covers, lambda scores: np.asarray(scores).T)


def _sequences(case: Case) -> list[str]:
    """Paths of the Linear layers whose input is ``[B, T, features]``."""
    found, hooks = [], []
    for path, module in case.model.named_modules():
        if type(module) is nn.Linear:

            def look(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor, path: str = path) -> None:
                if inputs[0].ndim == 3:
                    found.append(path)

            hooks.append(module.register_forward_hook(look))
    with torch.no_grad():
        case.loss(tuple(x[:1] for x in case.tracks))
    for hook in hooks:
        hook.remove()
    return found


PEERS: dict[str, Make] = {
    "kronfluence": kronfluence,
    "dattri": dattri,
    "captum": captum,
    "captum, sample-wise": captum_trick,
    "captum, TracInCPFast": captum_last,
    "traker": traker,
    "bergson": bergson,
    "bergson, its hooks": bergson_hooks,
}
