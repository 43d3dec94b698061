"""Verifying finds every byte that is not as it was written; repairing keeps every track that is whole."""

import json
import os
import re

import numpy as np
import pytest
import torch

from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, check
from attr_engine.latents.check import info, repair, verify
from attr_engine.latents.errors import DatasetError, MissingShard, NewerFormat
from attr_engine.latents.manifest import MANIFEST, Manifest
from attr_engine.latents.shardfile import Track, write_shard

SHARD = "shard-00000.safetensors"


@pytest.fixture
def rich(tmp_path):
    """Six tracks with conditioning of every kind in three shards."""
    writer = LatentWriter(tmp_path / "rich", shard_bytes=1, padding=np.ones(4), extra={"rate": 1})
    rng = np.random.default_rng(0)
    for i, n in enumerate((5, 1, 9, 3, 7, 2)):
        clap, t5, mask = (
            rng.normal(size=3).astype(np.float32),
            rng.normal(size=(i % 3, 2)),
            rng.random(i) < 0.5,
        )
        values = {"tempo": i, "clap": clap, "t5": t5, "mask": mask}
        latent = rng.normal(size=(4, n)).astype(np.float16)
        writer.add(f"t{i}", latent, values, {"title": f"piece {i}"}, more=i % 2 == 0)
    writer.close()
    assert len(check.shard_files(tmp_path / "rich")) == 3
    return tmp_path / "rich"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tracks_of(everything, folder):
    """All that is known of each track, by id."""
    ids, infos, values, _, _, lengths, _, latents, conditioning = everything(folder)
    return {name: row for name, *row in zip(ids, infos, values, lengths, latents, conditioning, strict=True)}


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def payload(path, folder, track):
    """The byte of a shard at which the latent of a track begins."""
    data = LatentDataset(folder)
    latent = data.batch([data.ids.index(track)], 10).latents[0, :, : data.lengths[data.ids.index(track)]]
    return path.read_bytes().index(latent.T.contiguous().numpy().tobytes())


# -- verify ---------------------------------------------------------------------------------------


def test_a_whole_data_set_has_no_findings(rich):
    told = []
    verdict = verify(rich, lambda done, total: told.append((done, total)))
    assert verdict.findings == verdict.harmful == []
    assert (verdict.shards, verdict.tracks) == (3, 6) and told == [(1, 3), (2, 3), (3, 3)]
    assert verdict.bytes == sum(path.stat().st_size for path in rich.glob("*.safetensors"))
    assert json.loads(verdict.to_json())["findings"] == []


def test_every_flip_of_every_byte_of_a_shard_is_found(rich):
    manifest, path = Manifest(rich / MANIFEST), rich / "shard-00001.safetensors"
    data = path.read_bytes()
    spaces = data.index(b"}}     ") + 2
    for position in (*range(spaces), *range(spaces, 4096, 9), *range(4096, len(data))):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        found = check._verify_shard(rich, path.name, manifest).findings
        assert found and all(finding.file == path.name for finding in found), position
        assert all("\n" not in finding.sentence and path.name in finding.sentence for finding in found)
        if position % 50 == 0:
            assert verify(rich).harmful == found
    path.write_bytes(data)
    assert verify(rich).findings == []


def test_every_flip_of_a_byte_that_matters_is_found_without_a_manifest(folder, shard):
    (folder / MANIFEST).unlink()
    data = shard.read_bytes()
    spaces = range(data.index(b"}}     ") + 2, 4096)
    for position in (*range(spaces.start), *spaces[::9], *range(4096, len(data))):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        shard.write_bytes(damaged)
        found = check._verify_shard(folder, SHARD, None).findings
        assert found or (position in spaces and chr(damaged[position]).isspace()), position


def test_a_shard_cut_at_every_length_is_found(folder, shard):
    manifest, data = Manifest(folder / MANIFEST), shard.read_bytes()
    for size in reversed(range(len(data))):
        os.truncate(shard, size)
        (found,) = check._verify_shard(folder, SHARD, manifest).findings
        assert (found.kind, found.file, found.row) == ("TruncatedShard", SHARD, -1)
        assert f"it has {size} bytes, {len(data)} were recorded" in found.sentence
    assert verify(folder).harmful[0].kind == "TruncatedShard"


