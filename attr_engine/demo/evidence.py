"""Sets of queries whose answer is known, to judge attributions by: pieces that training tracks made, and others.

Both come from a finished demo and a seed. ``known`` holds relatives of the training families, ``unknown`` pieces that
no training track made. Either is halved by its ``part``: what is chosen on "choose" is judged on "judge", and no family
is in both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine import progress, train
from attr_engine.demo import corpus
from attr_engine.demo.compose import Song
from attr_engine.demo.corpus import STAMP, Item, plan, sound, write_corpus, write_flac
from attr_engine.demo.evidence_plan import QUERY_COLUMNS, Query, drawn_seed, of_role, plan_known, plan_unknown
from attr_engine.demo.textures import texture
from attr_engine.errors import UserError
from attr_engine.files import write_json
from attr_engine.latents import LatentDataset
from attr_engine.latents.ingest import ingest_audio
from attr_engine.latents.manifest import MANIFEST
from attr_engine.models.autoencoder import Autoencoder, load_autoencoder
from attr_engine.models.checkpoint import read_json
from attr_engine.models.stable_audio import CONFIG_NAME, StableAudioDenoiser, load_model

_STAMP = "queries.json"
_BATCH = 8  # pieces that are sampled together; their noise depends on it
_GUIDANCE = 3.0
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Other:
    """The model that makes the "other model" pieces: tracks of its own corpus, training steps, sampler steps."""

    tracks: int = 128
    steps: int = 600
    sampler_steps: int = 60


def _sound(item: Item, rate: int, played: dict[Song, np.ndarray]) -> np.ndarray:
    """The audio of a query that no model samples, float32 ``[samples]``."""
    if item.recipe.songs:
        return sound(item, rate, played)
    return texture(item.recipe.value, item.seconds, rate, item.recipe.seed)


def _play(items: Sequence[Item], folder: Path, rate: int, tell: Callable[[int, int], None] | None) -> None:
    """Write the audio of the queries that no model samples; those of one family share what is rendered."""
    folder.mkdir(parents=True, exist_ok=True)
    own = sorted((item for item in items if item.relation != "other model"), key=lambda item: item.family)
    done = 0
    for _, family in itertools.groupby(own, key=lambda item: item.family or item.id):
        played: dict[Song, np.ndarray] = {}
        for item in family:
            path = folder / f"{item.id}.flac"
            if not path.exists():
                write_flac(path, _sound(item, rate, played), rate)
            done += 1
            if tell is not None:
                tell(done, len(own))


def _sample(
    items: Sequence[Item], model: StableAudioDenoiser, folder: Path, seed: int, steps: int,
    tell: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    """Write the audio of the pieces that a model samples, each to its length."""
    names = [entry["id"] for entry in model.config["model"]["conditioning"]["configs"]]
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        paths = [folder / f"{item.id}.flac" for item in batch]
        if not all(path.exists() for path in paths):
            values = [{**vars(item), "seconds_start": 0.0, "seconds_total": item.seconds} for item in batch]
            prompts = [{name: row[name] for name in names} for row in values]
            latents = model.sample(prompts, seed + first, steps, _GUIDANCE)
            for item, path, latent in zip(batch, paths, latents, strict=True):
                count = round(item.seconds * model.sample_rate)
                audio = model.decode(latent[None, :, : -(-count // model.samples_per_frame)])[0].mean(0)
                samples = audio[:count].cpu().numpy()
                write_flac(path, samples / max(1.0, float(np.abs(samples).max())), model.sample_rate)
        if tell is not None:
            tell(min(first + _BATCH, len(items)), len(items))


def _ingest(
    source: Path, out: Path, encoder: Autoencoder, like: LatentDataset, kind: str = "",
    tell: Callable[[int, int], None] | None = None,
) -> LatentDataset:  # fmt: skip
    """Encode a folder as the demo's tracks were."""
    if not (out / MANIFEST).exists():
        frames, condition = like.extra["frames"], like.extra["condition"]
        ingest_audio(
            source,
            out,
            encoder,
            frames,
            source / "metadata.csv",
            condition,
            "error",
            kind=kind,
            progress=tell,
        )
    return LatentDataset(out)


def _begin(demo: Path, out: Path, settings: Mapping[str, Any]) -> tuple[LatentDataset, dict[str, Any]]:
    """The demo's tracks and what its corpus was made from; refuses another demo and another call's folder."""
    made = read_json(demo / "audio" / STAMP, "demo corpus")
    tracks = LatentDataset(demo / "latents")
    expected = sorted(item.id for item in of_role("train", plan(made["seed"], made["tracks"])))
    if sorted(tracks.ids) != expected:
        raise UserError(
            f"{demo / 'latents'} does not hold the tracks of {demo / 'audio'}: make the demo anew"
        )
    stamp = {**settings, "corpus": made, "data": tracks.fingerprint, "encoder": tracks.extra["encoder"]}
    stamp = json.loads(json.dumps(stamp))
    path = out / _STAMP
    if path.exists() and (old := read_json(path, "query sets")) != stamp:
        odd = ", ".join(name for name in stamp if old.get(name) != stamp[name])
        raise UserError(f"{out} holds query sets with another {odd}: choose another folder, or remove it")
    write_json(path, stamp)
    return tracks, made


