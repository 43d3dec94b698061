"""Times what a run consists of: passes, reading tracks, making, writing and reading updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine import kernels
from attr_engine.diffusion import ROW_FUNCTIONS, Noised, noised_rows, predict, row_losses, work_dtype
from attr_engine.features import Projector, row_features
from attr_engine.fisher import Fisher
from attr_engine.influence import DIRECTION_BYTES, one_row_dots, row_dots
from attr_engine.jobs import Job, Work
from attr_engine.latents.batch import Tracks
from attr_engine.memory import passes, peak_bytes, weight_bytes
from attr_engine.models.protocol import select_parameters
from attr_engine.persample import SQUARES, summed_gradient
from attr_engine.ridge import index_settings
from attr_engine.unlearn import Update, applied, unlearn_query

_TIMES, _LEAST_SECONDS, _MOST_SECONDS = (
    3,
    0.3,
    10.0,
)  # so often and so long at least; no longer, but once at least
_PASSES = {
    "fisher": ("the Fisher",),
    "unlearn": ("unlearning",),
    "score": ("scoring", "influence"),
    "ridge": ("the Fisher",),
}


@dataclass(frozen=True)
class _Times:
    """Seconds of one thing: (least, mean, most), and what the first time took more than the mean."""

    each: np.ndarray
    once: float


def _time(work: Callable[[], object], device: torch.device) -> _Times:
    """Time some work after doing it once."""
    seconds: list[float] = []
    begun = time.perf_counter()
    while True:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        gone, again = time.perf_counter() - begun, len(seconds) - 1
        if again >= 1 and (gone > _MOST_SECONDS or (again >= _TIMES and gone > _LEAST_SECONDS)):
            break
    first, *rest = seconds
    each = np.array([min(rest), float(np.mean(rest)), max(rest)])
    return _Times(each, max(0.0, first - float(each[1])))


class Probe:
    """Times what the stages of a job consist of, with rows and tracks of a pass of the run."""

    def __init__(self, job: Job) -> None:
        self.job, self.s = job, job.run.settings
        self.device = next(job.model.module.parameters()).device
        self.parameters = select_parameters(job.model, self.s.layers)
        self.group = sum(p.numel() for p in self.parameters.values()) * work_dtype(job.model).itemsize
        self.once = 0.0  # seconds of first passes, since it was last taken
        self._loaded = job.run.path / "probe.safetensors"

    def _each(self, work: Callable[[], object]) -> np.ndarray:
        times = _time(work, self.device)
        self.once += times.once
        return times.each

    def _rows(self, purpose: Any, rows: int, draws: int, masked: bool, tracks: Tracks, first: int = 0) -> Any:
        """Rows as the run makes them, and what makes them."""
        here = range(first, min(first + max(1, rows // draws), len(tracks)))
        batch = tracks.batch(here, self.job.model.frames)
        pairs = [(i, d) for i in range(len(here)) for d in range(draws)][:rows]

        def make(some: Sequence[tuple[int, int]] = pairs) -> Any:
            return noised_rows(self.job.model, batch, some, self.job.plan, purpose, masked)

        return make, pairs

    def reading(self, tracks: int) -> np.ndarray:
        """Of reading one track, where so many are read at a time."""
        here = range(min(tracks, len(self.job.tracks)))
        return self._each(lambda: self.job.tracks.batch(here, self.job.model.frames)) / len(here)

    def fisher(self, work: Work) -> np.ndarray:
        """Of the Fisher."""
        s, rows = self.s, self.job.rows
        make, pairs = self._rows("fisher", rows, s.fisher_draws, s.mask_fisher, self.job.tracks)
        total = {n: torch.zeros_like(p, dtype=work_dtype(self.job.model)) for n, p in self.parameters.items()}
        squares = partial(SQUARES[s.gradients], self.job.model, self.parameters, make, pairs, total)
        reading = self.reading(max(1, rows // s.fisher_draws))
        return work.gradients * self._each(squares) / len(pairs) + work.tracks * reading

    def unlearn(self, work: Work) -> np.ndarray:
        """Of unlearning."""
        s, job, query = self.s, self.job, self.job.queries[0]
        rows = min(job.rows, s.update_draws)
        make, pairs = self._rows("update", rows, s.update_draws, s.mask_update, query.tracks, query.index)
        gradient = self._each(lambda: summed_gradient(job.model, self.parameters, make())) / len(pairs)
        seconds = work.gradients * gradient + work.written * self._each(self._write)
        if work.forward:  # sizes are looked for
            seconds = seconds + work.forward * self._forward(make()) / len(pairs)
        return np.asarray(seconds)

    def _forward(self, noised: Noised) -> np.ndarray:
        """Of a pass under an update, its losses and displacements."""
        with torch.no_grad():
            before = predict(self.job.model, noised)

            def forward() -> None:
                after = predict(self.job.model, noised)
                row_losses(after, noised)
                kernels.per_draw_loss(after, before, noised.counted)

            return self._each(forward)

    def _write(self) -> None:
        """Make and write an update, whose gradient is there already."""
        s, query = self.s, self.job.queries[0]
        ones: Mapping[str, Tensor] = {
            n: torch.ones_like(p, dtype=work_dtype(self.job.model)).detach()
            for n, p in self.parameters.items()
        }
        unlearn_query(
            self.job.model, query.tracks, query.index, Fisher(ones, 1), self.job.plan, len(self.job.tracks),
            s.strengths[0], "size", 1, s.update_draws, s.damping, s.mask_update, self.job.rows, ones,
        ).save(self._loaded, "")  # fmt: skip

    def score(self, work: Work) -> np.ndarray:
        """Of scoring."""
        s, job = self.s, self.job
        rows = min(job.rows, s.unit_tracks * s.score_draws)
        make, pairs = self._rows("score", rows, s.score_draws, s.mask_score, job.tracks)
        self._write()
        seconds = work.forward * self._forward(make()) / len(pairs)
        noising = (work.tracks * s.score_draws + work.gradients) * self._each(make) / len(pairs)
        seconds = (
            seconds + noising + work.tracks * self.reading(s.unit_tracks) + work.read * self._each(self._read)
        )
        for name in job.first_order:
            share = work.gradients / len(job.first_order)
            seconds = seconds + share * self._dots(make, pairs, name)
        return np.asarray(seconds)

    def ridge(self, work: Work) -> np.ndarray:
        """Of the index and of asking it: projected gradients."""
        make, pairs = self._rows(
            "score", self.job.rows, self.s.score_draws, self.s.mask_score, self.job.tracks
        )
        settings, rows = index_settings(self.job), make()
        projector = Projector(self.parameters, settings.projection, settings.rank, settings.seed)
        function = ROW_FUNCTIONS[settings.function]
        each = self._each(lambda: row_features(self.job.model, self.parameters, rows, projector, function))
        return work.gradients * (each + self._each(make)) / len(pairs) + work.tracks * self.reading(16)

    def _read(self) -> None:
        """Read an update and apply it."""
        with applied(self.job.model, Update.load(self._loaded).delta):
            pass

    def _dots(self, make: Any, pairs: Sequence[Any], name: str) -> np.ndarray:
        """Of a row's gradient and its products with every update."""
        updates = len(self.job.queries) * len(self.s.strengths)
        held = max(1, min(updates, DIRECTION_BYTES // self.group))
        directions = {
            n: torch.ones(held, *p.shape, dtype=work_dtype(self.job.model), device=p.device)
            for n, p in self.parameters.items()
        }
        some = pairs if self.s.gradients == "batch" else pairs[:1]
        measure = row_dots if self.s.gradients == "batch" else one_row_dots
        model, parameters = self.job.model, self.parameters
        rows = make(some)
        each = self._each(lambda: measure(model, parameters, rows, directions, ROW_FUNCTIONS[name]))
        return -(-updates // held) * each / len(some)

    def memory(self, stage: str) -> int:
        """Bytes of tensors at the stage's peak."""
        s, job = self.s, self.job
        updates = len(job.queries) * len(s.strengths) if job.first_order else 0
        kinds = passes(
            job.model, self.parameters, job.tracks.batch([0], job.model.frames), job.plan,
            s.unit_tracks * s.score_draws, updates, s.gradients,
        )  # fmt: skip
        found = [kinds[name] for name in _PASSES[stage] if name in kinds]
        most = max(one.held + peak_bytes(partial(one.work, job.rows), self.device) for one in found)
        return weight_bytes(job.model) + most
