"""An ingest that was stopped at any moment goes on to the same bytes; any number of workers gives them too."""

import functools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ingests
import numpy as np
import pytest

from attr_engine.cli import main
from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, convert
from attr_engine.latents import ingest as audio

pytest.importorskip("soundfile")

KINDS = ("audio", "pre-encoded", "webdataset", "arrays")
SHARD = 300  # bytes: a few tracks


@pytest.fixture
def small(monkeypatch):
    """Shards of a few tracks."""
    for module in (audio, convert):
        monkeypatch.setattr(module, "LatentWriter", functools.partial(LatentWriter, shard_bytes=SHARD))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- killed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child():
    """Run an ingest in a child process, which may be killed, and return what it said."""
    process = subprocess.Popen(
        [sys.executable, ingests.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def run(kind, source, out, die=None, **options):
        job = {"kind": kind, "source": str(source), "out": str(out), "die": die, "options": options}
        process.stdin.write(json.dumps({**job, "shard_bytes": SHARD}).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert answer["code"] == (
            -signal.SIGKILL if "raised" not in answer and "tracks" not in answer else 0
        ), answer
        return answer

    yield run
    process.stdin.close()
    process.wait(60)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_ingest_goes_on_to_the_same_bytes_wherever_it_was_killed(child, tmp_path, kind):
    source = ingests.make_source(kind, tmp_path / "source", 5 if kind == "audio" else 9)
    out = tmp_path / "set"
    counts = child(kind, source, out)
    whole, resumed = bytes_of(out), set()
    assert len(whole) > 2 and counts["torn"] == len(whole)
    points = [(event, n + 1) for event in ("file", "torn") for n in range(counts[event])]
    for point in [*points, *(("add", n) for n in range(1, counts["add"] + 1, 5))]:
        shutil.rmtree(out)
        assert child(kind, source, out, die=point)["code"] == -signal.SIGKILL
        again = child(kind, source, out)
        assert bytes_of(out) == whole, point
        assert again["tracks"] + again["there"] == counts["tracks"]
        resumed.add(again["there"])
    assert len(resumed) > 1  # it went on, and did not begin again


@pytest.mark.parametrize("kind", KINDS)
def test_an_ingest_that_is_killed_over_and_over_comes_to_the_same_bytes(child, tmp_path, rng, kind):
    source, out = ingests.make_source(kind, tmp_path / "source"), tmp_path / "set"
    child(kind, source, out)
    whole = bytes_of(out)
    shutil.rmtree(out)
    kills = 0
    while child(kind, source, out, die=("file", int(rng.integers(1, 12))))["code"] and kills < 50:
        kills += 1
    assert bytes_of(out) == whole


def test_a_killed_append_goes_on_and_leaves_what_was_there(child, tmp_path):
    source, out = ingests.make_source("pre-encoded", tmp_path / "source"), tmp_path / "set"
    later = [path for path in sorted(source.iterdir()) if path.stem >= "07"]
    (tmp_path / "aside").mkdir()
    for path in later:
        path.rename(tmp_path / "aside" / path.name)
    child("pre-encoded", source, out)
    before = bytes_of(out)
    shutil.copytree(tmp_path / "aside", source, dirs_exist_ok=True)
    shutil.copytree(out, tmp_path / "copy")
    counts = child("pre-encoded", source, out, append=True)
    whole = bytes_of(out)
    assert all(whole[name] == data for name, data in before.items() if name.startswith("shard"))
    assert LatentDataset(out).ids == [f"{i:02d}" for i in range(12)]
    for point in [
        *(("file", n) for n in range(1, counts["file"] + 1, 3)),
        ("torn", 1),
        ("torn", counts["torn"]),
    ]:
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "copy", out)
        child("pre-encoded", source, out, die=point, append=True)
        if (out / "manifest.parquet").read_bytes() == before["manifest.parquet"]:
            assert LatentDataset(out).ids == [f"{i:02d}" for i in range(7)]  # the old set, whole
        child("pre-encoded", source, out, append=True)
        assert bytes_of(out) == whole, point


# -- refused, and gone on with --------------------------------------------------------------------


def spoil(kind: str, source: Path) -> Path:
    """Make the last item of a source bad, and return a good copy of the file that was changed."""
    path = (
        source
        if source.is_file()
        else max(p for p in source.iterdir() if p.suffix in (".wav", ".npy", ".tar"))
    )
    good = path.with_name("good")
    shutil.copy(path, good)
    if kind == "arrays":
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, "11": np.full((3, 4), np.nan, dtype=np.float32)})
    else:
        path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    good.rename(good.parent.parent / "good")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_bad_item_was_put_right_the_same_call_goes_on_to_the_same_bytes(small, tmp_path, kind):
    source = ingests.make_source(kind, tmp_path / "source")
    ingests.ingest(kind, source, tmp_path / "whole")
    bad = spoil(kind, source)
    with pytest.raises(UserError) as caught:
        ingests.ingest(kind, source, tmp_path / "set")
    assert bad.name in str(caught.value) or "'11'" in str(caught.value)
    assert not (tmp_path / "set" / "manifest.parquet").exists()
    (tmp_path / "good").rename(bad)
    report = ingests.ingest(kind, source, tmp_path / "set")
    assert report.there > 0 and report.notes == ()
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "whole")


