"""A manifest that is damaged or lies is refused before anything is read from where it points."""

import json
import os

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents.build import seal
from attr_engine.latents.check import verify
from attr_engine.latents.errors import (
    ChecksumMismatch,
    DamagedManifest,
    DatasetError,
    ManifestMismatch,
    NewerFormat,
    OutsideFolder,
    TruncatedShard,
)
from attr_engine.latents.manifest import MANIFEST, Manifest


def put(column, row, value):
    return lambda columns, meta: columns[column].__setitem__(row, value)


def both(*changes):
    return lambda columns, meta: [change(columns, meta) for change in changes]


def shard(index, value):
    return lambda columns, meta: meta["shards"][0].__setitem__(index, value)


def meta(**values):
    return lambda columns, meta: meta.update(values)


def pop(column):
    return lambda columns, meta: columns.pop(column)


def drop_row(row):
    return lambda columns, meta: [values.pop(row) for values in columns.values()]


# Lies that every reader refuses: (change, exception, what its message names).
LIES = {
    "start out of range": (put("start", 5, 26), ManifestMismatch, "'t5'"),
    "start in another track": (put("start", 3, 0), ChecksumMismatch, "'t3'"),
    "start negative": (put("start", 0, -1), ManifestMismatch, "'t0'"),
    "start past the shard": (put("start", 3, 400), ManifestMismatch, "'t3'"),
    "start huge": (put("start", 3, 2**63 - 1), ManifestMismatch, "'t3'"),
    "frames past the tensor": (put("frames", 5, 3), ManifestMismatch, "'t5'"),
    "frames too few": (put("frames", 2, 8), ChecksumMismatch, "'t2'"),
    "frames negative": (put("frames", 2, -9), ManifestMismatch, "'t2'"),
    "frames huge": (put("frames", 2, 2**61), ManifestMismatch, "'t2'"),
    "start and frames that overflow": (both(put("start", 1, 2**62), put("frames", 1, 2**62)), ManifestMismatch, "'t1'"),
    "start and frames that overflow to 0": (
        both(put("start", 1, 2**63 - 1), put("frames", 1, 1)), ManifestMismatch, "'t1'",
    ),
    "other checksum": (put("crc32c", 4, 17), ChecksumMismatch, "'t4'"),
    "checksum too wide": (put("crc32c", 4, 2**32), DamagedManifest, "crc32c"),
    "shard not listed": (put("shard", 4, 1), ManifestMismatch, "not listed"),
    "shard negative": (put("shard", 4, -1), ManifestMismatch, "not listed"),
    "row twice": (put("row", 4, 3), DamagedManifest, "order"),
    "row negative": (put("row", 0, -1), DamagedManifest, "order"),
    "row past the shard": (put("row", 5, 6), DamagedManifest, "order"),
    "a track is not listed": (drop_row(2), DamagedManifest, "every track"),
    "no tracks": (lambda c, m: [column.clear() for column in c.values()], DamagedManifest, "every track"),
    "a track is said to be left out": (meta(dropped=[["shard-00000.safetensors", 2, "t2"]]), DamagedManifest, "every"),
    "another track is left out": (
        both(drop_row(2), meta(dropped=[["shard-00000.safetensors", 3, "t3"]])), DamagedManifest, "left out is listed",
    ),
    "id twice": (put("id", 4, "t0"), DamagedManifest, "'t0' stands twice"),
    "id empty": (put("id", 4, ""), DamagedManifest, "empty id"),
    "id null": (put("id", 4, None), DamagedManifest, "id"),
    "frames null": (put("frames", 4, None), DamagedManifest, "frames"),
    "frames as fractions": (lambda c, m: c.update(frames=[x + 0.5 for x in c["frames"]]), DamagedManifest, "frames"),
    "shards as text": (lambda c, m: c.update(shard=["x"] * 6), DamagedManifest, "shard"),
    "ids as numbers": (lambda c, m: c.update(id=list(range(6))), DamagedManifest, "id"),
    "conditioning no JSON": (put("conditioning", 0, "{"), DamagedManifest, MANIFEST),
    "conditioning a list": (put("conditioning", 0, "[]"), DamagedManifest, MANIFEST),
    "conditioning deep": (put("conditioning", 0, "[" * 100_000), DamagedManifest, MANIFEST),
    "info null": (put("info", 0, "null"), DamagedManifest, MANIFEST),
    "info deep": (put("info", 0, '{"a":' * 100_000 + "1" + "}" * 100_000), DamagedManifest, MANIFEST),
    "info of a huge number": (put("info", 0, '{"a":' + "9" * 5000 + "}"), DamagedManifest, MANIFEST),
    **{f"no {name}": (pop(name), DamagedManifest, name)
       for name in ("shard", "row", "start", "frames", "crc32c", "id", "conditioning", "info")},
    "a later format": (meta(format="attr_engine.latents/3"), NewerFormat, "install a newer"),
    "a far later format": (meta(format="attr_engine.latents/999999"), NewerFormat, "install a newer"),
    "the format before": (meta(format="attr_engine.latents/1"), DatasetError, "ingest again"),
    "another format": (meta(format="attr_engine.latents/" + "9" * 5000), DatasetError, "ingest again"),
    "a format that is no text": (meta(format=[2]), DatasetError, "ingest again"),
    "no format": (lambda c, m: m.pop("format"), DatasetError, "ingest again"),
    "channels missing": (lambda c, m: m.pop("channels"), DamagedManifest, MANIFEST),
    "other channels": (meta(channels=5, padding=None), ManifestMismatch, "shard-00000"),
    "half as many channels": (meta(channels=2, padding=None), ChecksumMismatch, "'t0'"),
    "no channels": (meta(channels=0, padding=None), DamagedManifest, MANIFEST),
    "channels as text": (meta(channels="4"), DamagedManifest, MANIFEST),
    "2^31 channels": (meta(channels=2**31, padding=None), ManifestMismatch, "'t0'"),
    "2^70 channels": (meta(channels=2**70, padding=None), ManifestMismatch, "'t0'"),
    "other dtype": (meta(dtype="F16"), ManifestMismatch, "shard-00000"),
    "dtype of numbers": (meta(dtype="I32"), DamagedManifest, "dtype"),
    "dtype a list": (meta(dtype=["F32"]), DamagedManifest, MANIFEST),
    "padding too long": (meta(padding=[0.0] * 5), DamagedManifest, "padding"),
    "padding NaN": (meta(padding=[float("nan")] * 4), DamagedManifest, "padding"),
    "padding text": (meta(padding="abcd"), DamagedManifest, "padding"),
    "padding of text": (meta(padding=list("abcd")), DamagedManifest, "padding"),
    "padding of lists": (meta(padding=[[1], [1, 2]]), DamagedManifest, "padding"),
    "extra a list": (meta(extra=[1]), DamagedManifest, MANIFEST),
    "fields a list": (meta(fields=[1]), DamagedManifest, MANIFEST),
    "a field without columns": (meta(fields={"clap": ["F32", [4]]}), DamagedManifest, "clap"),
    "a field of another dtype": (meta(fields={"clap": ["C64", [4]]}), DamagedManifest, "clap"),
    "a field with a hostile name": (meta(fields={"../clap": ["F32", [4]]}), DamagedManifest, "clap"),
    "a field of huge rows": (meta(fields={"clap": ["F32", [2**31 - 1] * 3]}), DamagedManifest, "clap"),
    "a field of rows that overflow": (meta(fields={"clap": ["F32", [2**32, 2**32]]}), DamagedManifest, "clap"),
    "a field of no items": (meta(fields={"clap": ["F32", [0]]}), DamagedManifest, "clap"),
    "a field of many axes": (meta(fields={"clap": ["F32", [1] * 9]}), DamagedManifest, "clap"),
    "a field of true": (meta(fields={"clap": ["F32", [True]]}), DamagedManifest, "clap"),
    "shards a number": (meta(shards=7), DamagedManifest, MANIFEST),
    "shards of too little": (meta(shards=[["shard-00000.safetensors", 1, 1]]), DamagedManifest, MANIFEST),
    "no shards": (meta(shards=[]), DamagedManifest, MANIFEST),
    "a shard twice": (lambda c, m: m["shards"].append([*m["shards"][0][:2], 0, 0]), ManifestMismatch, "listed twice"),
    "shard name a number": (shard(0, 7), DamagedManifest, MANIFEST),
    "shard too small": (shard(1, 4000), ManifestMismatch, "shard-00000"),
    "shard too large": (shard(1, 2**40), TruncatedShard, "shard-00000"),
    "shard of 2^64 bytes": (shard(1, 2**64), DamagedManifest, MANIFEST),
    "shard of too many tracks": (shard(2, 7), DamagedManifest, "every track"),
    "shard of 2^40 tracks": (shard(2, 2**40), DamagedManifest, MANIFEST),
    "shard of a negative number of tracks": (shard(2, -6), DamagedManifest, MANIFEST),
    "path upwards": (shard(0, "../shard-00000.safetensors"), OutsideFolder, "do not use it"),
    "path below": (shard(0, "x/shard-00000.safetensors"), OutsideFolder, "do not use it"),
    "absolute path": (shard(0, "/etc/passwd"), OutsideFolder, "'/etc/passwd'"),
    "path with a null": (shard(0, "shard-00000.safetensors\0"), OutsideFolder, "do not use it"),
    "path with a newline": (shard(0, "shard-00000.safetensors\n"), OutsideFolder, "do not use it"),
    "path of other digits": (shard(0, "shard-٠٠٠٠٠.safetensors"), OutsideFolder, "do not use it"),
    "dropped a number": (meta(dropped=3), DamagedManifest, MANIFEST),
    "dropped of numbers": (meta(dropped=[1]), DamagedManifest, MANIFEST),
    "dropped of another shard": (meta(dropped=[["x", 2, "t2"]]), DamagedManifest, "left out"),
    "dropped past the shard": (meta(dropped=[["shard-00000.safetensors", 6, "t6"]]), DamagedManifest, "left out"),
    "a listed shard left out": (meta(dropped=[["shard-00000.safetensors", -1, ""]]), DamagedManifest, "left out"),
    "dropped twice": (
        both(drop_row(2), drop_row(2), meta(dropped=[["shard-00000.safetensors", 2, "t2"]] * 2)),
        DamagedManifest, "twice",
    ),
    "more than belongs there": (meta(more=1), DamagedManifest, MANIFEST),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "names"), LIES.values(), ids=LIES)
