"""A shard is a safetensors file that any reader can read, and a header that lies is refused before it is used."""

import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents.check import verify
from attr_engine.latents.errors import DamagedHeader, ManifestMismatch, ReadError
from attr_engine.latents.header import MAX_HEADER, open_file, parse_header, read_header
from attr_engine.latents.shardfile import Track, read_contents, write_shard

SHARD = "shard-00000.safetensors"
READERS = ("native", "python") if native.available() else ("python",)


@pytest.fixture
def rich(tmp_path):
    """A shard of bfloat16 latents with conditioning of every kind: (path, latents, conditioning)."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(3, n, generator=generator).to(torch.bfloat16) for n in (5, 1, 4)]
    rows = [
        {"clap": torch.randn(7, generator=generator), "tokens": torch.arange(k), "t5": torch.ones(k, 2).half(),
         "mask": torch.arange(k) % 2 == 0, "offsets": torch.full((2,), i, dtype=torch.uint8)}
        for i, k in enumerate((3, 0, 2))
    ]  # fmt: skip
    writer = LatentWriter(tmp_path / "set")
    for i, (latent, row) in enumerate(zip(latents, rows, strict=True)):
        writer.add(f"t{i}", latent, row, {})
    writer.close()
    return tmp_path / "set" / SHARD, latents, rows


# -- stock readers --------------------------------------------------------------------------------


def test_stock_safetensors_reads_latents_and_conditioning(rich):
    path, latents, rows = rich
    tensors = safetensors.torch.load_file(path)
    assert tensors["latents"].dtype == torch.bfloat16 and tensors["latents"].shape == (10, 3)
    assert torch.equal(tensors["latents"], torch.cat([x.T for x in latents]))
    assert tensors["offsets"].tolist() == [0, 5, 6, 10]
    assert tensors["conditioning.clap"].shape == (3, 7)
    for name in rows[0]:
        packed, offsets = tensors[f"conditioning.{name}"].flatten(), tensors[f"conditioning.{name}.offsets"]
        width = packed.numel() // int(offsets[-1])
        for i, row in enumerate(rows):
            assert torch.equal(
                packed[int(offsets[i]) * width : int(offsets[i + 1]) * width], row[name].flatten()
            )
    assert [row[0] for row in json.loads(bytes(tensors["tracks"].numpy()))] == ["t0", "t1", "t2"]


def test_stock_safetensors_reads_the_shards_with_numpy(write, tmp_path):
    latents = write(tmp_path / "set", np.float16, shard_bytes=100)
    tracks = []
    for shard in sorted((tmp_path / "set").glob("*.safetensors")):
        tensors = safetensors.numpy.load_file(shard)
        assert tensors["offsets"].dtype == np.int64 and tensors["crc32c"].dtype == np.uint32
        found = np.split(tensors["latents"], tensors["offsets"][1:-1])
        assert [native.crc32c(np.ascontiguousarray(x)) for x in found] == tensors["crc32c"].tolist()
        with safe_open(shard, framework="np") as file:
            assert np.array_equal(file.get_slice("latents")[: len(found[0])], found[0])
        tracks += found
    assert all(np.array_equal(a.T, b) for a, b in zip(tracks, latents, strict=True))


def test_the_data_start_at_a_multiple_of_4096_and_tensors_are_aligned_to_their_items(rich):
    fd, size = open_file(rich[0])
    with open(fd, "rb"):
        entries, data, _ = read_header(fd, size)
    assert data % 4096 == 0
    sizes = {"I64": 8, "F32": 4, "U32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}
    assert all(entry.begin % sizes[entry.dtype] == 0 for entry in entries.values())
    assert {entry.dtype for entry in entries.values()} == set(sizes)


def test_the_manifest_holds_the_checksums_of_the_frames(write, tmp_path):
    latents = write(tmp_path / "set")
    recorded = pq.read_table(tmp_path / "set" / "manifest.parquet").column("crc32c").to_pylist()
    assert recorded == [native.crc32c(np.ascontiguousarray(x.T).tobytes()) for x in latents]


def test_a_shard_says_of_itself_what_was_written(rich):
    contents = read_contents(rich[0])
    assert (contents.dtype, contents.channels, [row[0] for row in contents.rows]) == (
        "BF16",
        3,
        ["t0", "t1", "t2"],
    )
    assert contents.fields == {"clap": ("F32", ()), "tokens": ("I64", ()), "t5": ("F16", (2,)), "mask": ("BOOL", ()),
                               "offsets": ("U8", ())}  # fmt: skip
    assert contents.offsets["t5"].tolist() == [0, 3, 3, 5]


# -- headers --------------------------------------------------------------------------------------

HEADERS = {
    "nothing": b"",
    "text": b"hello, this is no JSON",
    "not UTF-8": b"\xff\xfe\x00",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a space in front": b" {}",
    "an empty object": b"{}",
    "a list": b"[]",
    "a number": b"17",
    "null": b"null",
    "two objects": b"{}{}",
    "deep nesting": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep metadata": b'{"__metadata__":' * 100_000,
    "a huge number": b'{"latents": {"dtype": "F32", "shape": ['
    + b"9" * 5000
    + b', 4], "data_offsets": [0, 488]}}',
    "no latents": {"offsets": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}},
    "latents twice": b'{"latents": {}, "latents": {}}',
    "latents as text": {"latents": "F32"},
    "metadata of numbers": {"__metadata__": {"attr_engine": 1}},
    "metadata a list": {"__metadata__": []},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_of_garbage_is_refused_by_name(folder, shard, lie, rewrite_header, refused, header):
    rewrite_header(header)
    lie(lambda columns, meta: meta["shards"][0].__setitem__(1, shard.stat().st_size))
    refused(folder, DamagedHeader, SHARD)


ENTRIES = {
    "negative begin": lambda b, e: {"data_offsets": [-8, e]},
    "minus zero": lambda b, e: {"shape": [27, 4, -0.0]},
    "negative end": lambda b, e: {"data_offsets": [b, -e]},
    "end before begin": lambda b, e: {"data_offsets": [e, b]},
    "end past the file": lambda b, e: {"data_offsets": [b, 2**62]},
    "overflowing end": lambda b, e: {"data_offsets": [b, 2**64 + e]},
    "overflowing begin and end": lambda b, e: {"data_offsets": [2**64 + b, 2**64 + e]},
    "offsets of three": lambda b, e: {"data_offsets": [b, e, e]},
    "offsets of none": lambda b, e: {"data_offsets": []},
    "offsets that overlap": lambda b, e: {"data_offsets": [b - 8, e - 8]},
    "offsets with a hole": lambda b, e: {"data_offsets": [b + 8, e + 8]},
    "fractional offset": lambda b, e: {"data_offsets": [float(b), float(e)]},
    "true as offset": lambda b, e: {"data_offsets": [True, e]},
    "offset NaN": lambda b, e: {"data_offsets": [b, float("nan")]},
    "infinite shape": lambda b, e: {"shape": [float("inf"), 4]},
    "negative shape": lambda b, e: {"shape": [-27, -4]},
    "overflowing shape": lambda b, e: {"shape": [2**61 + 27, 4]},
    "shape that overflows to the right size": lambda b, e: {"shape": [2**62 + 27, 4]},
    "huge shape": lambda b, e: {"shape": [2**62, 2**62]},
    "huge empty shape": lambda b, e: {"shape": [2**62, 2**62, 0]},
    "shape of nine": lambda b, e: {"shape": [27, 4, *[1] * 7]},
    "shape as text": lambda b, e: {"shape": "ab"},
    "no shape": lambda b, e: {"shape": None},
    "dtype of another size": lambda b, e: {"dtype": "F16"},
    "dtype BF16": lambda b, e: {"dtype": "BF16"},
    "dtype unknown": lambda b, e: {"dtype": "X99"},
    "dtype a list": lambda b, e: {"dtype": ["F32"]},
    "more than belongs there": lambda b, e: {"more": 1},
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_header_that_lies_about_the_latents_is_refused_by_name(folder, rewrite_header, refused, entry):
    def change(header):
        return {**header, "latents": {**header["latents"], **entry(*header["latents"]["data_offsets"])}}

    rewrite_header(change)
    refused(folder, DamagedHeader, SHARD)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "I32"}, {"shape": [12, 9]}, {"shape": [108]}, {"shape": [4, 27]}, {"shape": [27, 2, 2]}],
    ids=str,
)
def test_a_header_that_is_valid_but_not_the_recorded_one_does_no_harm_and_is_found(
    folder, rewrite_header, refused, everything, change
):
    whole = everything(folder)
    rewrite_header(lambda header: {**header, "latents": {**header["latents"], **change}})
    if "dtype" in change:
        refused(folder, ManifestMismatch, SHARD, "I32, not F32")
    else:  # the same bytes at the same place
        assert everything(folder) == whole
    assert verify(folder).harmful


def test_a_name_that_is_spelled_with_an_escape_is_refused(folder, shard, refused):
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"latents":', b'"l\\u0061tents":').replace(b"     ", b"", 1))
    refused(folder, DamagedHeader, SHARD, "escape")


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8])
def test_an_oversized_header_length_is_refused_without_reading_it(folder, shard, refused, length):
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    refused(folder, DamagedHeader, SHARD)


def test_a_header_over_the_cap_is_refused_though_the_file_has_it(folder, shard, lie, refused):
    text = b"{}".ljust(MAX_HEADER + 1)
    shard.write_bytes(struct.pack("<Q", len(text)) + text)
    lie(lambda columns, meta: meta["shards"][0].__setitem__(1, shard.stat().st_size))
    refused(folder, DamagedHeader, SHARD, "its length is given as")


def test_no_flip_of_a_header_byte_changes_what_is_read(folder, shard, everything):
    data, whole = shard.read_bytes(), everything(folder)
    text_end = data.index(b"}}    ") + 10
    for position in (*range(0, text_end, 2), 4095):
        for reader in READERS:
            damaged = bytearray(data)
            damaged[position] ^= 1 << position // 2 % 8
            shard.write_bytes(damaged)
            try:
                assert everything(folder, reader) == whole
            except UserError as error:
                assert SHARD in str(error)


@given(junk=st.binary(max_size=200), keep=st.integers(0, 5200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_in_a_shard_never_crash_a_reader(write, everything, tmp_path_factory, junk, keep):
    folder = tmp_path_factory.getbasetemp() / "junk"
    if not (folder / "kept").exists():
        write(folder)
        (folder / SHARD).rename(folder / "kept")
    data = (folder / "kept").read_bytes()
    (folder / SHARD).write_bytes((data[:keep] + junk + data[keep + len(junk) :])[: len(data)])
    for reader in READERS:
        try:
            everything(folder, reader)
        except UserError as error:
            assert SHARD in str(error)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_the_parser_of_headers_raises_nothing_but_what_it_promises(text):
    for candidate in (text, b"{" + text, b'{"__metadata__":{"' + text):
        try:
            parse_header(candidate, 0)
        except ValueError:
            pass


# -- shards that describe themselves wrongly, with checksums that are right ---------------------------


def tracks_of(*offsets_of_clap):
    return [
        Track(f"t{i}", torch.ones(2, 4), {"clap": torch.ones(rows, 2)}, "{}", "{}")
        for i, rows in enumerate(offsets_of_clap)
    ]


def test_conditioning_or_info_that_is_no_object_is_refused(tmp_path):
    for text in ("[]", "null", "[" * 100_000 + "]" * 100_000, '"x"', "{"):
        track = Track("a", torch.ones(2, 4), {}, "{}", text)
        write_shard(tmp_path / SHARD, [track], {"padding": None, "extra": {}})
        with pytest.raises(ReadError) as caught:
            read_contents(tmp_path / SHARD)
        assert caught.value.kind == "header"


def test_a_list_of_tracks_that_would_fill_memory_is_refused(tmp_path):
    size = 2**40
    header = {"latents": ("F32", [0, 4], 0, 0), "tracks": ("U8", [size], 0, size)}
    entries = {k: {"dtype": d, "shape": s, "data_offsets": [b, e]} for k, (d, s, b, e) in header.items()}
    text = json.dumps(entries).encode()
    with open(tmp_path / SHARD, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + size)  # takes no room on the disk
        except OSError:
            pytest.skip("the file system has no files of a terabyte")
    with pytest.raises(ReadError, match="are allowed") as caught:
        read_contents(tmp_path / SHARD)
    assert caught.value.kind == "header"
    assert [x.kind for x in verify(tmp_path).harmful] == ["DatasetError", "DamagedHeader"]


def test_a_shard_of_a_later_format_is_refused_as_such(tmp_path):
    write_shard(tmp_path / SHARD, tracks_of(1, 2), {"format": "attr_engine.latents/3"})
    with pytest.raises(ReadError, match="latents/3") as caught:
        read_contents(tmp_path / SHARD)
    assert caught.value.kind == "newer"


@pytest.mark.parametrize(
    "offsets",
    [
        [1, 1, 3],
        [0, 4, 3],
        [0, 1, 4],
        [0, 1],
        [0, 1, 2, 3],
        [0, -1, 3],
        [-1, 1, 3],
        [0, 2**62, 3],
        [0, 2**63 - 1, -(2**63)],
    ],
    ids=str,
)
def test_offsets_that_do_not_rise_to_the_number_of_rows_are_refused(tmp_path, monkeypatch, offsets):
    from attr_engine.latents import shardfile

    real = np.cumsum

    def cumsum(values, dtype):
        return np.array(offsets, dtype=dtype) if len(values) == 3 else real(values, dtype=dtype)

    monkeypatch.setattr(shardfile.np, "cumsum", cumsum)
    write_shard(tmp_path / SHARD, tracks_of(1, 2), {"padding": None, "extra": {}})
    monkeypatch.undo()
    with pytest.raises(ReadError, match="offsets") as caught:
        read_contents(tmp_path / SHARD)
    assert caught.value.kind == "header"


def test_a_data_set_of_a_shard_that_was_swapped_for_a_valid_one_is_found(folder, shard, refused):
    data = LatentDataset(folder)
    tracks = [
        Track(x, torch.zeros(n, 4), {}, "{}", "{}")
        for x, n in zip(data.ids, data.lengths.tolist(), strict=True)
    ]
    write_shard(shard, tracks, {"padding": [0.0, 1.0, 2.0, 3.0], "extra": {}})
    assert "TruncatedShard" in {finding.kind for finding in verify(folder).harmful}
    with pytest.raises(UserError, match=SHARD):
        LatentDataset(folder).batch([0], 10)