class Other(ingests.FakeEncoder):
    fingerprint = "another"


AUDIO_CHANGES = {
    "encoder": {"encoder": Other()},
    "frames": {"frames": 10},
    "hop": {"hop": 0.5},
    "long": {"long": "error"},
    "store_dtype": {"dtype": "float16"},
    "condition": {"condition": ["tempo"]},
    "kind": {"kind": "held-out"},
}
OTHER_CHANGES = {
    "scale": {"scale": 2.0},
    "store_dtype": {"dtype": "float16"},
    "condition": {"condition": ["path"]},
}
CHANGES = [("audio", key, value) for key, value in AUDIO_CHANGES.items()]
CHANGES += [(kind, key, value) for kind in KINDS[1:] for key, value in OTHER_CHANGES.items()]


@pytest.mark.parametrize(
    ("kind", "name", "change"), CHANGES, ids=[f"{kind} {name}" for kind, name, _ in CHANGES]
)
def test_other_settings_than_those_it_was_begun_with_are_refused_by_name(small, tmp_path, kind, name, change):
    source = ingests.make_source(kind, tmp_path / "source")
    ingests.ingest(kind, source, tmp_path / "set")
    (tmp_path / "set" / "manifest.parquet").unlink()  # as if it had been killed at the last moment
    before = bytes_of(tmp_path / "set")
    with pytest.raises(UserError, match=f"shard-00000.* was written with {name} .*another --out"):
        ingests.ingest(kind, source, tmp_path / "set", **change)
    assert bytes_of(tmp_path / "set") == before
    ingests.ingest(kind, source, tmp_path / "set")
    assert LatentDataset(tmp_path / "set").ids


