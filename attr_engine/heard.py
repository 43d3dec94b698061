"""Latents as they sound: decoded by the model's autoencoder, for embeddings and classifiers of audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from attr_engine.embed import EMBEDDINGS, Embedding, embedding, standardiser
from attr_engine.errors import UserError
from attr_engine.latents.batch import Tracks
from attr_engine.methods import METHODS, parse
from attr_engine.methods.base import no_progress
from attr_engine.methods.embedder import Embedder
from attr_engine.methods.windows import cut_of, embed_audio
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors, save_tensors

_PART = 16  # tracks whose vectors are kept together


def decoder(model: Denoiser, rate: int) -> Callable[[np.ndarray], np.ndarray]:
    """What makes audio of one latent.

    Args:
        model: with an autoencoder.
        rate: Hz wanted.

    Returns:
        From a latent ``[C, n]``, valid frames only, to float32 ``[samples]``: all channels averaged, resampled.

    Raises:
        UserError: the model has no autoencoder, or there is no resampler (soxr).
    """
    its_rate = int(getattr(model, "sample_rate", 0))
    if its_rate <= 0 or not hasattr(model, "decode") or getattr(model, "pretransform", model) is None:
        raise UserError(
            "an embedding or classifier of audio needs pieces that can be heard, and the model has no autoencoder: use "
            "latent-statistics, or a model with one"
        )
    try:
        import soxr
    except ImportError as error:
        raise UserError(f"audio needs {error.name}: pip install 'attr-engine[audio]'") from error

    def sound(latent: np.ndarray) -> np.ndarray:
        made = cast(Any, model).decode(torch.from_numpy(np.ascontiguousarray(latent, np.float32))[None])
        audio = made[0].detach().float().mean(dim=0).cpu().numpy()
        if its_rate != rate:
            audio = soxr.resample(audio, its_rate, rate)
        return np.ascontiguousarray(audio, dtype=np.float32)

    return sound


def audio_embedding(
    name: str, model: Denoiser, tracks: Tracks, folder: str | Path, progress: Callable[[str, str], Any] = no_progress
) -> Embedding:  # fmt: skip
    """Tracks and pieces in an embedding of audio, one float64 vector each: the mean over its windows; NaN where a piece is not finite.

    Tracks are decoded from their latents as pieces are, so that what the autoencoder leaves out tells none from the other.

    Args:
        name: a method that embeds audio, with its options: ``openl3:checkpoint=FILE``, ``features``, ``embedding:onnx=FILE,rate=48000``.
        model: with an autoencoder.
        tracks: N.
        folder: the vectors of the tracks are kept there; an interrupted call carries on.
        progress: makes a progress callback from a title and a unit.

    Raises:
        UserError: a method that embeds no audio; see also :func:`decoder` and the method's ``embedder``.
    """
    method: Any = parse(name)[1]
    if not hasattr(method, "embedder"):
        fit = ", ".join(sorted(n for n, entry in METHODS.items() if hasattr(entry.make, "embedder")))
        raise UserError(f"the method {name} is no embedding of audio: use one of {fit}")
    embedder: Embedder = method.embedder(device_of(model))
    cut, sound = cut_of(embedder, method.window, method.hop, method.short), decoder(model, embedder.rate)

    def vector(latent: np.ndarray, what: str, width: int = 1) -> np.ndarray:
        audio = sound(latent)
        if not np.isfinite(audio).all():
            return np.full(width, np.nan)
        return np.asarray(embed_audio(embedder, audio, cut, what).astype(np.float64).mean(axis=0))

    fingerprint = key_of(embedder.fingerprint, vars(cut))
    key = key_of(fingerprint, model.fingerprint, tracks.fingerprint)
    show, here = progress("embedding", "track"), Path(folder) / f"embedding-{key}"

    def parts() -> Iterator[np.ndarray]:
        for first in range(0, len(tracks), _PART):
            show(first, len(tracks))
            path = here / f"part-{first:08d}.safetensors"
            if not path.exists():
                rows = [
                    vector(x, i) for i, x in _latents(tracks, range(first, min(first + _PART, len(tracks))))
                ]
                for i, row in zip(tracks.ids[first:], rows, strict=False):
                    if not np.isfinite(row).all():
                        raise UserError(f"the track {i!r} decodes to audio that is not finite: leave it out")
                save_tensors(path, {"vectors": torch.from_numpy(np.stack(rows))}, {"key": key})
            yield load_tensors(path, key)[0]["vectors"].numpy()
        show(len(tracks), len(tracks))

    raw = np.concatenate(list(parts()))
    scaled = standardiser(raw) if getattr(method, "standardised", False) else np.asarray

    def of_latents(latents: Sequence[np.ndarray]) -> np.ndarray:
        return scaled(np.stack([vector(x, "a piece", raw.shape[1]) for x in latents]))

    return Embedding(name, scaled(raw), of_latents, fingerprint)


def any_embedding(
    name: str, model: Denoiser, tracks: Tracks, folder: str | Path, progress: Callable[[str, str], Any] = no_progress
) -> Embedding:  # fmt: skip
    """:func:`audio_embedding` of a method's name, :func:`attr_engine.embed.embedding` of any other; the arguments are the former's."""
    if name in EMBEDDINGS or name.partition(":")[0] not in METHODS:
        return embedding(name, tracks)
    return audio_embedding(name, model, tracks, folder, progress)


def device_of(model: Denoiser) -> str:
    """Where a model's weights are: what listens to its pieces goes there too."""
    return str(next(model.module.parameters()).device)


def _latents(tracks: Tracks, some: range) -> Iterator[tuple[str, np.ndarray]]:
    """Id and valid frames ``[C, n]`` of every track."""
    batch = tracks.batch(some, int(tracks.lengths[some].max()))
    for i, x, n in zip(some, batch.latents.numpy(), batch.valid.tolist(), strict=True):
        yield tracks.ids[i], x[:, :n]
