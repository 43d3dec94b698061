"""Embeddings of tracks: what similarity, the choice of targets and the Frechet distance are measured in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine.errors import UserError, one_line
from attr_engine.latents.batch import Tracks
from attr_engine.latents.npy import read_npy_file

IDS = "ids.json"  # beside a .npy: the id of every row
_CHUNK = 64  # tracks that are in memory at a time
_ROUNDS = 100  # of Lloyd's algorithm, which settles long before


@dataclass(frozen=True)
class Embedding:
    """One vector a track.

    Attributes:
        name: as asked for.
        values: float64 ``[N, E]``, in the order of the tracks.
        of_latents: embeds other pieces in the same space: latents ``[C, n]``, valid frames only, to ``[M, E]``; None where only
            the vectors of the tracks are known.
        fingerprint: hex digest of what the name does not say, such as a checkpoint's weights; may be empty.
    """

    name: str
    values: np.ndarray
    of_latents: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    fingerprint: str = ""


def statistics(latents: Sequence[np.ndarray]) -> np.ndarray:
    """Mean and standard deviation of every channel over the frames: ``[M, 2 C]`` float64 of M latents ``[C, n]``, n at least 1."""
    return np.stack([np.concatenate([x.mean(axis=1), x.std(axis=1)]) for x in map(_double, latents)])


def _double(latent: np.ndarray) -> np.ndarray:
    return np.asarray(latent, dtype=np.float64)


def standardiser(raw: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What brings every dimension of tracks ``[N, E]`` to mean 0 and standard deviation 1, and other vectors the same way."""
    mean, spread = raw.mean(axis=0), raw.std(axis=0)
    # What is the same in all tracks tells none from another; rounding must not make it decide.
    unit = np.where(spread > 1e-12 * np.abs(mean), spread, np.inf)
    return lambda values: np.asarray((values - mean) / unit)


def latent_statistics(tracks: Tracks) -> Embedding:
    """:func:`statistics` of every track's valid frames, each standardised over the training tracks; needs no weights."""
    rows = []
    for first in range(0, len(tracks), _CHUNK):
        chunk = range(first, min(first + _CHUNK, len(tracks)))
        batch = tracks.batch(chunk, int(tracks.lengths[chunk].max()))
        pairs = zip(batch.latents.numpy(), batch.valid.tolist(), strict=True)
        rows.append(statistics([latent[:, :n] for latent, n in pairs]))
    raw = np.concatenate(rows)
    standardised = standardiser(raw)
    return Embedding(
        "latent-statistics", standardised(raw), lambda latents: standardised(statistics(latents))
    )


EMBEDDINGS: dict[str, Callable[[Tracks], Embedding]] = {"latent-statistics": latent_statistics}
"""Name to what makes it; add your own here."""


def embedding(name: str, tracks: Tracks) -> Embedding:
    """Embed tracks.

    Args:
        name: a key of :data:`EMBEDDINGS`, or a ``.npy`` of floating-point numbers ``[M, E]`` with a list of its M ids as ``ids.json``
            in the same folder; tracks that are not asked for may stand there too.
        tracks: the tracks, N.

    Raises:
        UserError: unknown name, an unreadable file, a track without a row, or a row that is not finite or zero.
    """
    if name in EMBEDDINGS:
        return EMBEDDINGS[name](tracks)
    path = Path(name)
    if path.suffix != ".npy":
        raise UserError(
            f"unknown embedding {name!r}: use {', '.join(EMBEDDINGS)}, a .npy with {IDS} beside it, or an embedding of audio, such as "
            "features or clmr:checkpoint=FILE"
        )
    return Embedding(name, vectors_of(path, tracks.ids))


