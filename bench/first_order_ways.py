"""The model, the rows, and the ways to gradient dot products that need no library but torch and the engine.

A way gives ``S[q, i] = <grad L(query q), grad L(track i)>``, summed over the parameters that it covers. Every track and query is one row:
one draw.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
from fisher_ways import Rows, Velocity
from score_libraries import mse
from torch import Tensor, nn

import attr_engine as ae
from attr_engine.diffusion import DrawPlan, Purpose, noised_rows
from attr_engine.jobs import Query
from attr_engine.latents.memory import MemoryTracks
from attr_engine.methods import Workspace, parse


@dataclass(frozen=True)
class Size:
    """Size of a case: latent frames, width and depth of the DiT, tracks and queries, rows that a library takes at a time."""

    tokens: int
    width: int
    depth: int
    tracks: int
    queries: int
    batch: int


class Case:
    """A DiT with random weights, tracks and queries for it, and their rows as tensors.

    Attributes:
        denoiser: the DiT as the engine sees it.
        model: the same as a module of four tensors, whose parameters begin with ``m.``.
        parameters: the DiT's, by their own names.
        tracks: rows of the tracks: x_t, t, two conditions, target.
        queries: rows of the queries.
    """

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32) -> None:
        made = cases.Case(size.tokens, size.width, size.depth, size.tracks)
        self.size, self.denoiser, self.set_of_tracks = size, made.model, made.tracks
        rng = np.random.default_rng(1)
        latents = [
            rng.standard_normal((made.size.channels, size.tokens), dtype=np.float32)
            for _ in range(size.queries)
        ]
        conditioning = [{"row": size.tracks + i} for i in range(size.queries)]
        self.set_of_queries = MemoryTracks([f"q{i}" for i in range(size.queries)], latents, conditioning)
        # The rows are noised in float32, so that every precision sees the same numbers.
        self.tracks = self._rows(self.set_of_tracks, "score", dtype)
        self.queries = self._rows(self.set_of_queries, "update", dtype)
        self.model = Velocity(made.model.module).to(dtype)
        self.parameters: dict[str, nn.Parameter] = dict(made.model.module.named_parameters())

    def _rows(self, tracks: MemoryTracks, purpose: Purpose, dtype: torch.dtype) -> Rows:
        batch, pairs = (
            tracks.batch(range(len(tracks)), self.size.tokens),
            [(i, 0) for i in range(len(tracks))],
        )
        rows = noised_rows(self.denoiser, batch, pairs, DrawPlan(replicates=1), purpose, False)
        conditions = self.denoiser.conditioning(batch.conditioning)
        parts = (rows.x_t, rows.t, conditions["cross_attn_cond"], conditions["global_embed"], rows.target)
        return tuple(x.to(dtype) for x in parts)

    def loss(self, rows: Rows, model: Callable[..., Tensor] | None = None) -> Tensor:
        """Mean squared error of each row, ``[B]``."""
        *inputs, target = rows
        return mse((model or self.model)(*inputs), target)


@dataclass(frozen=True)
class Way:
    """A way that is ready to run on a case.

    Attributes:
        run: what is timed.
        covers: the parameters whose gradients it looks at; None where its scores are of another kind, which nothing here is compared with.
        read: what ``run`` returned, as scores ``[Q, N]``.
    """

    run: Callable[[], Any]
    covers: Sequence[str] | None
    read: Callable[[Any], np.ndarray] = np.asarray


Make = Callable[[Case, Sequence[str]], Way]
"""Makes a way; the names are those of the parameters that are wanted, which only some ways can restrict."""


def engine(case: Case, only: Sequence[str], fitting: bool = False) -> Way:
    """The method ``tracin`` through the interface of all methods; rows are noised within its time, scores written to disk.

    Args:
        case: the case.
        only: the parameters.
        fitting: whether its fit is a part of the run: it chooses the rows of a pass and compares a batch with single rows.
    """
    settings = ae.Settings(
        layers=tuple(only), score_draws=1, update_draws=1, replicates=1, mask_update=False, plan="track", dtype="float32"
    )  # fmt: skip
    queries = [Query(case.set_of_queries, i, "") for i in range(case.size.queries)]
    folder = tempfile.TemporaryDirectory(prefix="attr-engine-bench-")

    def fit() -> Any:
        # A folder of its own, or what is kept there would not be computed again.
        work = Workspace(Path(tempfile.mkdtemp(dir=folder.name)), settings)
        return parse("tracin")[1].fit(case.denoiser, case.set_of_tracks, work)

    fitted = None if fitting else fit()

    def run() -> np.ndarray:
        if fitted is None:
            return fit().score(queries)
        fresh = Workspace(Path(tempfile.mkdtemp(dir=folder.name)), settings)
        return type(fitted)(**{**vars(fitted), "work": fresh}).score(queries)

    return Way(run, only)


def engine_fitting(case: Case, only: Sequence[str]) -> Way:
    """The engine with its fit in every run."""
    return engine(case, only, True)


def single(case: Case, rows: Rows, i: int, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """The gradient of one row, by autograd alone."""
    return torch.autograd.grad(case.loss(tuple(x[i : i + 1] for x in rows)).sum(), parameters)


def loop(case: Case, only: Sequence[str]) -> Way:
    """One row at a time: the queries' gradients are kept, each track's meets them all."""
    parameters = [case.parameters[name] for name in only]
    q, n = case.size.queries, case.size.tracks

    def run() -> Tensor:
        kept = [torch.zeros(q, p.numel()) for p in parameters]
        for k in range(q):
            for whole, g in zip(kept, single(case, case.queries, k, parameters), strict=True):
                whole[k] = g.flatten()
        out = torch.zeros(q, n)
        for i in range(n):
            for whole, g in zip(kept, single(case, case.tracks, i, parameters), strict=True):
                out[:, i] += whole @ g.flatten()
        return out

    return Way(run, only)


def parts(case: Case) -> dict[str, Tensor]:
    """The loop, in the case's precision: what each parameter contributes, ``[Q, N]``."""
    parameters = list(case.parameters.values())
    asked = [single(case, case.queries, k, parameters) for k in range(case.size.queries)]
    out = {name: torch.zeros(len(asked), case.size.tracks, dtype=torch.float64) for name in case.parameters}
    for i in range(case.size.tracks):
        track = single(case, case.tracks, i, parameters)
        for k, query in enumerate(asked):
            for value, a, b in zip(out.values(), query, track, strict=True):
                value[k, i] = (a * b).sum()
    return out


