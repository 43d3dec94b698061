"""From the paths in a run's settings to a job: model, training tracks, queries."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from attr_engine.errors import UserError
from attr_engine.jobs import Job, make_job
from attr_engine.latents import LatentDataset
from attr_engine.latents.audio import find_audio
from attr_engine.latents.ingest import ingest_audio
from attr_engine.latents.manifest import MANIFEST
from attr_engine.models.autoencoder import Autoencoder
from attr_engine.models.stable_audio import StableAudioDenoiser, load_model
from attr_engine.runs import LOCKS, Run, key_of
from attr_engine.settings import Settings
from attr_engine.units import held


def load_job(run: Run) -> Job:
    """Load what the settings name.

    Raises:
        UserError: a path is not set or cannot be used.
    """
    s = run.settings
    model, tracks = load_base(s)
    with held(run.path / LOCKS / "queries.lock", wait=True):  # audio is encoded once
        queries = [_load_queries(run, model, Path(path)) for path in s.queries]
    return make_job(run, model, tracks, queries)


def load_base(s: Settings) -> tuple[StableAudioDenoiser, LatentDataset]:
    """Model and training tracks that the settings name.

    Raises:
        UserError: a path is not set or cannot be used.
    """
    for value, flag, what in ((s.model, "--model", "model"), (s.data, "--data", "training data")):
        if not value:
            raise UserError(f"no {what} was named: give {flag} (or a --config that has it)")
    if s.threads > 0:
        torch.set_num_threads(s.threads)
    model = open_model(s.model, s.weights, s.dtype, s.device, s.ema, s.checkpointing, s.compile)
    return model, LatentDataset(s.data)


def open_model(
    path: str, weights: str, dtype: str, device: str, ema: bool = True, checkpointing: bool = False, compiled: str = "off"
) -> StableAudioDenoiser:  # fmt: skip
    """Load a model onto a device that is looked at first; of several processes on a machine each takes its own GPU.

    Raises:
        UserError: the device or the model cannot be used.
    """
    own = os.environ.get("LOCAL_RANK")  # torchrun says which
    device = f"cuda:{own}" if device == "cuda" and own is not None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}): use --device cpu"
        ) from error
    return load_model(path, weights or None, dtype, device, ema, checkpointing, compiled)


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
                     progress=run.progress("queries", "file", "encoding queries"))  # fmt: skip
    return LatentDataset(folder)