def test_a_manifest_that_lies_is_refused_by_track_or_file(folder, lie, refused, change, kind, names):
    lie(change)
    refused(folder, kind, names)
    assert verify(folder).harmful


# Lies that no reader can see without reading the list of tracks in the shard; verify does.
QUIET = {
    "no frames": (both(put("frames", 2, 0), put("crc32c", 2, 0)), "place, length or checksum"),
    "other ids": (lambda c, m: c["id"].reverse(), "another track at its place"),
    "other conditioning": (put("conditioning", 2, '{"seconds_total": 9.5}'), "conditioning or info"),
    "other info": (put("info", 3, '{"title": "stolen"}'), "conditioning or info"),
    "other header": (shard(3, 17), "header"),
    "other extra": (meta(extra={"rate": 1}), "extra"),
    "other padding": (meta(padding=[0.0, 1.0, 2.0, 4.0]), "padding"),
    "a shard of nothing": (
        lambda c, m: m["shards"].append(["shard-00001.safetensors", 0, 0, 0]), "shard-00001.safetensors is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), QUIET.values(), ids=QUIET)
def test_a_manifest_that_says_other_things_than_its_shards_is_found(folder, lie, change, says):
    assert verify(folder).findings == []
    lie(change)
    found = verify(folder).harmful
    assert found and all(says in finding.sentence for finding in found)


TENSOR_LIES = {
    "start negative": (put("t5.start", 3, -1), ManifestMismatch, "'t3'"),
    "start past the shard": (put("t5.start", 3, 2**63 - 1), ManifestMismatch, "'t3'"),
    "rows negative": (put("t5.rows", 0, -1), ManifestMismatch, "'t0'"),
    "rows huge": (put("t5.rows", 2, 2**62), ManifestMismatch, "'t2'"),
    "rows past the tensor": (put("t5.rows", 5, 6), ManifestMismatch, "'t5'"),
    "rows too few": (put("t5.rows", 5, 4), ChecksumMismatch, "'t5'"),
    "none where some are": (put("t5.rows", 5, 0), ChecksumMismatch, "'t5'"),
    "other checksum": (put("t5.crc32c", 4, 17), ChecksumMismatch, "'t4'"),
    "no column": (lambda c, m: c.pop("t5.crc32c"), DamagedManifest, "t5.crc32c"),
    "other dtype": (lambda c, m: m["fields"].update(t5=["F32", [2]]), ManifestMismatch, "conditioning.t5"),
    "wider rows": (lambda c, m: m["fields"].update(t5=["F64", [7]]), ManifestMismatch, "conditioning.t5"),
    "narrower rows": (lambda c, m: m["fields"].update(t5=["F64", []]), ChecksumMismatch, "'t1'"),
    "another tensor": (lambda c, m: m["fields"].update(x=["F64", [2]]), DamagedManifest, "x.start"),
}


@pytest.mark.parametrize(("change", "kind", "names"), TENSOR_LIES.values(), ids=TENSOR_LIES)
def test_lies_about_conditioning_tensors_are_refused_by_track_or_file(
    folder, lie, refused, change, kind, names
):
    for path in folder.iterdir():
        path.unlink()
    writer = LatentWriter(folder)
    for i in range(6):
        writer.add(f"t{i}", np.ones((4, 3), dtype=np.float32), {"t5": np.ones((i, 2))}, {})
    writer.close()
    lie(change)
    refused(folder, kind, names)
    assert verify(folder).harmful


def test_no_numbers_in_a_manifest_make_a_reader_do_anything_but_refuse(folder, lie, rng):
    numbers = [
        -(2**63),
        -(2**32),
        -1,
        0,
        1,
        3,
        26,
        27,
        28,
        400,
        2**31 - 1,
        2**31,
        2**32,
        2**40,
        2**61,
        2**62,
        2**63 - 1,
    ]
    original = (folder / MANIFEST).read_bytes()
    readers = [("python", "pread"), *([("native", "pread"), ("native", "map")] if native.available() else [])]
    for _ in range(120):
        (folder / MANIFEST).write_bytes(original)
        changes = [
            put(
                str(rng.choice(["start", "frames", "start", "frames", "shard", "row"])),
                rng.integers(6),
                numbers[i],
            )
            for i in rng.integers(len(numbers), size=rng.integers(1, 4))
        ]
        lie(both(*changes))
        kinds = set()
        for reader, source in readers:
            try:
                for batch in LatentDataset(folder).stream(2, reader=reader, source=source, checksums=False):
                    assert batch.latents.shape[2] <= 27 and batch.latents.isfinite().all()
                kinds.add(None)
            except DatasetError as error:
                kinds.add((type(error), str(error)))
        assert len(kinds) == 1, kinds


# -- damage ---------------------------------------------------------------------------------------


def test_every_flip_of_every_byte_of_a_manifest_is_refused_by_name(folder):
    path = folder / MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=MANIFEST) as caught:
            Manifest(path)
        assert "\n" not in str(caught.value) and type(caught.value) in (
            DamagedManifest,
            DatasetError,
            NewerFormat,
        )
    path.write_bytes(data)
    assert len(LatentDataset(folder)) == 6


def test_a_manifest_cut_anywhere_is_refused_by_name(folder):
    path = folder / MANIFEST
    data = path.read_bytes()
    for size in range(len(data)):
        os.truncate(path, len(data) - size - 1)
        with pytest.raises(DamagedManifest, match=MANIFEST):
            Manifest(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 9, b"hello", b"\xff\xff\xff\x7fPAR1" * 3, None])
