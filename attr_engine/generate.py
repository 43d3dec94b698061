"""Pieces from the model's own sampler, as a set of queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.errors import UserError
from attr_engine.latents.ingest import file_hash
from attr_engine.latents.store import LatentDataset
from attr_engine.latents.writer import LatentWriter
from attr_engine.models.stable_audio import StableAudioDenoiser

BATCH = 8  # pieces that are sampled together


def piece_length(model: Any, prompt: Mapping[str, Any]) -> tuple[float, int]:
    """Seconds and valid frames of a piece: as long as its conditioning says, where it does and the model can."""
    longest = model.frames * model.samples_per_frame / model.sample_rate
    seconds = min(float(prompt.get("seconds_total", longest)), longest)
    return seconds, max(1, min(model.frames, round(seconds * model.sample_rate / model.samples_per_frame)))


def generate(
    model: StableAudioDenoiser,
    tracks: LatentDataset,
    count: int,
    out: Path,
    seed: int = 0,
    steps: int = 60,
    guidance: float = 3.0,
) -> None:
    """Sample pieces under the conditioning of training tracks drawn at random, and write a data set.

    The latents are the sampler's, not encoded again; their audio lies beside them.

    Args:
        model: a model with an autoencoder.
        tracks: whose conditioning is used; a track with ``seconds_total`` gives a piece of that length.
        count: how many pieces.
        out: folder of the data set; ``out/audio`` gets a FLAC file a piece.
        seed: of the choice and the sampler.
        steps: sampler steps.
        guidance: classifier-free guidance.

    Raises:
        UserError: nothing asked for, or the model cannot decode.
    """
    import soundfile

    if count < 1 or steps < 1 or seed < 0 or not math.isfinite(guidance):
        raise UserError(
            f"count {count} and steps {steps} must be at least 1, seed {seed} at least 0, guidance {guidance} finite"
        )
    chosen = np.random.default_rng([seed, 1]).choice(len(tracks), count, replace=count > len(tracks))
    writer = LatentWriter(
        out, padding=tracks.padding, extra={**tracks.extra, "root": str((out / "audio").resolve())}
    )
    (out / "audio").mkdir(parents=True, exist_ok=True)
    for first in range(0, count, BATCH):
        prompts = [dict(tracks.conditioning[int(i)]) for i in chosen[first : first + BATCH]]
        latents = model.sample(prompts, seed + first, steps, guidance)
        for n, (prompt, latent) in enumerate(zip(prompts, latents, strict=True), start=first):
            seconds, frames = piece_length(model, prompt)
            kept = latent[:, :frames].cpu()
            sound = model.decode(kept[None])[0].cpu().numpy()
            name, level = f"generated-{n}", max(1.0, float(np.abs(sound).max()))
            soundfile.write(out / "audio" / f"{name}.flac", (sound / level).T, model.sample_rate)
            about = ", ".join(f"{k} {v}" for k, v in prompt.items() if not k.startswith("seconds_"))
            title = f"Generated piece {n + 1}" + (f" ({about})" if about else "")
            info = {"title": title, "source": f"{name}.flac", "seconds": seconds, "kind": "generated",
                    "sha256": file_hash(out / "audio" / f"{name}.flac")}  # fmt: skip
            writer.add(name, np.ascontiguousarray(kept.numpy()), prompt, info)
    writer.close()
