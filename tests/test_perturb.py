"""Every perturbation does what it says, and a data set of them says what was done to which query."""

import builtins
import csv
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents.audio import read_audio
from attr_engine.latents.ingest import encode_piece, file_hash, ingest_audio
from attr_engine.perturb import PERTURBATIONS, known, perturb, perturb_queries, recode

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")
pytest.importorskip("scipy")

RATE = 16000
ALL = [(name, level) for name, levels in PERTURBATIONS.items() for level, _ in levels]
STEPS = {f"{n:+d}": n for n in (-4, -2, -1, 1, 2, 4)}


def levels(name: str) -> list[str]:
    return [level for level, _ in PERTURBATIONS[name]]


def sine(hz: float, seconds: float, channels: int = 1) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)
    return np.tile(wave, (channels, 1)).astype(np.float32)


def heard_hz(audio: np.ndarray) -> float:
    """The loudest frequency of the first channel, interpolated between the bins."""
    power = np.log(np.abs(np.fft.rfft(audio[0] * np.hanning(audio.shape[1]))) + 1e-12)
    top = int(np.argmax(power))
    a, b, c = power[top - 1 : top + 2]
    return (top + 0.5 * (a - c) / (a - 2 * b + c)) * RATE / audio.shape[1]


def hiss(rng: np.random.Generator, channels: int = 2, seconds: float = 3.0) -> np.ndarray:
    return (0.1 * rng.standard_normal((channels, round(seconds * RATE)))).astype(np.float32)


def gain_at(audio: np.ndarray, out: np.ndarray, hz: float) -> float:
    """How much louder the frequencies around one became, in dB."""
    window, bins = np.hanning(audio.shape[1]), np.fft.rfftfreq(audio.shape[1], 1 / RATE)
    near = np.abs(bins - hz) < 5
    before, after = (np.sum(np.abs(np.fft.rfft(x * window)[:, near]) ** 2) for x in (audio, out))
    return 10 * math.log10(after / before)


@pytest.mark.parametrize(("name", "level"), ALL)
@pytest.mark.parametrize("channels", [1, 2])
def test_they_give_new_audio_of_the_same_form(
    name: str, level: str, channels: int, rng: np.random.Generator
) -> None:
    audio = hiss(rng, channels, 1.0)
    before = audio.copy()
    out = perturb(audio, RATE, name, level, rng)
    assert out.dtype == np.float32
    assert out.shape[0] == channels
    assert np.isfinite(out).all()
    assert not np.shares_memory(out, audio)
    assert np.array_equal(audio, before)
    assert out.shape != audio.shape or not np.array_equal(out, audio)


@pytest.mark.parametrize(("name", "level"), ALL)
def test_channels_keep_their_place(name: str, level: str, rng: np.random.Generator) -> None:
    audio = sine(500, 1.5, 2)
    audio[1] = 0
    if name == "noise":
        audio[1] = -audio[0]
    out = perturb(audio, RATE, name, level, rng).astype(float)
    if name == "noise":
        assert np.corrcoef(out)[0, 1] < 0
    else:
        assert np.sum(out[1] ** 2) < 0.01 * np.sum(out[0] ** 2)


@pytest.mark.parametrize("level", STEPS)
def test_pitch_moves_a_sine_by_its_ratio_and_keeps_the_length(level: str, rng: np.random.Generator) -> None:
    hz = rng.uniform(300, 1200)
    audio = sine(hz, 3.0)
    out = perturb(audio, RATE, "pitch", level, rng)
    assert out.shape == audio.shape
    assert 12 * math.log2(heard_hz(out) / hz) == pytest.approx(STEPS[level], abs=0.05)


@pytest.mark.parametrize("level", levels("tempo"))
def test_tempo_changes_the_length_and_not_the_pitch(level: str, rng: np.random.Generator) -> None:
    hz, seconds = rng.uniform(300, 1200), rng.uniform(2, 4)
    audio = sine(hz, seconds)
    out = perturb(audio, RATE, "tempo", level, rng)
    assert out.shape[1] == pytest.approx(audio.shape[1] / float(level), abs=1)
    assert 12 * math.log2(heard_hz(out) / hz) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("level", levels("tempo"))
