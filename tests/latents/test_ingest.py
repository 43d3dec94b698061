"""Audio, pre-encoded folders and arrays become data sets with the right latents, lengths, timing and names."""

import json
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents.ingest import (
    guess_kind,
    ingest_arrays,
    ingest_audio,
    ingest_pre_encoded,
    silence_latent,
    windows,
)

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


# -- audio ----------------------------------------------------------------------------------------


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


# -- pre-encoded folders --------------------------------------------------------------------------


def latent(n: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, n)).astype(dtype)


@pytest.fixture
def encoded(tmp_path):
    """Write a pre-encoded folder from {name: (latent, JSON)} and return it."""

    def write(items, silence=None):
        folder = tmp_path / "encoded"
        for name, (array, row) in items.items():
            path = folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            if array is not None:
                np.save(path, array, allow_pickle=True)
            if row is not None:
                path.with_suffix(".json").write_text(row if isinstance(row, str) else json.dumps(row))
        (folder / "details.json").write_text(json.dumps({"sample_size": 1}))
        if silence is not None:
            np.save(folder / "silence.npy", silence)
        return folder

    return write


def row(name: str, mask=None, **more) -> dict:
    """A description as stable-audio-tools 0.0.19 writes it."""
    base = {"path": f"/music/{name}.wav", "relpath": f"{name}.wav", "timestamps": [0.0, 0.7], "seconds_start": 0,
            "seconds_total": 12, "load_time": 0.1, "sample_rate": 44100, "prompt": f"prompt of {name}"}  # fmt: skip
    return {**base, **({} if mask is None else {"padding_mask": mask}), **more}


def test_rank_folders_are_read_up_to_the_last_one_of_the_mask(encoded, tmp_path):
    a, b, c = latent(8, 1), latent(8, 2), latent(8, 3)
    folder = encoded({
        "0/0000000000000": (a, row("a", [1, 1, 1, 1, 1, 0, 0, 0])),
        "0/0000000000001": (b, row("b", [1] * 8)),
        "1/0010000000000": (c, row("c", [1, 0, 1, 1, 0, 0, 0, 0])),
    })  # fmt: skip
    report = ingest_pre_encoded(folder, tmp_path / "set", ["prompt"])
    data, latents = read(tmp_path / "set")
    assert report.tracks == 3 and report.notes == ()
    assert data.ids == ["0/0000000000000", "0/0000000000001", "1/0010000000000"]
    assert data.lengths.tolist() == [5, 8, 4]
    assert all(np.array_equal(x, y) for x, y in zip(latents, (a[:, :5], b, c[:, :4]), strict=True))
    assert data.conditioning[2] == {"seconds_start": 0, "seconds_total": 12, "prompt": "prompt of c"}
    assert (data.info[2]["title"], data.info[2]["source"]) == ("prompt of c", "c.wav")
    assert data.padding is None


@pytest.mark.parametrize(
    "silence", [np.arange(4.0), np.arange(4.0)[:, None], np.tile(np.arange(4.0)[:, None], (1, 9))]
)
def test_a_flat_folder_has_its_silence_as_padding_and_not_as_a_track(encoded, tmp_path, silence):
    a = latent(5, 1)
    folder = encoded({"0000000000": (a, row("a")), "0000000001": (latent(3, 2), row("b"))}, silence)
    ingest_pre_encoded(folder, tmp_path / "set", scale=2.0)
    data, latents = read(tmp_path / "set")
    assert data.ids == ["0000000000", "0000000001"] and data.lengths.tolist() == [5, 3]
    assert data.padding.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert np.array_equal(latents[0], a / np.float32(2.0))


@pytest.mark.parametrize(
    "mask", [[[1, 1, 1, 0]], [[[1, 1, 1, 0]]], [1.0, 1.0, 1.0, 0.0], [True, True, True, False], [1, 1, 1]]
)
def test_masks_come_in_several_shapes(encoded, tmp_path, mask):
    ingest_pre_encoded(encoded({"a": (latent(4), row("a", mask))}), tmp_path / "set")
    assert LatentDataset(tmp_path / "set").lengths.tolist() == [3]


