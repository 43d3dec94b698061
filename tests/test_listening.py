"""The listening test asks what the run says, tells nobody which is which, and its answers are counted as they were given."""

import base64
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import BINARY, browser
from helpers import ToyDenoiser, make_tracks

from attr_engine.errors import UserError
from attr_engine.jobs import Job, make_queries
from attr_engine.judge import share
from attr_engine.latents import LatentDataset, LatentWriter
from attr_engine.listening import Draws, Key, Pair, Trial, arranged, leading_scores, seeded
from attr_engine.listening_answers import COLUMNS, Answer, binomial, judge, read_answers
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


# -- the key --------------------------------------------------------------------------------------

TRIALS = (
    Trial(1, PAIR, "q0", "t0", "t1", "A", "random"),
    Trial(2, CATCH, "q1", "t2", "q1", "B"),
    Trial(3, PAIR, "q1", "t3", "t0", "B", "table"),
    Trial(4, PAIR, "q0", "t1", "t0", "B", "random", 1),
)
SIMPLE = Key(TRIALS, 5, {"trials": 2}, {"random": 0, "table": 3})


def test_a_key_reads_as_it_was_written(tmp_path):
    SIMPLE.write(tmp_path / KEY)
    assert Key.read(tmp_path / KEY) == SIMPLE


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format="other"), lambda v: v.pop("seed"), lambda v: v["trials"][0].update(target="C"),
        lambda v: v["trials"][0].update(a=3), lambda v: v["trials"][3].update(repeat_of=4), lambda v: v["trials"][3].update(repeat_of=2),
        lambda v: v["trials"][0].update(number=9), lambda v: v["trials"][0].update(against="who"), lambda v: v.update(trials=7),
        lambda v: v.update(same=[]), lambda v: v["trials"][0].update(target="B"),
    ],
)  # fmt: skip
def test_a_key_that_is_none_or_was_changed_is_refused(tmp_path, change):
    value = json.loads(SIMPLE.text())
    change(value)
    (tmp_path / KEY).write_text(json.dumps(value, indent=1, sort_keys=True))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / KEY))):
        Key.read(tmp_path / KEY)


def test_a_key_of_any_bytes_is_refused(tmp_path, rng):
    for data in (b"", b"[" * 100_000, b"\xff", rng.bytes(200), b"5"):
        (tmp_path / KEY).write_bytes(data)
        with pytest.raises(UserError, match="key of a listening test"):
            Key.read(tmp_path / KEY)
    with pytest.raises(UserError, match="cannot be read"):
        Key.read(tmp_path / "none.json")


# -- the answers ----------------------------------------------------------------------------------


def said(listener: str, trial: int, choice: str, **more) -> dict[str, object]:
    row = {"listener": listener, "test": SIMPLE.test, "trial": trial, "choice": choice, "confidence": "sure", "seconds": 2.5,
           "plays_x": 1, "plays_a": 1, "plays_b": 2, "comment": ""}  # fmt: skip
    return {**row, **more}


