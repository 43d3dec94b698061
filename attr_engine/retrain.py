"""Models trained again on parts of the data: the counterfactuals that an attribution is judged by (METHOD section 5).

A training is named by what it is of, so that models are kept and a later question finds those that exist. All trainings share
one recipe; seed s has the same initial weights and draws whatever tracks are kept, so that what differs between two models of
a seed is the tracks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.diffusion import DrawPlan, losses, noised_rows
from attr_engine.errors import UserError
from attr_engine.files import writing_in
from attr_engine.latents import LatentDataset
from attr_engine.latents.batch import Chosen, Tracks
from attr_engine.models.protocol import Denoiser
from attr_engine.models.stable_audio import StableAudioDenoiser, create_model, quiet
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.train import fit_diffusion, read_config
from attr_engine.units import held

MODELS, LOSSES = "models", "losses"
JUDGE_SEED = 20_251  # of the draws that queries are judged by; no attribution uses them


@dataclass(frozen=True)
class Recipe:
    """How every model is trained.

    Attributes:
        model: folder whose config is used (the weights are not).
        data: folder of the training tracks.
        steps: optimiser steps, whatever the number of tracks.
        batch: tracks a step.
        lr: peak learning rate.
    """

    model: str
    data: str
    steps: int = 600
    batch: int = 16
    lr: float = 2e-3


@dataclass(frozen=True)
class Training:
    """One model.

    Attributes:
        name: file name without suffix.
        left_out: indices of the tracks that it does not see, ascending.
        seed: of order, draws and initial weights.
    """

    name: str
    left_out: tuple[int, ...]
    seed: int


def training(what: str, left_out: Sequence[int], seed: int) -> Training:
    """A training under a name that says what it is of, and changes with the tracks that are left out."""
    out = tuple(sorted(int(i) for i in left_out))
    return Training(f"{what}-{key_of(out)[:8]}-seed{seed}", out, seed)


def half_subsets(tracks: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """The tracks that random halves leave out, ``count`` times.

    Subset k does not depend on how many are asked for.
    """
    if tracks < 2 or count < 1:
        raise UserError(f"{count} halves of {tracks} tracks: use at least 1 of at least 2")
    return [
        tuple(sorted(np.random.default_rng([seed, k]).permutation(tracks)[: tracks // 2].tolist()))
        for k in range(count)
    ]


class Retrainer:
    """Trains, keeps and asks models of one recipe.

    Args:
        recipe: how they are trained.
        folder: where models and losses are kept.

    Raises:
        UserError: the model's config or the data cannot be read.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.config = read_config(Path(recipe.model))
        self.tracks = LatentDataset(recipe.data)
        self._key = key_of(self.config, self.tracks.fingerprint, recipe.steps, recipe.batch, recipe.lr)

    def path(self, which: Training) -> Path:
        """The file of a model."""
        return self.folder / MODELS / f"{which.name}.safetensors"

    def train(self, which: Training, progress: Callable[[int, int], None] | None = None) -> None:
        """Train a model, unless it is there; where another process is at it, wait for it."""
        path, recipe = self.path(which), self.recipe
        kept = sorted(set(range(len(self.tracks))) - set(which.left_out))
        with held(self.folder / "locks" / f"{which.name}.lock", wait=True), writing_in(self.folder):
            if path.exists():
                return
            state = self.folder / "partial" / f"{which.name}.safetensors"
            wrapper, loss = fit_diffusion(
                self.config, Chosen(self.tracks, kept), state, recipe.steps, None, recipe.batch, recipe.lr, which.seed, progress
            )  # fmt: skip
            save_tensors(path, _weights(wrapper), {"key": self._key_of(which), "loss": loss})
            state.unlink(missing_ok=True)

    def _key_of(self, which: Training) -> str:
        return key_of(self._key, which.left_out, which.seed)

    def load(self, which: Training) -> StableAudioDenoiser:
        """A model that was trained.

        Raises:
            UserError: it was not, or by another recipe.
        """
        found = load_tensors(self.path(which), self._key_of(which))[0]
        wrapper = create_model(self.config)
        with quiet():
            wrapper.load_state_dict(found, strict=False)
        missing = set(_weights(wrapper)) ^ set(found)
        if missing:
            raise UserError(
                f"{self.path(which)} is of another model ({sorted(missing)[0]}): choose another --out"
            )
        return StableAudioDenoiser(wrapper, self.config, autoencoder=False)

    def losses(self, which: Training, queries: Tracks, draws: int) -> np.ndarray:
        """Losses of queries under a model, measured once: float64 ``[Q, draws]``, valid frames only, draws that all models share."""
        path = self.folder / LOSSES / key_of(queries.fingerprint, draws) / f"{which.name}.safetensors"
        if not path.exists():
            found = query_losses(self.load(which), queries, draws)
            with writing_in(self.folder):
                save_tensors(path, {"losses": torch.from_numpy(found)}, {"key": self._key_of(which)})
        return load_tensors(path, self._key_of(which))[0]["losses"].numpy()


def _weights(wrapper: Any) -> dict[str, torch.Tensor]:
    return {n: v for n, v in wrapper.state_dict().items() if not n.startswith("pretransform.")}


@torch.no_grad()
def query_losses(model: Denoiser, queries: Tracks, draws: int, rows: int = 16) -> np.ndarray:
    """Losses of queries on draws of the judge, float64 ``[Q, draws]``; only valid frames count."""
    plan = DrawPlan(JUDGE_SEED, "shared", 1)
    out = np.empty((len(queries), draws))
    for i in range(len(queries)):
        batch = queries.batch([i], model.frames)
        for first in range(0, draws, rows):
            pairs = [(0, d) for d in range(first, min(first + rows, draws))]
            found = losses(model, noised_rows(model, batch, pairs, plan, "score", masked=True))
            out[i, first : first + len(pairs)] = found.cpu().numpy()
    return out


# -- several at a time --------------------------------------------------------------------------

_mine: Retrainer


def _begin(recipe: Recipe, folder: Path, threads: int) -> None:
    global _mine
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    _mine = Retrainer(recipe, folder)


def _end_with(parent: int) -> None:
    """End this process when the one that started it does, however that ended: nobody waits for its models."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _one(which: Training, queries: Sequence[str], draws: int) -> str:
    _mine.train(which)
    for path in queries:
        _mine.losses(which, LatentDataset(path), draws)
    return which.name


def train_all(
    retrainer: Retrainer, trainings: Sequence[Training], queries: Sequence[str], draws: int, workers: int
) -> Iterator[int]:
    """Train what is missing and measure the queries' losses, one model a process at a time.

    Args:
        retrainer: recipe and folder.
        trainings: in the order of their importance.
        queries: folders of data sets.
        draws: of the queries' losses.
        workers: processes, one thread each.

    Yields:
        How many are done.

    Raises:
        UserError: a worker was killed, or could not do its part.
    """
    if workers < 1:
        raise UserError(f"{workers} workers: use at least 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin,
        initargs=(retrainer.recipe, retrainer.folder, 1),
    )  # fmt: skip
    try:
        waiting = [pool.submit(_one, t, queries, draws) for t in trainings]
        for done, future in enumerate(as_completed(waiting), start=1):
            future.result()
            yield done
    except BrokenProcessPool as error:
        raise UserError(
            f"a training process was killed, perhaps for lack of memory: use fewer --workers than {workers}; "
            "the same command carries on"
        ) from error
    except BaseException:
        for child in active_children():  # their trainings carry on from what they kept
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
