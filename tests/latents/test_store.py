"""A data set gives back what went in, and whatever is damaged or made up is refused by name."""

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native, store

LENGTHS = (5, 1, 9, 3, 7, 2)
FRAMES = 10


def everything(folder: Path) -> tuple:
    """All that a reader can learn from a data set, as something that compares exactly."""
    data = LatentDataset(folder)
    batch = data.batch(range(len(data)), FRAMES)
    return (
        data.ids, data.channels, data.lengths.tolist(), data.info, data.conditioning, data.extra,
        None if data.padding is None else data.padding.tolist(), str(batch.latents.dtype),
        batch.latents.contiguous().numpy().tobytes(), batch.valid.tolist(),
    )  # fmt: skip


def refusal(folder: Path) -> str:
    """The message with which a data set is refused, on opening or on reading."""
    with pytest.raises(UserError) as caught:
        everything(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_was_written_is_read_bit_for_bit(write, tmp_path, dtype, shard_bytes):
    latents = write(tmp_path / "set", dtype, shard_bytes=shard_bytes)
    data = LatentDataset(tmp_path / "set")
    shards = len(list((tmp_path / "set").glob("*.safetensors")))
    assert {1: shards == 6, 100: 1 < shards < 6, 1 << 20: shards == 1}[shard_bytes]
    batch = data.batch(range(6), FRAMES)
    assert batch.latents.shape == (6, 4, FRAMES)
    for i, latent in enumerate(latents):
        got = batch.latents[i, :, : LENGTHS[i]].numpy()
        assert got.dtype == dtype and np.array_equal(got, latent)
        assert not batch.latents[i, :, LENGTHS[i] :].any()
    assert batch.valid.tolist() == data.lengths.tolist() == list(LENGTHS)
    assert batch.mask().sum(dim=1).tolist() == list(LENGTHS)
    assert batch.ids == data.ids == [f"t{i}" for i in range(6)]
    assert [c["seconds_total"] for c in batch.conditioning] == [i + 0.5 for i in range(6)]
    assert [i["title"] for i in data.info] == [f"piece {i}" for i in range(6)]


@given(order=st.lists(st.integers(0, 5), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_repeats_over_shards_are_delivered_in_plan_order(write, tmp_path_factory, order):
    folder = tmp_path_factory.getbasetemp() / "orders"
    if not (folder / store.MANIFEST).exists():
        write(folder, shard_bytes=100)
    data = LatentDataset(folder)
    whole, batch = data.batch(range(6), FRAMES), data.batch(order, FRAMES)
    assert list(batch.ids) == [f"t{i}" for i in order]
    assert torch.equal(batch.latents, whole.latents[order])
    assert torch.equal(batch.valid, whole.valid[order])
    assert list(batch.conditioning) == [whole.conditioning[i] for i in order]


def test_a_batch_of_no_tracks_is_empty(folder):
    assert LatentDataset(folder).batch([], FRAMES).latents.shape == (0, 4, FRAMES)


def test_frames_after_the_end_hold_the_padding(write, tmp_path):
    silence = np.array([0.5, -1.25, 3.0, 0.0])
    write(tmp_path / "set", np.float16, padding=silence)
    data = LatentDataset(tmp_path / "set")
    batch = data.batch([2, 1], FRAMES)
    for row, n in zip(batch.latents, (9, 1), strict=True):
        assert torch.equal(
            row[:, n:], torch.tensor(silence, dtype=torch.float16)[:, None].expand(4, FRAMES - n)
        )
    assert data.padding.tolist() == silence.tolist()


def test_stock_safetensors_reads_the_shards_frame_major(write, tmp_path):
    latents = write(tmp_path / "set", shard_bytes=100)
    tracks = []
    for shard in sorted((tmp_path / "set").glob("*.safetensors")):
        with safe_open(shard, framework="np") as file:
            frames, offsets = file.get_tensor("latents"), file.get_tensor("offsets")
        assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(frames)
        tracks += [frames[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert all(np.array_equal(a.T, b) for a, b in zip(tracks, latents, strict=True))


def test_the_checksum_in_the_manifest_is_the_crc32c_of_the_frames(write, tmp_path):
    latents = write(tmp_path / "set")
    recorded = pq.read_table(tmp_path / "set" / "manifest.parquet").column("crc32c").to_pylist()
    assert recorded == [native.crc32c(np.ascontiguousarray(x.T).tobytes()) for x in latents]


def test_the_fallback_without_the_extension_reads_the_same_bits(write, tmp_path, monkeypatch):
    write(tmp_path / "set", np.float16, shard_bytes=100)
    fast = everything(tmp_path / "set")
    monkeypatch.setattr(native, "_native", None)
    assert everything(tmp_path / "set") == fast


def test_the_fingerprint_changes_with_latents_ids_conditioning_and_padding(tmp_path):
    def fingerprint(name: str, value: float = 1.0, track: str = "a", tempo: int = 1, padding=None) -> str:
        writer = LatentWriter(tmp_path / name, padding=padding)
        writer.add(track, np.full((2, 3), value, dtype=np.float32), {"tempo": tempo}, {})
        writer.close()
        return LatentDataset(tmp_path / name).fingerprint

    first = fingerprint("0")
    assert fingerprint("again") == first
    others = [fingerprint("1", value=1.5), fingerprint("2", track="b"), fingerprint("3", tempo=2)]
    others.append(fingerprint("4", padding=np.ones(2)))
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x1b[31m",
        "a\nb\rc",
        "\u202e\u2028",
        "日本語 🎵",
        "<b>&amp;",
        "../../etc/passwd",
        "'; --",
        "a" * 9999,
    ],
)
def test_ids_and_metadata_are_kept_verbatim(tmp_path, text):
    writer = LatentWriter(tmp_path / "set")
    writer.add(
        text, np.ones((2, 3), dtype=np.float32), {"prompt": text}, {"title": text, text: [text, None, {}]}
    )
    writer.close()
    data = LatentDataset(tmp_path / "set")
    assert data.ids == [text]
    assert data.info == [{"title": text, text: [text, None, {}]}]
    assert data.conditioning == [{"prompt": text}]


# -- what the writer refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "says"),
    [
        (np.zeros(3, dtype=np.float32), "shape"),
        (np.zeros((1, 2, 3), dtype=np.float32), "shape"),
        (np.zeros((4, 0), dtype=np.float32), "empty"),
        (np.zeros((0, 4), dtype=np.float32), "empty"),
        (np.zeros((4, 3), dtype=np.int16), "int16"),
        (np.zeros((4, 3), dtype=np.complex64), "complex64"),
        (np.array([["x"]], dtype=object), "object"),
        (np.full((4, 3), np.nan, dtype=np.float32), "frame 0"),
        (np.array([[0, 0, np.inf]], dtype=np.float16), "frame 2"),
        (np.zeros((5, 3), dtype=np.float32), "5 channels"),
        (np.zeros((4, 3), dtype=np.float16), "float16"),
    ],
)
def test_an_unusable_latent_is_refused_by_its_track(tmp_path, latent, says):
    writer = LatentWriter(tmp_path / "set")
    writer.add("good", np.zeros((4, 3), dtype=np.float32), {}, {})
    with pytest.raises(UserError, match=f"'bad one'.*{says}"):
        writer.add("bad one", latent, {}, {})


@pytest.mark.parametrize(
    ("name", "says"), [("a", "'a' stands twice"), ("", "empty id"), ("\udc80", "Unicode"), (3, "int")]
)
def test_an_unusable_id_is_refused_when_it_is_added(tmp_path, name, says):
    writer = LatentWriter(tmp_path / "set")
    writer.add("a", np.zeros((4, 3), dtype=np.float32), {}, {})
    with pytest.raises(UserError, match=says):
        writer.add(name, np.zeros((4, 3), dtype=np.float32), {}, {})


@pytest.mark.parametrize(
    ("conditioning", "info"),
    [
        ({"tempo": float("nan")}, {}),
        ({"tempo": float("inf")}, {}),
        ({"clap": np.zeros(3)}, {}),
        ({}, {"x": object()}),
    ],
)
def test_conditioning_and_info_that_json_cannot_hold_are_refused_by_track(tmp_path, conditioning, info):
    with pytest.raises(UserError, match="'song'"):
        LatentWriter(tmp_path / "set").add("song", np.zeros((4, 3), dtype=np.float32), conditioning, info)


@pytest.mark.parametrize(
    "padding", [np.zeros(3), np.zeros(5), np.array([0, 0, 0, np.nan]), np.array([0, 0, 0, 1e9])]
)
def test_padding_that_is_no_latent_of_this_set_is_refused(write, tmp_path, padding):
    with pytest.raises(UserError, match="padding"):
        write(tmp_path / "set", padding=padding)
    assert not (tmp_path / "set" / "manifest.parquet").exists()


def test_a_set_of_no_tracks_is_refused(tmp_path):
    with pytest.raises(UserError, match="no track"):
        LatentWriter(tmp_path / "set").close()


def test_a_whole_data_set_is_never_overwritten(folder):
    before = everything(folder)
    with pytest.raises(UserError, match="already holds"):
        LatentWriter(folder)
    assert everything(folder) == before


def test_a_killed_writer_leaves_no_manifest_and_the_next_one_starts_over(write, tmp_path):
    script = (
        "import sys, os, signal, numpy as np; from attr_engine.latents import LatentWriter\n"
        "w = LatentWriter(sys.argv[1], shard_bytes=1)\n"
        "for i in range(9): w.add(f't{i}', np.full((4, 3), i, dtype=np.float32), {}, {})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "set")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "set").glob("*.safetensors"))) == 9
    assert "manifest.parquet" in refusal(tmp_path / "set")
    latents = write(tmp_path / "set")
    assert np.array_equal(LatentDataset(tmp_path / "set").batch([2], 9).latents[0].numpy(), latents[2])


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_writer_that_fails_before_the_rename_leaves_no_manifest(write, tmp_path, monkeypatch, failing):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "set")
    monkeypatch.undo()
    assert "manifest.parquet" in refusal(tmp_path / "set")


# -- damaged shards -------------------------------------------------------------------------------


def test_a_flipped_payload_byte_is_refused_by_its_track_and_the_others_are_read(folder, shard):
    data = bytearray(shard.read_bytes())
    with safe_open(shard, framework="np") as file:
        frames = file.get_tensor("latents").astype(np.float32)
    first = bytes(data).index(frames.tobytes())
    row = 4 * 4
    data[first + row * (5 + 1) + 3] ^= 0x10  # t0 has 5 frames, t1 has 1: this is the first frame of t2
    shard.write_bytes(data)
    opened = LatentDataset(folder)
    for i in (0, 1, 3, 4, 5):
        opened.batch([i], FRAMES)
    with pytest.raises(UserError, match=r"shard-00000.safetensors, track 't2'.*CRC-32C"):
        opened.batch([0, 1, 2, 3], FRAMES)


def test_every_bit_of_the_payload_is_guarded(folder, shard):
    data, whole = shard.read_bytes(), everything(folder)
    with safe_open(shard, framework="np") as file:
        frames = file.get_tensor("latents").tobytes()
    first = data.index(frames)
    for position in range(first, first + len(frames), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        shard.write_bytes(damaged)
        assert "track" in refusal(folder)
    shard.write_bytes(data)
    assert everything(folder) == whole


def test_a_shard_cut_anywhere_is_refused_by_name(folder, shard):
    data = shard.read_bytes()
    for size in range(len(data)):
        shard.write_bytes(data[:size])
        assert "shard-00000.safetensors" in refusal(folder)


def test_a_shard_that_becomes_shorter_after_it_was_opened_is_refused_and_kills_nobody(folder, shard):
    opened = LatentDataset(folder)
    os.truncate(shard, shard.stat().st_size - 4)
    opened.batch([0], FRAMES)
    with pytest.raises(UserError, match=r"shard-00000.safetensors, track 't5'"):
        opened.batch([0, 5], FRAMES)


def test_bytes_after_the_end_of_a_shard_are_refused(folder, shard):
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert "shard-00000.safetensors" in refusal(folder)


def test_a_missing_shard_is_refused_by_name(write, tmp_path):
    write(tmp_path / "set", shard_bytes=100)
    (tmp_path / "set" / "shard-00001.safetensors").unlink()
    assert "shard-00001.safetensors is missing" in refusal(tmp_path / "set")


def test_a_folder_in_place_of_a_shard_is_refused_by_name(folder, shard):
    shard.unlink()
    shard.mkdir()
    assert "shard-00000.safetensors" in refusal(folder)


def test_shards_in_each_others_place_are_refused(write, tmp_path):
    write(tmp_path / "set", shard_bytes=1)
    a, b = (tmp_path / "set" / f"shard-0000{i}.safetensors" for i in (0, 2))
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    refusal(tmp_path / "set")


HEADERS = {
    "nothing": b"",
    "text": b"hello, this is no JSON",
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"17",
    "null": b"null",
    "deep nesting": b"[" * 100_000,
    "a huge number": b'{"latents": {"dtype": "F32", "shape": ['
    + b"9" * 5000
    + b', 4], "data_offsets": [0, 488]}}',
    "no latents": {"offsets": {"dtype": "I64", "shape": [1], "data_offsets": [0, 488]}},
    "latents twice": b'{"latents": {}, "latents": {}}',
    "latents as text": {"latents": "F32"},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_of_garbage_is_refused_by_name(folder, rewrite_header, header):
    rewrite_header(header)
    assert "shard-00000.safetensors" in refusal(folder)


# In the shard of the fixture the offsets take the bytes 0 to 56 and the latents 56 to 488.
ENTRIES = {
    "negative begin": {"data_offsets": [-8, 488]},
    "negative end": {"data_offsets": [56, -488]},
    "end before begin": {"data_offsets": [488, 56]},
    "end past the file": {"data_offsets": [56, 2**62]},
    "overflowing end": {"data_offsets": [56, 2**64 + 488]},
    "overflowing begin and end": {"data_offsets": [2**64 + 56, 2**64 + 488]},
    "offsets of three": {"data_offsets": [56, 488, 488]},
    "offsets of none": {"data_offsets": []},
    "fractional offset": {"data_offsets": [56.0, 488.0]},
    "true as offset": {"data_offsets": [True, 488]},
    "offset NaN": {"data_offsets": [56, float("nan")]},
    "infinite shape": {"shape": [float("inf"), 4]},
    "negative shape": {"shape": [-27, -4]},
    "overflowing shape": {"shape": [2**61 + 27, 4]},
    "huge shape": {"shape": [2**62, 2**62]},
    "flat shape": {"shape": [108]},
    "shape of three": {"shape": [27, 4, 1]},
    "one channel": {"shape": [108, 1]},
    "transposed": {"shape": [4, 27]},
    "shape as text": {"shape": "ab"},
    "no shape": {"shape": None},
    "dtype of another size": {"dtype": "F16"},
    "dtype of integers": {"dtype": "I32"},
    "dtype BF16": {"dtype": "BF16"},
    "dtype unknown": {"dtype": "X99"},
    "dtype a list": {"dtype": ["F32"]},
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_header_that_lies_about_the_latents_is_refused_by_name(folder, rewrite_header, entry):
    rewrite_header(lambda header: {**header, "latents": {**header["latents"], **entry}})
    assert "shard-00000.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "offsets",
    [[0, 64], [0, 48], [8, 56], [56, 488]],
    ids=["overlap", "hole", "hole at the start", "the same bytes"],
)
def test_tensors_that_overlap_or_leave_holes_are_refused(folder, rewrite_header, offsets):
    rewrite_header(lambda header: {**header, "offsets": {**header["offsets"], "data_offsets": offsets}})
    assert "shard-00000.safetensors" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8])
def test_an_oversized_header_length_is_refused_without_reading_it(folder, shard, length):
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    assert "shard-00000.safetensors" in refusal(folder)


def test_every_flip_of_a_header_byte_is_refused_or_changes_nothing(folder, shard):
    data, whole = shard.read_bytes(), everything(folder)
    (length,) = struct.unpack("<Q", data[:8])
    for position in range(8 + length):
        for bit in (1, 0x20, 0x80):
            damaged = bytearray(data)
            damaged[position] ^= bit
            shard.write_bytes(damaged)
            try:
                assert everything(folder) == whole
            except UserError as error:
                assert "shard-00000.safetensors" in str(error)


@given(junk=st.binary(max_size=200), keep=st.integers(0, 1200))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_in_a_shard_never_crash_the_reader(write, tmp_path_factory, junk, keep):
    folder = tmp_path_factory.getbasetemp() / "junk"
    if not (folder / "kept").exists():
        write(folder)
        (folder / "shard-00000.safetensors").rename(folder / "kept")
    data = (folder / "kept").read_bytes()
    (folder / "shard-00000.safetensors").write_bytes(data[:keep] + junk + data[keep + len(junk) :])
    try:
        everything(folder)
    except UserError as error:
        assert "shard-00000.safetensors" in str(error)


# -- manifests that lie ---------------------------------------------------------------------------


def put(column, row, value):
    return lambda columns, meta: columns[column].__setitem__(row, value)


LIES = {
    "start out of range": (put("start", 5, 26), "'t5'"),
    "start negative": (put("start", 0, -1), "start"),
    "start huge": (put("start", 3, 2**63 - 1), "start"),
    "start of another track": (put("start", 3, 0), "'t3'"),
    "frames out of range": (put("frames", 5, 3), "'t5'"),
    "frames zero": (put("frames", 2, 0), "'t2'"),
    "frames negative": (put("frames", 2, -9), "frames"),
    "frames huge": (put("frames", 2, 2**61), "'t2'"),
    "start and frames that overflow together": (
        lambda columns, meta: (put("start", 1, 2**61)(columns, meta), put("frames", 1, 2**61)(columns, meta)),
        "'t1'",
    ),
    "shard missing": (put("shard", 4, 1), "shard-00001"),
    "shard negative": (put("shard", 4, -1), "shard"),
    "other checksum": (put("crc32c", 4, 17), "'t4'"),
    "checksum too wide": (put("crc32c", 4, 2**32), "crc32c"),
    "id twice": (put("id", 4, "t0"), "'t0' stands twice"),
    "id empty": (put("id", 4, ""), "empty id"),
    "id null": (put("id", 4, None), "id"),
    "frames null": (put("frames", 4, None), "frames"),
    "frames as fractions": (lambda c, m: c.update(frames=[float(x) for x in c["frames"]]), "frames"),
    "shards as text": (lambda c, m: c.update(shard=["0"] * 6), "shard"),
    "ids as numbers": (lambda c, m: c.update(id=list(range(6))), "id"),
    "conditioning no JSON": (put("conditioning", 0, "{"), "manifest.parquet"),
    "conditioning a list": (put("conditioning", 0, "[]"), "manifest.parquet"),
    "conditioning deep": (put("conditioning", 0, "[" * 100_000), "manifest.parquet"),
    "info null": (put("info", 0, "null"), "manifest.parquet"),
    "no column": (lambda c, m: c.pop("crc32c"), "crc32c"),
    "other format": (lambda c, m: m.update(format="attr_engine.latents/2"), "attr_engine.latents/2"),
    "no format": (lambda c, m: m.pop("format"), "format"),
    "other channels": (lambda c, m: m.update(channels=5, padding=None), "shard-00000"),
    "no channels": (lambda c, m: m.update(channels=0, padding=None), "manifest.parquet"),
    "channels as text": (lambda c, m: m.update(channels="4"), "manifest.parquet"),
    "channels missing": (lambda c, m: m.pop("channels"), "channels"),
    "padding too long": (lambda c, m: m.update(padding=[0.0] * 5), "padding"),
    "padding NaN": (lambda c, m: m.update(padding=[float("nan")] * 4), "padding"),
    "padding text": (lambda c, m: m.update(padding="abcd"), "padding"),
    "padding of text": (lambda c, m: m.update(padding=list("abcd")), "padding"),
    "extra a list": (lambda c, m: m.update(extra=[1]), "manifest.parquet"),
    "more than belongs there": (lambda c, m: m.update(more=1), "manifest.parquet"),
}


@pytest.mark.parametrize(("change", "names"), LIES.values(), ids=LIES)
def test_a_manifest_that_lies_is_refused_by_track_or_file(folder, lie, change, names):
    lie(change)
    assert names in refusal(folder)


@pytest.mark.parametrize(
    "change", [{"padding": [0.0, 1.0, 2.0, 4.0]}, {"extra": {"root": "/"}}, {"crc32c": 0}]
)
def test_metadata_that_do_not_match_their_checksum_are_refused(folder, change):
    path = folder / "manifest.parquet"
    table = pq.read_table(path)
    meta = {**json.loads(table.schema.metadata[b"attr_engine"]), **change}
    pq.write_table(table.replace_schema_metadata({"attr_engine": json.dumps(meta)}), path)
    assert "manifest.parquet" in refusal(folder)


def test_a_manifest_without_rows_is_an_empty_set_that_models_refuse(folder, lie):
    lie(lambda columns, meta: [column.clear() for column in columns.values()])
    refusal(folder)


def test_a_manifest_without_our_metadata_is_refused_by_name(folder):
    pq.write_table(pa.table({"id": ["a"]}), folder / "manifest.parquet")
    assert "manifest.parquet" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 9, b"hello", os.urandom(2000)])
def test_a_manifest_of_garbage_is_refused_by_name(folder, content):
    (folder / "manifest.parquet").write_bytes(content)
    assert "manifest.parquet" in refusal(folder)


def test_a_flip_of_a_manifest_byte_is_refused_or_changes_nothing(folder, rng):
    path = folder / "manifest.parquet"
    data, whole = path.read_bytes(), everything(folder)
    silent = []
    for position in range(int(rng.integers(5)), len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            if everything(folder) != whole:
                silent.append(position)
        except UserError as error:
            assert "\n" not in str(error)
    assert silent == []


def test_a_manifest_cut_anywhere_is_refused_by_name(folder):
    path = folder / "manifest.parquet"
    data = path.read_bytes()
    for size in range(0, len(data), 13):
        path.write_bytes(data[:size])
        assert "manifest.parquet" in refusal(folder)


# -- no code in data ------------------------------------------------------------------------------


def test_nothing_that_a_data_set_holds_is_unpickled(folder, shard, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    everything(folder)
    shard.write_bytes(pickle.dumps({"latents": [1, 2]}))
    refusal(folder)


def test_a_track_longer_than_the_batch_is_refused_by_name(folder):
    with pytest.raises(UserError, match="'t2' has 9 frames"):
        LatentDataset(folder).batch([0, 2], 8)


def test_json_in_the_manifest_is_plain(folder):
    table = pq.read_table(folder / "manifest.parquet")
    assert json.loads(table.schema.metadata[b"attr_engine"])["format"] == store.FORMAT
    assert json.loads(table.column("info")[0].as_py()) == {"title": "piece 0"}
