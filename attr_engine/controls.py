"""Rankings that no method should lose to: random, duration, training loss, raw-latent cosine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attr_engine.latents.batch import Tracks


def _centred(tracks: Tracks, indices: Sequence[int], frames: int, mean: np.ndarray) -> np.ndarray:
    """Flattened latents ``[n, C * F]``, centred, zero where padded, of unit length."""
    batch = tracks.batch(indices, frames)
    x = (batch.latents.double().numpy() - mean[None, :, None]) * batch.mask().numpy()[:, None, :]
    flat = x.reshape(len(indices), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.where(length > 0, length, 1.0))


def _chunks(n: int, size: int = 64) -> list[list[int]]:
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def channel_mean(tracks: Tracks, frames: int) -> np.ndarray:
    """Mean of every channel over the valid frames of all tracks, ``[C]`` float64."""
    total, count = np.zeros(tracks.channels), 0
    for chunk in _chunks(len(tracks)):
        batch = tracks.batch(chunk, frames)
        mask = batch.mask().numpy()
        total += (batch.latents.double().numpy() * mask[:, None, :]).sum(axis=(0, 2))
        count += int(mask.sum())
    return np.asarray(total / count)


def raw_latent_cosine(tracks: Tracks, queries: Sequence[tuple[Tracks, int]], frames: int) -> np.ndarray:
    """Cosine of the latents, frame by frame from the start, padding left out: ``[Q, N]`` float64."""
    mean = channel_mean(tracks, frames)
    wanted = np.concatenate([_centred(t, [i], frames, mean) for t, i in queries])
    return np.concatenate(
        [wanted @ _centred(tracks, chunk, frames, mean).T for chunk in _chunks(len(tracks))], axis=1
    )


def control_scores(
    tracks: Tracks, queries: Sequence[tuple[Tracks, int]], base: np.ndarray, frames: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores of every control, larger = more responsible.

    Args:
        tracks: the training tracks, N.
        queries: (set, index) of every query, Q.
        base: loss of every track under theta_0, ``[N]``.
        frames: F.
        seed: of the random control.

    Returns:
        Name to float64 ``[Q, N]``: ``random``; ``duration`` (shorter first: the artefact to look out
        for); ``training loss`` (higher first); ``raw-latent cosine``.
    """
    shape = (len(queries), len(tracks))
    return {
        "random": np.random.default_rng(seed).random(shape),
        "duration": np.broadcast_to(-tracks.lengths.astype(np.float64), shape).copy(),
        "training loss": np.broadcast_to(base, shape).copy(),
        "raw-latent cosine": raw_latent_cosine(tracks, queries, frames),
    }