def vectors_of(path: Path, wanted: Sequence[str]) -> np.ndarray:
    """Rows float64 ``[M, E]`` of a ``.npy`` for M ids, as :func:`embedding` reads it.

    Raises:
        UserError: as there.
    """
    values, ids = read_npy_file(path), _read_ids(path.with_name(IDS))
    if values.ndim != 2 or values.dtype.kind != "f" or len(values) != len(ids) or values.shape[1] < 1:
        raise UserError(
            f"{path} holds {values.dtype} {list(values.shape)} for {len(ids)} ids in {path.with_name(IDS)}: "
            "save floating-point numbers, one row an id"
        )
    where = {track: i for i, track in enumerate(ids)}
    missing = [track for track in wanted if track not in where]
    if missing:
        raise UserError(f"{path} has no row for the track {missing[0]!r} ({len(missing)} are missing): embed it too")  # fmt: skip
    chosen = np.asarray(values[[where[track] for track in wanted]], dtype=np.float64)
    lengths = np.linalg.norm(chosen, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise UserError(
            f"{path}: the row of the track {wanted[int(bad[0])]!r} is zero or not finite: embed it again"
        )
    return chosen


def _read_ids(path: Path) -> list[str]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): write the id of every row as a JSON list"
        ) from error
    if not isinstance(ids, list) or not all(isinstance(x, str) for x in ids) or len(set(ids)) != len(ids):
        raise UserError(f"{path} is not a JSON list of different texts: write the id of every row there")
    return ids


def similarity(values: np.ndarray, index: int) -> np.ndarray:
    """Cosine of one row of ``[N, E]`` with every row, ``[N]``; 0 with a row that is zero."""
    lengths = np.linalg.norm(values, axis=1)
    unit = values / np.where(lengths > 0, lengths, 1.0)[:, None]
    return np.asarray(unit @ unit[index])


def _squared_distances(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """``[N, K]`` of rows ``[N, E]`` and centres ``[K, E]``."""
    return np.stack([np.square(values - centre).sum(axis=1) for centre in centres], axis=1)


def k_means(values: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Centres of k-means: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations until nothing moves.

    Args:
        values: ``[N, E]``.
        count: K, at most the number of different rows.
        seed: of the first centres.

    Returns:
        ``[K, E]``.
    """
    rng = np.random.default_rng([seed, 3])
    centres = values[[int(rng.integers(len(values)))]]
    nearest = _squared_distances(values, centres)[:, 0]
    while len(centres) < count:
        if not nearest.any():
            raise UserError(f"there are only {len(centres)} different tracks: ask for fewer targets than {count}")  # fmt: skip
        new = values[[int(rng.choice(len(values), p=nearest / nearest.sum()))]]
        centres = np.concatenate([centres, new])
        nearest = np.minimum(nearest, _squared_distances(values, new)[:, 0])
    assigned = np.full(len(values), -1)
    for _ in range(_ROUNDS):
        before, assigned = assigned, _squared_distances(values, centres).argmin(axis=1)
        if np.array_equal(before, assigned):
            break
        # A centre that lost its rows stays where it is.
        centres = np.stack(
            [
                values[assigned == k].mean(axis=0) if (assigned == k).any() else centres[k]
                for k in range(count)
            ]
        )
    return centres


def pick_targets(values: np.ndarray, count: int, seed: int, copies: Sequence[frozenset[int]]) -> list[int]:
    """The track nearest to each centre of k-means, as METHOD section 1 chooses its 40 targets.

    Args:
        values: embedding ``[N, E]``.
        count: how many.
        seed: of k-means.
        copies: of every track, indices of itself and its exact copies: one of them is picked at most.

    Returns:
        Different indices, in ascending order.

    Raises:
        UserError: there are not as many different tracks.
    """
    different = len(set(copies))
    if not 1 <= count <= different:
        raise UserError(f"{count} targets of {different} different training tracks: use 1 to {different}")
    taken: set[int] = set()
    chosen = []
    for column in _squared_distances(values, k_means(values, count, seed)).T:
        nearest = next(int(i) for i in np.argsort(column, kind="stable") if int(i) not in taken)
        chosen.append(nearest)
        taken |= copies[nearest]
    return sorted(chosen)
