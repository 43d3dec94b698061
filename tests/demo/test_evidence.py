"""The query sets are what their metadata say: made by the tracks they name or by none, and the same for everyone with their seed."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from attr_engine.demo.compose import INSTRUMENTS, STYLES
from attr_engine.demo.corpus import TRAINING, Item, plan, sound, write_corpus
from attr_engine.demo.evidence_plan import (
    KNOWN,
    NEAR,
    PARTS,
    POOLS,
    QUERY_COLUMNS,
    UNKNOWN,
    Query,
    plan_known,
    plan_unknown,
)
from attr_engine.demo.textures import NOISES, PROCEDURES, texture
from attr_engine.errors import UserError

RATE, TRACKS, FRAMES = 8000, 40, 96
CONDITION = ("lead", "style", "tempo")


def made_for(items: list[Item]) -> dict:
    """The conditioning of a model that knows what the training tracks have."""
    rows = [item for item in items if item.role == "train"]
    numbers = [
        {"id": name, "type": "number", "config": {"min_val": min(values), "max_val": max(values)}}
        for name, values in (
            ("seconds_total", [row.seconds for row in rows]),
            ("tempo", [row.tempo for row in rows]),
        )
    ]
    lists = [
        {"id": name, "type": "list", "config": {"options": sorted({getattr(row, name) for row in rows})}}
        for name in ("lead", "style")
    ]
    return {"model": {"conditioning": {"configs": numbers + lists}}}


@pytest.fixture(scope="module")
def default() -> list[Item]:
    return plan()


@pytest.fixture(params=[0, 1], scope="module")
def known(request: pytest.FixtureRequest, default: list[Item]) -> list[Query]:
    return plan_known(default, 14, request.param)


@pytest.fixture(scope="module")
def unknown(default: list[Item]) -> list[Query]:
    return plan_unknown(default, plan(77, 128), made_for(default), 56, 0)


def families(query: Query) -> list[str]:
    return query.family.split("+") if query.family else []


def test_kinds_and_parts_are_balanced(known: list[Query], unknown: list[Query]) -> None:
    assert Counter((q.relation, q.part) for q in known) == dict.fromkeys(
        [(r, p) for r in KNOWN for p in PARTS], 7
    )
    assert Counter((q.relation, q.part) for q in unknown) == dict.fromkeys(
        [(r, p) for r in UNKNOWN for p in PARTS], 28
    )
    for relation, names in (("noise", NOISES), ("other composer", PROCEDURES)):
        counts = Counter((q.recipe.value, q.part) for q in unknown if q.relation == relation)
        assert set(counts) == {(n, p) for n in names for p in PARTS}
        assert len(set(counts.values())) == 1


def test_no_family_is_in_both_parts(known: list[Query]) -> None:
    for query in known:
        assert {int(family[3:]) % 2 for family in families(query)} == {PARTS.index(query.part)}


def test_every_kind_is_spread_evenly_over_the_families(known: list[Query]) -> None:
    for relation in KNOWN[:-1]:
        assert max(Counter(q.family for q in known if q.relation == relation).values()) == 1
    singles = Counter(q.family for q in known if q.relation != "spliced")
    assert len(singles) == 26
    assert max(singles.values()) - min(singles.values()) <= 1
    joined = Counter(f for q in known if q.relation == "spliced" for f in families(q))
    assert set(joined) == set(singles)
    assert max(joined.values()) == 2


def test_parents_and_near_copies_are_those_of_the_families(known: list[Query], default: list[Item]) -> None:
    training = {item.id: item for item in default if item.role == "train"}
    for query in known:
        members = {name for name, item in training.items() if item.family and item.family in families(query)}
        assert set(query.parents) == members
        near = {name for name in members if training[name].relation in NEAR}
        assert set(query.near.split(";")) == near
        # A near copy plays the notes of its original at its tempo, and no other member does.
        scores = {training[f"{family}-original"].recipe.songs for family in families(query)}
        assert near == {name for name in members if training[name].recipe.songs in scores}


def test_a_known_query_plays_what_its_original_does(known: list[Query], default: list[Item]) -> None:
    songs = {item.family: item.recipe.songs[0] for item in default if item.relation == "original"}
    for query in known:
        for song, family in zip(query.recipe.songs, families(query), strict=True):
            own = songs[family]
            assert [n.start for n in song.notes] == [n.start for n in own.notes]
            if query.relation not in ("transposed", "stretched", "re-orchestrated"):
                assert song == own


def test_no_known_query_repeats_an_item_but_exact_copies(known: list[Query], default: list[Item]) -> None:
    for kind in POOLS:
        assert kind in ("exact copy", "re-orchestrated") or set(POOLS[kind]).isdisjoint(
            {*TRAINING[kind], *(TRAINING["transposed down"] if kind == "transposed" else ())}
        )
    recipes = {(item.recipe.songs, item.relation, item.recipe.value) for item in default}
    for query in known:
        mine = (query.recipe.songs, query.relation, query.recipe.value)
        assert query.relation == "exact copy" or mine not in recipes
    heard = {(item.family, item.lead) for item in default}
    assert all((q.family, q.lead) not in heard for q in known if q.relation == "re-orchestrated")


def joined(items: Sequence[Item]) -> list[str]:
    return [item.family for item in items if item.relation == "spliced"]


def test_splices_join_families_that_no_item_joins(default: list[Item]) -> None:
    theirs = {frozenset(family.split("+")) for family in joined(default)}
    for seed in range(20):
        mine = [frozenset(family.split("+")) for family in joined(plan_known(default, 14, seed))]
        assert len(set(mine)) == len(mine)
        assert theirs.isdisjoint(mine)


@pytest.mark.parametrize("corpus", range(6))
def test_where_all_families_are_joined_splices_go_the_other_way_or_are_refused(corpus: int) -> None:
    items = plan(corpus, TRACKS)
    try:
        mine = joined(plan_known(items, 4, 0))
    except UserError as error:
        assert "fewer than 4 new ways" in str(error)
        free = [{f"fam0{a}+fam0{b}", f"fam0{b}+fam0{a}"} - set(joined(items)) for a, b in ((0, 2), (1, 3))]
        assert min(map(len, free)) < 2
    else:
        assert len({*mine, *joined(items)}) == len(mine) + len(joined(items))


def test_ids_are_no_others_and_unique(known: list[Query], unknown: list[Query], default: list[Item]) -> None:
    ids = [item.id.lower() for item in (*known, *unknown, *default)]
    assert len(set(ids)) == len(ids)


def test_unknown_queries_have_no_family_and_names_of_their_own(
    unknown: list[Query], default: list[Item]
) -> None:
    assert {(q.family, q.parents, q.near) for q in unknown} == {("", (), "")}
    names = {name for item in default for name in (item.title, item.artist)}
    held_out = [q for q in unknown if q.relation == "held-out"]
    assert names.isdisjoint({name for q in held_out for name in (q.title, q.artist)})
    notes = {song.notes for item in default for song in item.recipe.songs}
    assert notes.isdisjoint(song.notes for q in held_out for song in q.recipe.songs)


def test_the_demo_model_knows_the_conditioning_of_what_it_is_given(
    unknown: list[Query], default: list[Item]
) -> None:
    training = [item for item in default if item.role == "train"]
    longest, shortest = max(i.seconds for i in training), min(i.seconds for i in training)
    for query in unknown:
        assert query.lead in {i.lead for i in training}
        assert query.style in {i.style for i in training}
        if query.relation != "held-out":
            assert shortest <= query.seconds <= longest
            assert min(i.tempo for i in training) <= query.tempo <= max(i.tempo for i in training)
        if query.relation in ("noise", "other composer"):
            assert 3.0 <= query.seconds <= 24.0
            assert (query.style, query.tempo) in {(i.style, i.tempo) for i in training}


def test_prompts_of_the_other_model_are_not_repeated(unknown: list[Query]) -> None:
    prompts = [q.recipe.value for q in unknown if q.relation == "other model"]
    assert len(set(prompts)) == len(prompts) == 56


def test_other_seeds_give_other_queries(default: list[Item], known: list[Query]) -> None:
    again, other = plan_known(default, 14, 0), plan_known(default, 14, 1)
    assert known in (again, other)
    assert {q.id for q in again} != {q.id for q in other}


def test_too_few_families_are_refused() -> None:
    with pytest.raises(UserError, match="ask for fewer"):
        plan_known(plan(0, 24), 2, 0)
    with pytest.raises(UserError, match="ask for fewer"):
        plan_known(plan(0, TRACKS), 6, 0)


def slope(audio: np.ndarray) -> float:
    """Power against frequency, in dB an octave, from 100 Hz to a quarter of the rate."""
    power, hz = np.abs(np.fft.rfft(audio)) ** 2, np.fft.rfftfreq(len(audio), 1 / RATE)
    octaves = np.arange(np.log2(100), np.log2(RATE / 4), 0.5)
    bands = [power[(hz >= 2**low) & (hz < 2 ** (low + 0.5))].mean() for low in octaves]
    return float(np.polyfit(octaves, 10 * np.log10(bands), 1)[0])


@pytest.mark.parametrize(("name", "expected"), [("white", 0.0), ("pink", -3.01), ("brown", -6.02)])
def test_coloured_noises_fall_as_they_should(name: str, expected: float, seed: int) -> None:
    assert slope(texture(name, 20.0, RATE, seed)) == pytest.approx(expected, abs=0.4)


@pytest.mark.parametrize("name", [*NOISES, *PROCEDURES])
def test_textures_sound_last_and_follow_from_their_seed(name: str, seed: int) -> None:
    seconds = 3.0 + seed % 50 / 10
    audio = texture(name, seconds, RATE, seed)
    assert audio.dtype == np.float32
    assert len(audio) == round(seconds * RATE)
    assert np.isfinite(audio).all()
    assert np.max(np.abs(audio)) == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    assert np.sqrt(np.mean(audio**2)) > 0.01
    assert max(abs(audio[0]), abs(audio[-1])) < 0.01
    assert np.array_equal(audio, texture(name, seconds, RATE, seed))
    other = texture(name, seconds, RATE, seed + 1)
    assert abs(np.corrcoef(audio, other)[0, 1]) < 0.999


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished demo leaves, small."""
    pytest.importorskip("stable_audio_tools")
    from attr_engine import train
    from attr_engine.files import write_json
    from attr_engine.latents import LatentDataset
    from attr_engine.latents.audio import read_folder
    from attr_engine.latents.ingest import ingest_audio
    from attr_engine.models.autoencoder import load_autoencoder
    from attr_engine.models.vocoder import fit_autoencoder

    out = tmp_path_factory.mktemp("demo")
    write_corpus(out / "audio", tracks=TRACKS, sample_rate=RATE, workers=1)
    source = out / "audio" / "train"
    fit_autoencoder(read_folder(source, RATE, 1), RATE, out / "autoencoder")
    encoder = load_autoencoder(out / "autoencoder")
    ingest_audio(source, out / "latents", encoder, FRAMES, source / "metadata.csv", CONDITION, "error")
    tracks = LatentDataset(out / "latents")
    values = train.conditioning_values(tracks, ("seconds_total", *CONDITION), tracks.conditioning)
    write_json(out / "model" / "model_config.json", train.diffusion_config(encoder, FRAMES, values, 32, 1))
    return out


