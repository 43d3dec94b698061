"""Arrays that numpy and safetensors write are read bit for bit; anything else is refused before memory is taken."""

import io
import os
import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents.convert import guess_kind, ingest_arrays
from attr_engine.latents.npy import MAX_ARRAY, Npz, Tensors, read_npy, read_npy_file

DTYPES = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "<i4", ">i8", "|b1", "|u1", "<c8"]


def npy(array: np.ndarray, version=None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=True)
    return file.getvalue()


def parse(data: bytes) -> np.ndarray:
    return read_npy(io.BytesIO(data), len(data), "the file x.npy")


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        parse(data)
    message = str(caught.value)
    assert message.startswith("the file x.npy cannot be read") and "without pickle" in message
    assert "\n" not in message
    return message


def header(text: str, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    data = text.encode("latin-1")
    size = len(data) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", size) + data


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 7), (1, 4, 7), (4,), (), (4, 0), (1, 1)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_is_read_bit_for_bit_in_native_order(rng, dtype, order, shape, version):
    array = np.asarray(rng.integers(0, 2, shape), dtype=dtype, order=order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = parse(npy(array, version))
    assert np.array_equal(got, array) and got.shape == array.shape
    assert got.dtype == array.dtype.newbyteorder("=") and got.dtype.isnative


def test_a_latent_in_another_byte_or_memory_order_becomes_the_same_track(tmp_path, rng):
    latent = rng.normal(size=(3, 5)).astype(np.float32)
    for name, array in {
        "plain": latent, "big": latent.astype(">f4"), "fortran": np.asfortranarray(latent), "both": np.asfortranarray(latent.astype(">f4"))
    }.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
    ingest_arrays(tmp_path, tmp_path / "set")
    batch = LatentDataset(tmp_path / "set").batch(range(4), 5)
    assert all(np.array_equal(x.numpy(), latent) for x in batch.latents)


GOOD = npy(np.arange(12, dtype=np.float32).reshape(3, 4))
SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
HOSTILE = {
    "empty": (b"", ""),
    "text": (b"hello world, this is no array", "magic"),
    "only magic": (b"\x93NUMPY", ""),
    "cut in the header": (GOOD[:50], "ends in its header"),
    "cut in the data": (GOOD[:-1], "47 are there"),
    "no data": (GOOD[:128], "0 are there"),
    "more data": (GOOD + b"x", "49 are there"),
    "two arrays": (GOOD + GOOD, "are there"),
    "version 3": (b"\x93NUMPY\x03\x00" + GOOD[8:], "(3, 0)"),
    "a header of 60 KB": (header(" " * 60_000), "60000 bytes"),
    "a header of 4 GB": (header(SHAPE % "(3, 4)", (2, 0), 2**32 - 1), "4294967295 bytes"),
    "terabytes": (header(SHAPE % "(3, 999999999999999)") + bytes(48), "48 are there"),
    "a size past 64 bits": (header(SHAPE % "(4294967296, 4294967296, 4294967296)") + bytes(48), "48 are there"),
    "an axis past 64 bits": (header(SHAPE % f"(0, {2**70})"), "cannot be"),
    "nothing times much": (header(SHAPE % f"(0, {2**62}, {2**62})"), ""),
    "negative": (header(SHAPE % "(-3, -4)") + bytes(48), "cannot be"),
    "bool in the shape": (header(SHAPE % "(True, 'x')"), ""),
    "many axes": (header(SHAPE % ("(" + "1," * 40 + ")")) + bytes(4), "cannot be"),
    "deep": (header(SHAPE % ("(" * 3000 + ")" * 3000)), ""),
    "code": (header("__import__('os').mkdir('executed')"), ""),
    "a call in the shape": (header(SHAPE % "(len('abc'), 4)") + bytes(48), ""),
    "text items": (npy(np.array([["a", "b"]])), "U1"),
    "bytes without size": (header("{'descr': '|S0', 'fortran_order': False, 'shape': (9,), }"), "S0"),
    "records": (npy(np.zeros(3, dtype=[("a", "f4"), ("b", "i4")])), "numbers"),
    "dates": (npy(np.zeros(3, dtype="M8[s]")), "numbers"),
    "objects": (npy(np.array([{}], dtype=object)), "objects"),
    "missing key": (header("{'descr': '<f4', 'shape': (3, 4), }") + bytes(48), ""),
    "no dtype": (header("{'descr': 'oops', 'fortran_order': False, 'shape': (3, 4), }") + bytes(48), ""),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_hostile_npy_is_refused_in_one_sentence(tmp_path, monkeypatch, data, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(data)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_memory_is_refused_before_memory_is_taken():
    tracemalloc.start()
    refusal(header(SHAPE % "(1000, 1000000)") + bytes(1000))
    refusal(header(SHAPE % "(3, 4)", (2, 0), 2**31))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_array_of_more_than_a_gigabyte_is_refused_unread(tmp_path):
    text = SHAPE % f"({(MAX_ARRAY >> 2) + 1},)"
    with open(tmp_path / "x.npy", "wb") as file:
        file.write(header(text))
        file.truncate(len(header(text)) + MAX_ARRAY + 4)  # a hole: takes no space
    with pytest.raises(UserError, match=r"x\.npy.*more than"):
        read_npy_file(tmp_path / "x.npy")


def test_a_stream_that_is_shorter_or_longer_than_it_was_said_is_refused():
    for data in (GOOD[:-5], GOOD + b"x"):
        with pytest.raises(UserError, match="x.npy"):
            read_npy(io.BytesIO(data), len(GOOD), "x.npy")


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_an_array_of_that_size_or_a_refusal(seed):
    rng, data = np.random.default_rng(seed), bytearray(GOOD)
    for position in rng.integers(0, 100, 1 + seed % 3):
        data[position] ^= 1 << int(rng.integers(8))
    try:
        assert parse(bytes(data)).nbytes == 48
    except UserError as error:
        assert "x.npy" in str(error) and "\n" not in str(error)


def test_a_pipe_and_a_folder_named_as_an_array_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    for name in ("pipe.npy", "folder.npy", "nowhere.npy"):
        with pytest.raises(UserError, match=name):
            read_npy_file(tmp_path / name)


# -- npz ------------------------------------------------------------------------------------------


def lie_about_size(path, size: int) -> None:
    """Change the size of the one member of an archive, in the directory and before the data."""
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", size)
    data[22:26] = struct.pack("<I", size)
    path.write_bytes(data)


@pytest.mark.parametrize("claimed", [len(GOOD) - 1, len(GOOD) + 1, 200, 2**31])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_another_size_than_the_archive_says_is_refused(tmp_path, claimed, compression):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a.npy", GOOD)
    lie_about_size(path, claimed)
    with pytest.raises(UserError, match=r"a\.npz.*'a'"):
        ingest_arrays(path, tmp_path / "set")


def test_a_member_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.npz"
    text = header(SHAPE % "(4, 1)")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", text + bytes(64 << 20))
    lie_about_size(path, len(text) + 16)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.npz.*'a'"):
        ingest_arrays(path, tmp_path / "set")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("what", ["bz2", "lzma", "encrypted", "twice", "another name", "damaged"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_numpy_does_not_write_is_refused_by_name(tmp_path, what):
    path = tmp_path / "bad.npz"
    kind = {"bz2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}.get(what, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for _ in range(2 if what == "twice" else 1):
            archive.writestr("a.npy", GOOD)
    data = bytearray(path.read_bytes())
    if what == "encrypted":
        data[6] |= 1
        data[data.rindex(b"PK\x01\x02") + 8] |= 1
    elif what == "another name":
        data[30] = ord("b")
    elif what == "damaged":
        data[data.index(GOOD[-8:])] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.npz|'a' stands twice"):
        ingest_arrays(path, tmp_path / "set")


def test_members_can_be_read_in_any_order_from_threads(tmp_path, rng):
    from concurrent.futures import ThreadPoolExecutor

    arrays = {f"sub/{i}": rng.normal(size=(3, 50)) for i in range(40)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    archive = Npz(tmp_path / "a.npz")
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(archive.read, reversed(range(40))))
    assert archive.names == list(arrays)
    assert all(np.array_equal(x, y) for x, y in zip(got[::-1], arrays.values(), strict=True))


# -- safetensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors_of_one_file_and_of_a_folder_are_the_same_set_bit_for_bit(tmp_path, dtype):
    latents = {name: torch.randn(3, n).to(dtype) for name, n in (("a", 4), ("b", 7), ("sub-c", 1))}
    safetensors.torch.save_file(latents, tmp_path / "all.safetensors")
    (tmp_path / "folder").mkdir()
    for name, latent in latents.items():
        key = "latents" if name == "b" else "latent"
        safetensors.torch.save_file({key: latent}, tmp_path / "folder" / f"{name}.safetensors")
    for source in ("all.safetensors", "folder"):
        assert guess_kind(tmp_path / source) == "arrays"
        ingest_arrays(tmp_path / source, tmp_path / f"set of {source}")
        data = LatentDataset(tmp_path / f"set of {source}")
        assert sorted(data.ids) == list(latents) and data.dtype == dtype
        batch = data.batch(range(3), 7)
        for name, x, n in zip(batch.ids, batch.latents, batch.valid, strict=True):
            assert torch.equal(x[:, : int(n)], latents[name])


@pytest.mark.parametrize(
    "what", ["empty", "text", "cut", "long header", "flipped", "integers", "two", "other name"]
)
def test_bad_safetensors_are_refused_by_name(tmp_path, what):
    path = tmp_path / "folder" / "bad.safetensors"
    path.parent.mkdir()
    safetensors.torch.save_file({"latent": torch.randn(3, 50)}, path)
    data = path.read_bytes()
    if what in ("integers", "two", "other name"):
        tensors = {"integers": {"latent": torch.ones(3, 4, dtype=torch.int32)}, "other name": {"x": torch.ones(3, 4)},
                   "two": {"latent": torch.ones(3, 4), "latents": torch.ones(3, 4)}}  # fmt: skip
        safetensors.torch.save_file(tensors[what], path)
    else:
        changed = {"empty": b"", "text": b"hello", "cut": data[:-1], "long header": struct.pack("<Q", 2**60) + data[8:],
                   "flipped": data[:12] + b"\xff" + data[13:]}  # fmt: skip
        path.write_bytes(changed[what])
    with pytest.raises(UserError, match="bad"):
        ingest_arrays(path.parent, tmp_path / "set")


def test_tensors_of_a_file_that_became_shorter_are_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.randn(3, 5000)}, tmp_path / "x.safetensors")
    tensors = Tensors(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 1000)
    with pytest.raises(UserError, match="'a' cannot be read"):
        tensors.read(0)