def test_a_manifest_of_garbage_is_refused_by_name(folder, refused, rng, content):
    (folder / MANIFEST).write_bytes(rng.bytes(2000) if content is None else content)
    refused(folder, DamagedManifest, MANIFEST, "attr-engine shards repair")


@pytest.mark.parametrize(
    "change", [{"padding": [0.0, 1.0, 2.0, 4.0]}, {"extra": {"root": "/"}}, {"crc32c": 0}], ids=str
)
def test_metadata_that_do_not_match_their_checksum_are_refused(folder, refused, change):
    path = folder / MANIFEST
    table = pq.read_table(path)
    values = {**json.loads(table.schema.metadata[b"attr_engine"]), **change}
    pq.write_table(table.replace_schema_metadata({"attr_engine": json.dumps(values)}), path)
    seal(path)
    refused(folder, DamagedManifest, MANIFEST, "checksum")


def test_a_manifest_that_another_program_wrote_again_is_refused(folder, refused):
    pq.write_table(pq.read_table(folder / MANIFEST), folder / MANIFEST)
    refused(folder, DamagedManifest, "its bytes do not match their checksum")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "", "[" * 100_000, '{"a":' * 100_000, "\0"], ids=lambda x: x[:4]
)
def test_metadata_of_garbage_are_refused_by_name(folder, text):
    path = folder / MANIFEST
    pq.write_table(pq.read_table(path).replace_schema_metadata({"attr_engine": text}), path)
    seal(path)
    with pytest.raises(DatasetError, match=MANIFEST):
        LatentDataset(folder)


