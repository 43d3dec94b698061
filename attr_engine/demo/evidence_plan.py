"""Which queries a demo's corpus is asked with to judge attributions: relatives of its families, and unrelated pieces."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attr_engine.demo import corpus
from attr_engine.demo.corpus import COLUMNS, Item, Pool, Recipe
from attr_engine.demo.textures import NOISES, PROCEDURES
from attr_engine.errors import UserError

PARTS = ("choose", "judge")
NEAR = (
    "original",
    "exact copy",
    "gain",
    "noise",
    "lossy",
)  # what a family's original becomes and stays itself
# None of these is the corpus' TRAINING; that none repeats one of its held-out queries is seen to item by item.
POOLS: Pool = {
    "exact copy": (0,), "gain": (-2, -4.5, -7.5, -11, -14), "noise": (15, 19, 22, 25, 28),
    "lossy": (("MP3", 0.7), ("MP3", 0.88), ("OGG", 0.8), ("OGG", 0.95)), "transposed": (-6, -3, -1, 1, 4, 6),
    "stretched": (0.82, 0.9, 0.96, 1.04, 1.12, 1.18), "re-orchestrated": (0,),
}  # fmt: skip
KNOWN = (*POOLS, "spliced")
UNKNOWN = ("held-out", "noise", "other composer", "other model")
QUERY_COLUMNS = (*COLUMNS, "part", "near")
SHORTEST = 3.0  # seconds of a texture


@dataclass(frozen=True)
class Query(Item):
    """A query: `part` is one of PARTS; `near` joins the ids of near copies of its originals by semicolons."""

    part: str = ""
    near: str = ""


def drawn_seed(seed: int, name: str) -> int:
    """A seed of its own for a named thing."""
    return int(corpus._rng(seed, name).integers(2**31))


def of_role(role: str, items: Sequence[Item]) -> list[Item]:
    """The items of a role, in their order."""
    return [item for item in items if item.role == role]


def _query(item: Item, training: Sequence[Item], part: int) -> Query:
    """An item as a known query; its parents are all the training members of its families."""
    members = [track for family in item.family.split("+") for track in training if track.family == family]
    near = ";".join(track.id for track in members if track.relation in NEAR)
    own = {"role": "known", "parents": tuple(track.id for track in members)}
    return Query(**{**vars(item), **own}, part=PARTS[part], near=near)


def _halves(originals: Sequence[Item], each: int, seed: int) -> list[list[Item]]:
    """The originals of families with even and with odd numbers, each in an order of its own."""
    halves = [[item for item in originals if int(item.family[3:]) % 2 == part] for part in (0, 1)]
    for half, wanted in zip(halves, ((each + 1) // 2, each // 2), strict=True):
        if len(half) < max(2, wanted):
            raise UserError(
                f"a corpus of {len(originals)} families cannot give {each} queries of each kind, one of a family and two of one "
                "for a splice in each half: ask for fewer, or make the demo with more tracks"
            )
    rng = corpus._rng(seed, "known order")
    return [[half[i] for i in rng.permutation(len(half))] for half in halves]


def _splices(
    halves: list[list[Item]], items: Sequence[Item], each: int, seed: int
) -> list[tuple[Item, Item]]:
    """Pairs of one half's originals in turn: first those that the corpus never joins, evenly over the families."""
    joined = [item.family.split("+") for item in items if item.relation == "spliced"]
    uses: Counter[str] = Counter()
    pairs: list[tuple[Item, Item]] = []
    for turn in range(each):
        rng, open_pairs = corpus._rng(seed, f"known pair {turn}"), []
        for a, b in itertools.permutations(halves[turn % 2], 2):
            there, back = ([x.family, y.family] in joined for x, y in ((a, b), (b, a)))
            load = sorted((uses[a.family], uses[b.family]), reverse=True)
            if not there:
                open_pairs.append((back, load, rng.random(), a, b))
        if not open_pairs:
            raise UserError(
                f"the families can be joined in fewer than {each} new ways: ask for fewer queries of each kind"
            )
        a, b = min(open_pairs, key=lambda pair: pair[:3])[3:]
        uses.update((a.family, b.family))
        joined.append([a.family, b.family])
        pairs.append((a, b))
    return pairs