def test_tempo_moves_what_happens_to_its_time(level: str, rng: np.random.Generator) -> None:
    at = rng.uniform(1.0, 2.0)
    audio = sine(440, 3.0)
    audio[:, : round(at * RATE)] = 0
    out = perturb(audio, RATE, "tempo", level, rng)
    begins = np.argmax(np.abs(out[0]) > 0.2) / RATE
    assert begins == pytest.approx(at / float(level), abs=0.08)


@pytest.mark.parametrize("level", levels("noise"))
def test_noise_lies_as_far_below_the_signal_as_it_says(level: str, rng: np.random.Generator) -> None:
    audio = sine(rng.uniform(100, 2000), 2.0, 2) * rng.uniform(0.05, 1)
    added = perturb(audio, RATE, "noise", level, rng).astype(float) - audio
    ratio = 10 * np.log10(np.mean(audio.astype(float) ** 2) / np.mean(added**2))
    assert ratio == pytest.approx(float(level.removesuffix(" dB")), abs=1e-3)
    # White: as much in the lower half as in the upper, and another one in either channel.
    power = np.abs(np.fft.rfft(added)) ** 2
    half = power.shape[1] // 2
    assert power[:, :half].sum() == pytest.approx(power[:, half:].sum(), rel=0.1)
    assert abs(np.corrcoef(added)[0, 1]) < 0.05


def test_noise_follows_from_its_generator(seed: int) -> None:
    audio = sine(400, 1.0)
    a, b, c = (
        perturb(audio, RATE, "noise", "10 dB", np.random.default_rng(s)) for s in (seed, seed, seed + 1)
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_silence_stays_silent(rng: np.random.Generator) -> None:
    silence = np.zeros((1, RATE), dtype=np.float32)
    for name, level in ALL:
        out = perturb(silence, RATE, name, level, rng)
        assert np.abs(out).max() < 1e-3, (name, level)


@pytest.mark.parametrize("name", ["low-pass", "high-pass"])
def test_filters_cut_at_their_frequency(name: str, rng: np.random.Generator) -> None:
    audio = hiss(rng)
    for level in levels(name):
        hz = float(level.removesuffix(" Hz"))
        out = perturb(audio, RATE, name, level, rng)
        assert out.shape == audio.shape
        for share in (0.1, 0.5, 0.7, 1.0, 1.4, 1.8):
            # A Butterworth filter of four poles through the bilinear transform, twice.
            steps = math.tan(math.pi * share * hz / RATE) / math.tan(math.pi * hz / RATE)
            expected = -20 * math.log10(1 + steps ** (8 if name == "low-pass" else -8))
            if expected > -50:
                assert gain_at(audio, out, share * hz) == pytest.approx(expected, abs=0.5 - expected / 20)
            else:
                assert gain_at(audio, out, share * hz) < -45
        # No delay: the two fit best where they lie.
        match = np.fft.irfft(np.fft.rfft(out[0]) * np.conj(np.fft.rfft(audio[0])))
        assert int(np.argmax(match)) == 0


def test_a_filter_above_half_the_rate_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="4000 Hz needs audio of more than 8000 Hz"):
        perturb(hiss(rng), 8000, "low-pass", "4000 Hz", rng)


def music(rng: np.random.Generator, seconds: float = 3.0) -> np.ndarray:
    """Tones that come and go, so that place and quality can be measured."""
    time = np.arange(round(seconds * RATE)) / RATE
    waves = [
        np.sin(2 * np.pi * hz * time) * np.exp(-4 * np.maximum(0, time - at)) * (time > at)
        for hz, at in zip(rng.uniform(150, 2500, 40), rng.uniform(0, seconds, 40), strict=True)
    ]
    out = np.sum(waves, axis=0)
    return (0.5 * out / np.abs(out).max())[None].astype(np.float32)


def test_lossy_keeps_the_place_and_the_lower_level_loses_more(rng: np.random.Generator) -> None:
    audio = music(rng)
    errors = []
    for level in ("MP3 high", "MP3 low"):
        out = perturb(audio, RATE, "lossy", level, rng)
        assert out.shape == audio.shape
        errors.append(float(np.mean((out - audio) ** 2) / np.mean(audio**2)))
    assert 0 < errors[0] < errors[1] < 0.1


@pytest.mark.parametrize("codec", ["MP3", "OGG"])
def test_recoding_at_odd_lengths_keeps_length_and_place(codec: str, rng: np.random.Generator) -> None:
    audio = np.concatenate([music(rng, rng.uniform(1.2, 2.6))] * 2)
    audio[1] *= -0.5
    out = recode(audio, RATE, codec, 0.5)
    assert out.shape == audio.shape
    assert np.corrcoef(out[0], audio[0])[0, 1] > 0.97
    assert np.sum(out[0] * out[1]) / np.sum(out[0] ** 2) == pytest.approx(-0.5, abs=0.05)