def write_answers(path: Path, rows, columns=COLUMNS, encoding="utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        out = csv.DictWriter(file, columns, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return path


def read(*paths: Path) -> list[Answer]:
    return read_answers(list(paths), {SIMPLE.test: SIMPLE})


def test_answers_are_read_in_any_order_of_columns_with_a_mark_and_several_lines(tmp_path):
    rows = [
        said("Ann", 1, "A", comment='a "b",\nc'),
        said("Ann", 3, "neither", confidence="unsure", seconds=0),
    ]
    one = read(write_answers(tmp_path / "a.csv", rows))
    two = read(write_answers(tmp_path / "b.csv", rows, COLUMNS[::-1], "utf-8-sig"))
    assert one == two == [
        Answer("Ann", SIMPLE.test, TRIALS[0], "A", "sure", 2.5, (1, 1, 2), 'a "b",\nc'),
        Answer("Ann", SIMPLE.test, TRIALS[2], "neither", "unsure", 0.0, (1, 1, 2), ""),
    ]  # fmt: skip
    assert [a.chosen for a in one] == ["retrieved", "neither"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test": "0123456789abcdef"}, "to test '0123456789abcdef'"), ({"trial": 5}, "trial '5' is no whole number from 1 to 4"),
        ({"trial": "-1"}, "trial"), ({"trial": "1e0"}, "trial"), ({"trial": "9" * 5000}, "trial"), ({"trial": "²"}, "trial"),
        ({"choice": "C"}, "choice 'C'"), ({"choice": ""}, "choice ''"), ({"confidence": "very"}, "confidence 'very'"),
        ({"seconds": "nan"}, "no number of seconds"), ({"seconds": "-1"}, "seconds"), ({"seconds": "1e9"}, "seconds"),
        ({"seconds": "soon"}, "seconds"), ({"plays_a": "1.5"}, "plays_a"), ({"plays_x": "1" * 7}, "plays_x"),
        ({"listener": ""}, "listener"), ({"listener": "a" * 65}, "listener"), ({"listener": "a\x1b[2J"}, "listener"),
        ({"comment": "x" * 5000}, "5000 characters"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_one_is_named_with_its_line(tmp_path, change, sentence):
    path = write_answers(tmp_path / "a.csv", [said("Ann", 1, "A"), {**said("Bob", 1, "A"), **change}])
    with pytest.raises(UserError, match=re.escape(sentence)) as found:
        read(path)
    assert (
        f"{path}, line 3" in str(found.value) and "\n" not in str(found.value) and len(str(found.value)) < 500
    )


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"a,b\n1,2\n", b'"listener', b"\x00" * 50, b"x" * (5 << 20),
             (",".join(COLUMNS) + "\n1,2\n").encode(), (",".join(COLUMNS) + '\n"a"b,' + "," * 8).encode(),
             (",".join(COLUMNS) + "\n").encode()]
)  # fmt: skip
def test_a_file_that_holds_no_answers_is_refused(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError):
        read(tmp_path / "a.csv")


def test_an_answer_given_twice_is_refused_in_one_file_or_two(tmp_path):
    one = write_answers(tmp_path / "a.csv", [said("Ann", 1, "A"), said("Ann", 1, "B")])
    with pytest.raises(UserError, match="trial 1 a second time"):
        read(one)
    two = write_answers(tmp_path / "b.csv", [said("Ann", 2, "A"), said("Bob", 1, "B")])
    three = write_answers(tmp_path / "c.csv", [said("Bob", 1, "B")])
    with pytest.raises(UserError, match=r"c\.csv, line 2: 'Bob' .*b\.csv, line 3"):
        read(two, three)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_the_exact_test_counts_coins(rng):
    for count in range(1, 9):
        sums = np.array([sum(coins) for coins in itertools.product((0, 1), repeat=count)])
        for hits in range(count + 1):
            as_far = np.abs(sums - count / 2) >= abs(hits - count / 2)
            assert binomial(hits, count) == pytest.approx(as_far.mean(), rel=1e-12)
    assert np.isnan(binomial(0, 0)) and 0 <= binomial(3000, 10_000) < 1e-100


def table(found, title: str) -> list[dict[str, object]]:
    (one,) = [t for t in found.tables if t.title.startswith(title)]
    return [dict(zip(one.columns, row, strict=True)) for row in one.rows]


def test_answers_are_counted_by_control_and_by_query(tmp_path, rng):
    trials = [Trial(i + 1, PAIR, f"q{i}", "t", "c", "A", ("random", "table")[i % 2]) for i in range(12)]
    key = Key((*trials, Trial(13, CATCH, "q0", "q0", "c", "A"), replace(trials[0], number=14, a="c", b="t", target="B", repeat_of=1)),
              1, {}, {"random": 0, "table": 2})  # fmt: skip
    said_by = {f"l{k}": rng.choice(["A", "B", "neither"], size=12) for k in range(4)}
    answers = []
    for name, choices in said_by.items():
        for t, c in zip(trials, choices, strict=True):
            answers.append(Answer(name, key.test, t, str(c), "sure", 1.0, (1, 1, 1), ""))
        answers.append(
            Answer(name, key.test, key.trials[12], "B" if name == "l3" else "A", "sure", 1.0, (1, 1, 1), "")
        )
        answers.append(Answer(name, key.test, key.trials[13], "B", "unsure", 1.0, (1, 1, 1), ""))
    found = judge({key.test: key}, answers)
    assert found.kept == {"l0", "l1", "l2"}
    kept = np.stack([said_by[f"l{k}"] for k in range(3)])
    for row in table(found, "The retrieved"):
        some = {"random": kept[:, ::2], "table": kept[:, 1::2], "all": kept}[row["against"]]
        hits, misses = int((some == "A").sum()), int((some == "B").sum())
        assert (row["retrieved"], row["control"], row["neither"]) == (hits, misses, some.size - hits - misses)
        wilson = share(hits, hits + misses)
        assert (row["share"], row["low"], row["high"]) == (wilson.value, wilson.low, wilson.high)
        assert row["p"] == binomial(hits, hits + misses)
        assert row["same track"] == {"random": 0, "table": 2, "all": 2}[row["against"]]
        shares = [
            (r == "A").sum() / max(1, np.isin(r, ["A", "B"]).sum())
            for r in some
            if np.isin(r, ["A", "B"]).any()
        ]
        if len(shares) > 1:
            assert row["over listeners"].startswith(f"{np.mean(shares):.3f} (")
    for row in table(found, "Queries"):
        column = kept[:, int(row["query"][1:])]
        assert (row["retrieved"], row["control"]) == ((column == "A").sum(), (column == "B").sum())
    for row in table(found, "Listeners"):
        mine = said_by[row["listener"]]
        assert row["kept"] == ("no" if row["listener"] == "l3" else "yes") and row["answers"] == 12
        assert (
            row["repeats answered alike"] == f"{int(mine[0] == 'A')} of 1"
        )  # B of the repeat is A of the first
        assert row["catch trials right"] == ("0 of 1" if row["listener"] == "l3" else "1 of 1")
    assert judge({key.test: key}, answers, 0.0).kept == set(said_by)


def test_who_answers_no_catch_trial_is_left_out_where_there_are_some():
    one = Answer("Ann", SIMPLE.test, TRIALS[0], "A", "sure", 1.0, (1, 1, 1), "")
    with pytest.raises(UserError, match="none of 1 listeners"):
        judge({SIMPLE.test: SIMPLE}, [one])
    with pytest.raises(UserError, match="outside 0 to 1"):
        judge({SIMPLE.test: SIMPLE}, [one], 2.0)
    neither = dataclasses.replace(one, trial=TRIALS[1], choice="neither")
    with pytest.raises(UserError, match="none of 1 listeners"):
        judge({SIMPLE.test: SIMPLE}, [one, neither])
    right = dataclasses.replace(one, trial=TRIALS[1], choice="B")
    assert judge({SIMPLE.test: SIMPLE}, [one, right]).kept == {"Ann"}


def test_what_is_written_runs_nothing_in_a_spreadsheet_or_a_page(tmp_path):
    nasty = "=cmd|'/c calc'!A1"
    answers = read(
        write_answers(
            tmp_path / "a.csv", [said("<b>|", 1, "A", comment=nasty), said("<b>|", 2, "B", comment="-1\n+2")]
        )
    )
    judge({SIMPLE.test: SIMPLE}, answers).write(tmp_path)
    with (tmp_path / "listening.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["comment"][0] for r in rows] == ["'", "'"] and [r["chosen"] for r in rows] == [
        "retrieved",
        "retrieved",
    ]
    assert [(r["retrieved"], r["control"]) for r in rows] == [("t0", "t1"), ("q1", "t2")]
    text = (tmp_path / "listening.md").read_text(encoding="utf-8")
    assert "<b>" not in text and r"\<b\>\|" in text
    assert json.loads((tmp_path / "listening.json").read_text())[0]["rows"][0][0] == "random"


# -- in a browser, and by the command line --------------------------------------------------------


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


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run over real files, by the command line."""
    pytest.importorskip("stable_audio_tools")
    root = tmp_path_factory.mktemp("run")
    for i in range(5):
        tone(root / "music" / f"t{i}.wav", 200 + 90 * i, 1.2 + 0.1 * i, 0.3)
    for i in range(3):
        tone(root / "pieces" / f"q{i}.wav", 900 + 90 * i, 1.3, 0.3)
    assert command("train", "autoencoder", root / "music", "--hop", 512, "--out", root / "ae") == 0
    assert (
        command(
            "ingest", root / "music", "--autoencoder", root / "ae", "--seconds", 2, "--out", root / "latents"
        )
        == 0
    )
    assert command("train", "diffusion", root / "latents", "--autoencoder", root / "ae", "--width", 32, "--depth", 1, "--patch", 16,
                   "--steps", 2, "--batch", 2, "--out", root / "model") == 0  # fmt: skip
    assert command("score", "--model", root / "model", "--data", root / "latents", "--queries", root / "pieces", "--self-influence",
                   "t2.wav", "--functions", "ridge", "--score-draws", 4, "--update-draws", 4, "--projection-rank", 4,
                   "--out", root / "run") == 0  # fmt: skip
    return root


def command(*words: object) -> int:
    from attr_engine.cli import main

    return main([str(w) for w in words])


def complaint(capsys, *words: object) -> str:
    capsys.readouterr()
    assert command(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_test_is_made_from_a_run_and_its_answers_are_judged(run_folder, tmp_path, capsys):
    run, test = run_folder / "run", tmp_path / "test"
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert (
        command(
            "report",
            "--out",
            run,
            "--listening-test",
            test,
            "--against",
            "random",
            "cosine",
            "--catch",
            1,
            "--repeats",
            1,
        )
        == 0
    )
    assert "trials against random" in capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file() and p in before} == before
    key = Key.read(test / KEY)
    result = Attribution.from_parquet(run / "scores.parquet")
    for t in (t for t in key.trials if t.kind == PAIR):
        named = [row.track for row in result.top(2, t.query) if row.track != t.query]
        assert (t.a if t.target == "A" else t.b) == named[0]
    rows = [said("Ann", t.number, t.target, test=key.test) for t in key.trials]
    answers = write_answers(tmp_path / "ann.csv", rows)
    assert command("listening", answers, "--key", test / KEY, "--out", tmp_path / "out") == 0
    assert "The retrieved track against a control" in capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "listening.json").read_text())[0]
    total = dict(zip(first["columns"], first["rows"][-1], strict=True))
    asked = sum(t.kind == PAIR and not t.repeat_of for t in key.trials)
    assert (total["retrieved"], total["control"], total["share"], total["p"]) == (
        asked,
        0,
        1.0,
        binomial(asked, asked),
    )
    assert (tmp_path / "out" / "listening.md").exists() and (tmp_path / "out" / "listening.csv").exists()
    assert "holds a listening test" in complaint(capsys, "report", "--out", run, "--listening-test", test)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trials", 3], "--trials is about a listening test"),
        (["--listening-test", "new", "--trials", 0], "at least 1 trial"),
        (["--listening-test", "new", "--against", "random", "random"], "stands twice"),
        (["--listening-test", "new", "--against", "random=scores.parquet"], "may not be called random"),
        (["--listening-test", "new", "--against", "none.parquet"], "none.parquet"),
        (["--listening-test", "new", "--groups", "artist"], "ranks groups"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(run_folder, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.parquet").write_bytes((run_folder / "run" / "scores.parquet").read_bytes())
    assert sentence in complaint(capsys, "report", "--out", run_folder / "run", *words)
    assert not (tmp_path / "new").exists()


def test_without_scores_there_is_no_test(run_folder, tmp_path, capsys):
    words = ("--model", run_folder / "model", "--data", run_folder / "latents", "--self-influence", "t1.wav")
    assert "finish the run first" in complaint(
        capsys, "report", "--out", tmp_path / "none", *words, "--listening-test", tmp_path / "t"
    )
    assert not (tmp_path / "none").exists()
