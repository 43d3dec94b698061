"""The demo corpus: families of related tracks, unrelated ones, held-out queries, and their files.

Everything follows from a seed. What a track was derived from is known, so an attribution can be judged.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.demo import compose as music
from attr_engine.demo.compose import INSTRUMENTS, RING_SECONDS, STYLES, Song, compose, crop
from attr_engine.demo.synth import degrade, normalise, render, splice, transcode

# fmt: off
LICENCE = "CC0-1.0"
RELATIONS = ("original", "exact copy", "gain", "noise", "lossy", "transposed", "stretched", "re-orchestrated",
             "spliced", "unrelated", "short")
COLUMNS = ("path", "id", "title", "artist", "licence", "seconds", "family", "relation", "parents", "lead",
           "style", "tempo", "key", "lead_id", "style_id")
FOLDERS = {"train": "train", "query": "queries"}
STAMP = "corpus.json"  # says which corpus a folder holds
LONGEST = 24.0  # seconds
FADE = 0.08  # seconds in which a spliced track goes from one parent to the other

# What can be done to an original. Queries draw from pools of their own, so none repeats a training item.
Pool = dict[str, tuple[Any, ...]]
TRAINING: Pool = {
    "exact copy": (0,), "gain": (-4, -6, -8, -10, -12), "noise": (18, 21, 24, 27),
    "lossy": (("MP3", 0.8), ("MP3", 0.95), ("OGG", 0.9), ("OGG", 1.0)), "transposed": (2, 3, 5),
    "stretched": (0.8, 0.88, 1.15, 1.25), "re-orchestrated": (0,), "transposed down": (-2, -4, -5),
}
QUERIES: Pool = {
    "noise": (16, 20, 23), "gain": (-3, -5, -7, -9), "transposed": (-6, -3, -1, 1, 4, 6),
    "stretched": (0.84, 0.93, 1.08, 1.2), "re-orchestrated": (0,),
}
# How a relative's id and title go on after its family's.
LABELS = {
    "exact copy": ("copy", "Reissue"), "gain": ("gain{value}dB", "Quiet Master"),
    "noise": ("noise{value}dB", "Tape Transfer"), "lossy": ("lossy-{value[0]}", "Download"),
    "transposed": ("transposed{value:+d}", "in {song.key}"), "stretched": ("stretched{value}", "Live"),
    "re-orchestrated": ("reorchestrated-{song.lead}", "for {song.lead}"),
}
GIVEN = "Odile Tomas Mirela Janek Sunniva Caspian Ilse Oren Talitha Bram Yuna Leocadia".split()
SURNAMES = "Varrow Kestrin Halloway-Quist Ombrel Tasker Lindqvar Marchetto Fenwood Solari Draven-Oake".split()
BANDS = "Paper Northern Velvet Copper Hollow Amber Distant Crooked Salt Winter".split()
MEMBERS = "Lanterns Ferries Cartographers Orchards Antennas Herons Bakeries Tramways Sextants Moths".split()
MOODS = ("Slow Borrowed Silver Blue Late Quiet Burning Second Paper Hidden Northern Empty Golden Small Wild"
         " Distant Last Tender Crooked Bright Velvet Broken Early Salt").split()
THINGS = ("Harbour Orchard Signal Window River Machine Garden Winter Letter Tide Engine Mirror Carousel Kite"
          " Morning Station Lantern Mountain Hour Compass Meadow Telegram Balcony Comet Staircase").split()
# fmt: on


@dataclass(frozen=True)
class Recipe:
    """How an item's audio is made: the songs to play, and what is then done to the sound."""

    songs: tuple[Song, ...]
    relation: str
    value: Any = 0  # of a relation that changes the sound and not the notes
    seed: int = 0


@dataclass(frozen=True)
class Item:
    """One track of the corpus."""

    id: str
    role: str  # "train" or "query"
    family: str
    relation: str
    parents: tuple[str, ...]
    title: str
    artist: str
    licence: str
    lead: str
    style: str
    tempo: float
    key: str
    seconds: float
    recipe: Recipe = field(repr=False)


