"""``attr-engine shards``: what it prints is for people or programs, and never what a data set would like it to print."""

import json
import os

import numpy as np
import pytest

from attr_engine.cli import main
from attr_engine.latents import LatentDataset, LatentWriter


@pytest.fixture
def folder(tmp_path):
    """Four tracks in two shards, whose names and texts would move the cursor of a terminal."""
    writer = LatentWriter(tmp_path / "set", shard_bytes=1, extra={"title": "\x1b[2J\n\u202e"})
    for i in range(4):
        latent = np.full((3, i + 1), i, dtype=np.float32)
        writer.add(
            f"t{i}\x1b]0;x\x07\n\u202e", latent, {"clap": np.ones(2)}, {"title": "\x1b[1m"}, more=i % 2 == 0
        )
    writer.close()
    return tmp_path / "set"


def call(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    capsys.readouterr()
    code = main(["shards", *map(str, arguments)])
    out = capsys.readouterr()
    text = out.out + out.err
    assert "Traceback" not in text and all(c.isprintable() or c in "\n\r" for c in text), text
    return code, out.out, out.err


def damage(folder, name="shard-00001.safetensors"):
    path = folder / name
    data = bytearray(path.read_bytes())
    position = bytes(data).index(np.full((3, 3), 2, dtype=np.float32).tobytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_info_is_a_table_or_json(folder, capsys):
    code, out, err = call(capsys, "info", folder)
    assert (code, err) == (0, "") and LatentDataset(folder).fingerprint in out
    assert len(out.splitlines()) == len(json.loads(call(capsys, "info", folder, "--json")[1]))
    found = json.loads(call(capsys, "info", folder, "--json")[1])
    assert (found["tracks"], found["shards"], found["extra"]["title"]) == (4, 2, "\x1b[2J\n\u202e")


def test_verify_of_a_whole_set_says_so(folder, capsys):
    code, out, _ = call(capsys, "verify", folder)
    assert code == 0 and "4 tracks in 2 shards" in out and "every byte" in out
    code, out, _ = call(capsys, "verify", folder, "--json")
    assert code == 0 and json.loads(out)["findings"] == []


def test_verify_of_a_damaged_set_names_what_is_damaged(folder, capsys):
    damage(folder)
    os.truncate(folder / "shard-00000.safetensors", 100)
    code, out, err = call(capsys, "verify", folder)
    assert code == 2 and len(out.splitlines()) == 2
    assert (
        "TruncatedShard: shard-00000.safetensors" in out
        and "ChecksumMismatch: shard-00001.safetensors" in out
    )
    assert "track 't2" in out and err.splitlines()[-1].startswith(f"attr-engine: {folder}: 2 ")
    code, out, _ = call(capsys, "verify", folder, "--json")
    kinds = {(x["kind"], x["file"], x["row"]) for x in json.loads(out)["findings"]}
    assert code == 2
    assert kinds == {
        ("TruncatedShard", "shard-00000.safetensors", -1),
        ("ChecksumMismatch", "shard-00001.safetensors", 0),
    }


def test_repair_refuses_damage_until_it_may_leave_it_out(folder, capsys):
    before = LatentDataset(folder)
    ids = list(before.ids)
    damage(folder)
    code, out, err = call(capsys, "repair", folder)
    assert (code, out) == (2, "") and "shard-00001.safetensors" in err and "--drop" in err.splitlines()[-1]
    assert LatentDataset(folder).fingerprint == before.fingerprint
    code, out, _ = call(capsys, "repair", folder, "--drop")
    assert code == 0 and "was left out" in out and "3 tracks" in out
    assert call(capsys, "verify", folder)[0] == 0
    assert LatentDataset(folder).ids == [name for name in ids if not name.startswith("t2")]


def test_repair_makes_a_manifest_that_was_lost(folder, capsys):
    fingerprint = LatentDataset(folder).fingerprint
    (folder / "manifest.parquet").unlink()
    code, _, err = call(capsys, "info", folder)
    assert code == 2 and "attr-engine shards repair" in err
    assert call(capsys, "verify", folder)[0] == 2
    assert call(capsys, "repair", folder)[0] == 0
    assert LatentDataset(folder).fingerprint == fingerprint


@pytest.mark.parametrize("action", ["info", "verify", "repair"])
def test_a_folder_without_a_data_set_is_refused_in_one_sentence(tmp_path, capsys, action):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for name in ("empty", "file", "nowhere"):
        code, out, err = call(capsys, action, tmp_path / name)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and str(tmp_path / name) in err


def test_an_unknown_action_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as left:
        main(["shards", "destroy", str(folder)])
    assert left.value.code == 2 and "destroy" in capsys.readouterr().err