def test_the_damaged_track_is_named(rich):
    flip(rich / "shard-00001.safetensors", payload(rich / "shard-00001.safetensors", rich, "t3"))
    (found,) = verify(rich).harmful
    assert (found.kind, found.file, found.track) == ("ChecksumMismatch", "shard-00001.safetensors", "t3")
    assert "track 't3'" in found.sentence and "shards repair --drop" in found.sentence


def test_everything_that_is_bad_is_found(rich):
    first = rich / SHARD
    for place in [payload(first, rich, track) for track in ("t0", "t1")]:
        flip(first, place)
    (rich / "shard-00001.safetensors").unlink()
    os.truncate(rich / "shard-00002.safetensors", 100)
    assert [(x.kind, x.file[6:11], x.track) for x in verify(rich).harmful] == [
        ("ChecksumMismatch", "00000", "t0"), ("ChecksumMismatch", "00000", "t1"), ("MissingShard", "00001", ""),
        ("TruncatedShard", "00002", ""),
    ]  # fmt: skip


def test_what_harms_no_reader_is_a_note(rich):
    (rich / "shard-00007.safetensors").write_bytes(b"x")
    (rich / "shard-00008.safetensors.part").write_bytes(b"x")
    (rich / "readme.txt").write_bytes(b"x")
    verdict = verify(rich)
    assert verdict.harmful == []
    assert [x.file for x in verdict.findings] == ["shard-00007.safetensors", "shard-00008.safetensors.part"]


def test_without_a_manifest_the_shards_are_verified(rich):
    (rich / MANIFEST).unlink()
    verdict = verify(rich)
    assert [x.file for x in verdict.harmful] == [MANIFEST] and verdict.tracks == 6
    flip(rich / "shard-00001.safetensors", -1)
    assert [x.file for x in verify(rich).harmful] == [MANIFEST, "shard-00001.safetensors"]


@pytest.mark.parametrize("act", [info, verify, repair])
def test_where_nothing_is_that_is_told(tmp_path, act):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=re.escape(str(folder))):
            act(folder)


def test_what_a_data_set_holds(rich):
    found = info(rich)
    assert (found["tracks"], found["frames"], found["shortest"], found["longest"]) == (6, 27, 1, 9)
    assert (found["channels"], found["dtype"], found["shards"], found["extra"]) == (4, "F16", 3, {"rate": 1})
    assert found["conditioning tensors"] == {"clap": ["F32", []], "mask": ["BOOL", []], "t5": ["F64", [2]]}
    assert json.loads(json.dumps(found))["fingerprint"] == LatentDataset(rich).fingerprint


# -- repair ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [None, os.unlink, lambda path: flip(path, 700), lambda path: os.truncate(path, 50)]
)
def test_a_manifest_is_made_again_as_it_was(rich, damage):
    before, fingerprint = files_of(rich), LatentDataset(rich).fingerprint
    if damage is not None:
        damage(rich / MANIFEST)
    (sentence,) = repair(rich)
    assert sentence == f"{rich / MANIFEST} was made from 3 shards: 6 tracks"
    after = files_of(rich)
    after.pop(f"{MANIFEST}.old", None)
    assert after == before and LatentDataset(rich).fingerprint == fingerprint


DAMAGE = {
    "a flipped bit": (lambda path, at: flip(path, at), {"t3"}),
    "a cut shard": (lambda path, at: os.truncate(path, at), {"t2", "t3"}),
    "a missing shard": (lambda path, at: path.unlink(), {"t2", "t3"}),
    "a flip in the header": (lambda path, at: flip(path, 30), {"t2", "t3"}),
    "a flip in the list of tracks": (lambda path, at: flip(path, -3), {"t2", "t3"}),
    "zeros": (lambda path, at: path.write_bytes(bytes(path.stat().st_size)), {"t2", "t3"}),
    "a folder": (lambda path, at: (path.unlink(), path.mkdir()), {"t2", "t3"}),
    "a fifo": (lambda path, at: (path.unlink(), os.mkfifo(path)), {"t2", "t3"}),
    "a link": (lambda path, at: (path.unlink(), path.symlink_to("/etc/hostname")), {"t2", "t3"}),
}


