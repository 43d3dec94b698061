"""The experiments of the paper (arXiv 2506.18312): a grid of settings, each judged by unlearning training tracks.

In every cell some training tracks are unlearned and all are scored, on other draws; then each target should rank first. One run
directory holds the cells that differ in strength and score function only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from attr_engine import grid_table, pipeline
from attr_engine.embed import pick_targets, similarity
from attr_engine.errors import UserError, one_line
from attr_engine.evaluate import clusters
from attr_engine.files import write_json, writing_in
from attr_engine.frechet import (
    UNTOUCHED,
    Pieces,
    keep_distance,
    kept_distances,
    measure_distances,
    update_names,
)
from attr_engine.grid_settings import CONFIG, Judging, settings_of_runs
from attr_engine.grid_table import Row
from attr_engine.heard import any_embedding
from attr_engine.jobs import Job, check, make_job, make_queries
from attr_engine.latents.batch import Tracks
from attr_engine.memory import fit_rows
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.monitor import Cancel
from attr_engine.report.tables import number_of
from attr_engine.result import Attribution
from attr_engine.runs import Run, key_of, open_run
from attr_engine.settings import Settings, decisive, to_json
from attr_engine.units import held, workers

RUNS, CACHE, ROWS, FRECHET = "runs", "cache", "rows.json", "frechet.json"

Say = Callable[[int, int, str], None]


class Grid:
    """A grid in its folder; finished runs are skipped, an interrupted one carries on.

    Args:
        model: theta_0.
        tracks: the training tracks.
        base: settings of all runs; ``self_influence`` names the targets, without it they are chosen. The cache is the grid's own
            where ``cache`` is not set.
        axes: settings with several values.
        out: folder.
        judging: how cells are judged.
        order: of the tables, ``"best"`` or ``"grid"`` (:func:`attr_engine.grid_table.ordered`).

    Attributes:
        runs: settings of every run.
        targets: ids of the training tracks that are unlearned.
        similar: k of the similarity columns.

    Raises:
        UserError: anything unusable, by name, before anything is computed.
    """

    def __init__(
        self, model: Denoiser, tracks: Tracks, base: Settings, axes: Mapping[str, Sequence[Any]], out: str | Path,
        judging: Judging | None = None, order: str = "best",
    ) -> None:  # fmt: skip
        if workers() > 1:
            raise UserError("a grid is the work of one process: start attr-engine grid without torchrun")
        self.model, self.tracks, self.out, self.order = model, tracks, Path(out), order
        self.judging = j = judging or Judging()
        self.base, self.axes = base, {name: list(values) for name, values in axes.items()}
        settings_of_runs(base, axes)
        self._where = {name: i for i, name in enumerate(tracks.ids)}
        self._copies = {
            name: frozenset(self._where[x] for x in some)
            for name, some in clusters(tracks.ids, tracks.info).items()
        }
        self._embedding = any_embedding(j.embedding, model, tracks, self.out / CACHE)
        self.targets = base.self_influence or self._pick()
        make_queries(tracks, [], self.targets)
        self._near = {name: similarity(self._embedding.values, self._where[name]) for name in self.targets}
        self.similar = j.similar or min(100, max(1, len(tracks) // 4))
        if not 1 <= self.similar < len(tracks) or j.piece_targets < 1:
            raise UserError(
                f"similarity to {self.similar} of {len(tracks)} tracks and pieces after {j.piece_targets} targets: ask for at least "
                "one of each, and for fewer tracks than there are"
            )
        own = replace(base, self_influence=self.targets, cache=base.cache or str(self.out.resolve() / CACHE))
        self.runs = settings_of_runs(own, axes)
        for settings in self.runs:  # whatever a run would refuse, before the first one has cost time
            check(self._job(Run(self.out, replace(settings, rows=1, memory=0.0))))
        self._pieces = None
        if j.pieces:
            self._pieces = Pieces(
                model, tracks, self._embedding, j.pieces, j.sampler_steps, j.guidance, base.seed
            )

    def _pick(self) -> tuple[str, ...]:
        copies = [self._copies[name] for name in self.tracks.ids]
        chosen = pick_targets(self._embedding.values, self.judging.targets, self.base.seed, copies)
        return tuple(self.tracks.ids[i] for i in chosen)

    def _job(self, run: Run) -> Job:
        return make_job(run, self.model, self.tracks, [])

    @property
    def _sampled(self) -> Sequence[str]:
        """Targets after whose unlearning pieces are generated."""
        return self.targets[: self.judging.piece_targets] if self._pieces else ()

    def config(self) -> dict[str, Any]:
        """What replays the grid: ``attr-engine grid --config grid.json``."""
        return {"settings": to_json(self.base), "axes": self.axes, "judging": asdict(self.judging)}

    def run(
        self, cancel: Cancel | None = None, bars: bool = False, say: Say = lambda done, total, what: None
    ) -> list[Row]:
        """Compute what is missing and write the tables, anew after every run.

        Args:
            cancel: says when to stop; looked at between passes.
            bars: whether runs draw bars on standard error.
            say: called before every run that is not finished yet with how many are, how many there are, and which one it is; and at
                the end.

        Returns:
            One row a cell, in the order of the tables.

        Raises:
            UserError: another process works in the folder, or a file cannot be written. A run that cannot be computed (such as one
                without damping where the Fisher is zero) does not end the grid: its rows say why.
            Cancelled: as in :func:`attr_engine.attribute`.
        """
        rows: list[Row] = []
        with writing_in(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            with held(self.out / ".lock") as mine:
                if not mine:
                    raise UserError(f"another process works in {self.out}: wait for it, or use another --out")
                write_json(self.out / CONFIG, self.config())
                rows_a_pass = self.base.rows or self._choose_rows()
                untouched = self._untouched()
                for done, settings in enumerate(self.runs):
                    begin = partial(say, done, len(self.runs), self.describe(settings))
                    rows += self._rows(replace(settings, rows=rows_a_pass), begin, cancel, bars)
                    self._write(rows, done + 1, untouched)
                say(len(self.runs), len(self.runs), "")
        return grid_table.ordered(rows, self.order)

    def describe(self, settings: Settings) -> str:
        """A run by what distinguishes it."""
        named = (f"{name} {grid_table.text_of(getattr(settings, name))}" for name in self.axes)
        return ", ".join(named) or "the only run"

    def _choose_rows(self) -> int:
        """Rows a pass: chosen once for the folder, so that all runs share what theta_0 says of the tracks."""
        path, s = self.out / ROWS, self.runs[0]
        layers = list(dict.fromkeys(name for run in self.runs for name in run.layers))
        key = key_of(self.model.fingerprint, self.tracks.fingerprint, layers, s.memory, s.score_draws, s.unit_tracks)  # fmt: skip
        if path.exists():
            kept = read_json(path, "number of rows")
            if kept.get("key") == key:
                return int(kept["rows"])
        rows = fit_rows(
            self.model, select_parameters(self.model, layers), self.tracks.batch([0], self.model.frames),
            self._job(Run(self.out, s)).plan, s.memory, s.unit_tracks * s.score_draws, gradients=s.gradients,
        )  # fmt: skip
        write_json(path, {"key": key, "rows": rows})
        return rows

    # -- one run ------------------------------------------------------------------------------------

    def _rows(
        self, settings: Settings, begin: Callable[[], None], cancel: Cancel | None, bars: bool
    ) -> list[Row]:
        """The cells of a run, computed where it is not there yet."""
        folder = self.out / RUNS / key_of(decisive(settings))[:12]
        cells = list(itertools.product(settings.functions, settings.strengths))
        try:
            result, distances = self._result(folder, settings, begin, cancel, bars)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # that is of the disk, not of the run
                raise
            return [Row(settings, f, x, folder.name, error=one_line(error)) for f, x in cells]
        return [
            Row(
                settings, f, x, folder.name, [self._judge(result, f, x, name) for name in self.targets],
                [math.nan if (d := distances[t, x]) is None else d for t in self._sampled],
            )
            for f, x in cells
        ]  # fmt: skip

    def _judge(self, result: Attribution, function: str, strength: float, target: str) -> grid_table.Judged:
        return grid_table.judge(
            result, function, result.row(target, strength), self._copies[target], self._near[target], self.similar,
            self._short(target),
        )  # fmt: skip

    def _short(self, target: str) -> bool:
        """Whether a track is a short one: by its metadata, or by its frames where the model knows how long one is."""
        i, model = self._where[target], self.model
        seconds = number_of(self.tracks.info[i], "seconds")
        if seconds is None and hasattr(model, "samples_per_frame") and hasattr(model, "sample_rate"):
            seconds = float(self.tracks.lengths[i]) * model.samples_per_frame / model.sample_rate
        return seconds is not None and seconds < grid_table.SHORT_SECONDS

    def _result(
        self, folder: Path, settings: Settings, begin: Callable[[], None], cancel: Cancel | None, bars: bool
    ) -> tuple[Attribution, dict[tuple[str, float], float | None]]:
        """Scores and Frechet distances of a run: read where they are there, else computed."""
        names = update_names(self._job(Run(folder, settings)), self._sampled)
        path, kept = folder / pipeline.SCORES_PARQUET, self.out / FRECHET
        known = kept_distances(kept, self._pieces)
        if path.exists() and all(name in known for name in names.values()):
            result = Attribution.from_parquet(path)
            mine = (key_of(decisive(settings)), self.model.fingerprint, self.tracks.fingerprint)
            if tuple(result.meta.get(name) for name in ("config", "model", "data")) == mine:
                return result, {pair: known[name] for pair, name in names.items()}
        begin()
        with open_run(folder, settings, cancel, bars) as run:
            job = self._job(run)
            result = pipeline.run_job(job)
            if self._pieces is not None:
                measure_distances(job, self._pieces, self._sampled, kept)
            pipeline.drop_updates(job)
            (folder / pipeline.FISHER).unlink(missing_ok=True)  # the cache has it
        known = kept_distances(kept, self._pieces)
        return result, {pair: known[name] for pair, name in names.items()}

    def _untouched(self) -> float | None:
        """Frechet distance of theta_0's pieces; None without pieces."""
        if self._pieces is None:
            return None
        path = self.out / FRECHET
        if UNTOUCHED not in kept_distances(path, self._pieces):
            keep_distance(path, self._pieces, UNTOUCHED)
        return kept_distances(path, self._pieces)[UNTOUCHED]

    # -- tables -------------------------------------------------------------------------------------

    def _write(self, rows: Sequence[Row], done: int, untouched: float | None) -> None:
        about = {
            **self.config(), "targets": list(self.targets), "tracks": len(self.tracks), "similar": self.similar,
            "frechet_untouched": untouched, "runs": len(self.runs), "runs_done": done,
        }  # fmt: skip
        grid_table.write(
            self.out, grid_table.ordered(rows, self.order), list(self.axes), self.similar, self._notes(done, untouched), about
        )  # fmt: skip

    def _notes(self, done: int, untouched: float | None) -> list[str]:
        """What the tables are of."""
        j, n, short = self.judging, len(self.tracks), sum(map(self._short, self.targets))
        draws = [
            " or ".join(str(x) for x in self.axes.get(name, [getattr(self.base, name)]))
            for name in ("update_draws", "score_draws")
        ]
        how = (
            "named by id"
            if self.base.self_influence
            else f"chosen by k-means (seed {self.base.seed}) on {j.embedding}"
        )
        notes = [f"So far {done} of {len(self.runs)} runs."] if done < len(self.runs) else []
        notes += [
            f"{len(self.targets)} training tracks of {n}, {how}, {short} of them shorter than {grid_table.SHORT_SECONDS:g} s; each was "
            f"unlearned with {draws[0]} draws a step, and all tracks were scored on {draws[1]} others.",
            "Rank of itself: 1 is right, a track and its exact copies count as one, equal scores share the middle of their places. "
            "It is necessary, not sufficient: which cell is right about generated music is decided by retraining.",
            f"Similarity: mean cosine of {j.embedding} between a target and its first and last {self.similar} tracks, itself and its "
            "exact copies left out.",
        ]  # fmt: skip
        if self._pieces is not None:
            figure = "no finite one" if untouched is None else f"{untouched:.4g}"
            notes.append(
                f"Frechet distance of {j.embedding}: {j.pieces} generated pieces a model ({j.sampler_steps} sampler steps, guidance "
                f"{j.guidance:g}, the same conditioning and noise for every model) from the {n} training tracks; the mean over "
                f"{len(self._sampled)} unlearned targets. The untouched model has {figure}. So few pieces make it too large: "
                "compare it with that figure only."
            )
        return [
            *notes,
            f"`attr-engine grid --config {CONFIG} --out .` in this folder makes the tables again.",
        ]
