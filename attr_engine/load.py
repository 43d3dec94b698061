"""From the paths in a run's settings to a job: model, training tracks, queries."""

from __future__ import annotations

from pathlib import Path

import torch

from attr_engine import progress
from attr_engine.errors import UserError
from attr_engine.jobs import Job, make_queries
from attr_engine.latents import LatentDataset
from attr_engine.latents.audio import find_audio
from attr_engine.latents.ingest import ingest_audio
from attr_engine.latents.manifest import MANIFEST
from attr_engine.models.autoencoder import Autoencoder
from attr_engine.models.stable_audio import StableAudioDenoiser, load_model
from attr_engine.runs import Run, key_of


def load_job(run: Run) -> Job:
    """Load what the settings name.

    Raises:
        UserError: a path is not set or cannot be used.
    """
    s = run.settings
    for value, flag, what in ((s.model, "--model", "model"), (s.data, "--data", "training data")):
        if not value:
            raise UserError(f"no {what} was named: give {flag} (or a --config that has it)")
    if s.threads > 0:
        torch.set_num_threads(s.threads)
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {s.device!r} cannot be used ({str(error).splitlines()[0]}): use --device cpu"
        ) from error
    model = load_model(s.model, s.weights or None, s.dtype, s.device, s.ema, s.checkpointing, s.compile)
    tracks = LatentDataset(s.data)
    queries = [_load_queries(run, model, Path(path)) for path in s.queries]
    return Job(run, model, tracks, make_queries(tracks, queries, s.self_influence))


def _load_queries(run: Run, model: StableAudioDenoiser, source: Path) -> LatentDataset:
    """A data set as it is; audio is encoded into the run directory first, longer pieces refused."""
    if (source / MANIFEST).exists():
        return LatentDataset(source)
    files = find_audio(source)
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    folder = run.path / f"queries-{key_of(str(source.resolve()), stamp, model.fingerprint)}"
    if not (folder / MANIFEST).exists():
        if model.pretransform is None:
            raise UserError(
                f"the model has no autoencoder, or its weights lack it, so the audio {source} cannot be encoded: "
                "ingest latents as queries"
            )
        encoder = Autoencoder(
            model.pretransform, model.sample_rate, model.config["model"]["pretransform"], model.fingerprint
        )
        metadata = next((p for p in (source / "metadata.csv", source / "metadata.json") if p.is_file()), None)
        names = (
            [] if model.wrapper.conditioner is None else list(model.wrapper.conditioner.conditioners.keys())
        )
        condition = [n for n in names if n not in ("seconds_start", "seconds_total")]
        ingest_audio(source, folder, encoder, model.frames, metadata, condition, "error", kind="query",
                     progress=progress.bar("encoding queries", "file"))  # fmt: skip
    return LatentDataset(folder)