def vmap(case: Case, only: Sequence[str]) -> Way:
    """``vmap(grad)`` of all queries, then of a batch of tracks at a time."""
    weights = {f"m.{name}": case.parameters[name].detach() for name in only}

    def one(values: dict[str, Tensor], *row: Tensor) -> Tensor:
        def model(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(case.model, values, inputs)

        return case.loss(tuple(x[None] for x in row), model).sum()

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, *[0] * len(case.tracks)))

    def run() -> Tensor:
        asked = each(weights, *case.queries)
        found = []
        for first in range(0, case.size.tracks, case.size.batch):
            some = each(weights, *(x[first : first + case.size.batch] for x in case.tracks))
            found.append(sum(asked[name].flatten(1) @ g.flatten(1).T for name, g in some.items()))
        return torch.cat(found, dim=1).detach()  # parameters that are not wanted leave a graph behind

    return Way(run, only)


WAYS: dict[str, Make] = {"engine": engine, "engine, with its fit": engine_fitting, "loop": loop, "vmap": vmap}


def error(found: np.ndarray, want: Tensor) -> float:
    """Norm of the difference over the norm, of all scores, in float64."""
    if found.shape != tuple(want.shape):
        raise ValueError(f"scores are {found.shape}, not {tuple(want.shape)}")
    return float(np.linalg.norm(found.astype(np.float64) - want.numpy()) / np.linalg.norm(want.numpy()))
