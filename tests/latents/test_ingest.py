"""Audio becomes a data set with the right latents, lengths, timing and names."""

import json
import math
import os

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents.ingest import ingest_audio, silence_latent, windows

soundfile = pytest.importorskip("soundfile")

RATE, HOP, FRAMES = 16000, 1024, 32
LONGEST = FRAMES * HOP / RATE


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)


@pytest.fixture
def music(tmp_path):
    """Write wav files (float32, so that samples are exact) into a folder and return it."""

    def write(**files):
        for name, audio in files.items():
            path = tmp_path / "music" / f"{name.replace('__', '/')}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, audio, RATE, subtype="FLOAT")
        return tmp_path / "music"

    return write


def read(folder) -> tuple[LatentDataset, list[np.ndarray]]:
    """The data set, and the valid frames [C, n] of every track."""
    data = LatentDataset(folder)
    batch = data.batch(range(len(data)), int(data.lengths.max()))
    return data, [x[:, : int(n)].numpy() for x, n in zip(batch.latents, batch.valid, strict=True)]


def by_hand(encoder, audio: np.ndarray, context: int) -> np.ndarray:
    """Means of the VAE with stable-audio-tools' own call; ``context`` frames of silence follow the audio."""
    n = math.ceil(len(audio) / HOP)
    padded = torch.zeros(1, 1, (n + context) * HOP)
    padded[0, 0, : len(audio)] = torch.from_numpy(audio)
    with torch.no_grad():
        both = encoder.pretransform.model.encode(padded, skip_bottleneck=True)
    return (both[0, :4] / 2.5)[:, :n].numpy()  # the lower half of the channels is the mean


@pytest.mark.parametrize("seconds", [0.01, 0.064, 1.0, 1.03, LONGEST])
def test_latents_are_the_encoders_mean_over_the_scale(music, tmp_path, encoder, seconds):
    audio = noise(seconds)
    ingest_audio(music(a=audio), tmp_path / "set", encoder, FRAMES)
    data, (latent,) = read(tmp_path / "set")
    n = math.ceil(len(audio) / HOP)
    assert data.lengths.tolist() == [n]
    expected = by_hand(encoder, audio, context=min(16, FRAMES - n))
    assert np.array_equal(latent, expected)
    sampled = encoder.pretransform.encode(torch.zeros(1, 1, HOP)) - encoder.pretransform.encode(
        torch.zeros(1, 1, HOP)
    )
    assert sampled.any()  # the pretransform itself draws: it must not be what was used


def test_the_silence_after_the_end_is_what_the_last_frames_see(music, tmp_path, encoder):
    """With 16 frames of silence the latent is that of a much longer silence, to rounding."""
    audio = noise(0.5)
    ingest_audio(music(a=audio), tmp_path / "set", encoder, 376)
    _, (latent,) = read(tmp_path / "set")
    assert np.allclose(latent, by_hand(encoder, audio, context=200), atol=1e-5)


