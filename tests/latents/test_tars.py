"""Webdataset tars become the data set that webdataset reads from them; hostile ones are refused by tar and sample."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc

import ingests
import numpy as np
import pytest

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset
from attr_engine.latents import tars as module
from attr_engine.latents.convert import guess_kind, ingest_pre_encoded, ingest_webdataset


def latent(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, n)).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def pack(path, members, mode: str = "w", **options) -> None:
    """Write a tar of {name: bytes}, or of members."""
    items = [member(*item) for item in members.items()] if isinstance(members, dict) else members
    with tarfile.open(path, mode, **options) as tar:
        for info, data in items:
            tar.addfile(info, io.BytesIO(data))


GOOD = {"good.npy": npy(latent(5, 1)), "good.json": b'{"prompt": "a good one"}'}


def read(folder) -> tuple[LatentDataset, list[np.ndarray]]:
    data = LatentDataset(folder)
    batch = data.batch(range(len(data)), int(data.lengths.max()))
    return data, [x[:, : int(n)].numpy() for x, n in zip(batch.latents, batch.valid, strict=True)]


# -- what is read ---------------------------------------------------------------------------------


def test_samples_are_those_that_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "000.tar")) as writer:
        for i in range(5):
            row = {"prompt": f"piece {i}", "seconds_total": i + 0.5}
            writer.write(
                {
                    "__key__": f"sub/{i:03d}",
                    "npy": latent(3 + i, i),
                    "json": row,
                    "txt": "other",
                    "wav": b"RIFF",
                }
            )
    ingest_webdataset(tmp_path / "000.tar", tmp_path / "set", ["prompt"])
    data, latents = read(tmp_path / "set")
    theirs = list(webdataset.WebDataset(str(tmp_path / "000.tar"), shardshuffle=False).decode())
    assert data.ids == [sample["__key__"] for sample in theirs]
    assert all(np.array_equal(x, sample["npy"]) for x, sample in zip(latents, theirs, strict=True))
    assert [c["prompt"] for c in data.conditioning] == [sample["json"]["prompt"] for sample in theirs]
    assert [c["seconds_total"] for c in data.conditioning] == [i + 0.5 for i in range(5)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_format_and_compression_is_read(tmp_path, mode, format):
    long = "/".join(["a long folder name"] * 4) + "/" + "x" * 90
    members = {
        "./a.npy": npy(latent(5)),
        f"{long}.npy": npy(latent(6, 1)[None]),
        f"{long}.JSON": b'{"padding_mask": [1, 1, 0]}',
    }
    pack(tmp_path / "a.tar", members, mode, format=format)
    ingest_webdataset(tmp_path / "a.tar", tmp_path / "set")
    data, latents = read(tmp_path / "set")
    assert data.ids == ["a", long] and data.lengths.tolist() == [5, 2]
    assert np.array_equal(latents[0], latent(5)) and np.array_equal(latents[1], latent(6, 1)[:, :2])


def test_a_tar_gives_what_the_pre_encoded_folder_gives_that_it_was_packed_from(tmp_path):
    folder = ingests.make_source("pre-encoded", tmp_path / "folder")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    ingest_pre_encoded(folder, tmp_path / "of folder", ["prompt"], 1.7)
    ingest_webdataset(tmp_path / "a.tar", tmp_path / "of tar", ["prompt"], 1.7)
    (one, first), (two, second) = read(tmp_path / "of folder"), read(tmp_path / "of tar")
    assert one.ids == two.ids and one.conditioning == two.conditioning and one.info == two.info
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_text_is_the_prompt_where_the_json_has_none(tmp_path):
    x = npy(latent(3))
    pack(tmp_path / "a.tar", {
        "a.npy": x, "a.txt": b"from text\n", "b.npy": x, "b.txt": b"from text", "b.json": b'{"prompt": "from json"}',
        "c.txt": "é".encode(), "c.json": b'{"tempo": 3}', "c.npy": x,
    })  # fmt: skip
    ingest_webdataset(tmp_path / "a.tar", tmp_path / "set", ["prompt"])
    assert [c["prompt"] for c in LatentDataset(tmp_path / "set").conditioning] == [
        "from text",
        "from json",
        "é",
    ]


def test_what_is_no_sample_is_passed_over(tmp_path):
    members = [
        member("folder", type=tarfile.DIRTYPE), member("__notes__", b"x"), member("__notes__/a.npy", b"x"),
        member("README", b"hello"), member("._good.npy", b"resource fork"), *(member(*x) for x in GOOD.items()),
        member("good.flac", b"audio"),
    ]  # fmt: skip
    pack(tmp_path / "a.tar", members)
    assert ingest_webdataset(tmp_path / "a.tar", tmp_path / "set").tracks == 1
    assert LatentDataset(tmp_path / "set").ids == ["good"]


def test_tars_of_a_folder_are_read_in_order_and_recognised(tmp_path):
    source = ingests.make_source("webdataset", tmp_path / "source")
    assert guess_kind(source) == guess_kind(source / "00.tar") == "webdataset"
    (source / "more").mkdir()
    with gzip.open(source / "more" / "99.tar.gz", "wb") as file:
        pack(tmp_path / "x.tar", {"good.npy": npy(latent(3)[:3])})
        file.write((tmp_path / "x.tar").read_bytes())
    ingest_webdataset(source, tmp_path / "set")
    assert LatentDataset(tmp_path / "set").ids == [*(f"{i:02d}" for i in range(12)), "good"]


def test_tars_and_gzip_streams_that_were_joined_are_read_to_their_end(tmp_path):
    pack(tmp_path / "a.tar", GOOD)
    pack(tmp_path / "b.tar", {"b.npy": npy(latent(3))})
    first, second = ((tmp_path / name).read_bytes() for name in ("a.tar", "b.tar"))
    (tmp_path / "plain.tar").write_bytes(first + second)
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(first) + gzip.compress(second))
    for name in ("plain", "zipped"):
        ingest_webdataset(tmp_path / f"{name}.tar", tmp_path / name)
        assert LatentDataset(tmp_path / name).ids == ["good", "b"]


def test_a_sample_that_repeats_another_track_is_left_out_and_reported(tmp_path):
    row = json.dumps({"path": "/a.wav", "timestamps": [0, 1]}).encode()
    pack(tmp_path / "a.tar", {"a.npy": npy(latent(3)), "a.json": row, "b.npy": npy(latent(3)), "b.json": row})
    report = ingest_webdataset(tmp_path / "a.tar", tmp_path / "set")
    assert report.notes == ("1 samples repeat the path and timestamps of another and were left out",)
    assert LatentDataset(tmp_path / "set").ids == ["a"]


def test_nothing_is_extracted_and_memory_stays_at_a_few_samples(tmp_path):
    size = 1 << 20
    data = npy(np.zeros((4, size // 16), dtype=np.float32))
    pack(tmp_path / "a.tar", {f"{i:03d}.npy": data for i in range(60)})
    before = set(tmp_path.rglob("*"))
    samples = 0
    tracemalloc.start()
    for _ in module.read_samples(tmp_path / "a.tar", lambda key: False):
        samples += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples == 60 and peak < 5 * size
    assert set(tmp_path.rglob("*")) == before


def test_the_latents_of_tracks_that_are_there_are_not_read(tmp_path):
    pack(tmp_path / "a.tar", GOOD)
    (sample,) = module.read_samples(tmp_path / "a.tar", lambda key: key == "good")
    assert sample.there and set(sample.parts) == {"json"}


# -- what is refused ------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


HEAD = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 99999999), }"
CLAIM = b"\x93NUMPY\x01\x00" + len(HEAD).to_bytes(2, "little") + HEAD.encode() + bytes(64)
BAD = {
    "a link": ([member("bad.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "'bad.npy' is a link"),
    "a hard link": ([member("bad.npy", type=tarfile.LNKTYPE, linkname="good.npy")], "'bad.npy' is a link"),
    "a device": ([member("bad.npy", type=tarfile.CHRTYPE)], "'bad.npy' is a device"),
    "a block device": ([member("bad.npy", type=tarfile.BLKTYPE)], "'bad.npy' is a device"),
    "a pipe": ([member("bad.npy", type=tarfile.FIFOTYPE)], "'bad.npy' is a pipe"),
    "an unknown type": ([member("bad.npy", type=b"Q")], "'bad.npy' is of an unknown type"),
    "two latents": ([member("bad.npy", npy(latent(3)))] * 2, "sample 'bad' has two members .npy"),
    "two latents by case": ([member(f"bad.{x}", npy(latent(3))) for x in ("npy", "NPY")], "'bad' has two members .npy"),
    "the sample again": ([member("x.npy", npy(latent(3))), member("good.npy", npy(latent(3)))], "sample 'good', which"),
    "pickle": ([member("bad.npy", npy(np.array([Code()], dtype=object)))], "sample 'bad': its .npy"),
    "a header that claims more": ([member("bad.npy", CLAIM)], "sample 'bad': its .npy"),
    "no npy": ([member("bad.npy", b"hello")], "sample 'bad': its .npy"),
    "no latent": ([member("bad.json", b"{}")], "sample 'bad' has no .npy, only .json"),
    "another ending": ([member("bad.latent.npy", npy(latent(3)))], "sample 'bad' has no .npy, only .latent.npy"),
    "JSON cut": ([member("bad.json", b"{"), member("bad.npy", npy(latent(3)))], "sample 'bad' has a .json"),
    "JSON deep": ([member("bad.json", b"[" * 99999), member("bad.npy", npy(latent(3)))], "sample 'bad' has a .json"),
    "JSON a list": ([member("bad.json", b"[]"), member("bad.npy", npy(latent(3)))], "sample 'bad' has a .json"),
    "JSON bytes": ([member("bad.json", b"\xff"), member("bad.npy", npy(latent(3)))], "sample 'bad' has a .json"),
    "text bytes": ([member("bad.txt", b"\xff"), member("bad.npy", npy(latent(3)))], "sample 'bad' has a .json or .txt"),
    "a mask too long": ([member("bad.json", b'{"padding_mask": [1, 1, 1, 1]}'), member("bad.npy", npy(latent(3)))], "'bad'"),
    "two in a batch": ([member("bad.npy", npy(np.zeros((2, 4, 3), np.float32)))], "shape [2, 4, 3]"),
    "NaN": ([member("bad.npy", npy(np.full((4, 3), np.nan, np.float32)))], "NaN"),
    "integers": ([member("bad.npy", npy(np.zeros((4, 3), np.int32)))], "int32"),
    "a huge JSON": ([member("bad.json", bytes((16 << 20) + 1))], "'bad.json' is said to take 16777217 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("members", "says"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_bad_member_is_refused_by_tar_and_sample(tmp_path, monkeypatch, members, says, workers):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tars").mkdir()
    pack(tmp_path / "tars" / "b.tar", [*(member(*x) for x in GOOD.items()), *members])
    with pytest.raises(UserError) as caught:
        ingest_webdataset(tmp_path / "tars", tmp_path / "set", workers=workers)
    message = str(caught.value)
    assert says in message and "b.tar" in message and "\n" not in message
    assert not (tmp_path / "set" / "manifest.parquet").exists() and not (tmp_path / "executed").exists()


def test_a_name_that_is_no_unicode_is_refused_by_name(tmp_path):
    pack(
        tmp_path / "a.tar",
        [member(b"\xff.npy".decode("utf-8", "surrogateescape"), npy(latent(3)))],
        format=tarfile.GNU_FORMAT,
    )
    with pytest.raises(UserError, match="Unicode"):
        ingest_webdataset(tmp_path / "a.tar", tmp_path / "set")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path, mode):
    rng = np.random.default_rng(0)
    pack(tmp_path / "whole.tar", {f"{i}.npy": npy(rng.normal(size=(4, 60))) for i in range(3)}, mode)
    data = (tmp_path / "whole.tar").read_bytes()
    # A plain tar is whole once one block of zeros ends it.
    end = len(data) - 1
    if mode == "w":
        end = data.rindex(b"2.npy\0") + 512 + 2048
        assert not any(data[end:])
    for size in sorted({*range(0, end, 509), *range(0, end, 512), end}):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"the tar .*cut\.tar cannot be read"):
            list(module.read_samples(tmp_path / "cut.tar", lambda key: False))


@pytest.mark.parametrize("seed", range(60))
def test_a_tar_with_flipped_bytes_never_raises_anything_else(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pack(
        tmp_path / "a.tar",
        {**GOOD, "b.npy": npy(latent(3)), "c.json": b"{}", "c.npy": npy(latent(3))},
        "w:gz" if seed % 4 == 0 else "w",
    )
    data = bytearray((tmp_path / "a.tar").read_bytes())
    for position in (
        rng.integers(0, len(data), 3) if seed % 2 else 512 * rng.integers(0, 8, 3) + rng.integers(0, 500, 3)
    ):
        data[position % len(data)] ^= 1 << int(rng.integers(8))
    (tmp_path / "a.tar").write_bytes(data)
    try:
        ingest_webdataset(tmp_path / "a.tar", tmp_path / "set")
    except UserError as error:
        assert "\n" not in str(error)


def claims(size: int, **fields) -> bytes:
    info, _ = member("bad.npy", b"", size=size)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


LIES = {
    "a huge latent": (claims(1 << 40), "'bad.npy' is said to take 1099511627776 bytes"),
    "more than there is": (claims(1 << 20) + bytes(2048), "cut short|unexpected end"),
    "a negative size": (claims(-1), "said to take -1 bytes"),
    "a very negative size": (claims(-(1 << 40)), "said to take -1099511627776 bytes"),
    "a huge member that is not read": (claims(1 << 50, name="bad.wav"), "cut short, or a member is not"),
    "a long name of 1 TB": (claims(1 << 40, type=tarfile.GNUTYPE_LONGNAME), "the name of a member is said to take"),
    "a long link of 2 MB": (claims(2 << 20, type=tarfile.GNUTYPE_LONGLINK), "the name of a member is said to take"),
    "a pax header of 1 TB": (claims(1 << 40, type=tarfile.XHDTYPE), "the name of a member is said to take"),
    "a global pax header of 1 TB": (claims(1 << 40, type=tarfile.XGLTYPE), "the name of a member is said to take"),
    "an old sparse file": (claims(512, type=tarfile.GNUTYPE_SPARSE), "'bad.npy' is a sparse file"),
    "random bytes": (np.random.default_rng(3).bytes(1024), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path, data, says):
    pack(tmp_path / "a.tar", GOOD)
    good = (tmp_path / "a.tar").read_bytes()
    end = good.rindex(b"a good one") // 512 * 512 + 512
    (tmp_path / "b.tar").write_bytes(good[:end] + data + bytes(1024))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"the tar .*b\.tar cannot be read.*({says})"):
        list(module.read_samples(tmp_path / "b.tar", lambda key: False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "headers", [{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "bad.npy"}, {"size": "-1"},
                {"size": "1099511627776"}, {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}],
)  # fmt: skip
def test_pax_headers_that_lie_are_refused(tmp_path, headers):
    info, data = member("bad.npy", npy(latent(3)))
    info.pax_headers = headers
    pack(tmp_path / "b.tar", [(info, data)], format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match=r"the tar .*b\.tar cannot be read"):
        list(module.read_samples(tmp_path / "b.tar", lambda key: False))


@pytest.mark.parametrize("name", ["bad.npy", "bad.json", "bad.wav"])
def test_a_bomb_takes_no_memory(tmp_path, name):
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = 200 << 20
        with open("/dev/zero", "rb") as zeros:
            tar.addfile(info, zeros)
    tracemalloc.start()
    if name == "bad.npy":  # within the limit of a latent, but no array
        module._LIMITS, limits = {**module._LIMITS, "npy": 1 << 20}, module._LIMITS
    try:
        with pytest.raises(UserError, match="b.tar|no .npy"):
            ingest_webdataset(tmp_path / "b.tar", tmp_path / "set")
    finally:
        if name == "bad.npy":
            module._LIMITS = limits
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x1f\x8b\x08\x00 no gzip", b"BZh9 no", b"\xfd7zXZ no", bytes(100)]
)
def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path, data):
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.tar"):
        ingest_webdataset(tmp_path / "bad.tar", tmp_path / "set")


def test_an_empty_folder_is_refused_by_name(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no tars"):
        ingest_webdataset(tmp_path / "none", tmp_path / "set")
    with pytest.raises(UserError, match="nowhere holds no tars"):
        ingest_webdataset(tmp_path / "nowhere", tmp_path / "set")
    pack(tmp_path / "empty.tar", {})
    with pytest.raises(UserError, match="no track was written"):
        ingest_webdataset(tmp_path / "empty.tar", tmp_path / "set")