def write_query_sets(
    demo: Path, out: Path, each: int = 14, unknown_each: int = 56, seed: int = 0, other: Other | None = None,
    bars: bool = False,
) -> tuple[LatentDataset, LatentDataset]:  # fmt: skip
    """Write both sets of queries for a finished demo, going on where an earlier call stopped.

    All of it is audio first (``out/audio``), which the demo's autoencoder then encodes: the latents of the other model's
    pieces are therefore not the sampler's own, but its decoded sound encoded again. That model (``out/other``) has the
    demo model's configuration and was trained on other music of the same composer.

    The columns are those of the demo's queries, ``part`` and ``near`` (:class:`Query`). ``relation`` is one of ``KNOWN`` or
    ``UNKNOWN``; ``parents`` are all training members of the families. Training splices count for neither of their families.

    Args:
        demo: the demo's folder; nothing is written there.
        out: gets the data sets ``known`` and ``unknown``, and what they were made from.
        each: known queries of each of the 8 kinds.
        unknown_each: unknown queries of each of the 4 kinds.
        seed: everything that is drawn follows from it.
        other: how the other model is made.
        bars: draw bars on standard error.

    Returns:
        The data sets ``known`` (8 ``each``) and ``unknown`` (4 ``unknown_each``).

    Raises:
        UserError: no finished demo, more queries than it can give, or ``out`` was begun with other settings.
    """
    if each < 1 or unknown_each < 1 or seed < 0:
        raise UserError(
            f"{each} and {unknown_each} queries of a kind must be at least 1, seed {seed} at least 0"
        )
    demo, out, other = Path(demo), Path(out), other or Other()
    settings = {"seed": seed, "each": each, "unknown_each": unknown_each, "other": asdict(other)}
    tracks, made = _begin(demo, out, settings)
    sets = {"known": out / "known", "unknown": out / "unknown"}
    if not all((folder / MANIFEST).exists() for folder in sets.values()):
        tell: Callable[..., Any] = progress.bar if bars else lambda *_: None
        encoder = load_autoencoder(demo / "autoencoder")
        for name, queries in _plan(demo, made, settings, other).items():
            source = out / "audio" / name
            _play(queries, source, made["sample_rate"], tell(f"composing {name}", "piece"))
            if sampled := [item for item in queries if item.relation == "other model"]:
                model = _other_model(demo, out / "other", made, seed, other, encoder, tracks, tell)
                _sample(sampled, model, source, seed, other.sampler_steps, tell("sampling", "piece"))
            corpus._write_table(source / "metadata.csv", queries, QUERY_COLUMNS)
            _ingest(source, sets[name], encoder, tracks, name, tell(f"encoding {name}", "file"))
    return LatentDataset(sets["known"]), LatentDataset(sets["unknown"])


def _other_corpus(made: Mapping[str, Any], seed: int) -> int:
    """The seed of the other corpus: above the demo's, so it is another one."""
    return int(made["seed"]) + 1 + drawn_seed(seed, "other corpus")


def _plan(
    demo: Path, made: Mapping[str, Any], settings: Mapping[str, Any], other: Other
) -> dict[str, list[Query]]:
    """All queries of both sets."""
    seed, items = settings["seed"], plan(made["seed"], made["tracks"])
    others, config = (
        plan(_other_corpus(made, seed), other.tracks),
        read_json(demo / "model" / CONFIG_NAME, "model config"),
    )
    return {
        "known": plan_known(items, settings["each"], seed),
        "unknown": plan_unknown(items, others, config, settings["unknown_each"], seed),
    }


def _other_model(
    demo: Path, out: Path, made: Mapping[str, Any], seed: int, other: Other, encoder: Autoencoder, like: LatentDataset,
    tell: Callable[..., Any],
) -> StableAudioDenoiser:  # fmt: skip
    """Train the demo's model from nothing on another corpus, or load it where that is done."""
    if not (out / "model" / CONFIG_NAME).exists():
        write_corpus(
            out / "audio", _other_corpus(made, seed), other.tracks, made["sample_rate"], 1, tell("composing the other corpus", "track")
        )  # fmt: skip
        source = out / "audio" / "train"
        tracks = _ingest(source, out / "latents", encoder, like, tell=tell("encoding it", "file"))
        config = read_json(demo / "model" / CONFIG_NAME, "model config")
        train.train_diffusion(
            config, tracks, out / "model", other.steps, encoder, lr=_LEARNING_RATE, seed=seed, progress=tell("training", "step")
        )  # fmt: skip
    return load_model(out / "model")