def _rng(seed: int, name: str) -> np.random.Generator:
    """The generator of one named thing, whatever else the corpus holds."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _item(name: str, family: str, parents: tuple[str, ...], title: str, artist: str, recipe: Recipe) -> Item:
    """An item, described by the (first) song it plays; the name of a query says that it is one."""
    song, seconds = recipe.songs[0], recipe.songs[0].seconds
    if recipe.relation == "spliced":
        seconds = recipe.value[0] + recipe.songs[1].seconds - recipe.value[1]
    role, tempo = "query" if name.startswith("query-") else "train", round(song.tempo, 2)
    about = (title, artist, LICENCE, song.lead, song.style, tempo, song.key, round(seconds, 3))
    return Item(name, role, family, recipe.relation, parents, *about, recipe)


def _names(seed: int) -> tuple[list[str], Iterator[str]]:
    """Thirty invented artists, and titles without end, none given twice."""
    rng = _rng(seed, "names")
    people = rng.permutation([f"{a} {b}" for a in GIVEN for b in SURNAMES])
    bands = rng.permutation([f"The {a} {b}" for a in BANDS for b in MEMBERS])
    titles = rng.permutation([f"{a} {b}" for a in MOODS for b in THINGS])
    numbered = (f"{t} No. {n}" if n > 1 else str(t) for n in itertools.count(1) for t in titles)
    return [str(name) for name in rng.permutation([*people[:16], *bands[:14]])], numbered


def _length(rng: np.random.Generator, style: str, longest: float) -> float:
    """Draw a duration that gives the style a phrase of four bars at least."""
    manner = STYLES[style]
    phrase = RING_SECONDS + (3 * manner.metre + 2) * 120 / sum(manner.tempo)
    return round(float(rng.uniform(min(max(6.0, phrase), longest - 1), longest)), 2)


def _alike(song: Song, other: Song) -> bool:
    """Whether two originals could be taken for versions of one another."""
    near = abs(np.log(song.tempo / other.tempo)) < 0.06
    return song.style == other.style and (near or song.tonic == other.tonic)


def _originals(seed: int, count: int, artists: list[str], titles: Iterator[str]) -> list[Item]:
    """The first member of each family: styles and leads take turns, and no two are alike."""
    styles = [str(style) for style in _rng(seed, "styles").permutation(list(STYLES))]
    led: Counter[str] = Counter()
    songs: list[Song] = []
    items: list[Item] = []
    for index in range(count):
        rng, style = _rng(seed, f"family {index}"), styles[index % len(styles)]
        lead = min(STYLES[style].leads.split(","), key=lambda name: (led[style + name], led[name]))
        led.update((lead, style + lead))
        for _ in range(40):
            song = compose(rng, style, _length(rng, style, 20.0), lead)
            if not any(_alike(song, other) for other in songs):
                break
        songs.append(song)
        family, artist = f"fam{index:0{max(2, len(str(count - 1)))}d}", artists[index % len(artists)]
        items.append(
            _item(f"{family}-original", family, (), next(titles), artist, Recipe((song,), "original"))
        )
    return items


def _relative(
    seed: int, prefix: str, original: Item, kind: str, pool: Pool, avoid: Collection[str] = ()
) -> Item:
    """A relative of an original; the kind is a relation, with a word after it if there are two of it."""
    song, relation = original.recipe.songs[0], kind.removesuffix(" down")
    rng = _rng(seed, f"{prefix}{original.family} {kind}")
    fits = [v for v in pool[kind] if relation != "stretched" or song.seconds * v <= LONGEST]
    value = fits[rng.integers(len(fits))]
    if relation == "transposed":
        song = music.transpose(song, value)
    elif relation == "stretched":
        song = music.stretch(song, value)
    elif relation == "re-orchestrated":
        song = music.reorchestrate(song, rng, avoid)
    mark, note = (text.format(value=value, song=song) for text in LABELS[relation])
    name, title = f"{prefix}{original.family}-{mark}".replace(" ", "-"), f"{original.title} ({note})"
    recipe = Recipe((song,), relation, value, int(rng.integers(2**31)))
    return _item(name, original.family, (original.id,), title, original.artist, recipe)


def _families(seed: int, originals: list[Item], tracks: int) -> list[Item]:
    """Every family's members, `tracks` in all: the kinds of relatives that are rarest so far come first."""
    used: Counter[str] = Counter()
    items: list[Item] = []
    for index, original in enumerate(originals):
        size = tracks // len(originals) + (index < tracks % len(originals))
        draw = dict(zip(TRAINING, _rng(seed, f"kinds {index}").random(len(TRAINING)), strict=True))
        # A second transposition is the one kind that adds no new relation.
        kinds = sorted(TRAINING, key=lambda kind: (used[kind], kind == "transposed down", draw[kind]))
        used.update(kinds[: size - 1])
        relatives = [kind for kind in TRAINING if kind in kinds[: size - 1]]
        items += [original, *(_relative(seed, "", original, kind, TRAINING) for kind in relatives)]
    return items