@pytest.mark.parametrize("keep_manifest", [True, False])
@pytest.mark.parametrize(("damage", "lost"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_left_out_when_that_is_asked_for_and_only_then(
    rich, everything, damage, lost, keep_manifest
):
    whole, path = tracks_of(everything, rich), rich / "shard-00001.safetensors"
    if not keep_manifest and not path.is_file():
        return
    damage(path, payload(path, rich, "t3"))
    if not keep_manifest:
        (rich / MANIFEST).unlink()
    before = {x.name: x.read_bytes() for x in rich.iterdir() if x.is_file()}
    if keep_manifest or path.is_file() or path.is_symlink() or path.exists():
        with pytest.raises(UserError, match=r"shard-00001.*--drop") as caught:
            repair(rich)
        assert "\n" not in str(caught.value)
        assert {x.name: x.read_bytes() for x in rich.iterdir() if x.is_file()} == before
    done = repair(rich, drop=True)
    assert any("left out" in sentence for sentence in done) or (not keep_manifest and not path.exists())
    kept = tracks_of(everything, rich)
    assert kept == {name: row for name, row in whole.items() if name not in lost}
    assert verify(rich).harmful == []
    assert {x.name: x.read_bytes() for x in rich.glob("*.safetensors") if x.is_file()} == {
        name: data for name, data in before.items() if name.endswith("rs")
    }
    again = files_of_readable(rich)
    repair(rich)  # what was left out stays left out
    assert files_of_readable(rich) == again


def files_of_readable(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}


def test_the_old_manifest_is_kept(rich):
    old = (rich / MANIFEST).read_bytes()
    flip(rich / "shard-00001.safetensors", payload(rich / "shard-00001.safetensors", rich, "t3"))
    repair(rich, drop=True)
    assert (rich / f"{MANIFEST}.old").read_bytes() == old != (rich / MANIFEST).read_bytes()
    assert LatentDataset(rich).manifest.meta["dropped"] == [["shard-00001.safetensors", 1, "t3"]]


def test_tracks_are_left_out_one_after_the_other(rich, everything):
    whole = tracks_of(everything, rich)
    for lost in (["t3"], ["t3", "t0"], ["t0", "t2", "t3"]):
        path = next(
            x for x in sorted(rich.glob("*.safetensors")) if any(y == x.name for y in place_of(rich, lost))
        )
        flip(path, payload_of_new(rich, path, lost))
        repair(rich, drop=True)
        assert verify(rich).harmful == []
        assert tracks_of(everything, rich) == {name: row for name, row in whole.items() if name not in lost}
    (rich / "shard-00001.safetensors").unlink()
    repair(rich, drop=True)
    assert sorted(tracks_of(everything, rich)) == ["t1", "t4", "t5"]
    assert verify(rich).findings == []


def place_of(folder, lost):
    data = LatentDataset(folder)
    return [data.files[data.reading.shard[data.ids.index(name)]] for name in lost if name in data.ids]


def payload_of_new(folder, path, lost):
    (name,) = [name for name in lost if name in LatentDataset(folder).ids]
    return payload(path, folder, name)


def test_a_set_with_tracks_left_out_can_be_appended_to(rich, everything):
    flip(rich / "shard-00001.safetensors", payload(rich / "shard-00001.safetensors", rich, "t3"))
    os.truncate(rich / "shard-00002.safetensors", 10)
    repair(rich, drop=True)
    before = tracks_of(everything, rich)
    writer = LatentWriter(rich, append=True, padding=np.ones(4), extra={"rate": 1})
    assert writer.has("t2") and not writer.has("t3") and not writer.has("t5")
    tensors = {"clap": np.ones(3, dtype=np.float32), "t5": np.ones((1, 2)), "mask": np.ones(1, dtype=bool)}
    for name in ("t3", "t5"):
        writer.add(name, np.ones((4, 2), dtype=np.float16), tensors, {})
    writer.close()
    after = tracks_of(everything, rich)
    assert list(after) == ["t0", "t1", "t2", "t3", "t5"] and {name: after[name] for name in before} == before
    assert verify(rich).harmful == [] and info(rich)["left out"] == 2
    assert (rich / "shard-00003.safetensors").exists()


def test_shards_that_an_interrupted_append_left_are_taken_in_if_they_are_whole(rich, everything):
    whole = tracks_of(everything, rich)
    (rich / "shard-00005.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="shard-00005.safetensors"):
        repair(rich)
    repair(rich, drop=True)
    assert tracks_of(everything, rich) == whole and verify(rich).harmful == []
    tensors = {
        "clap": torch.ones(3),
        "mask": torch.ones(1, dtype=torch.bool),
        "t5": torch.ones(1, 2).double(),
    }
    meta = {"padding": [1.0] * 4, "extra": {"rate": 1}}
    write_shard(
        rich / "shard-00006.safetensors", [Track("new", torch.ones(2, 4).half(), tensors, "{}", "{}")], meta
    )
    repair(rich)
    assert list(tracks_of(everything, rich)) == [*whole, "new"]


def test_a_shard_of_another_data_set_is_not_taken_in(rich):
    write_shard(
        rich / "shard-00003.safetensors",
        [Track("x", torch.ones(2, 4), {}, "{}", "{}")],
        {"padding": None, "extra": {}},
    )
    before = files_of(rich)
    with pytest.raises(DatasetError, match=r"shard-00003.*another data set"):
        repair(rich)
    assert files_of(rich) == before


def test_an_id_that_stands_in_two_shards_is_not_taken_in(rich):
    (rich / "shard-00003.safetensors").write_bytes((rich / SHARD).read_bytes())
    before = files_of(rich)
    with pytest.raises(UserError, match="'t0' stands twice"):
        repair(rich)
    assert files_of(rich) == before


def test_a_set_of_which_nothing_is_left_is_refused(rich):
    for path in rich.glob("*.safetensors"):
        os.truncate(path, 100)
    before = files_of(rich)
    with pytest.raises(UserError, match="ingest again"):
        repair(rich, drop=True)
    assert files_of(rich) == before


def test_what_interrupted_writers_left_is_removed(rich):
    (rich / "shard-00009.safetensors.part").write_bytes(b"half")
    (rich / "mine.part").write_bytes(b"mine")
    done = repair(rich)
    assert "shard-00009.safetensors.part, left by an interrupted writer, was removed" in done
    assert not (rich / "shard-00009.safetensors.part").exists() and (rich / "mine.part").exists()


def test_a_data_set_that_is_being_written_is_not_repaired(rich):
    writer = LatentWriter(rich, append=True, padding=np.ones(4), extra={"rate": 1})
    with pytest.raises(UserError, match="another process writes"):
        repair(rich)
    writer.release()
    repair(rich)


def test_a_lying_manifest_is_replaced_by_what_the_shards_say(folder, lie, everything):
    whole = everything(folder)
    lie(lambda columns, meta: columns["id"].reverse())
    assert everything(folder) != whole
    repair(folder)
    assert everything(folder) == whole


def test_names_that_are_no_shards_are_told(folder, lie, everything):
    whole = everything(folder)
    lie(lambda columns, meta: meta["shards"].append(["../x", 0, 0, 0]))
    assert any("'../x'" in sentence for sentence in repair(folder))
    assert everything(folder) == whole


def test_a_data_set_of_a_later_version_is_not_touched(folder, lie):
    lie(lambda columns, meta: meta.update(format="attr_engine.latents/3"))
    before = files_of(folder)
    with pytest.raises(NewerFormat, match="newer attr-engine"):
        repair(folder, drop=True)
    assert files_of(folder) == before


def test_a_shard_that_comes_back_is_in_the_set_again(rich, tmp_path, everything):
    whole = tracks_of(everything, rich)
    (rich / "shard-00001.safetensors").rename(tmp_path / "away")
    with pytest.raises(MissingShard):
        LatentDataset(rich)
    (tmp_path / "away").rename(rich / "shard-00001.safetensors")
    assert tracks_of(everything, rich) == whole
