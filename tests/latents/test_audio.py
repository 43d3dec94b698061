"""Any audio that libsndfile reads arrives at the wanted rate and channels, with its pitch, level and length."""

import numpy as np
import pytest

from attr_engine.errors import UserError
from attr_engine.latents.audio import decoded_bytes, find_audio, read_audio

soundfile = pytest.importorskip("soundfile")

FORMATS = {
    "wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III", "aiff": "PCM_24", "aif": "PCM_16"
}  # fmt: skip
RATE, PITCH, LEVEL, SECONDS = 16000, 440.0, 0.5, 1.5


def sine(rate: int, channels: int = 1, pitch: float = PITCH, seconds: float = SECONDS) -> np.ndarray:
    """[samples, channels] float32."""
    wave = LEVEL * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def pitch_and_level(audio: np.ndarray, rate: int) -> tuple[float, float]:
    """Frequency and amplitude of the strongest partial, away from the ends."""
    middle = audio[len(audio) // 8 : -len(audio) // 8]
    size = 1 << 18
    window = np.hanning(len(middle))
    spectrum = np.abs(np.fft.rfft(middle * window, size))
    peak = int(spectrum.argmax())
    return peak * rate / size, 2 * spectrum[peak] / window.sum()


@pytest.fixture
def save(tmp_path):
    def write(name: str, audio: np.ndarray, rate: int = RATE, subtype: str | None = None):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        soundfile.write(path, audio, rate, subtype=subtype or FORMATS[path.suffix[1:].lower()])
        return path

    return write


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_audio(path, RATE, 1, **options)
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    return message


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 48000, 16000])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_a_sine_keeps_its_pitch_level_and_length(save, kind, rate, channels, wanted):
    audio = read_audio(save(f"a.{kind}", sine(rate, channels), rate), RATE, wanted)
    assert audio.dtype == np.float32 and audio.flags.c_contiguous and len(audio) == wanted
    lossy = kind in ("ogg", "mp3")
    assert abs(audio.shape[1] - RATE * SECONDS) <= (1500 if kind == "mp3" else 1)
    for row in audio:
        pitch, level = pitch_and_level(row, RATE)
        assert pitch == pytest.approx(PITCH, abs=0.2)
        assert level == pytest.approx(LEVEL, rel=0.05 if lossy else 0.005)


@pytest.mark.parametrize("kind", ["wav", "flac", "aiff"])
def test_audio_at_the_wanted_rate_comes_through_to_the_sample(save, kind):
    audio = sine(RATE, 2)
    audio[:, 1] *= -0.25
    got = read_audio(save(f"a.{kind}", audio), RATE, 2)
    assert got.T.shape == audio.shape
    assert np.abs(got.T - audio).max() < 2**-15


