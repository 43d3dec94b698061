"""The listening test asks what the run says and tells nobody which is which."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import BINARY, browser
from helpers import ToyDenoiser, make_tracks
from test_listening_answers import table

from attr_engine.errors import UserError
from attr_engine.jobs import Job, make_queries
from attr_engine.latents import LatentDataset, LatentWriter
from attr_engine.listening import Draws, Key, Pair, arranged, leading_scores, seeded
from attr_engine.listening_answers import judge, read_answers
from attr_engine.listening_settings import CATCH, KEY, PAGE, PAIR, Design
from attr_engine.report import listening as page
from attr_engine.result import Attribution
from attr_engine.runs import open_run
from attr_engine.settings import Settings

soundfile = pytest.importorskip("soundfile")

RATE = 16000
SECRETS = ("Hidden <Title>", "Sécret & Artist", "</script><b>")


class Model(ToyDenoiser):
    """A toy that also plays: whatever it decodes is a tone of 100 Hz of two seconds."""

    sample_rate = RATE

    def decode(self, latents):
        time = torch.arange(2 * RATE) / RATE
        return torch.sin(2 * torch.pi * 100 * time).expand(len(latents), 1, -1) * 0.5


def tone(path: Path, hertz: float, seconds: float, level: float) -> dict:
    """Write a tone; the info that ingest would give its track."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, level * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE), RATE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "source": path.name, "seconds": seconds, "start": 0.0, "sha256": digest,
        "title": f"{SECRETS[0]} {path.stem}", "artist": SECRETS[1], "licence": SECRETS[2],
    }  # fmt: skip


def write_set(folder: Path, prefix: str, count: int, rng: np.random.Generator, pitch: int) -> LatentDataset:
    tracks = make_tracks(rng, count, 3, 10)
    writer = LatentWriter(folder / "set", padding=tracks.silence, extra={"root": str(folder / "music")})
    for i in range(count):
        info = tone(
            folder / "music" / f"{prefix}{i}.wav",
            pitch + 40 * i,
            float(rng.uniform(1.2, 3)),
            float(rng.uniform(0.05, 0.9)),
        )
        writer.add(f"{prefix}{i}", tracks.raw[i], tracks.conditioning[i], info)
    writer.close()
    return LatentDataset(folder / "set")