def _spliced(seed: int, name: str, first: Item, second: Item, artist: str) -> Item:
    """A track that begins as one original and goes on as another, cut where bars begin."""
    a, b = first.recipe.songs[0], second.recipe.songs[0]
    leaves, enters = (
        [bar * song.metre * 60 / song.tempo for bar in range(64) if 0.3 < bar * song.metre / song.beats < 0.7]
        for song in (a, b)
    )
    cuts = [cut for cut in itertools.product(leaves, enters) if 4 <= cut[0] + b.seconds - cut[1] <= LONGEST]
    cuts = cuts or [(a.seconds / 2, b.seconds / 2)]
    recipe = Recipe((a, b), "spliced", cuts[_rng(seed, name).integers(len(cuts))])
    family, title = f"{first.family}+{second.family}", f"{first.title} / {second.title}"
    return _item(f"{name}-{family}", family, (first.id, second.id), title, artist, recipe)


def _pairs(seed: int, originals: list[Item]) -> list[tuple[Item, Item]]:
    """All ordered pairs of different families, those at the head spread evenly over the families."""
    count, order = len(originals), _rng(seed, "pairs").permutation(len(originals))
    turns = [(i, (i + step) % count) for step in range(1, count) for i in range(count)]
    return [(originals[order[i]], originals[order[j]]) for i, j in turns[::2] + turns[1::2]]


def _single(seed: int, name: str, artists: list[str], title: str, short: bool = False) -> Item:
    """A track related to no other."""
    rng = _rng(seed, name)
    styles = [style for style in STYLES if not (short and style == "ambient")]  # too sparse for a snippet
    style, artist = styles[rng.integers(len(styles))], artists[rng.integers(len(artists))]
    song = compose(rng, style, 12.0 if short else _length(rng, style, LONGEST))
    if short:
        beats, ring = song.tempo / 60, 0.45
        song = crop(song, 0.0, (rng.uniform(2.05, 3.45) - ring) * beats, ring * beats)
    return _item(name, "", (), title, artist, Recipe((song,), "short" if short else "unrelated"))


def _held_out(
    seed: int,
    training: list[Item],
    pairs: list[tuple[Item, Item]],
    each: int,
    artists: list[str],
    titles: Iterator[str],
) -> list[Item]:
    """The queries, `each` of every kind; their parents are all the training members of their families."""
    originals = [item for item in training if item.relation == "original"]
    order = _rng(seed, "queries").permutation(len(originals))
    items: list[Item] = []
    for turn, kind in enumerate(kind for kind in QUERIES for _ in range(each)):
        original = originals[order[turn % len(order)]]
        heard = {item.lead for item in training if item.family == original.family}
        items.append(_relative(seed, "query-", original, kind, QUERIES, heard))
    items += [
        _spliced(seed, f"query-splice{i:02d}", *pair, artists[-1 - i]) for i, pair in enumerate(pairs[:each])
    ]
    items += [_single(seed, f"query-solo{i:02d}", artists, next(titles)) for i in range(each)]
    members: dict[str, list[str]] = {}
    for item in training:
        members.setdefault(item.family or "-", []).append(item.id)
    return [
        replace(
            item, parents=tuple(name for part in item.family.split("+") for name in members.get(part, ()))
        )
        for item in items
    ]


def plan(seed: int = 0, tracks: int = 256) -> list[Item]:
    """Every item of the corpus, `tracks` of them for training, then the queries.

    Of 256 tracks, 182 are in 26 families; 14 are spliced, 44 unrelated and 16 short.
    """
    if tracks < 1:
        raise ValueError(f"a corpus needs at least one track, not {tracks}")
    shares = (("splice", 14, 10), ("solo", 44, 4), ("short", 16, 6))  # the least tracks to have one at all
    counts = {name: max(1, round(n * tracks / 256)) if tracks >= least else 0 for name, n, least in shares}
    rest, each = tracks - sum(counts.values()), 2 if tracks >= 128 else 1
    artists, titles = _names(seed)
    originals = _originals(seed, max(2 if counts["splice"] else 1, round(rest / 7)), artists, titles)
    training, pairs = _families(seed, originals, rest), itertools.cycle(_pairs(seed, originals))
    names = {name: [f"{name}{i:0{max(2, len(str(n - 1)))}d}" for i in range(n)] for name, n in counts.items()}
    training += [
        _spliced(seed, name, *next(pairs), artists[-1 - i % 4]) for i, name in enumerate(names["splice"])
    ]
    training += [_single(seed, name, artists, next(titles)) for name in names["solo"]]
    training += [_single(seed, name, artists, next(titles), short=True) for name in names["short"]]
    return training + _held_out(seed, training, list(itertools.islice(pairs, each)), each, artists, titles)