def test_a_rate_that_mp3_lacks_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="no sample rate of 10000 Hz"):
        perturb(hiss(rng), 10000, "lossy", "MP3 low", rng)


@pytest.mark.parametrize("level", levels("crop"))
def test_a_crop_is_the_start(level: str, rng: np.random.Generator) -> None:
    audio = hiss(rng, 2, rng.uniform(1, 2))
    out = perturb(audio, RATE, "crop", level, rng)
    assert out.shape[1] == pytest.approx(audio.shape[1] * float(level), abs=0.5)
    assert np.array_equal(out, audio[:, : out.shape[1]])


@pytest.mark.parametrize("level", [x for x in levels("gain") if x.endswith("dB")])
def test_gain_is_in_decibels(level: str, rng: np.random.Generator) -> None:
    audio = hiss(rng)
    out = perturb(audio, RATE, "gain", level, rng)
    assert 20 * np.log10(np.linalg.norm(out) / np.linalg.norm(audio)) == pytest.approx(
        float(level.removesuffix(" dB")), abs=1e-4
    )
    assert np.corrcoef(out[0], audio[0])[0, 1] > 0.999999


def test_full_scale_is_as_loud_as_can_be_without_clipping(rng: np.random.Generator) -> None:
    for loudness in (0.01, 30.0):
        audio = loudness * hiss(rng)
        out = perturb(audio, RATE, "gain", "full scale", rng)
        assert np.abs(out).max() == 1
        assert np.corrcoef(out[1], audio[1])[0, 1] > 0.999999


@pytest.mark.parametrize("level", [level for level, _ in known()["mixing"]])
@pytest.mark.parametrize("seconds", [0.7, 3.0, 4.1])
def test_another_piece_is_mixed_in_as_far_below_as_it_says(
    level: str, seconds: float, rng: np.random.Generator
) -> None:
    audio, other = 0.3 * hiss(rng), hiss(rng, 2, seconds)
    before = audio.copy(), other.copy()
    out = perturb(audio, RATE, "mixing", level, rng, other)
    assert out.dtype == np.float32 and out.shape == audio.shape
    assert np.array_equal(audio, before[0]) and np.array_equal(other, before[1])
    added = out.astype(float) - audio
    ratio = 10 * np.log10(np.mean(audio.astype(float) ** 2) / np.mean(added**2))
    assert ratio == pytest.approx(float(level.removesuffix(" dB")), abs=1e-3)
    for channel in range(2):
        wanted = [other[channel, i % other.shape[1]] for i in range(audio.shape[1])]
        assert np.corrcoef(added[channel], wanted)[0, 1] > 0.99999


def test_mixing_needs_something_that_sounds(rng: np.random.Generator) -> None:
    audio, silence = hiss(rng), np.zeros((2, 100), dtype=np.float32)
    with pytest.raises(UserError, match="mixing needs another piece"):
        perturb(audio, RATE, "mixing", "6 dB", rng)
    with pytest.raises(UserError, match="the other piece is silent"):
        perturb(audio, RATE, "mixing", "6 dB", rng, silence)
    assert not perturb(silence, RATE, "mixing", "0 dB", rng, audio).any()


def test_none_changes_nothing(rng: np.random.Generator) -> None:
    audio = hiss(rng)
    out = perturb(audio, RATE, "none", "as it is", rng)
    assert np.array_equal(out, audio) and not np.shares_memory(out, audio)


def test_unknown_perturbations_are_refused_with_those_there_are(rng: np.random.Generator) -> None:
    for name, level in (("reverb", "1"), ("pitch", "+3")):
        with pytest.raises(UserError, match="choose from pitch -4, -2"):
            perturb(hiss(rng), RATE, name, level, rng)


