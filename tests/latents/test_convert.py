"""Pre-encoded folders and arrays become data sets with the right latents, lengths, timing and names."""

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
from attr_engine.latents.convert import guess_kind, ingest_arrays, ingest_pre_encoded


def read(folder) -> tuple[LatentDataset, list[np.ndarray]]:
    """The data set, and the valid frames [C, n] of every track."""
    data = LatentDataset(folder)
    batch = data.batch(range(len(data)), int(data.lengths.max()))
    return data, [x[:, : int(n)].numpy() for x, n in zip(batch.latents, batch.valid, strict=True)]


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
    "other channels": (np.zeros((5, 3), dtype=np.float32), row("a"), "channels 5"),
    "other dtype": (np.zeros((4, 3), dtype=np.float16), row("a"), 'dtype "F16"'),
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
def test_a_bad_archive_is_refused_by_name(tmp_path, rng, content):
    path = tmp_path / "bad.npz"
    np.savez(path, a=latent(100))
    data = path.read_bytes()
    if content in ("empty", "text", "bytes"):
        path.write_bytes({"empty": b"", "text": b"hello", "bytes": rng.bytes(500)}[content])
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
        (["a.tar", "b.tar"], "webdataset"),
        (["sub/a.TGZ", "README.md"], "webdataset"),
        (["a.tar", "b.flac"], "audio"),
        (["a.safetensors"], "arrays"),
        ([], "audio"),
    ],
)
def test_the_kind_of_a_folder_is_guessed_from_what_lies_there(tmp_path, files, kind):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert guess_kind(tmp_path) == kind


def test_the_kind_of_a_file_is_guessed_from_its_ending(tmp_path):
    for name in ("x.npz", "x.npy", "x.wav", "x.tar", "x.tar.gz", "x.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert guess_kind(tmp_path / "x.npz") == "arrays"
    assert guess_kind(tmp_path / "x.npy") == "arrays"
    assert guess_kind(tmp_path / "x.safetensors") == "arrays"
    assert guess_kind(tmp_path / "x.wav") == "audio"
    assert guess_kind(tmp_path / "x.tar") == guess_kind(tmp_path / "x.tar.gz") == "webdataset"
    with pytest.raises(UserError, match="nowhere"):
        guess_kind(tmp_path / "nowhere")


def test_one_npy_is_a_set_of_one_track(tmp_path):
    np.save(tmp_path / "song.npy", latent(5))
    ingest_arrays(tmp_path / "song.npy", tmp_path / "set")
    data, (got,) = read(tmp_path / "set")
    assert data.ids == ["song"] and np.array_equal(got, latent(5))


def test_a_data_set_is_no_source(tmp_path):
    np.save(tmp_path / "song.npy", latent(5))
    ingest_arrays(tmp_path / "song.npy", tmp_path / "set")
    with pytest.raises(UserError, match="set is a data set already"):
        guess_kind(tmp_path / "set")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_latents_are_stored_in_the_dtype_that_was_asked_for(encoded, tmp_path, dtype):
    a = latent(6, 1)
    ingest_pre_encoded(encoded({"a": (a, row("a"))}), tmp_path / "set", scale=1.7, dtype=dtype)
    np.save(tmp_path / "a.npy", a)
    ingest_arrays(tmp_path / "a.npy", tmp_path / "arrays", scale=1.7, dtype=dtype)
    expected = (torch.from_numpy(a) / 1.7).to(getattr(torch, dtype))
    for name in ("set", "arrays"):
        data = LatentDataset(tmp_path / name)
        assert data.dtype == expected.dtype
        assert torch.equal(data.batch([0], 6).latents[0].to(expected.dtype), expected)


def test_a_latent_too_large_for_half_precision_is_refused_by_name(encoded, tmp_path):
    folder = encoded({"a": (np.full((4, 3), 1e6, dtype=np.float32), row("a"))})
    with pytest.raises(UserError, match="'a' holds NaN or infinity"):
        ingest_pre_encoded(folder, tmp_path / "set", dtype="float16")