def sound(item: Item, sample_rate: int = 16000, played: dict[Song, np.ndarray] | None = None) -> np.ndarray:
    """The audio of an item, mono float32; `played` keeps what was rendered for its relatives to use."""
    recipe, played = item.recipe, {} if played is None else played
    for song in recipe.songs:
        if song not in played:
            played[song] = render(song, sample_rate)
    audio = played[recipe.songs[0]]
    if recipe.relation == "spliced":
        leave, enter = (round(cut * sample_rate) for cut in recipe.value)
        joined = splice(audio, played[recipe.songs[1]], leave, enter, int(FADE * sample_rate))
        return normalise(joined).astype(np.float32)
    if recipe.relation == "gain":
        return (audio * 10 ** (recipe.value / 20)).astype(np.float32)
    if recipe.relation == "noise":
        return degrade(audio, recipe.value, recipe.seed)
    return transcode(audio, sample_rate, *recipe.value) if recipe.relation == "lossy" else audio


def _path(out: Path, item: Item) -> Path:
    return out / FOLDERS[item.role] / f"{item.id}.flac"


def write_flac(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write audio ``[samples]`` of at most full scale as 16 bits, whole or not at all."""
    import soundfile

    # Another process may be writing the same corpus.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    samples = np.round(audio * 32767).astype(np.int16)
    soundfile.write(part, samples, sample_rate, format="FLAC", subtype="PCM_16")
    os.replace(part, path)


def _write(items: list[Item], out: Path, sample_rate: int) -> int:
    """Write the files of items that may share songs, and say how many there are."""
    played: dict[Song, np.ndarray] = {}
    for item in items:
        path = _path(out, item)
        if not path.exists():
            write_flac(path, sound(item, sample_rate, played), sample_rate)
    return len(items)


def _write_all(batches: list[list[Item]], out: Path, sample_rate: int, workers: int) -> Iterator[int]:
    """Write batches of items, in other processes or in this one, and yield how many each batch held."""
    if workers > 1:
        # The parent may hold threads and a GPU, which a forked child must not inherit.
        pool = ProcessPoolExecutor(min(workers, len(batches)), mp_context=get_context("spawn"))
        try:
            futures = [pool.submit(_write, batch, out, sample_rate) for batch in batches]
            for future in as_completed(futures):
                yield future.result()
            return
        except BrokenProcessPool:  # among others where the main module has no __main__ guard
            warnings.warn("the worker processes ended: writing the corpus in this one", stacklevel=3)
        finally:
            pool.shutdown(cancel_futures=True)
    for batch in batches:
        yield _write(batch, out, sample_rate)


def _write_table(path: Path, items: Iterable[Item], columns: Sequence[str] = COLUMNS) -> None:
    """Write the metadata of a folder."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for item in items:
            ids = {"lead_id": INSTRUMENTS.index(item.lead), "style_id": list(STYLES).index(item.style)}
            row = {**vars(item), **ids, "path": f"{item.id}.flac", "parents": ";".join(item.parents)}
            table.writerow({**row, "seconds": f"{item.seconds:.3f}", "tempo": f"{item.tempo:.2f}"})
    os.replace(part, path)


def write_corpus(
    out: Path,
    seed: int = 0,
    tracks: int = 256,
    sample_rate: int = 16000,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the corpus under `out`, going on where an earlier call stopped.

    The audio is in train/ and queries/, each with a metadata.csv that comes last: where both are, the
    corpus is whole and nothing is done. `progress` is told how many items are done, and of how many.
    """
    out = Path(out)
    stamp, tables = out / STAMP, {role: out / folder / "metadata.csv" for role, folder in FOLDERS.items()}
    settings = json.dumps({"seed": seed, "tracks": tracks, "sample_rate": sample_rate})
    if stamp.exists() and stamp.read_text(encoding="utf-8") != settings:
        raise ValueError(f"{out} holds another corpus, {stamp.read_text(encoding='utf-8')}, not {settings}")
    if all(table.exists() for table in tables.values()):
        return
    items = plan(seed, tracks)
    for table in tables.values():
        table.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(settings, encoding="utf-8")
    batches: dict[str, list[Item]] = {}
    for item in items:
        batches.setdefault(item.family or item.id, []).append(item)
    done = 0
    for count in _write_all(list(batches.values()), out, sample_rate, workers):
        done = min(done + count, len(items))
        if progress is not None:
            progress(done, len(items))
    for role, table in tables.items():
        _write_table(table, [item for item in items if item.role == role])
