"""Frechet distance of the pieces that a model makes from its training tracks: whether unlearning spoils the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from torch import Tensor

from attr_engine import pipeline
from attr_engine.embed import Embedding
from attr_engine.errors import UserError
from attr_engine.files import write_json
from attr_engine.generate import BATCH, piece_length
from attr_engine.jobs import Job, update_key
from attr_engine.latents.batch import Tracks
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of
from attr_engine.updates import Update, applied

UNTOUCHED = "untouched"


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two sets of samples (Dowson and Landau 1982).

    With ``C = X^T X``, X the centred samples over ``sqrt(n - 1)``, the trace of the root is the sum of the singular values of
    ``X_a X_b^T``: no root of a matrix is taken, which loses half of the digits where fewer samples than dimensions make it singular.
    Few samples make the distance too large; compare distances of the same number.

    Args:
        a: ``[n, E]``, n at least 2.
        b: ``[m, E]``, m at least 2.

    Returns:
        Float64, not negative; NaN where a sample is not finite.

    Raises:
        UserError: fewer than 2 samples, or other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(
            f"a Frechet distance needs two sets of at least 2 samples of one width, not {list(a.shape)} and {list(b.shape)}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    (mean_a, root_a), (mean_b, root_b) = _moments(a), _moments(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    spread = np.square(root_a).sum() + np.square(root_b).sum() - 2.0 * cross
    return max(float(np.square(mean_a - mean_b).sum() + spread), 0.0)


def _moments(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[E]`` and R with ``R^T R`` the covariance, of at most E rows."""
    values = np.asarray(samples, dtype=np.float64)
    mean = values.mean(axis=0)
    centred = (values - mean) / math.sqrt(len(values) - 1)
    return mean, np.asarray(np.linalg.qr(centred, mode="r"))


class Sampling(Protocol):
    """A denoiser that makes pieces, such as :class:`attr_engine.models.stable_audio.StableAudioDenoiser`."""

    def sample(self, items: Sequence[Mapping[str, Any]], seed: int, steps: int, guidance: float) -> Tensor:
        """Latents ``[B, C, F]`` under one conditioning a piece."""
        ...


def pieces(
    model: Denoiser, prompts: Sequence[Mapping[str, Any]], seed: int, steps: int, guidance: float
) -> list[np.ndarray]:
    """Latents ``[C, n]`` from the model's sampler, valid frames only; the same seed gives every model the same noise.

    Args:
        model: as it is when this is called; its weights may be others than theta_0.
        prompts: conditioning, one a piece.
        seed: of the sampler.
        steps: of the sampler.
        guidance: classifier-free guidance.

    Raises:
        UserError: the model has no sampler.
    """
    if not hasattr(model, "sample"):
        raise UserError("the model has no sampler: ask for no pieces (--pieces 0)")
    out: list[np.ndarray] = []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        made = cast(Sampling, model).sample(some, seed + first, steps, guidance).cpu().numpy()
        out += [x[:, : piece_length(model, p)[1]] for x, p in zip(made, some, strict=True)]
    return out


class Pieces:
    """The same pieces from a model as it is and from unlearned ones: one conditioning and one noise a piece.

    Args:
        model: theta_0; its weights may be others whenever :meth:`distance` is called.
        tracks: the training tracks; the pieces get the conditioning of some of them.
        embedding: of the training tracks; of pieces too.
        count: how many pieces, at least 2.
        steps: sampler steps.
        guidance: classifier-free guidance.
        seed: of the choice and the sampler.

    Attributes:
        key: names whatever the distances of theta_0 depend on.

    Raises:
        UserError: the model cannot sample, or the embedding is of the training tracks only.
    """

    def __init__(
        self, model: Denoiser, tracks: Tracks, embedding: Embedding, count: int, steps: int, guidance: float, seed: int,
    ) -> None:  # fmt: skip
        if count < 2 or steps < 1 or not math.isfinite(guidance):
            raise UserError(
                f"{count} pieces in {steps} sampler steps with guidance {guidance}: a Frechet distance needs at least 2 pieces, "
                "1 step and a finite guidance; 0 pieces switch it off"
            )
        if not hasattr(model, "sample"):
            raise UserError("the model has no sampler: switch the Frechet distance off (--pieces 0)")
        if embedding.of_latents is None:
            raise UserError(
                f"the embedding {embedding.name} is of the training tracks only, not of generated pieces: switch the Frechet distance "
                "off (--pieces 0)"
            )
        chosen = np.random.default_rng([seed, 4]).choice(len(tracks), count, replace=count > len(tracks))
        self._prompts = tracks.batch(chosen.tolist(), model.frames).conditioning
        self._model, self._seed, self._steps, self._guidance = model, seed, steps, guidance
        self._embed, self._tracks = embedding.of_latents, embedding.values
        self.key = key_of(
            model.fingerprint,
            tracks.fingerprint,
            embedding.name + embedding.fingerprint,
            count,
            steps,
            guidance,
            seed,
        )

    def distance(self) -> float:
        """Frechet distance of the model's pieces from the training tracks; NaN where a piece is not finite."""
        made = pieces(self._model, self._prompts, self._seed, self._steps, self._guidance)
        return frechet_distance(self._embed(made), self._tracks)


def update_names(job: Job, targets: Sequence[str]) -> dict[tuple[str, float], str]:
    """(target, strength) to whatever the update depends on, under which its distance is kept: runs that differ in scoring share it."""
    chosen = [q for q in job.queries if q.id in targets]
    return {
        (q.id, x): f"{q.id}@{x!r} {update_key(job, q)}" for q in chosen for x in job.run.settings.strengths
    }


def kept_distances(path: Path, pieces: Pieces | None) -> dict[str, float | None]:
    """Distances in a file, if they are of these pieces; None stands for one that is not finite."""
    if pieces is None or not path.exists():
        return {}
    found = read_json(path, "table of Frechet distances")
    return dict(found["distances"]) if found.get("key") == pieces.key else {}


def keep_distance(path: Path, pieces: Pieces, name: str) -> None:
    """Measure the model as it is, and keep the distance under a name."""
    distance = pieces.distance()
    known = kept_distances(path, pieces)
    known[name] = distance if math.isfinite(distance) else None
    write_json(path, {"key": pieces.key, "distances": known})


def measure_distances(job: Job, pieces: Pieces, targets: Sequence[str], path: Path) -> None:
    """Distances after some queries of a job were unlearned, at every strength; each is kept as soon as it is known."""
    names, strengths = update_names(job, targets), job.run.settings.strengths
    known = kept_distances(path, pieces)
    chosen = [q for q in job.queries if q.id in targets]
    missing = [(q, x) for q in chosen for x in strengths if names[q.id, x] not in known]
    if not missing:
        return
    if not all(job.update_path(q, job.made("loss")[-1]).exists() for q, _ in missing):
        pipeline.update_stage(job, pipeline.fisher_stage(job))  # a finished run has dropped them
    show = job.run.progress("pieces", "model", "pieces")
    with job.run.stage("pieces"):
        for done, (query, strength) in enumerate(missing):
            show(done, len(missing))
            # Where effects are tangents there is one update, and the others are multiples of it.
            made = strength if strength in job.made("loss") else strengths[0]
            update = Update.load(job.update_path(query, made), update_key(job, query))
            with applied(job.model, {n: d * (strength / made) for n, d in update.delta.items()}):
                keep_distance(path, pieces, names[query.id, strength])
        show(len(missing), len(missing))