def test_a_manifest_without_our_metadata_is_refused_by_name(folder, refused):
    pq.write_table(pa.table({"id": ["a"]}), folder / MANIFEST)
    refused(folder, DamagedManifest, MANIFEST)


def test_without_a_manifest_the_message_says_how_to_get_one(folder, refused, tmp_path):
    (folder / MANIFEST).unlink()
    refused(folder, DatasetError, "manifest.parquet is missing", "attr-engine shards repair")
    refused(tmp_path / "nowhere", DatasetError, "attr-engine ingest")
    (folder / MANIFEST).mkdir()
    refused(folder, DatasetError, "manifest.parquet is missing")


# -- stock readers --------------------------------------------------------------------------------


def test_pandas_and_pyarrow_read_the_manifest(write, tmp_path):
    write(tmp_path / "set", shard_bytes=100)
    frame = pandas.read_parquet(tmp_path / "set" / MANIFEST)
    assert frame["id"].tolist() == [f"t{i}" for i in range(6)]
    assert frame["frames"].tolist() == [5, 1, 9, 3, 7, 2]
    assert [json.loads(x)["title"] for x in frame["info"]] == [f"piece {i}" for i in range(6)]
    table = pq.read_table(tmp_path / "set" / MANIFEST, page_checksum_verification=True)
    assert table.column_names == ["id", "shard", "row", "start", "frames", "crc32c", "conditioning", "info"]
    assert pa.types.is_uint32(table.schema.field("crc32c").type)


def test_texts_of_some_rows_are_those_of_all_rows(write, tmp_path):
    write(tmp_path / "set", shard_bytes=100)
    manifest = Manifest(tmp_path / "set" / MANIFEST)
    whole = manifest.texts("info")
    assert manifest._file.num_row_groups > 1
    for first in range(7):
        for last in range(first, 7):
            assert manifest.texts("info", first, last) == whole[first:last]


def test_messages_of_a_hostile_manifest_are_one_line(folder, lie):
    lie(lambda c, m: both(put("id", 2, "a\nb\x1b[2J"), put("frames", 2, 999))(c, m))
    with pytest.raises(UserError) as caught:
        LatentDataset(folder)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