def test_the_mask_of_a_latent_of_one_frame_is_a_number(encoded, tmp_path):
    ingest_pre_encoded(encoded({"a": (latent(1), row("a", 1))}), tmp_path / "set")
    assert LatentDataset(tmp_path / "set").lengths.tolist() == [1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_latents_are_divided_by_the_scale_in_at_least_float32(encoded, tmp_path, dtype):
    a = latent(6, 1, dtype)
    ingest_pre_encoded(encoded({"a": (a, row("a"))}), tmp_path / "set", scale=1.7)
    _, (got,) = read(tmp_path / "set")
    assert got.dtype == dtype
    wide = np.promote_types(dtype, np.float32).type
    assert np.array_equal(got, (a.astype(wide) / wide(1.7)).astype(dtype))


def test_a_file_that_repeats_another_track_is_left_out_and_reported(encoded, tmp_path):
    """Where encoding a file failed, stable-audio-tools writes another track in its place."""
    folder = encoded({
        "0/a": (latent(4, 1), row("a")),
        "0/b": (latent(4, 1), row("a")),
        "0/c": (latent(4, 2), row("a", timestamps=[0.7, 1.0])),
        "1/d": (latent(4, 2), row("d")),
        "1/e": (latent(4, 1), row("a")),
    })  # fmt: skip
    report = ingest_pre_encoded(folder, tmp_path / "set")
    assert LatentDataset(tmp_path / "set").ids == ["0/a", "0/c", "1/d"]
    assert report.tracks == 3
    assert report.notes == ("2 files repeat the path and timestamps of another and were left out",)


def test_descriptions_without_a_path_are_no_doubles(encoded, tmp_path):
    report = ingest_pre_encoded(encoded({"a": (latent(4, 1), {}), "b": (latent(4, 2), {})}), tmp_path / "set")
    assert report.tracks == 2 and report.notes == ()


BAD = {
    "no JSON": (latent(4), None, "no bad.json"),
    "JSON cut": (latent(4), "{", "bad.json is not valid JSON"),
    "JSON a list": (latent(4), "[]", "bad.json holds list"),
    "JSON deep": (latent(4), "[" * 99999, "bad.json"),
    "mask of zeros": (latent(4), row("a", [0, 0, 0, 0]), "bad.json masks every frame"),
    "mask empty": (latent(4), row("a", []), "bad.json masks every frame"),
    "mask of zero": (latent(4), row("a", 0), "bad.json masks every frame"),
    "mask ragged": (latent(4), row("a", [[1, 1], [1]]), "bad.json"),
    "mask of text": (latent(4), row("a", ["1", "1"]), "bad.json"),
    "mask text": (latent(4), row("a", "1111"), "bad.json"),
    "mask of twos": (latent(4), row("a", [2, 2]), "bad.json"),
    "mask of nulls": (latent(4), row("a", [None]), "bad.json"),
    "mask longer than the latent": (latent(4), row("a", [1] * 5), "5 valid frames, the latent has 4"),
    "mask an object": (latent(4), row("a", {"a": 1}), "bad.json"),
    "objects (pickle)": (np.array([[{"a": 1}]], dtype=object), row("a"), "bad.npy"),
    "NaN": (np.full((4, 3), np.nan, dtype=np.float32), row("a"), "NaN"),
    "infinity": (np.full((4, 3), np.inf, dtype=np.float32), row("a"), "NaN"),
    "NaN under the mask": (np.array([[1.0, np.nan]] * 4), row("a", [1, 0]), "NaN"),
    "flat": (np.zeros(4, dtype=np.float32), row("a", [1]), "shape"),
    "a batch": (np.zeros((1, 4, 3), dtype=np.float32), row("a"), "shape"),
    "a number": (np.float32(3), row("a"), "shape"),
    "tokens": (np.zeros((4, 3), dtype=np.int64), row("a"), "int64"),
    "bool": (np.ones((4, 3), dtype=bool), row("a"), "bool"),
    "complex": (np.ones((4, 3), dtype=np.complex64), row("a"), "complex64"),
    "text": (np.array([["a"]]), row("a"), "U1"),
    "no frames": (np.zeros((4, 0), dtype=np.float32), row("a"), "empty"),
    "other channels": (np.zeros((5, 3), dtype=np.float32), row("a"), "5 channels"),
    "other dtype": (np.zeros((4, 3), dtype=np.float16), row("a"), "float16"),
    "NaN as time": (latent(4), row("a", seconds_total=math.nan), "'bad'"),
}


@pytest.mark.parametrize(("array", "description", "says"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("error")
def test_a_bad_pre_encoded_track_is_refused_by_name(encoded, tmp_path, array, description, says):
    folder = encoded({"a good one": (latent(4, 1), row("good")), "bad": (array, description)})
    with pytest.raises(UserError) as caught:
        ingest_pre_encoded(folder, tmp_path / "set")
    message = str(caught.value)
    assert says in message and "bad" in message and "\n" not in message
    assert not (tmp_path / "set" / "manifest.parquet").exists()


def test_a_latent_file_with_code_in_it_is_refused_and_the_code_not_run(encoded, tmp_path):
    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = encoded({"a": (np.array([Code()], dtype=object), row("a"))})
    with pytest.raises(UserError, match=r"a\.npy.*without pickle"):
        ingest_pre_encoded(folder, tmp_path / "set")
    (folder / "a.npy").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=r"a\.npy.*without pickle"):
        ingest_pre_encoded(folder, tmp_path / "set")
    np.savez(tmp_path / "a.npz", a=np.array([Code()], dtype=object))
    with pytest.raises(UserError, match=r"a\.npz.*without pickle"):
        ingest_arrays(tmp_path / "a.npz", tmp_path / "set")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_npy_never_raises_anything_else(encoded, tmp_path, seed):
    folder = encoded({"a": (latent(4), row("a"))})
    rng = np.random.default_rng(seed)
    data = bytearray((folder / "a.npy").read_bytes())
    for position in rng.integers(0, 128 if seed % 3 else len(data), 2):
        data[position] ^= 1 << int(rng.integers(8))
    (folder / "a.npy").write_bytes(data[: len(data) if seed % 4 else int(rng.integers(len(data)))])
    try:
        ingest_pre_encoded(folder, tmp_path / "set")
    except UserError as error:
        assert "a.npy" in str(error) or "'a'" in str(error)
        assert "\n" not in str(error)


def test_a_header_that_claims_terabytes_is_refused_before_memory_is_taken(encoded, tmp_path):
    folder = encoded({"a": (latent(4), row("a"))})
    data = (
        (folder / "a.npy").read_bytes().replace(b"(4, 4), }                 ", b"(4, 999999999999999), }   ")
    )
    assert b"999999" in data
    (folder / "a.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npy"):
        ingest_pre_encoded(folder, tmp_path / "set")


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, -math.inf])
def test_a_scale_that_cannot_divide_is_refused(encoded, tmp_path, scale):
    with pytest.raises(UserError, match="scale"):
        ingest_pre_encoded(encoded({"a": (latent(4), row("a"))}), tmp_path / "set", scale=scale)