@pytest.mark.parametrize(
    ("name", "level", "module"), [("pitch", "+1", "librosa"), ("tempo", "0.9", "librosa"), ("low-pass", "1000 Hz", "scipy")]
)  # fmt: skip
def test_a_missing_library_is_named(
    name: str, level: str, module: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(what: str, *args: object, **options: object) -> object:
        if what.split(".")[0] == module:
            raise ImportError(f"No module named {module!r}", name=module)
        return real(what, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"needs? {module}: pip install 'attr-engine\[perturb\]'"):
        perturb(hiss(rng), RATE, name, level, rng)


class Frames:
    """An encoder: mean, spread and peak of every frame of 800 samples."""

    sample_rate, audio_channels, samples_per_frame, fingerprint = RATE, 1, 800, "frames"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        frames = audio.reshape(len(audio), -1, 800)
        return torch.stack([frames.mean(-1), frames.std(-1), frames.amax(-1)], dim=1)


def make_queries(
    folder: Path,
    rng: np.random.Generator,
    frames: int = 40,
    prefix: str = "q",
    rows: list[dict[str, str]] | None = None,
    loudness: float = 1.0,
) -> LatentDataset:
    """Three pieces of 0.8 to 1.9 s with a metadata table; each has another source, or what ``rows`` say."""
    source = folder / "audio"
    source.mkdir(parents=True)
    more = [{"parents": f"a{i};b{i}"} for i in range(3)] if rows is None else rows
    table = [["path", "id", "tempo", "parents", "family"]]
    for i, seconds in enumerate((0.8, 1.9, 1.2)):
        soundfile.write(source / f"{i}.wav", loudness * hiss(rng, 1, seconds)[0], RATE, subtype="FLOAT")
        table.append(
            [f"{i}.wav", f"{prefix}{i}", 90.5 + i, more[i].get("parents", ""), more[i].get("family", "")]
        )
    with (source / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    ingest_audio(source, folder / "set", Frames(), frames, source / "metadata.csv", ["tempo"])
    return LatentDataset(folder / "set")


def test_a_set_says_what_was_done_to_which_query(rng: np.random.Generator, tmp_path: Path, seed: int) -> None:
    queries, told = make_queries(tmp_path, rng), []
    out = perturb_queries(
        queries, Frames(), tmp_path / "out", 40, seed=seed, progress=lambda *done: told.append(done)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert list(out.ids) == [f"{query} {name} {level}" for query in queries.ids for name, level in ALL]
    for i, (label, info) in enumerate(zip(out.ids, out.info, strict=True)):
        name, level, query = info["perturbation"], info["level"], info["query"]
        number = int(query[1:])
        assert label == f"{query} {name} {level}"
        assert info["parents"] == f"a{number};b{number}"
        assert not {"source", "sha256", "path", "id"} & set(info)
        # The slow, obvious way.
        audio = read_audio(tmp_path / "audio" / f"{number}.wav", RATE, 1)
        draws = np.random.default_rng([seed, zlib.crc32(label.encode())])
        heard = perturb(audio, RATE, name, level, draws)
        whole, heard = heard, heard[:, : 40 * 800]
        assert info["seconds"] == heard.shape[1] / RATE
        assert info["seconds_cut"] == (whole.shape[1] - heard.shape[1]) / RATE
        assert (info["seconds_cut"] > 0) == (number == 1 and name == "tempo" and level in ("0.8", "0.9"))
        given = out.conditioning[i]
        assert given["tempo"] == 90.5 + number
        assert given["seconds_start"] == 0.0
        assert given["seconds_total"] == pytest.approx(info["seconds"], abs=1e-9)
        n = math.ceil(heard.shape[1] / 800)
        padded = np.zeros(n * 800)
        padded[: heard.shape[1]] = heard[0]
        rows = padded.reshape(n, 800)
        expected = np.stack([rows.mean(1), rows.std(1, ddof=1), rows.max(1)])
        assert out.lengths[i] == n
        assert out.batch([i], n).latents[0].double().numpy() == pytest.approx(expected, abs=1e-5)


def test_a_window_is_perturbed_and_not_its_recording(rng: np.random.Generator, tmp_path: Path) -> None:
    source = tmp_path / "audio"
    source.mkdir()
    audio = hiss(rng, 1, 4.9)
    soundfile.write(source / "long.wav", audio[0], RATE, subtype="FLOAT")
    ingest_audio(source, tmp_path / "set", Frames(), 40)
    queries = LatentDataset(tmp_path / "set")
    assert len(queries) == 2
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, {"crop": ["0.5"], "gain": ["-6 dB"]})
    half = np.asarray(out.batch([2], 20).latents[0])
    piece = audio[0, 32000:48000].reshape(20, 800)
    assert half[0] == pytest.approx(piece.mean(1), abs=1e-6)
    assert half[2] == pytest.approx(piece.max(1), abs=1e-6)
    given = [out.conditioning[i] for i in (2, 3)]
    assert [g["seconds_start"] for g in given] == [2.0, 2.0]
    assert [g["seconds_total"] for g in given] == pytest.approx([3.9, 4.9])


def test_missing_and_changed_audio_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    queries, path = make_queries(tmp_path, rng), tmp_path / "audio" / "1.wav"
    soundfile.write(path, hiss(rng, 1, 1.0)[0], RATE)
    with pytest.raises(UserError, match=r"1\.wav is not the file that the query 'q1' was made from"):
        perturb_queries(queries, Frames(), tmp_path / "changed", 40, {"gain": ["-6 dB"]})
    path.unlink()
    with pytest.raises(UserError, match=r"'q1' has no audio at .*1\.wav"):
        perturb_queries(queries, Frames(), tmp_path / "missing", 40, {"gain": ["-6 dB"]})


def test_a_finished_set_is_opened_and_another_one_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    queries, encoder, wanted = make_queries(tmp_path, rng), Frames(), {"gain": ["-6 dB"], "crop": ["0.5"]}
    first = perturb_queries(queries, encoder, tmp_path / "out", 40, wanted)
    calls = encoder.calls
    assert perturb_queries(queries, encoder, tmp_path / "out", 40, wanted).fingerprint == first.fingerprint
    assert encoder.calls == calls
    for options in ({"perturbations": {"gain": ["-6 dB"]}}, {"seed": 1}):
        with pytest.raises(UserError, match=f"another {next(iter(options))}"):
            perturb_queries(queries, encoder, tmp_path / "out", 40, **{"perturbations": wanted, **options})
    with pytest.raises(UserError, match="at least one"):
        perturb_queries(queries, encoder, tmp_path / "none", 40, {})


def test_a_stopped_one_goes_on_to_the_same_set(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attr_engine import perturb as module
    from attr_engine.latents.writer import LatentWriter

    queries, wanted = make_queries(tmp_path, rng), {"noise": levels("noise"), "crop": ["0.25"]}
    whole = perturb_queries(queries, Frames(), tmp_path / "whole", 40, wanted)

    class Stop(Exception):
        pass

    def stop(done: int, count: int) -> None:
        if done == 2:
            raise Stop

    monkeypatch.setattr(module, "LatentWriter", lambda *a, **o: LatentWriter(*a, **o, shard_bytes=1))
    with pytest.raises(Stop):
        perturb_queries(queries, Frames(), tmp_path / "out", 40, wanted, progress=stop)
    encoder = Frames()
    again = perturb_queries(queries, encoder, tmp_path / "out", 40, wanted)
    assert encoder.calls <= 5  # those of the last query; the latent of silence lies in the shards
    assert again.ids == whole.ids
    rows = list(range(len(whole)))
    assert np.array_equal(again.batch(rows, 40).latents, whole.batch(rows, 40).latents)
    assert list(again.info) == list(whole.info)


MIXED = {"mixing": ["12 dB", "0 dB"]}


def test_an_unrelated_piece_is_mixed_in_the_same_at_every_level(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries, chosen = make_queries(tmp_path, rng), set()
    for seed in range(12):
        out = perturb_queries(queries, Frames(), tmp_path / str(seed), 40, MIXED, seed)
        mixed = [info["mixed_with"] for info in out.info]
        assert mixed[::2] == mixed[1::2]
        chosen.update(zip([info["query"] for info in out.info], mixed, strict=True))
        for label, info, i in zip(out.ids, out.info, range(len(out)), strict=True):
            audio, other = (
                read_audio(tmp_path / "audio" / f"{name[1:]}.wav", RATE, 1)
                for name in (info["query"], info["mixed_with"])
            )
            heard = perturb(audio, RATE, "mixing", info["level"], rng, other)
            latent = encode_piece(Frames(), heard, 40)
            assert torch.equal(latent, out.batch([i], latent.shape[1]).latents[0]), label
    assert chosen == {(a, b) for a in queries.ids for b in queries.ids if a != b}


@pytest.mark.parametrize(
    ("rows", "strange"),
    [
        ([{"family": "f"}, {"family": "f+g"}, {"family": "g"}], {0: {2}, 1: set(), 2: {0}}),
        ([{"parents": "q1;x"}, {}, {"parents": "x"}], {0: set(), 1: {2}, 2: {1}}),
        ([{"family": "q1"}, {}, {}], {0: {1, 2}, 1: {0, 2}, 2: {0, 1}}),
    ],
)
def test_relatives_are_not_mixed(
    rows: list[dict[str, str]], strange: dict[int, set[int]], rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = make_queries(tmp_path, rng, rows=rows)
    for index, wanted in strange.items():
        if not wanted:
            with pytest.raises(UserError, match=f"holds nothing unrelated to 'q{index}'"):
                perturb_queries(queries, Frames(), tmp_path / "none", 40, MIXED, only=[index])
            continue
        found = set()
        for seed in range(16 if len(wanted) > 1 else 2):
            folder = tmp_path / f"{index} {seed}"
            out = perturb_queries(queries, Frames(), folder, 40, {"mixing": ["6 dB"]}, seed, only=[index])
            assert list(out.ids) == [f"q{index} mixing 6 dB"]
            found.add(int(out.info[0]["mixed_with"][1:]))
        assert found == wanted


def test_others_are_mixed_in_where_they_are_given(rng: np.random.Generator, tmp_path: Path) -> None:
    queries, others = make_queries(tmp_path / "a", rng), make_queries(tmp_path / "b", rng, prefix="o")
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, MIXED, others=others)
    assert {info["mixed_with"] for info in out.info} <= set(others.ids)
    with pytest.raises(UserError, match="another others"):
        perturb_queries(queries, Frames(), tmp_path / "out", 40, MIXED)


def test_kept_audio_is_what_was_encoded_and_what_the_set_names(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries, wanted = make_queries(tmp_path, rng), {"gain": ["full scale"], "noise": ["0 dB"], **MIXED}
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, wanted, keep_audio=True)
    scales = []
    for i, info in enumerate(out.info):
        path = Path(out.extra["root"]) / info["source"]
        assert path.parent == tmp_path / "out" / "audio" and file_hash(path) == info["sha256"]
        assert soundfile.info(path).subtype == "PCM_16"
        audio = read_audio(path, RATE, 1)
        assert audio.shape[1] / RATE == info["seconds"] and info["start"] == 0
        latent = encode_piece(Frames(), audio, 40)
        assert torch.equal(latent, out.batch([i], latent.shape[1]).latents[0])
        draws = np.random.default_rng([0, zlib.crc32(out.ids[i].encode())])
        plain, other = (
            read_audio(tmp_path / "audio" / f"{name[1:]}.wav", RATE, 1)
            for name in (info["query"], info.get("mixed_with", "q0"))
        )
        heard = perturb(plain, RATE, info["perturbation"], info["level"], draws, other)
        assert info["scaled"] == 1 / max(1.0, float(np.abs(heard).max()))
        np.testing.assert_allclose(audio, heard * info["scaled"], atol=2**-14)
        scales.append(info["scaled"])
    assert max(scales) == 1
    assert not (perturb_queries(queries, Frames(), tmp_path / "plain", 40, MIXED).path / "audio").exists()


def test_what_is_beyond_full_scale_is_scaled_down_to_be_kept(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = make_queries(tmp_path, rng, loudness=8.0)
    out = perturb_queries(queries, Frames(), tmp_path / "out", 40, {"none": ["as it is"]}, keep_audio=True)
    for i, info in enumerate(out.info):
        plain = read_audio(tmp_path / "audio" / f"{i}.wav", RATE, 1)
        assert np.abs(plain).max() > 1
        audio = read_audio(tmp_path / "out" / "audio" / info["source"], RATE, 1)
        np.testing.assert_allclose(audio, plain * info["scaled"], atol=2**-14)
        assert np.abs(audio).max() == pytest.approx(1, abs=2**-14)


def test_some_queries_are_perturbed_alike_alone_and_among_all(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    queries = make_queries(tmp_path, rng)
    wanted = {"noise": ["10 dB"], **MIXED}
    whole = perturb_queries(queries, Frames(), tmp_path / "all", 40, wanted)
    some = perturb_queries(queries, Frames(), tmp_path / "some", 40, wanted, only=[2, 0])
    assert list(some.ids) == [*whole.ids[6:], *whole.ids[:3]]
    assert torch.equal(some.batch(range(6), 40).latents, whole.batch([6, 7, 8, 0, 1, 2], 40).latents)
    with pytest.raises(UserError, match="another only"):
        perturb_queries(queries, Frames(), tmp_path / "some", 40, wanted, only=[0])