class World:
    """Eight tracks and five queries with sounds, and made-up scores of a method and of another one."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.model = folder, Model(1)
        self.tracks = write_set(folder / "tracks", "track-", 8, rng, 300)
        self.queries = write_set(folder / "queries", "query-", 5, rng, 1000)
        self.result, self.other = (self.scores(rng.normal(size=(6, 8))) for _ in range(2))

    @property
    def asked(self):
        return make_queries(self.tracks, [self.queries], ["track-3"])

    def scores(self, values: np.ndarray) -> Attribution:
        meta = {"model": self.model.fingerprint, "data": self.tracks.fingerprint, "config": "c"}
        updates = [(q.id, 0.1) for q in self.asked]
        return Attribution(
            self.tracks.ids, updates, {"ridge": values}, {"ridge": values}, np.zeros(8), meta,
            np.ones(values.shape, dtype=np.int64),
        )  # fmt: skip

    def write(self, name: str, against=("random",), title="", **design) -> tuple[Key, Path]:
        folder = self.folder / name
        tables = {n: self.other if n == "zither" else None for n in against}
        with open_run(self.folder / f"{name}-run", Settings()) as run:
            job = Job(run, self.model, self.tracks, self.asked)
            return page.write_test(folder, job, self.result, tables, Design(**design), title), folder


@pytest.fixture
def world(tmp_path, rng) -> World:
    return World(tmp_path, rng)


def clips_of(folder: Path) -> dict[tuple[int, str], bytes]:
    text = (folder / PAGE).read_text(encoding="utf-8")
    found = re.findall(r'<script type="text/plain" id="clip-(\d+)-([xab])">([A-Za-z0-9+/=]+)</script>', text)
    return {(int(n), letter): base64.b64decode(data) for n, letter, data in found}


def sound(data: bytes) -> np.ndarray:
    audio, rate = soundfile.read(io.BytesIO(data))
    assert rate == RATE and audio.ndim == 1
    return audio


def pitch(audio: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 17)).argmax() * RATE / (1 << 17))


# -- what is asked --------------------------------------------------------------------------------


def random_draws(rng: np.random.Generator, queries: int, tracks: int, copies=None):
    names, ids = [f"q{i}" for i in range(queries)], [f"t{i}" for i in range(tracks)]
    scores = {name: rng.normal(size=(queries, tracks)) for name in ("lead", "random", "table")}
    for (
        values
    ) in scores.values():  # the last three are measured, so that every query has a top, without copies too
        values[:, :-3][rng.random((queries, tracks - 3)) < 0.1] = np.nan
    alike = {t: frozenset([t]) for t in ids} | (copies or {})
    controls = {n: scores[n] for n in ("random", "table")}
    return names, ids, scores, alike, Draws(names, ids, scores["lead"], controls, alike, rng)


def naive_top(row: np.ndarray, ids, without) -> str:
    return max((v, name) for v, name in zip(row, ids, strict=True) if v == v and name not in without)[1]


def test_each_query_is_asked_once_with_the_top_of_both_sides(rng):
    copies = {"t1": frozenset(["t1", "t2"]), "t2": frozenset(["t1", "t2"])}
    names, ids, scores, alike, draws = random_draws(rng, 40, 9, copies)
    pairs = draws.pairs(100, lambda pair: pair.query != 7)
    assert len({p.query for p in pairs}) == len(pairs) and 7 not in {p.query for p in pairs}
    same = 0
    for q in range(40):
        first = naive_top(scores["lead"][q], ids, ())
        same += naive_top(scores["table"][q], ids, ()) in alike[first]
    assert draws.same == {"random": 0, "table": same}
    for p in pairs:
        first = naive_top(scores["lead"][p.query], ids, ())
        without = alike[first] if p.against == "random" else ()
        assert (ids[p.target], ids[p.other]) == (first, naive_top(scores[p.against][p.query], ids, without))
        assert ids[p.other] not in alike[ids[p.target]]
    counts = [sum(p.against == name for p in pairs) for name in ("random", "table")]
    assert sum(counts) >= 38 and abs(counts[0] - counts[1]) <= max(1, 2 * same)
    assert len(draws.pairs(5, lambda _: True)) == 5


def test_a_training_track_is_never_compared_with_itself_or_its_copy(rng):
    ids = [f"t{i}" for i in range(4)]
    copies = {t: frozenset([t]) for t in ids} | {t: frozenset(["t0", "t1"]) for t in ("t0", "t1")}
    lead = np.array([[9.0, 8, 2, 1]])  # itself, its copy, then t2
    control = np.array([[9.0, 8, 1, 2]])
    draws = Draws(["t0"], ids, lead, {"random": control, "table": control}, copies, rng)
    assert draws.same == {"random": 0, "table": 0}
    assert {(p.target, p.other) for p in draws.pairs(1, lambda _: True)} == {(2, 3)}
    # 60 fair choices: one of the two is missing once in 2^59 runs.
    assert {p.other for _ in range(3) for p in draws.catches(40, lambda _: True)} == {2, 3}


def test_ranks_of_stages_are_kept_and_what_was_not_measured_is_not_retrieved():
    values = np.array([[5.0, 1.0, np.nan, 2.0]])
    stage = np.array([[0, 1, -1, 1]])
    result = Attribution(
        ["a", "b", "c", "d"], [("q", 1.0)], {"f": values}, {"f": values}, np.zeros(4), {}, np.ones((1, 4), np.int64), stage
    )  # fmt: skip
    row = leading_scores(result, ["q"])[0]
    assert np.isnan(row[2]) and list(np.argsort(-row)[:3]) == [3, 1, 0]


def test_repeats_exchange_the_sides_and_come_later(rng):
    names, ids, _, _, draws = random_draws(rng, 30, 9)
    pairs, catches = draws.pairs(20, lambda _: True), draws.catches(4, lambda _: True)
    trials, asked = arranged(pairs, catches, 5, names, ids, rng)
    assert [t.number for t in trials] == list(range(1, 30)) and len(asked) == 29
    for t, pair in zip(trials, asked, strict=True):
        target = t.query if t.kind == CATCH else ids[pair.target]
        assert {t.a, t.b} == {target, ids[pair.other]} and (t.a if t.target == "A" else t.b) == target
        assert t.query == names[pair.query]
    again = [t for t in trials if t.repeat_of]
    assert len(again) == 5 and sum(t.kind == CATCH for t in trials) == 4
    for t in again:
        first = trials[t.repeat_of - 1]
        assert (first.a, first.b, first.kind, first.query) == (t.b, t.a, PAIR, t.query)
        assert first.number < t.number > 12 and first.target != t.target and not first.repeat_of


def test_sides_are_fair_coins_and_independent(seed):
    pairs = [Pair(0, 0, 1, "random")] * 2
    sides = []
    for i in range(2000):
        trials, _ = arranged(pairs, [], 0, ["q"], ["t0", "t1"], np.random.default_rng([seed, i]))
        sides.append([t.target == "A" for t in trials])
    both = np.array(sides, dtype=float)
    # Seven standard deviations of 2000 fair coins, and of their correlation: beyond are 2 exp(-7^2 / 2) (Hoeffding).
    assert np.abs(both.mean(axis=0) - 0.5).max() < 7 * 0.5 / np.sqrt(2000)
    assert abs(np.corrcoef(both.T)[0, 1]) < 7 / np.sqrt(2000)


@pytest.mark.parametrize(
    "wrong", [{"trials": 0}, {"catch": -1}, {"repeats": 30}, {"trials": 499}, {"seconds": 0.5}, {"seconds": float("nan")},
              {"excerpt": "best"}, {"seed": -1}]
)  # fmt: skip
def test_a_test_that_cannot_be_made_is_refused(wrong):
    with pytest.raises(UserError):
        Design(**wrong).check()


# -- what is heard --------------------------------------------------------------------------------


def test_the_loudest_stretch_is_that_of_a_plain_search(rng):
    for _ in range(20):
        audio = (rng.normal(size=400) * np.repeat(rng.uniform(0, 1, 20), 20)).astype(np.float32)
        length, hop = int(rng.integers(1, 400)), int(rng.integers(1, 60))
        sums = [
            float((audio[s : s + length].astype(float) ** 2).sum()) for s in range(0, 400 - length + 1, hop)
        ]
        first = int(np.argmax(sums)) * hop
        assert np.array_equal(page.excerpt(audio, length, "loudest", hop), audio[first : first + length])
        assert np.array_equal(page.excerpt(audio, length, "start", hop), audio[:length])
    assert np.array_equal(page.excerpt(np.zeros(50), 20, "loudest", 5), np.zeros(50)[:20])


def test_clips_are_equally_loud_and_never_clipped(rng):
    spiky = np.zeros(4000)
    spiky[2000] = 0.7
    clips = [rng.normal(size=4000) * 1e-2, np.sin(np.arange(4000)) * 0.9, spiky]
    made = page.levelled(clips, 100)
    levels = [float(np.sqrt(np.mean(c.astype(float) ** 2))) for c in made]
    assert np.ptp(levels) < 1e-6 * levels[0]
    assert max(np.abs(c).max() for c in made) == pytest.approx(page.PEAK, rel=1e-6)
    two = page.levelled(clips[:2], 100)
    assert np.sqrt(np.mean(two[0].astype(float) ** 2)) == pytest.approx(page.LEVEL, rel=1e-6)
    assert page.levelled([clips[0], np.zeros(4000)], 100) is None


def test_the_clips_of_a_trial_are_those_of_the_key_alike_in_everything_else(world):
    key, folder = world.write("test", ("random", "cosine", "zither"), catch=2, repeats=2, seconds=2)
    found = clips_of(folder)
    hertz = {f"track-{i}": 300 + 40 * i for i in range(8)} | {f"query-{i}": 1000 + 40 * i for i in range(5)}
    assert set(found) == {(t.number, letter) for t in key.trials for letter in "xab"}
    for t in key.trials:
        data = [found[t.number, letter] for letter in "xab"]
        assert len({len(d) for d in data}) == 1
        sounds = [sound(d) for d in data]
        for name, audio in zip((t.query, t.a, t.b), sounds, strict=True):
            assert pitch(audio) == pytest.approx(hertz[name], abs=2)
        levels = [np.sqrt(np.mean(s**2)) for s in sounds]
        assert max(levels) / min(levels) < 1.02 and len({len(s) for s in sounds}) == 1
        assert 1.0 * RATE <= len(sounds[0]) <= 2.2 * RATE


def test_two_clips_are_never_told_apart_by_their_source(world):
    lost = "track-5"
    (world.folder / "tracks" / "music" / f"{lost}.wav").unlink()
    lead = np.zeros((6, 8))
    lead[:, 5] = 1
    world.result = world.scores(lead)
    key, folder = world.write("test", catch=0, repeats=0)
    found = clips_of(folder)
    assert len(key.trials) == 6
    for t in key.trials:
        assert lost in (t.a, t.b)
        assert [round(pitch(sound(found[t.number, letter])), -1) for letter in "ab"] == [100, 100]


def test_a_pair_without_sound_is_left_out_and_counted(world):
    silent = world.folder / "queries" / "music" / "query-1.wav"
    world.model.decode = lambda latents: torch.zeros(len(latents), 1, 2 * RATE)
    silent.unlink()
    key, _ = world.write("test", catch=0, repeats=0)
    assert len(key.trials) == 5 and "query-1" not in {t.query for t in key.trials}
    assert key.settings["without_sound"] == 1
    for path in (world.folder / "tracks" / "music").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="gives no trial"):
        world.write("none")
    assert not (world.folder / "none" / PAGE).exists()


# -- what the page tells --------------------------------------------------------------------------


def skeleton(folder: Path, key: Key) -> str:
    """The page without sounds, and without the hash of its key."""
    text = (folder / PAGE).read_text(encoding="utf-8")
    assert key.digest in text and hashlib.sha256((folder / KEY).read_bytes()).hexdigest() == key.digest
    text = re.sub(r'(id="clip-\d+-[xab]">)[A-Za-z0-9+/=]+', r"\1", text)
    return text.replace(key.digest, "").replace(key.test, "")


def test_the_page_tells_nothing_of_its_tracks(world):
    key, folder = world.write("test", ("random", "zither"), title="<i>Mine</i>", repeats=1)
    text = skeleton(folder, key)
    for word in (*world.tracks.ids, *world.queries.ids, *SECRETS, "Hidden", "Artist", "ridge", "zither", "retrieved",
                 str(key.seed), str(world.folder)):  # fmt: skip
        assert word not in text, word
    assert "<i>" not in text and "&lt;i&gt;Mine" in text
    assert "http" not in text.replace("http-equiv", "")


def test_pages_of_any_two_seeds_differ_in_their_sounds_alone(world, seed):
    one, first = world.write("one", ("random", "zither"), seed=seed)
    two, second = world.write("two", ("random", "zither"), seed=seed + 1)
    again, third = world.write("again", ("random", "zither"), seed=seed)
    assert len(one.trials) == len(two.trials)
    assert skeleton(first, one) == skeleton(second, two)
    assert one.trials != two.trials and one.digest != two.digest
    assert again == one and (third / PAGE).read_bytes() == (first / PAGE).read_bytes()
    assert one.seed == seed and seeded(Design())[0].seed != seeded(Design())[0].seed


def test_a_test_is_not_written_over_and_scores_are_of_the_run(world):
    world.write("test")
    with pytest.raises(UserError, match="holds a listening test"):
        world.write("test")
    world.result = replace(world.result, meta={**world.result.meta, "model": "another"})
    with pytest.raises(UserError, match="another model"):
        world.write("fresh")
    with pytest.raises(UserError, match="needs a control"):
        world.result = replace(world.result, meta={**world.result.meta, "model": world.model.fingerprint})
        world.write("bare", ())


# -- in a browser -------------------------------------------------------------------------------


@pytest.mark.skipif(BINARY is None, reason="no Chromium or Chrome is installed")
def test_a_listener_goes_through_the_page_and_the_answers_come_back_as_given(world, rng):
    key, folder = world.write("test", ("random", "zither"), catch=2, repeats=1, seconds=1)
    count, comment = len(key.trials), 'a "quote", a comma\nand a line <b>&amp;'
    # Every catch trial right, the first pair for the control, the second for neither, all others for the retrieved track.
    pairs = [t.number for t in key.trials if t.kind == PAIR]
    choice = {t.number: t.target for t in key.trials}
    choice[pairs[0]] = "B" if key.trials[pairs[0] - 1].target == "A" else "A"
    choice[pairs[1]] = "neither"
    saved = world.folder / "saved"
    saved.mkdir()
    at = "document.getElementById('at').textContent"
    shown = "!document.getElementById('{}').hidden"
    with browser(world.folder / "profile") as b:
        b.downloads(saved)
        b.open(folder / PAGE)
        b.until(shown.format("start"))
        for letter in "Ann":
            if letter == "A":
                b.js("document.getElementById('listener').focus()")
            b.key(letter)
        b.key("Enter")
        for t in key.trials:
            b.until(f"{shown.format('trial')} && {at} === '{t.number}'")
            assert b.js("document.activeElement.id") == "trial-title"
            b.key("n")
            assert (
                b.js("document.getElementById('problem').textContent")
                == "Please listen to X and A and B first."
            )
            for letter in "xab":
                b.key(letter)
                b.until(f"document.querySelector('.clip.playing')?.dataset.letter === '{letter}'")
            b.until("document.querySelector('.clip.playing input').value > 0")  # it does play
            b.key("n")
            assert b.js("document.getElementById('problem').textContent") == "Please choose A, B or neither."
            b.key({"A": "1", "B": "2", "neither": "3"}[choice[t.number]])
            b.key("n")
            assert b.js("document.getElementById('problem').textContent") == "Please say how sure you are."
            b.key("u" if t.number == 2 else "s")
            if t.number == 2:
                b.js(f"document.getElementById('comment').value = {json.dumps(comment)}")
                b.key("p")  # back, and forward again
                b.until(f"{at} === '1'")
                b.key("n")
                b.until(f"{at} === '2'")
                assert b.js("document.getElementById('comment').value") == comment
                (folder / "elsewhere.html").write_text("<!DOCTYPE html>")
                b.open(folder / "elsewhere.html")
                b.open(folder / PAGE)  # as after a crash: the answers are still there
                b.until(shown.format("start"))
                assert b.js("document.getElementById('begin-button').textContent") == "Carry on"
                b.js("document.getElementById('begin-button').click()")
                b.until(f"{at} === '2'")
                assert b.js("document.querySelector('input[name=choice]:checked').value") == choice[2]
            b.key("n")
        b.until(shown.format("end"))
        assert b.js("document.getElementById('summary').textContent").startswith(f"{count} of {count}")
        b.js("document.getElementById('save').click()")
        name = f"listening-{key.test[:8]}-Ann.csv"
        b.until("document.getElementById('saved').textContent !== ''")
        for _ in range(200):
            if (saved / name).exists() and (saved / name).stat().st_size:
                break
            b.js("new Promise((done) => setTimeout(done, 50))")
        assert (
            b.js("performance.getEntriesByType('resource').filter((x) => !x.name.startsWith('blob:')).length")
            == 0
        )
    answers = read_answers([saved / name], {key.test: key})
    assert {a.trial.number: a.choice for a in answers} == choice
    assert {a.listener for a in answers} == {"Ann"} and all(
        min(a.plays) >= 1 and a.seconds > 0 for a in answers
    )
    assert [a.comment for a in answers if a.comment] == [comment]
    assert [a.trial.number for a in answers if a.confidence == "unsure"] == [2]
    found = judge({key.test: key}, answers)
    row = table(found, "The retrieved")[-1]
    asked = [t for t in key.trials if t.kind == PAIR and not t.repeat_of]
    got = {name: sum(choice[t.number] == {"retrieved": t.target, "neither": "neither"}.get(name) for t in asked) for name in
           ("retrieved", "neither")}  # fmt: skip
    assert (row["retrieved"], row["neither"]) == (got["retrieved"], got["neither"])
    assert row["control"] == 1 and got["neither"] == 1
    assert table(found, "Listeners")[0]["catch trials right"] == "2 of 2"
