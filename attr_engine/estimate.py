"""What a run is going to take, from a short measured probe: seconds, memory and disk, before anything is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.fisher import FisherSettings, fisher_units
from attr_engine.index_store import META, Maker
from attr_engine.jobs import Job, Work, fisher_work, make_job, ridge_work, score_work, unit_sizes, update_work
from attr_engine.latents.batch import Tracks
from attr_engine.latents.manifest import MANIFEST
from attr_engine.models.protocol import Denoiser
from attr_engine.pipeline import FISHER, check_all
from attr_engine.probe import Probe
from attr_engine.progress import clock_time
from attr_engine.ridge import SCORES, index_folder, index_settings
from attr_engine.runs import LOCKS, Run, check_same
from attr_engine.score import RIDGE
from attr_engine.scoring import EFFECTS
from attr_engine.settings import Settings
from attr_engine.tensorfile import load_meta
from attr_engine.units import workers

STAGES = ("fisher", "unlearn", "score", "ridge")


@dataclass(frozen=True)
class StageEstimate:
    """What is left of a stage.

    Attributes:
        name: one of :data:`STAGES`.
        work: what it still does, by all processes.
        seconds: from the (least, mean, most) of the probe's repetitions, with all processes working side by side.
        memory_bytes: of tensors on the device, the model's included, at the stage's peak, in each process.
        disk_bytes: what it adds to the run directory at most while it runs.
        kept_bytes: what of that is there at its end.
    """

    name: str
    work: Work
    seconds: tuple[float, float, float]
    memory_bytes: int
    disk_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a run still takes. The report is not counted.

    Attributes:
        stages: in their order; what is finished has no work and takes nothing.
        rows: (track, draw) pairs a pass.
        processes: that share the work.
        device: that the probe ran on.
        free_bytes: of the disk that holds the run directory.
        probe_seconds: how long the probe took.
    """

    stages: Sequence[StageEstimate]
    rows: int
    processes: int
    device: str
    free_bytes: int
    probe_seconds: float

    @property
    def seconds(self) -> tuple[float, float, float]:
        """(least, mean, most) of all stages."""
        low, middle, high = (sum(times) for times in zip(*(s.seconds for s in self.stages), strict=True))
        return low, middle, high

    @property
    def disk_bytes(self) -> int:
        """What the run directory grows by at most."""
        most = kept = 0
        for stage in self.stages:
            most, kept = max(most, kept + stage.disk_bytes), kept + stage.kept_bytes
        return most

    @property
    def warning(self) -> str:
        """One sentence where it does not fit on the disk; else empty."""
        if self.disk_bytes <= self.free_bytes:
            return ""
        return (
            f"the run needs {_size(self.disk_bytes)} of disk and {_size(self.free_bytes)} are free: "
            "make room, choose another --out, or name fewer --layers, queries or strengths"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        total = {"seconds": self.seconds, "disk_bytes": self.disk_bytes, "warning": self.warning}
        return dataclasses.asdict(self) | total

    def text(self) -> str:
        """A few lines for people."""
        many = "1 process" if self.processes == 1 else f"{self.processes} processes"
        lines = [f"{self.rows} rows a pass on {self.device}, {many}; probed for {self.probe_seconds:.0f} s"]
        for s in self.stages:
            if s.work == Work():
                lines.append(f"{s.name:8s} done")
                continue
            w = s.work
            counts = [(w.gradients, "gradients"), (w.forward, "forward passes"), (w.written, "updates")]
            lines.append(
                f"{s.name:8s} {_span(s.seconds)}; {_size(s.memory_bytes)} of memory, {_size(s.disk_bytes)} of disk; "
                + ", ".join(f"{n} {what}" for n, what in counts if n)
            )
        lines.append(
            f"{'total':8s} {_span(self.seconds)}; {_size(self.disk_bytes)} of disk, {_size(self.free_bytes)} free"
        )
        return "\n".join(lines + ([f"warning: {self.warning}"] if self.warning else []))  # fmt: skip


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _span(seconds: tuple[float, float, float]) -> str:
    low, middle, high = (clock_time(s) if s >= 60 else f"{s:.2g} s" for s in seconds)
    return f"{middle} ({low} to {high})"


def stages_of(job: Job) -> tuple[str, ...]:
    """The stages that the score functions need."""
    unlearning = STAGES[:3] if job.measured else ()
    return (*unlearning, "ridge") if RIDGE in job.run.settings.functions else unlearning


def left_of(job: Job, stages: Sequence[str] = STAGES) -> dict[str, Work]:
    """What the stages of a job still have to do: what is in its run directory is done."""
    s, path, n = job.run.settings, job.run.path, len(job.tracks)
    # Who asks for the first stages alone gets them, whatever the score functions.
    left = {name: Work() for name in stages if "ridge" not in stages or name in stages_of(job)}
    if "ridge" in left and not (path / SCORES).exists():
        left["ridge"] = ridge_work(job, 0 if (index_folder(job) / META).exists() else n)
    if (path / EFFECTS).exists() and (path / FISHER).exists():
        return left
    if "fisher" in left and not (path / FISHER).exists():
        units = fisher_units(n, FisherSettings(s.layers, job.plan, s.fisher_draws, s.mask_fisher, job.rows))
        folder = (path / FISHER).with_suffix("")
        missing = [i for i in range(len(units)) if not (folder / f"{i:02d}.safetensors").exists()]
        so_far = [folder / f"{i:02d}.so-far.safetensors" for i in missing]
        summed = sum(int(load_meta(p)["done"]) for p in so_far if p.exists())
        left["fisher"] = fisher_work(job, sum(len(units[i]) for i in missing) - summed)
    if "unlearn" in left:
        lacking = [
            (query, sum(not job.update_path(query, x, function).exists() for x in job.made(function)))
            for query in job.queries
            for function in job.row_functions
        ]
        left["unlearn"] = update_work(job, lacking)
    if "score" in left:
        folder = path / "units"
        sizes = [
            n for i, n in enumerate(unit_sizes(job)) if not (folder / f"00-{i:06d}.safetensors").exists()
        ]
        # Of a race that has begun no more is known than what it takes at most.
        left["score"] = score_work(job, unit_sizes(job) if s.top else sizes)
    return left


def _disk(job: Job, stage: str, work: Work, group: int) -> tuple[int, int]:
    """Bytes that a stage adds at most, and that it leaves."""
    s = job.run.settings
    if work == Work():
        return 0, 0
    if stage == "fisher":
        units = fisher_units(
            len(job.tracks), FisherSettings(s.layers, job.plan, s.fisher_draws, rows=job.rows)
        )
        return (len(units) + 1) * group, group
    if stage == "ridge":  # units of float32 numbers beside the rows in float16 and the solve in float64
        settings, tracks = index_settings(job), len(job.tracks)
        numbers = Maker(job.model, settings).width
        width = min(settings.width or numbers, numbers, tracks)
        kept = width * (2 * tracks + 8 * numbers) + 16 * len(job.queries) * tracks
        return 4 * tracks * numbers + kept, kept
    if stage == "unlearn":
        return work.written * group, work.written * group
    updates = len(job.queries) * len(s.strengths)
    numbers = 1 + updates * (2 * job.needs_forward + len(job.first_order))
    effects = int(8 * len(job.scored) * s.score_draws * numbers * (s.race_share if s.top else 1))
    names = [sum(map(len, x)) / len(x) for x in (job.scored.ids, [q.id for q in job.queries], s.functions)]
    line = sum(names) + 60  # three numbers, strength, quotes and commas; 26 bytes a row in Parquet
    tables = int(len(job.scored) * updates * len(s.functions) * (line + 26))
    return 2 * effects + tables, effects + tables


def estimate(job: Job, stages: Sequence[str] = STAGES) -> Estimate:
    """Estimate what a job still takes, from a probe of at most about ten seconds a kind of pass.

    Args:
        job: in a :func:`mirrored` run directory; the probe writes one update there.
        stages: which stages.

    Returns:
        Of every stage the time of its passes, of reading tracks, and of making, writing and reading updates, each measured
        on this device with as many rows as the run would use; times what is left, divided by the number of processes.

    Raises:
        UserError: what the run itself would refuse.
    """
    begun = time.perf_counter()
    check_all(job)
    probe, found = Probe(job), []
    for stage, work in left_of(job, stages).items():
        seconds, memory = np.zeros(3), 0
        if work != Work():
            seconds = getattr(probe, stage)(work) / workers() + probe.once
            probe.once, memory = 0.0, probe.memory(stage)
        low, middle, high = (float(x) for x in seconds)
        most, kept = _disk(job, stage, work, probe.group)
        found.append(StageEstimate(stage, work, (low, middle, high), memory, most, kept))
    device = "cpu" if probe.device.type == "cpu" else torch.cuda.get_device_name(probe.device)
    free = shutil.disk_usage(job.run.path).free
    return Estimate(found, job.rows, workers(), device, free, time.perf_counter() - begun)


@contextlib.contextmanager
def mirrored(out: str | Path, settings: Settings, bars: bool = False) -> Iterator[Run]:
    """A run directory that shows what lies in another one, on the same disk, for as long as the block runs.

    Whatever is written there goes with it; the other one is not changed, and need not be there.

    Raises:
        UserError: the other one holds a run with other settings, or nothing can be written beside it.
    """
    out = Path(out).absolute()
    if out.is_dir():
        check_same(out, settings)
    base = next(p for p in (out, *out.parents) if p.exists())
    entries = sorted(out.iterdir()) if out.is_dir() else []
    try:
        folder = tempfile.TemporaryDirectory(prefix=".attr-engine-dry-run-", dir=base)
    except OSError as error:
        raise UserError(
            f"nothing can be written in {base} ({error.strerror}): choose another --out"
        ) from error
    with folder as name:
        for entry in entries:
            half_written = entry.name.startswith("queries-") and not (entry / MANIFEST).exists()
            if not half_written and entry.name != LOCKS and not entry.name.startswith((".", "status")):
                (Path(name) / entry.name).symlink_to(entry)
        run = Run(Path(name), settings, bars=bars)
        try:
            yield run
        finally:
            run.monitor.close()


def dry_run(
    model: Denoiser,
    tracks: Tracks,
    queries: Tracks | Sequence[Tracks] | None,
    settings: Settings,
    out: str | Path,
) -> Estimate:
    """What :func:`attr_engine.attribute` with the same arguments would still take; nothing is left behind.

    Raises:
        UserError: what the run itself would refuse.
    """
    sets: Any = queries if isinstance(queries, list | tuple) else [] if queries is None else [queries]
    with mirrored(out, settings) as run:
        return estimate(make_job(run, model, tracks, sets))