@pytest.mark.parametrize("kind", KINDS)
def test_another_source_is_refused_by_name(small, tmp_path, kind):
    first, second = (ingests.make_source(kind, tmp_path / name) for name in ("first", "second"))
    ingests.ingest(kind, first, tmp_path / "set")
    with pytest.raises(UserError, match="was written with (root|source) .*first.*second"):
        ingests.ingest(kind, second, tmp_path / "set", append=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_set_is_refused_and_appending_what_is_there_changes_nothing(small, tmp_path, kind):
    source, out = ingests.make_source(kind, tmp_path / "source"), tmp_path / "set"
    first = ingests.ingest(kind, source, out)
    before = bytes_of(out)
    with pytest.raises(UserError, match="already holds a data set"):
        ingests.ingest(kind, source, out)
    again = ingests.ingest(kind, source, out, append=True)
    assert bytes_of(out) == before
    assert (again.tracks, again.there) == (0, first.tracks) and first.there == 0
    assert len(again.notes) == 1 and "already" in again.notes[0] and again.notes[0].startswith("12 ")


def test_appended_recordings_stand_behind_those_that_were_there(small, tmp_path):
    source, out = ingests.make_source("audio", tmp_path / "source"), tmp_path / "set"
    (source / "01.wav").rename(tmp_path / "01.wav")
    ingests.ingest("audio", source, out)
    first = LatentDataset(out)
    (tmp_path / "01.wav").rename(source / "01.wav")
    report = ingests.ingest("audio", source, out, append=True)
    second = LatentDataset(out)
    assert second.ids == [*first.ids, "01.wav#000", "01.wav#001", "01.wav#002"] and report.tracks == 3
    assert second.padding.tolist() == first.padding.tolist()


def test_the_windows_of_a_recording_lie_in_one_shard(small, tmp_path):
    ingests.ingest("audio", ingests.make_source("audio", tmp_path / "source"), tmp_path / "set", hop=0.1)
    data = LatentDataset(tmp_path / "set")
    shards = {}
    for name, shard in zip(data.ids, data.manifest.columns["shard"], strict=True):
        shards.setdefault(name.split("#")[0], set()).add(int(shard))
    assert len(data.files) > 3 and all(len(found) == 1 for found in shards.values())


def test_an_encoder_that_rounds_silence_otherwise_with_other_threads_still_goes_on(small, tmp_path):
    class Rounds(ingests.FakeEncoder):
        def encode(self, audio):
            return super().encode(audio) + 1e-9

    source = ingests.make_source("audio", tmp_path / "source")
    ingests.ingest("audio", source, tmp_path / "set")
    (tmp_path / "set" / "manifest.parquet").unlink()
    ingests.ingest("audio", source, tmp_path / "set", encoder=Rounds())
    assert LatentDataset(tmp_path / "set").padding.tolist() == [0.0, 0.0, 0.0]


# -- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_gives_the_same_bytes(small, tmp_path, kind):
    source = ingests.make_source(kind, tmp_path / "source")
    for workers in (1, 4):
        ingests.ingest(kind, source, tmp_path / f"with {workers}", workers=workers)
    assert bytes_of(tmp_path / "with 1") == bytes_of(tmp_path / "with 4")


@pytest.mark.parametrize("kind", KINDS)
def test_no_workers_are_refused(tmp_path, kind):
    with pytest.raises(UserError, match="workers"):
        ingests.ingest(kind, ingests.make_source(kind, tmp_path / "source"), tmp_path / "set", workers=0)


def test_progress_begins_where_the_work_begins_and_ends_at_the_end(small, tmp_path):
    for kind in KINDS:
        source, seen = ingests.make_source(kind, tmp_path / kind), []
        ingests.ingest(
            kind, source, tmp_path / f"set of {kind}", progress=lambda *x, seen=seen: seen.append(x)
        )
        assert seen[-1][0] == seen[-1][1] and seen == sorted(set(seen))
        if kind == "audio":
            shard = max((tmp_path / f"set of {kind}").glob("shard-*"))
            shard.unlink()
            (tmp_path / f"set of {kind}" / "manifest.parquet").unlink()
            seen.clear()
            ingests.ingest(
                kind, source, tmp_path / f"set of {kind}", progress=lambda *x, seen=seen: seen.append(x)
            )
            assert 0 < seen[0][0] and seen[-1] == (12, 12)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_says_how_many_tracks_were_there_and_appends(small, tmp_path, capsys):
    source, out = ingests.make_source("webdataset", tmp_path / "source"), tmp_path / "set"
    words = ["ingest", str(source), "--out", str(out), "--condition", "prompt", "--workers", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"12 tracks written to {out}\n"
    max(out.glob("shard-*")).unlink()
    (out / "manifest.parquet").unlink()
    assert main(words) == 0
    assert "were there already" in capsys.readouterr().out
    assert main(words) == 2
    assert "already holds a data set" in capsys.readouterr().err
    assert main([*words, "--append"]) == 0
    said = capsys.readouterr()
    assert "0 tracks written" in said.out and "12 were there already" in said.out
    assert "note: 12 samples are in the data set already" in said.err
    assert main([*words, "--append", "--scale", "3"]) == 2
    assert "was written with scale 1.0, now it is 3.0" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--metadata", "x.csv"], ["--workers", "0"], ["--kind", "audio"]])
def test_flags_that_do_not_fit_a_tar_are_refused(tmp_path, capsys, flags):
    source = ingests.make_source("webdataset", tmp_path / "source")
    assert main(["ingest", str(source), "--out", str(tmp_path / "set"), *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