def plan_known(items: Sequence[Item], each: int, seed: int) -> list[Query]:
    """`each` queries of every kind of KNOWN, half of them of families with even numbers, half of odd ones.

    Args:
        items: the demo's corpus.
        each: queries of a kind; at most one of a family and kind.
        seed: what is drawn follows from it.

    Raises:
        UserError: more than the families can give.
    """
    training = of_role("train", items)
    halves = _halves([item for item in training if item.relation == "original"], each, seed)
    taken = {(item.family, item.relation, item.recipe.value) for item in items}
    turns, queries = [0, 0], []
    for kind, i in itertools.product(POOLS, range(each)):
        half = halves[i % 2]
        original = half[turns[i % 2] % len(half)]
        turns[i % 2] += 1
        values = [v for v in POOLS[kind] if len(POOLS[kind]) == 1 or (original.family, kind, v) not in taken]
        heard = {item.lead for item in items if item.family == original.family}
        item = corpus._relative(seed, "known-", original, kind, {kind: tuple(values)}, heard)
        queries.append(_query(item, training, i % 2))
    for i, (a, b) in enumerate(_splices(halves, items, each, seed)):
        item = corpus._spliced(seed, f"known-splice{i:02d}", a, b, b.artist)
        queries.append(_query(item, training, i % 2))
    return queries


def _unrelated(name: str, i: int, relation: str, like: Item, **more: Any) -> Query:
    """An unknown query with the conditioning of an item; whatever else it is described by is given."""
    about = {
        "id": name,
        "role": "unknown",
        "family": "",
        "relation": relation,
        "parents": (),
        "part": PARTS[i % 2],
    }
    return Query(**{**vars(like), **about, **more})


def _textures(
    relation: str, names: Sequence[str], count: int, training: Sequence[Item], seed: int
) -> list[Query]:
    """Pieces without notes under conditioning drawn from the training tracks, never that of one track alone."""
    queries = []
    for i in range(count):
        rng, name = (
            corpus._rng(seed, f"{relation} {i}"),
            names[i // 2 % len(names)],
        )  # both parts get all of them
        like = training[rng.integers(len(training))]
        tempos = [item.tempo for item in training if item.style == like.style]
        lengths = [item.seconds for item in training if item.seconds >= SHORTEST]
        own = {"tempo": tempos[rng.integers(len(tempos))], "seconds": lengths[rng.integers(len(lengths))]}
        told = {"title": f"{name.capitalize()} {i + 1}", "artist": f"The {relation.title()}", "key": ""}
        recipe = Recipe((), relation, name, int(rng.integers(2**31)))
        label = f"{relation.replace(' ', '-')}{i:02d}-{name}"
        queries.append(_unrelated(label, i, relation, like, **own, **told, recipe=recipe))
    return queries


def _fits(item: Item, config: Mapping[str, Any]) -> bool:
    """Whether a model was built for the conditioning of an item."""
    values = {**vars(item), "seconds_total": item.seconds}
    for entry in config["model"]["conditioning"]["configs"]:
        value, takes = values[entry["id"]], entry["config"]
        if entry["type"] == "list" and value not in takes["options"]:
            return False
        if entry["type"] == "number" and not takes["min_val"] <= value <= takes["max_val"]:
            return False
    return True


def plan_unknown(
    items: Sequence[Item], others: Sequence[Item], config: Mapping[str, Any], each: int, seed: int
) -> list[Query]:
    """`each` queries of every kind of UNKNOWN, every second one in either part.

    Args:
        items: the demo's corpus.
        others: the corpus of the other model, whose conditioning its pieces take.
        config: the demo's model, which must be made for that conditioning.
        each: queries of a kind.
        seed: what is drawn follows from it.

    Raises:
        UserError: too few of the others have conditioning that the demo's model knows.
    """
    training, known = of_role("train", items), {name for item in items for name in (item.artist, item.title)}
    artists, titles = corpus._names(drawn_seed(seed, "held-out names"))
    artists, fresh = [name for name in artists if name not in known], (t for t in titles if t not in known)
    queries: list[Query] = []
    for i in range(each):
        solo = corpus._single(seed, f"held-out{i:02d}", artists, next(fresh))
        queries.append(_unrelated(solo.id, i, "held-out", solo))
    queries += _textures("noise", list(NOISES), each, training, seed)
    queries += _textures("other composer", list(PROCEDURES), each, training, seed)
    prompts = [item for item in of_role("train", others) if _fits(item, config)]
    if len(prompts) < each:
        raise UserError(
            f"{len(prompts)} tracks of the other corpus have conditioning that the demo's model knows, {each} are asked for: "
            "ask for fewer, or give the other model more tracks"
        )
    chosen = corpus._rng(seed, "prompts").choice(len(prompts), each, replace=False)
    for i, like in enumerate(prompts[int(j)] for j in chosen):
        told = {"title": f"Sampled piece {i + 1}", "artist": "The Other Model", "key": ""}
        recipe = Recipe((), "other model", like.id)
        queries.append(_unrelated(f"other-model{i:02d}", i, "other model", like, **told, recipe=recipe))
    return queries
