"""A data set gives back what went in, in any order, in memory of the reader's own."""

import json
import os
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, native
from attr_engine.latents.manifest import MANIFEST

LENGTHS = (5, 1, 9, 3, 7, 2)
FRAMES = 10


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


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    latents = [torch.randn(4, n).to(torch.bfloat16) for n in LENGTHS]
    writer = LatentWriter(tmp_path / "set", shard_bytes=100)
    for i, latent in enumerate(latents):
        writer.add(f"t{i}", latent, {}, {})
    writer.close()
    data = LatentDataset(tmp_path / "set")
    batch = data.batch(range(6), FRAMES)
    assert data.dtype == batch.latents.dtype == torch.bfloat16
    for got, latent in zip(batch.latents, latents, strict=True):
        assert torch.equal(got[:, : latent.shape[1]], latent)


@given(order=st.lists(st.integers(0, 5), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_repeats_over_shards_are_delivered_in_plan_order(write, tmp_path_factory, order):
    folder = tmp_path_factory.getbasetemp() / "orders"
    if not (folder / MANIFEST).exists():
        write(folder, shard_bytes=100)
    data = LatentDataset(folder)
    whole, batch = data.batch(range(6), FRAMES), data.batch(order, FRAMES)
    assert list(batch.ids) == [f"t{i}" for i in order]
    assert torch.equal(batch.latents, whole.latents[order])
    assert torch.equal(batch.valid, whole.valid[order])
    assert list(batch.conditioning) == [whole.conditioning[i] for i in order]


def test_a_batch_of_no_tracks_is_empty(folder):
    assert LatentDataset(folder).batch([], FRAMES).latents.shape == (0, 4, FRAMES)


def test_a_track_longer_than_the_batch_is_refused_by_name(folder):
    with pytest.raises(UserError, match="'t2' has 9 frames"):
        LatentDataset(folder).batch([0, 2], 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_frames_after_the_end_hold_the_padding(write, tmp_path, dtype):
    silence = np.array([0.5, -1.25, 3.0, 0.0])
    write(tmp_path / "set", dtype, padding=silence)
    data = LatentDataset(tmp_path / "set")
    batch = data.batch([2, 1], FRAMES)
    for row, n in zip(batch.latents, (9, 1), strict=True):
        assert torch.equal(row[:, n:], torch.tensor(silence).to(row.dtype)[:, None].expand(4, FRAMES - n))
    assert data.padding.tolist() == silence.tolist()


def test_a_batch_shares_no_memory_with_later_ones(folder):
    data = LatentDataset(folder)
    first = data.batch([0], FRAMES)
    kept = first.latents.clone()
    data.batch([1], FRAMES).latents.zero_()
    assert torch.equal(first.latents, kept)


def test_without_the_extension_the_same_bits_are_read(write, tmp_path, everything, monkeypatch):
    write(tmp_path / "set", np.float16, shard_bytes=100, padding=np.ones(4))
    fast, batch = everything(tmp_path / "set"), LatentDataset(tmp_path / "set").batch([5, 0], FRAMES)
    monkeypatch.setattr(native, "_native", None)
    with pytest.warns(UserWarning, match="not installed"):
        assert everything(tmp_path / "set") == fast
    assert torch.equal(LatentDataset(tmp_path / "set").batch([5, 0], FRAMES).latents, batch.latents)


def test_the_fingerprint_changes_with_latents_ids_conditioning_and_padding(tmp_path):
    def fingerprint(name, value=1.0, track="a", conditioning=None, padding=None):
        writer = LatentWriter(tmp_path / name, padding=padding)
        writer.add(track, np.full((2, 3), value, dtype=np.float32), conditioning or {"tempo": 1}, {})
        writer.close()
        return LatentDataset(tmp_path / name).fingerprint

    first = fingerprint("0")
    assert fingerprint("again") == first
    others = [
        fingerprint("1", value=1.5),
        fingerprint("2", track="b"),
        fingerprint("3", conditioning={"tempo": 2}),
        fingerprint("4", padding=np.ones(2)),
        fingerprint("5", conditioning={"tempo": 1, "clap": np.zeros(3)}),
        fingerprint("6", conditioning={"tempo": 1, "clap": np.ones(3)}),
    ]
    assert len({first, *others}) == 7


def test_what_is_open_stays_the_data_set_that_was_opened(write, tmp_path):
    write(tmp_path / "set")
    opened = LatentDataset(tmp_path / "set")
    expected = LatentDataset(tmp_path / "set").fingerprint
    writer = LatentWriter(tmp_path / "set", append=True)
    writer.add("more", np.ones((4, 2), dtype=np.float32), {}, {})
    writer.close()
    assert opened.fingerprint == expected != LatentDataset(tmp_path / "set").fingerprint
    assert len(opened.ids) == len(opened.info) == len(opened) == 6
    (tmp_path / "set" / MANIFEST).unlink()
    assert len(opened.conditioning) == 6 and opened.batch([5], FRAMES).ids == ["t5"]


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
        '"\\',
        "a" * 9999,
    ],
)
def test_ids_and_metadata_are_kept_verbatim(tmp_path, text):
    writer = LatentWriter(tmp_path / "set", extra={text: text})
    info = {"title": text, text: [text, None, {}]}
    writer.add(text, np.ones((2, 3), dtype=np.float32), {"prompt": text}, info)
    writer.close()
    data = LatentDataset(tmp_path / "set")
    assert data.ids == [text]
    assert data.info == [info]
    assert data.conditioning == [{"prompt": text}]
    assert data.extra == {text: text}


def test_a_surrogate_in_the_metadata_is_kept(tmp_path):
    writer = LatentWriter(tmp_path / "set")
    writer.add("a", np.ones((2, 3), dtype=np.float32), {}, {"path": "\udc80.wav"})
    writer.close()
    assert LatentDataset(tmp_path / "set").info == [{"path": "\udc80.wav"}]


def test_a_data_set_travels_to_another_process(folder):
    data = LatentDataset(folder)
    assert torch.equal(
        pickle.loads(pickle.dumps(data)).batch([3], FRAMES).latents, data.batch([3], FRAMES).latents
    )


def test_every_number_of_a_set_of_one_frame_is_kept(tmp_path):
    writer = LatentWriter(tmp_path / "set")
    writer.add("a", np.array([[-0.0]], dtype=np.float32), {}, {})
    writer.close()
    batch = LatentDataset(tmp_path / "set").batch([0], 1)
    assert np.signbit(batch.latents.numpy()).all()


# -- leaving a shard out --------------------------------------------------------------------------


def test_a_shard_is_left_out_by_name_and_its_tracks_are_told(write, tmp_path):
    latents = write(tmp_path / "set", shard_bytes=1)
    whole = LatentDataset(tmp_path / "set")
    (tmp_path / "set" / "shard-00002.safetensors").unlink()
    part = LatentDataset(tmp_path / "set", exclude=["shard-00002.safetensors", "shard-00004.safetensors"])
    assert (part.ids, part.excluded, whole.excluded) == (["t0", "t1", "t3", "t5"], ["t2", "t4"], [])
    assert part.lengths.tolist() == [5, 1, 3, 2] and len(part) == 4
    assert [x["title"] for x in part.info] == ["piece 0", "piece 1", "piece 3", "piece 5"]
    batch = part.batch([2, 3], FRAMES)
    assert batch.ids == ["t3", "t5"] and np.array_equal(batch.latents[0, :, :3].numpy(), latents[3])
    assert batch.conditioning[1] == {"seconds_total": 5.5}
    again = LatentDataset(
        tmp_path / "set", exclude=["shard-00004.safetensors", "shard-00002.safetensors"] * 2
    )
    assert part.fingerprint == again.fingerprint != whole.fingerprint
    assert pickle.loads(pickle.dumps(part)).ids == part.ids


def test_a_shard_that_is_not_there_cannot_be_left_out(folder):
    with pytest.raises(UserError, match="no shard 'shard-00007.safetensors' to leave out"):
        LatentDataset(folder, exclude=["shard-00007.safetensors"])


# -- no code in data ------------------------------------------------------------------------------


def test_nothing_that_a_data_set_holds_is_unpickled(folder, shard, everything, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    everything(folder)
    shard.write_bytes(pickle.dumps({"latents": [1, 2]}))
    with pytest.raises(UserError):
        everything(folder)


def test_the_manifest_is_plain_parquet_and_json(folder):
    table = pq.read_table(folder / MANIFEST)
    assert json.loads(table.schema.metadata[b"attr_engine"])["format"] == "attr_engine.latents/2"
    assert json.loads(table.column("info")[0].as_py()) == {"title": "piece 0"}
    assert os.path.getsize(folder / MANIFEST) < 20_000
