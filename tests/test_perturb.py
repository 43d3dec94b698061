"""Every perturbation does what it says."""

import builtins
import math

import numpy as np
import pytest

from attr_engine.errors import UserError
from attr_engine.perturb import PERTURBATIONS, known, perturb, recode

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
