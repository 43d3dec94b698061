"""The demo corpus is music whose relations are what its metadata say, the same for everyone with its seed."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from attr_engine.demo import corpus
from attr_engine.demo.compose import DRUMS, INSTRUMENTS, STYLES, compose, crop, reorchestrate, transpose
from attr_engine.demo.corpus import COLUMNS, FADE, RELATIONS, Item, plan, sound, write_corpus
from attr_engine.demo.synth import VOICES, Tone, render

TRACKS = 24
RATE = 8000


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return plan(0, TRACKS)


@pytest.fixture(scope="module")
def default() -> list[Item]:
    return plan()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    write_corpus(out, tracks=TRACKS, sample_rate=RATE, workers=1)
    return out


@pytest.fixture(scope="module")
def audio(folder: Path, items: list[Item]) -> dict[str, np.ndarray]:
    return {i.id: soundfile.read(corpus._path(folder, i), dtype="float32")[0] for i in items}


def train(items: list[Item], relation: str = "") -> list[Item]:
    return [item for item in items if item.role == "train" and relation in ("", item.relation)]


def queries(items: list[Item]) -> list[Item]:
    return [item for item in items if item.role == "query"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def chroma(samples: np.ndarray, rate: int) -> np.ndarray:
    power = np.abs(np.fft.rfft(samples)) ** 2
    hz = np.fft.rfftfreq(len(samples), 1 / rate)
    heard = (hz > 100) & (hz < 1500)
    classes = np.round(12 * np.log2(hz[heard] / 440)).astype(int) % 12
    return np.sqrt(np.bincount(classes, power[heard], 12))


def test_the_same_seed_gives_the_same_bits_for_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, tracks=TRACKS, sample_rate=RATE, workers=2)
    assert contents(tmp_path) == contents(folder)


def test_another_seed_gives_other_music(items: list[Item]) -> None:
    songs = {song.notes for item in items for song in item.recipe.songs}
    assert songs.isdisjoint(song.notes for item in plan(1, TRACKS) for song in item.recipe.songs)


@pytest.mark.parametrize("tracks", [1, 2, 5, 9, 10, 13, 24, 60, 256, 300])
def test_there_are_as_many_training_tracks_as_asked_for(tracks: int) -> None:
    assert len(train(plan(3, tracks))) == tracks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_relation_appears_at_least_eight_times_by_default(seed: int) -> None:
    counts = Counter(item.relation for item in train(plan(seed)))
    assert set(counts) == set(RELATIONS)
    assert min(counts.values()) >= 8


def test_every_relation_is_present_in_a_small_corpus(items: list[Item]) -> None:
    assert {item.relation for item in train(items)} == set(RELATIONS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lengths_are_planned_within_2_and_24_seconds(seed: int) -> None:
    for item in plan(seed):
        assert 2.0 <= item.seconds <= 24.0
        assert item.relation != "short" or item.seconds <= 3.5
        assert item.relation != "original" or 6.0 <= item.seconds <= 20.0


def test_files_are_as_long_as_planned(items: list[Item], audio: dict[str, np.ndarray]) -> None:
    for item in items:
        assert len(audio[item.id]) / RATE == pytest.approx(item.seconds, abs=2e-3)


def test_ids_are_unique_and_safe_in_file_names(default: list[Item]) -> None:
    ids = [item.id for item in default]
    assert len({name.lower() for name in ids}) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]+", name) for name in ids)


def test_parents_are_in_training(default: list[Item]) -> None:
    ids = {item.id for item in train(default)}
    assert all(set(item.parents) <= ids for item in default)


def test_a_family_has_one_artist_and_no_two_families_share_their_title(default: list[Item]) -> None:
    originals = train(default, "original")
    assert len({item.title for item in originals}) == len(originals) == 26
    for original in originals:
        assert {item.artist for item in default if item.family == original.family} == {original.artist}


def test_originals_differ_from_one_another_in_style_or_in_tempo_and_key(default: list[Item]) -> None:
    originals = [item.recipe.songs[0] for item in train(default, "original")]
    for i, song in enumerate(originals):
        assert not any(corpus._alike(song, other) for other in originals[:i])


def test_queries_have_all_training_members_of_their_families_as_parents(default: list[Item]) -> None:
    held_out = queries(default)
    assert Counter(item.relation for item in held_out) == dict.fromkeys(
        ("noise", "gain", "transposed", "stretched", "re-orchestrated", "spliced", "unrelated"), 2
    )
    for item in held_out:
        families = item.family.split("+") if item.family else []
        assert set(item.parents) == {t.id for t in train(default) if t.family in families}
        assert bool(item.parents) == (item.relation != "unrelated")


def test_no_query_is_in_training(
    items: list[Item], default: list[Item], audio: dict[str, np.ndarray]
) -> None:
    heard = {audio[item.id].tobytes() for item in train(items)}
    assert all(audio[item.id].tobytes() not in heard for item in queries(items))
    recipes = {item.recipe for item in train(default)}
    for item in queries(default):
        assert item.recipe not in recipes
        relatives = [t for t in train(default, item.relation) if t.id in item.parents]
        if item.relation in ("gain", "noise"):
            assert item.recipe.value not in [t.recipe.value for t in relatives]
        else:
            assert item.recipe.songs not in [t.recipe.songs for t in train(default, item.relation)]


def test_exact_copies_are_bit_identical(folder: Path, items: list[Item]) -> None:
    files = contents(folder / "train")
    copies = train(items, "exact copy")
    assert copies
    for item in copies:
        assert files[f"{item.id}.flac"] == files[f"{item.parents[0]}.flac"]


def test_audio_is_finite_sounding_and_within_full_scale(audio: dict[str, np.ndarray]) -> None:
    for samples in audio.values():
        assert np.isfinite(samples).all()
        assert np.max(np.abs(samples)) <= 1.0
        assert np.sqrt(np.mean(samples**2)) > 0.01


def test_audio_starts_and_ends_without_a_click(items: list[Item], audio: dict[str, np.ndarray]) -> None:
    for item in items:
        if item.relation not in ("noise", "lossy"):
            assert abs(audio[item.id][0]) < 0.01
            assert abs(audio[item.id][-1]) < 0.01


def test_transposed_items_sound_as_many_semitones_away(
    items: list[Item], audio: dict[str, np.ndarray]
) -> None:
    for item in train(items, "transposed"):
        before, after = (chroma(audio[name], RATE) for name in (item.parents[0], item.id))
        fits = [np.corrcoef(np.roll(before, shift), after)[0, 1] for shift in range(12)]
        assert int(np.argmax(fits)) == item.recipe.value % 12


def test_transposing_moves_every_note_but_the_drums() -> None:
    song = compose(np.random.default_rng(0), "bossa", 12.0)
    for old, new in zip(song.notes, transpose(song, 3).notes, strict=True):
        assert new == (old if old.part == DRUMS else old._replace(pitch=old.pitch + 3))


def test_stretched_items_last_longer_by_their_factor(items: list[Item], audio: dict[str, np.ndarray]) -> None:
    for item in train(items, "stretched"):
        ratio = len(audio[item.id]) / len(audio[item.parents[0]])
        assert ratio == pytest.approx(item.recipe.value, rel=1e-3)


def test_reorchestrating_keeps_the_melody_and_changes_who_plays_it() -> None:
    song = compose(np.random.default_rng(1), "waltz", 12.0, lead="clarinet")
    other = reorchestrate(song, np.random.default_rng(2), avoid=["flute"])
    assert other.lead not in ("clarinet", "flute")
    assert all(old[1] != new[1] for old, new in zip(song.parts, other.parts, strict=True))
    shifts = {b.pitch - a.pitch for a, b in zip(song.notes, other.notes, strict=True) if a.part == "lead"}
    assert len(shifts) == 1
    assert shifts.pop() % 12 == 0


def test_gain_changes_the_level_by_its_decibels(items: list[Item], audio: dict[str, np.ndarray]) -> None:
    for item in train(items, "gain"):
        ratio = np.max(np.abs(audio[item.id])) / np.max(np.abs(audio[item.parents[0]]))
        assert 20 * np.log10(ratio) == pytest.approx(item.recipe.value, abs=0.02)


@pytest.mark.parametrize("relation", ["noise", "lossy"])
def test_degraded_items_stay_in_time_with_their_original(
    relation: str, items: list[Item], audio: dict[str, np.ndarray]
) -> None:
    for item in train(items, relation):
        degraded, original = audio[item.id], audio[item.parents[0]]
        assert 0.9 < np.corrcoef(degraded, original)[0, 1] < 0.99999


def test_a_splice_is_the_start_of_one_parent_and_the_end_of_another(
    items: list[Item], audio: dict[str, np.ndarray]
) -> None:
    for item in train(items, "spliced"):
        first, second = (audio[name] for name in item.parents)
        leave, enter = (round(cut * RATE) for cut in item.recipe.value)
        fade, joined = int(FADE * RATE), audio[item.id]
        assert np.corrcoef(joined[: leave - fade], first[: leave - fade])[0, 1] > 0.9999
        assert np.corrcoef(joined[leave + fade :], second[enter + fade :])[0, 1] > 0.9999


def test_tables_describe_every_file(folder: Path, items: list[Item]) -> None:
    for role, name in corpus.FOLDERS.items():
        rows = table(folder / name)
        assert tuple(rows[0]) == COLUMNS
        assert {row["path"] for row in rows} == {path.name for path in (folder / name).glob("*.flac")}
        for row, item in zip(rows, [item for item in items if item.role == role], strict=True):
            assert (row["id"], tuple(filter(None, row["parents"].split(";")))) == (item.id, item.parents)
            assert INSTRUMENTS[int(row["lead_id"])] == row["lead"] == item.lead
            assert list(STYLES)[int(row["style_id"])] == row["style"] == item.style


def test_a_stopped_writing_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    def write() -> list[tuple[int, int]]:
        told: list[tuple[int, int]] = []
        write_corpus(tmp_path, 0, 5, RATE, workers=1, progress=lambda *done: told.append(done))
        return told

    told = write()
    assert told[-1] == (11, 11)
    whole = contents(tmp_path)
    assert write() == []
    kept, lost = sorted((tmp_path / "train").glob("*.flac"))[:2]
    before = kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "train" / "metadata.csv").unlink()
    write()
    assert contents(tmp_path) == whole
    assert kept.stat().st_mtime_ns == before


def test_a_folder_with_another_corpus_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="another corpus"):
        write_corpus(folder, seed=1, tracks=TRACKS, sample_rate=RATE)


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_notes_rise_from_and_fall_to_silence_without_aliasing(instrument: str) -> None:
    low, high = (VOICES[instrument](Tone(740.0, rate // 2, rate, 0.9)) for rate in (16000, 48000))
    for wave in (low, high):
        wave /= np.max(np.abs(wave))
        assert max(abs(wave[0]), abs(wave[-1])) < 1e-3
    # At a higher rate the same note is the same below the lower rate's limit: nothing has folded back.
    bands = [
        np.add.reduceat(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))[:1600] ** 2, range(0, 1600, 200))
        for wave in (low, high[: 3 * len(low)])
    ]
    shares = [band / band.sum() for band in bands]
    assert np.max(np.abs(shares[0] - shares[1])) < 0.02


def test_a_crop_holds_only_its_beats() -> None:
    song = compose(np.random.default_rng(4), "jig", 12.0)
    part = crop(song, 3.0, 6.0, ring=1.0)
    assert part.beats == 4.0
    assert part.notes
    assert all(0 <= note.start and note.start + note.length <= 3.0 + 1e-9 for note in part.notes)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_plays_to_its_length_at_any_rate(style: str) -> None:
    song = compose(np.random.default_rng(5), style, 8.0)
    assert len(render(song, 11025)) == 8 * 11025
    assert {part for part, _ in song.parts} <= {note.part for note in song.notes}


def test_sound_needs_nothing_but_the_item() -> None:
    item = plan(0, 5)[-1]
    assert np.array_equal(sound(item, RATE), sound(plan(0, 5)[-1], RATE))