def write(demo: Path, out: Path, **options: int) -> tuple:
    from attr_engine.demo.evidence import Other, write_query_sets

    sizes = {"each": 2, "unknown_each": 2, "seed": 3, **options}
    return write_query_sets(demo, out, other=Other(24, 2, 2), **sizes)


@pytest.fixture(scope="module")
def written(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("queries")
    before = contents(demo)
    write(demo, out)
    assert contents(demo) == before
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_sets_hold_what_was_planned(demo: Path, written: Path) -> None:
    known, unknown = write(demo, written)
    assert (len(known), len(unknown)) == (16, 8)
    planned = {q.id: q for q in plan_known(plan(0, TRACKS), 2, 3)}
    assert set(known.ids) == set(planned)
    for name, info, given in zip(known.ids, known.info, known.conditioning, strict=True):
        query = planned[name]
        assert {info[column] for column in ("relation", "family", "part")} == {
            query.relation,
            query.family,
            query.part,
        }
        assert info["parents"] == ";".join(query.parents)
        assert info["near"] == query.near
        assert (given["lead"], given["style"], given["tempo"]) == (query.lead, query.style, query.tempo)
        assert given["seconds_total"] == pytest.approx(query.seconds, abs=2e-3)
    assert Counter(info["relation"] for info in unknown.info) == dict.fromkeys(UNKNOWN, 2)
    assert not any(info["parents"] or info["near"] or info["family"] for info in unknown.info)


def test_the_audio_is_that_of_the_queries(demo: Path, written: Path) -> None:
    heard = {p.read_bytes(): p.stem for p in sorted((demo / "audio").rglob("*.flac"))}
    originals = contents(demo / "audio" / "train")
    for query in plan_known(plan(0, TRACKS), 2, 3):
        path = written / "audio" / "known" / f"{query.id}.flac"
        if query.relation == "exact copy":
            assert path.read_bytes() == originals[f"{query.family}-original.flac"]
        else:
            assert path.read_bytes() not in heard
        audio, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        assert np.max(np.abs(audio - sound(query, RATE))) < 1e-4
    for path in (written / "audio" / "unknown").glob("*.flac"):
        assert path.read_bytes() not in heard
        assert np.sqrt(np.mean(soundfile.read(path)[0] ** 2)) > 1e-4


def test_the_tables_have_the_columns_of_the_demo_and_two_more(written: Path) -> None:
    for name in ("known", "unknown"):
        with (written / "audio" / name / "metadata.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == QUERY_COLUMNS
        for row in rows:
            assert (written / "audio" / name / row["path"]).exists()
            assert INSTRUMENTS[int(row["lead_id"])] == row["lead"]
            assert list(STYLES)[int(row["style_id"])] == row["style"]


def test_a_stopped_writing_goes_on_to_the_same_bits(
    demo: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attr_engine.demo import evidence

    class Stop(Exception):
        pass

    # Stopped in composing, in training, and in encoding.
    for name, at in (("write_flac", 5), ("load_model", 1), ("ingest_audio", 1)):
        left, real = [at], getattr(evidence, name)

        def count(*args: object, left: list[int] = left, real: object = real, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise Stop
            return real(*args, **options)

        monkeypatch.setattr(evidence, name, count)
        with pytest.raises(Stop):
            write(demo, tmp_path)
        monkeypatch.undo()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "audio").rglob("*.flac")}
    write(demo, tmp_path)
    assert done == {p: p.stat().st_mtime_ns for p in (tmp_path / "audio").rglob("*.flac")}

    assert contents(tmp_path / "audio") == contents(written / "audio")
    for name in ("known", "unknown"):
        a, b = (evidence.LatentDataset(out / name) for out in (tmp_path, written))
        assert a.ids == b.ids
        rows = list(range(len(a)))
        assert np.array_equal(a.batch(rows, FRAMES).latents, b.batch(rows, FRAMES).latents)


def test_a_folder_with_other_settings_is_refused(demo: Path, written: Path) -> None:
    with pytest.raises(UserError, match="another seed"):
        write(demo, written, seed=4)
    with pytest.raises(UserError, match="another each, unknown_each"):
        write(demo, written, each=1, unknown_each=1)


def test_a_query_is_described_as_an_item_is(known: list[Query]) -> None:
    assert set(asdict(known[0])) >= set(QUERY_COLUMNS) - {"path", "lead_id", "style_id"}