@pytest.mark.parametrize(
    "silence", [np.zeros(5), np.full(4, np.nan), np.zeros((2, 4, 3)), np.zeros(4, dtype=int)]
)
def test_a_silence_that_is_no_latent_is_refused(encoded, tmp_path, silence):
    with pytest.raises(UserError, match=r"silence"):
        ingest_pre_encoded(encoded({"a": (latent(4), row("a"))}, silence), tmp_path / "set")


def test_a_condition_that_the_json_lacks_is_refused_by_track(encoded, tmp_path):
    folder = encoded({"a": (latent(4), {"prompt": "x"}), "b": (latent(4), {})})
    with pytest.raises(UserError, match="'b' has no metadata 'prompt'"):
        ingest_pre_encoded(folder, tmp_path / "set", ["prompt"])


def test_an_empty_folder_is_refused_by_name(encoded, tmp_path):
    (tmp_path / "none").mkdir()
    for folder in (tmp_path / "none", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=folder.name):
            ingest_pre_encoded(folder, tmp_path / "set")
        with pytest.raises(UserError, match=folder.name):
            ingest_arrays(folder, tmp_path / "set")


# -- arrays ---------------------------------------------------------------------------------------


def test_arrays_from_a_folder_and_from_an_archive_are_the_same_set(tmp_path):
    arrays = {"a": latent(4, 1), "b": latent(7, 2)}
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    table = tmp_path / "tracks.csv"
    table.write_text("path,id,title,tempo\na,first,One,3\nb.npy,second,Two,4\n")
    for source in ("folder", "plain.npz", "small.npz"):
        ingest_arrays(tmp_path / source, tmp_path / f"set of {source}", table, ["tempo"])
        data, latents = read(tmp_path / f"set of {source}")
        assert data.ids == ["first", "second"]
        assert all(np.array_equal(x, y) for x, y in zip(latents, arrays.values(), strict=True))
        assert data.conditioning == [{"tempo": 3}, {"tempo": 4}]
        assert [i["title"] for i in data.info] == ["One", "Two"]


@pytest.mark.parametrize(
    "content", ["empty", "text", "one array", "cut", "damaged", "pickle", "no array", "bytes"]
)
def test_a_bad_archive_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.npz"
    np.savez(path, a=latent(100))
    data = path.read_bytes()
    if content in ("empty", "text", "bytes"):
        path.write_bytes({"empty": b"", "text": b"hello", "bytes": os.urandom(500)}[content])
    elif content == "one array":
        with open(path, "wb") as file:
            np.save(file, latent(4))
    elif content == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif content == "damaged":
        path.write_bytes(data[:600] + bytes(64) + data[664:])
    elif content == "pickle":
        np.savez(path, a=np.array([{}], dtype=object))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    with pytest.raises(UserError, match=r"bad\.npz|'a'"):
        ingest_arrays(path, tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.parquet").exists()


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["a.wav"], "audio"),
        (["a.npy", "b.npy"], "arrays"),
        (["0/a.npy", "0/a.json"], "pre-encoded"),
        (["a.npz"], "audio"),
        ([], "audio"),
    ],
)
def test_the_kind_of_a_folder_is_guessed_from_what_lies_there(tmp_path, files, kind):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert guess_kind(tmp_path) == kind


def test_the_kind_of_a_file_is_guessed_from_its_ending(tmp_path):
    for name in ("x.npz", "x.npy", "x.wav"):
        (tmp_path / name).write_bytes(b"")
    assert guess_kind(tmp_path / "x.npz") == "arrays"
    assert guess_kind(tmp_path / "x.npy") == "arrays"
    assert guess_kind(tmp_path / "x.wav") == "audio"
    with pytest.raises(UserError, match="nowhere"):
        guess_kind(tmp_path / "nowhere")


def test_one_npy_is_a_set_of_one_track(tmp_path):
    np.save(tmp_path / "song.npy", latent(5))
    ingest_arrays(tmp_path / "song.npy", tmp_path / "set")
    data, (got,) = read(tmp_path / "set")
    assert data.ids == ["song"] and np.array_equal(got, latent(5))