def test_encoding_twice_gives_the_same_bits(music, tmp_path, encoder):
    folder = music(a=noise(0.7), b=noise(2.5, 1), c=noise(1.2, 2))
    for out in ("first", "second"):
        ingest_audio(folder, tmp_path / out, encoder, FRAMES)
    first, second = (sorted((tmp_path / out).iterdir()) for out in ("first", "second"))
    assert [p.name for p in first] == [p.name for p in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_a_track_has_the_same_latent_whatever_lies_beside_it(music, tmp_path, encoder):
    folder = music(b=noise(0.7))
    ingest_audio(folder, tmp_path / "alone", encoder, FRAMES)
    music(a=noise(1.5, 1), c=noise(0.2, 2))
    ingest_audio(folder, tmp_path / "together", encoder, FRAMES)
    assert np.array_equal(read(tmp_path / "together")[1][1], read(tmp_path / "alone")[1][0])


def test_padding_is_the_latent_of_silence(music, tmp_path, encoder):
    folder = music(a=noise(0.2), quiet=np.zeros(100 * HOP, dtype=np.float32))
    ingest_audio(folder, tmp_path / "set", encoder, 376)
    data, (_, quiet) = read(tmp_path / "set")
    assert np.allclose(quiet[:, 50], data.padding, atol=1e-6)
    assert np.array_equal(silence_latent(encoder), data.padding.astype(np.float32))
    batch = data.batch([0], FRAMES)
    assert torch.equal(batch.latents[0, :, 20], torch.from_numpy(data.padding).float())


def test_silence_is_kept_and_reported(music, tmp_path, encoder):
    report = ingest_audio(music(a=noise(0.2), b=np.zeros(999)), tmp_path / "set", encoder, FRAMES)
    assert report.tracks == 2
    assert report.notes == ("b.wav is digital silence",)


def test_tracks_are_named_by_their_path_and_carry_timing_and_source(music, tmp_path, encoder):
    report = ingest_audio(music(b=noise(0.5), a__x=noise(1.0)), tmp_path / "set", encoder, FRAMES)
    data = LatentDataset(tmp_path / "set")
    assert report.tracks == 2 and data.ids == ["a/x.wav", "b.wav"]
    assert data.conditioning == [{"seconds_start": 0.0, "seconds_total": s} for s in (1.0, 0.5)]
    assert [(i["title"], i["source"], i["seconds"], i["start"], i["parent"]) for i in data.info] == [
        ("x", "a/x.wav", 1.0, 0.0, ""), ("b", "b.wav", 0.5, 0.0, "")
    ]  # fmt: skip
    assert data.extra["encoder"] == "fingerprint of the encoder"
    assert (data.extra["sample_rate"], data.extra["samples_per_frame"]) == (RATE, HOP)
    assert data.extra["root"] == str(tmp_path / "music")


def test_one_file_can_be_the_source(music, tmp_path, encoder):
    folder = music(a=noise(0.2), b=noise(0.3))
    ingest_audio(folder / "b.wav", tmp_path / "set", encoder, FRAMES, kind="query")
    data = LatentDataset(tmp_path / "set")
    assert data.ids == ["b.wav"] and data.info[0]["kind"] == "query"


def test_a_long_recording_is_cut_into_windows_that_remember_their_parent(music, tmp_path, encoder):
    audio = noise(2 * LONGEST + 1.5)
    folder = music(short=noise(1.0, 1), long=audio)
    report = ingest_audio(folder, tmp_path / "set", encoder, FRAMES)
    data, latents = read(tmp_path / "set")
    assert report.tracks == 4
    assert data.ids == ["long.wav#000", "long.wav#001", "long.wav#002", "short.wav"]
    assert [i["parent"] for i in data.info] == ["long.wav"] * 3 + [""]
    assert [c["seconds_start"] for c in data.conditioning[:3]] == [0.0, LONGEST, 2 * LONGEST]
    assert [i["start"] for i in data.info[:3]] == [0.0, LONGEST, 2 * LONGEST]
    assert [i["seconds"] for i in data.info[:3]] == pytest.approx([LONGEST, LONGEST, 1.5])
    assert [c["seconds_total"] for c in data.conditioning[:3]] == [len(audio) / RATE] * 3
    assert data.lengths.tolist()[:3] == [FRAMES, FRAMES, 24]
    size = FRAMES * HOP
    for i in range(3):
        part = audio[i * size : (i + 1) * size]
        assert np.array_equal(latents[i], by_hand(encoder, part, min(16, FRAMES - data.lengths[i])))


def test_windows_overlap_where_the_hop_is_shorter(music, tmp_path, encoder):
    audio = noise(LONGEST + 1.0)
    ingest_audio(music(a=audio), tmp_path / "set", encoder, FRAMES, hop=0.5)
    data, latents = read(tmp_path / "set")
    assert [c["seconds_start"] for c in data.conditioning] == [0.0, 0.5, 1.0]
    assert np.array_equal(latents[1], by_hand(encoder, audio[8000 : 8000 + FRAMES * HOP], 0))


@pytest.mark.parametrize(
    ("samples", "spans"),
    [
        (1, [(0, 1)]),
        (100, [(0, 100)]),
        (101, [(0, 100)]),
        (129, [(0, 100)]),
        (130, [(0, 100), (100, 130)]),
        (200, [(0, 100), (100, 200)]),
        (201, [(0, 100), (100, 200)]),
    ],
)
def test_a_tail_shorter_than_the_shortest_is_left_out_and_never_a_whole_recording(samples, spans):
    assert windows(samples, longest=100, hop=100, shortest=30) == spans


@pytest.mark.parametrize("samples", range(100, 400, 17))
@pytest.mark.parametrize("hop", [1, 30, 70, 100])
def test_windows_cover_all_but_a_short_tail(samples, hop):
    spans = windows(samples, longest=100, hop=hop, shortest=30)
    covered = np.zeros(samples, dtype=bool)
    for start, stop in spans:
        assert 30 <= stop - start <= 100 and start % hop == 0
        covered[start:stop] = True
    assert not (~covered[: samples - 29]).any()
    assert len(set(spans)) == len(spans)


def test_a_long_recording_is_refused_by_name_where_windows_are_not_wanted(music, tmp_path, encoder):
    folder = music(a=noise(LONGEST), b=noise(LONGEST + 1 / RATE))
    with pytest.raises(UserError, match=r"b\.wav lasts .* the model takes at most 2\.0 s.*--long window"):
        ingest_audio(folder, tmp_path / "set", encoder, FRAMES, long="error")
    assert not (tmp_path / "set" / "manifest.parquet").exists()


@pytest.mark.parametrize("hop", [0.0, -1.0, math.nan, math.inf])
def test_a_hop_that_makes_no_windows_is_refused(music, tmp_path, encoder, hop):
    with pytest.raises(UserError, match="hop"):
        ingest_audio(music(a=noise(3 * LONGEST)), tmp_path / "set", encoder, FRAMES, hop=hop)


def test_half_precision_is_the_float32_latent_rounded(music, tmp_path, encoder):
    folder = music(a=noise(1.0))
    ingest_audio(folder, tmp_path / "full", encoder, FRAMES)
    ingest_audio(folder, tmp_path / "half", encoder, FRAMES, dtype="float16")
    assert np.array_equal(read(tmp_path / "half")[1][0], read(tmp_path / "full")[1][0].astype(np.float16))


def test_metadata_reach_info_verbatim_and_conditioning_as_numbers(music, tmp_path, encoder):
    table = tmp_path / "tracks.csv"
    table.write_text(
        "\ufeffpath,id,title,artist,licence,tempo,key\n"
        'a.wav,song-1,007,"<b>Lind, ""qvist""</b>",CC0,120,C\n./b.wav,,1_000,=1+1,,90.5,7\n',
        encoding="utf-8",
    )
    ingest_audio(
        music(a=noise(0.1), b=noise(0.1)), tmp_path / "set", encoder, FRAMES, table, ["tempo", "key"]
    )
    data = LatentDataset(tmp_path / "set")
    assert data.ids == ["song-1", "b.wav"]
    assert [(i["title"], i["artist"], i["licence"]) for i in data.info] == [
        ("007", '<b>Lind, "qvist"</b>', "CC0"), ("1_000", "=1+1", "")
    ]  # fmt: skip
    assert [(c["tempo"], c["key"]) for c in data.conditioning] == [(120.0, "C"), (90.5, "7")]
    assert data.info[0]["source"] == "a.wav"


def test_metadata_cannot_pass_for_what_ingest_itself_knows(music, tmp_path, encoder):
    table = tmp_path / "tracks.json"
    fake = {"source": "../../secret.wav", "seconds": -1, "start": 99, "parent": "x", "sha256": "0"}
    table.write_text(json.dumps([{"path": "a.wav", **fake}]))
    ingest_audio(music(a=noise(0.1)), tmp_path / "set", encoder, FRAMES, table)
    info = LatentDataset(tmp_path / "set").info[0]
    assert (info["source"], info["seconds"], info["start"], info["parent"]) == ("a.wav", 0.1, 0.0, "")
    assert len(info["sha256"]) == 64


@pytest.mark.parametrize(
    ("rows", "condition", "says"),
    [
        ([{"path": "a.wav", "id": "x"}, {"path": "b.wav", "id": "x"}], [], "'x' stands twice"),
        ([{"path": "a.wav", "id": "b.wav"}], [], "'b.wav' stands twice"),
        ([{"path": "a.wav", "tempo": 1}], ["tempo"], "'b.wav' has no metadata 'tempo'"),
        ([{"path": "a.wav", "tempo": None}], ["tempo"], "'a.wav' has no metadata 'tempo'"),
        ([{"path": "a.wav", "tempo": 1}, {"path": "b.wav", "tempo": math.nan}], ["tempo"], "'b.wav'"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_by_track(music, tmp_path, encoder, rows, condition, says):
    table = tmp_path / "tracks.json"
    table.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=says):
        ingest_audio(music(a=noise(0.1), b=noise(0.1)), tmp_path / "set", encoder, FRAMES, table, condition)
    assert not (tmp_path / "set" / "manifest.parquet").exists()


def test_an_id_of_zero_is_an_id(music, tmp_path, encoder):
    table = tmp_path / "tracks.json"
    table.write_text(json.dumps([{"path": "a.wav", "id": 0}]))
    ingest_audio(music(a=noise(0.1)), tmp_path / "set", encoder, FRAMES, table)
    assert LatentDataset(tmp_path / "set").ids == ["0"]


def test_rows_of_absent_files_are_reported(music, tmp_path, encoder):
    table = tmp_path / "tracks.csv"
    table.write_text("path,title\na.wav,x\ngone.wav,y\n")
    report = ingest_audio(music(a=noise(0.1)), tmp_path / "set", encoder, FRAMES, table)
    assert report.notes == ("1 metadata rows name files that are not there, first 'gone.wav'",)


def test_a_window_whose_id_another_track_has_is_refused(music, tmp_path, encoder):
    table = tmp_path / "tracks.json"
    table.write_text(json.dumps([{"path": "b.wav", "id": "a.wav#001"}]))
    with pytest.raises(UserError, match="'a.wav#001' stands twice"):
        ingest_audio(music(a=noise(2 * LONGEST), b=noise(0.1)), tmp_path / "set", encoder, FRAMES, table)


def test_a_file_name_that_is_no_unicode_is_refused_by_name(music, tmp_path, encoder):
    folder = music(a=noise(0.1))
    try:
        os.rename(folder / "a.wav", os.fsencode(folder) + b"/\xff.wav")
    except OSError:
        pytest.skip("the file system takes no such name")
    with pytest.raises(UserError, match="Unicode"):
        ingest_audio(folder, tmp_path / "set", encoder, FRAMES)


@pytest.mark.parametrize("content", [b"", b"hello", b"RIFF"])
def test_a_bad_file_among_good_ones_is_refused_by_name_and_no_set_is_left(music, tmp_path, encoder, content):
    folder = music(a=noise(0.1), c=noise(0.1))
    (folder / "b.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.wav"):
        ingest_audio(folder, tmp_path / "set", encoder, FRAMES)
    assert not (tmp_path / "set" / "manifest.parquet").exists()


def test_progress_counts_the_files(music, tmp_path, encoder):
    seen = []
    folder = music(a=noise(0.1), b=noise(2 * LONGEST))
    ingest_audio(folder, tmp_path / "set", encoder, FRAMES, progress=lambda *x: seen.append(x))
    assert seen == [(1, 2), (2, 2)]