def test_resampling_up_and_down_is_in_place(save):
    """A click stays at its time: no delay is added by the resampler."""
    for rate in (44100, 8000):
        audio = np.zeros((rate, 1), dtype=np.float32)
        audio[rate // 2] = 0.9
        got = read_audio(save("click.wav", audio, rate), RATE, 1)[0]
        assert abs(int(np.abs(got).argmax()) - RATE // 2) <= 1


def test_what_lies_above_half_the_wanted_rate_is_gone(save):
    got = read_audio(save("high.wav", sine(48000, 1, pitch=15000.0), 48000), RATE, 1)[0]
    assert np.abs(got[1000:-1000]).max() < 1e-3


def test_six_channels_become_the_mean_or_the_first_two(save):
    audio = np.stack([np.full(100, 0.1 * (i + 1), dtype=np.float32) for i in range(6)], axis=1)
    path = save("surround.wav", audio, subtype="FLOAT")
    assert read_audio(path, RATE, 1)[0] == pytest.approx(0.35, abs=1e-6)
    assert read_audio(path, RATE, 2)[:, 50] == pytest.approx([0.1, 0.2], abs=1e-6)


def test_stereo_becomes_the_mean_and_mono_is_doubled(save):
    stereo = np.array([[0.5, -0.25]] * 64, dtype=np.float32)
    assert read_audio(save("s.wav", stereo, subtype="FLOAT"), RATE, 1)[0] == pytest.approx(0.125)
    mono = read_audio(save("m.wav", stereo[:, :1], subtype="FLOAT"), RATE, 2)
    assert np.array_equal(mono, np.full((2, 64), 0.5, dtype=np.float32))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_sample_type_has_full_scale_1(save, subtype):
    _, level = pitch_and_level(read_audio(save("a.wav", sine(RATE), subtype=subtype), RATE, 1)[0], RATE)
    assert level == pytest.approx(LEVEL, rel=0.02)


def test_silence_is_read_as_zeros(save):
    assert not read_audio(save("silence.flac", np.zeros((RATE, 1)), 44100), RATE, 1).any()


def test_a_single_sample_is_read_or_refused_by_name(save):
    path = save("one.wav", np.full((1, 1), 0.5), 48000)
    try:
        assert read_audio(path, RATE, 1).shape[1] <= 1
    except UserError as error:
        assert "one.wav" in str(error)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_empty_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / f"empty.{kind}"
    path.write_bytes(b"")
    refusal(path)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_file_without_samples_is_refused_by_name(save, kind):
    refusal(save(f"none.{kind}", np.zeros((0, 1))))


@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.flac", "text.raw", "text"])
def test_text_named_as_audio_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_text("Dear diary, this is not music.\n" * 50)
    assert "cannot be read as audio" in refusal(path)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("part", [0.9, 0.5, 0.1, 0.01])
def test_a_file_that_was_cut_is_refused_by_name(save, kind, part):
    path = save(f"cut.{kind}", sine(44100, seconds=4.0), 44100)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refusal(path)


def test_a_wav_from_a_pipe_whose_header_knows_no_length_is_read(save):
    path = save("pipe.wav", sine(RATE))
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    for unknown in (0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFD3):
        data[at : at + 4] = unknown.to_bytes(4, "little")
        path.write_bytes(data)
        assert read_audio(path, RATE, 1).shape[1] == int(RATE * SECONDS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_float_wav_with_nan_or_infinity_is_refused_by_name(save, value):
    audio = sine(RATE)
    audio[777] = value
    assert "NaN or infinity" in refusal(save("bad.wav", audio, subtype="FLOAT"))


def test_audio_that_never_ends_is_refused_before_it_is_read(save, monkeypatch):
    path = save("long.flac", np.zeros((1000, 1)), 1)
    monkeypatch.setattr("attr_engine.latents.audio._MAX_SECONDS", 900.0)
    monkeypatch.setattr(soundfile, "read", None)
    assert "hours" in refusal(path)


def test_more_samples_than_memory_should_hold_are_refused_before_they_are_read(save, monkeypatch):
    path = save("wide.wav", np.zeros((100, 6)))
    monkeypatch.setattr("attr_engine.latents.audio._MAX_SAMPLES", 599)
    monkeypatch.setattr(soundfile, "read", None)
    assert "6 channels of 100 samples" in refusal(path)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_in_a_file_never_raise_anything_else(save, seed):
    rng = np.random.default_rng(seed)
    path = save(f"a.{['wav', 'flac', 'ogg', 'aiff'][seed % 4]}", sine(RATE, seconds=0.3))
    data = bytearray(path.read_bytes())
    for position in rng.integers(0, min(len(data), 200 if seed % 8 < 4 else len(data)), 3):
        data[position] ^= int(rng.integers(1, 256))
    path.write_bytes(data)
    try:
        assert np.isfinite(read_audio(path, RATE, 1)).all()
    except UserError as error:
        assert path.name in str(error)


def test_without_soxr_the_message_names_the_extra(save, monkeypatch):
    import sys

    path = save("a.wav", sine(RATE))
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(UserError, match=r"soxr.*attr-engine\[audio\]"):
        read_audio(path, RATE, 1)


def test_audio_is_found_in_subfolders_sorted_and_whatever_its_case(save, tmp_path):
    for name in ("b.wav", "a/z.FLAC", "a/b/c.Mp3", "C.ogg"):
        save(f"music/{name}", sine(RATE, seconds=0.1))
    (tmp_path / "music" / "cover.jpg").write_bytes(b"x")
    (tmp_path / "music" / "folder.wav").mkdir()
    found = [p.relative_to(tmp_path / "music").as_posix() for p in find_audio(tmp_path / "music")]
    assert found == sorted(["C.ogg", "a/b/c.Mp3", "a/z.FLAC", "b.wav"])
    assert find_audio(tmp_path / "music" / "b.wav") == [tmp_path / "music" / "b.wav"]


def test_a_missing_or_silent_folder_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_audio(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no audio"):
        find_audio(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_the_bytes_that_decoding_takes_are_known_beforehand(save, tmp_path, kind):
    path = save(f"a.{kind}", sine(48000, 2), 48000)
    before, after = 4 * 2 * 48000 * SECONDS, 4 * RATE * SECONDS
    assert decoded_bytes(path, RATE, 1) == pytest.approx(before + after, rel=0.01)
    path.write_bytes(b"no audio")
    assert decoded_bytes(path, RATE, 1) == decoded_bytes(tmp_path / "nowhere.wav", RATE, 1) == 0
